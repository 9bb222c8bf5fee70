"""What a router sees of its workers and their model. Frozen; rebuilt when something changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pager.types import ExpertPool, PagingCounts, RoutingFacts


class WorkerState(StrEnum):
    STARTING = "starting"  # its process starts, or loads the model
    READY = "ready"
    DRAINING = "draining"  # takes nothing new and ends what it has; then its process ends, and another starts
    HUNG = "hung"  # a step makes no progress for longer than the watchdog allows; it is being killed
    DEAD = "dead"  # its process is gone, or could not load; it is started again after a pause


@dataclass(frozen=True, slots=True)
class ModelView:
    """The model that all workers serve, as the first ready one loaded it."""

    name: str
    fingerprint: str
    dtype: str
    device: str
    context_length: int
    kv_token_limit: int
    vocab_size: int
    facts: RoutingFacts
    num_slots: int
    expert_bytes: int
    plan: dict[str, Any]
    plan_text: str


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as last reported, at most about a second ago."""

    id: str
    state: WorkerState
    waiting: int = 0
    running: int = 0
    num_slots: int = 0
    expert_bytes: int = 0
    resident: tuple[int, ...] = ()  # per layer a bitmap of the routed experts in device slots
    page_in_bytes_per_s: float | None = None  # median of recent page-ins; None before the first
    peak_page_in_bytes_per_s: float | None = None  # of all readers together, at most
    place_s: float | None = None  # how long one place in its line has been lasting; None before an admission
    metrics_address: str | None = None  # of its last process that was ready; None before the first
    num_restarts: int = 0
    paging: PagingCounts = field(default_factory=PagingCounts)

    def missing_bytes(self, pool: ExpertPool) -> int:
        """What would have to be paged in to run `pool` here now."""
        missing = 0
        for layer, experts in enumerate(pool.experts):
            resident = self.resident[layer] if layer < len(self.resident) else 0
            missing += (sum(1 << expert for expert in experts) & ~resident).bit_count()
        return missing * self.expert_bytes


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """What a worker says when it has loaded: how to reach it, and what it serves. The token is a secret."""

    address: str
    token: str
    metrics_address: str
    pid: int
    model: ModelView

    def __repr__(self) -> str:
        return f"WorkerReady(address={self.address!r}, pid={self.pid})"


@dataclass(frozen=True, slots=True)
class Health:
    """`progress` is the engine's within a step, a number that changes with all it gets done; None between steps."""

    progress: int | None
    waiting: int = 0
    running: int = 0
