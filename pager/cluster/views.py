"""A router's view of its workers and their model: frozen values, made anew when something has changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pager.types import ExpertPool, ModelInfo, PagingCounts, WorkerResidency


class WorkerState(StrEnum):
    STARTING = "starting"  # its process starts, or loads the model
    READY = "ready"
    DRAINING = "draining"  # refuses new requests and ends those it has; then its process ends, and another starts
    HUNG = "hung"  # a step makes no progress for longer than the watchdog allows; the process is being killed
    DEAD = "dead"  # its process is gone, or could not load the model; it is started again after a pause


@dataclass(frozen=True, slots=True)
class LoadedModel(ModelInfo):
    """The model that all workers serve, as the first ready worker loaded and planned it."""

    dtype: str = ""
    device: str = ""
    expert_bytes: int = 0
    plan_facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerView(WorkerResidency):
    """One of this router's workers as last reported, at most about a second ago: what it holds, and how fast it is."""

    page_in_bytes_per_s: float | None = None  # median of recent page-ins; None before the first
    peak_page_in_bytes_per_s: float | None = None  # an upper bound for all readers together
    place_s: float | None = None  # how long one place in its waiting line has taken recently; None before an admission
    metrics_address: str | None = None  # of its last process that was ready; None before the first
    num_restarts: int = 0
    paging: PagingCounts = field(default_factory=PagingCounts)
    kv_share: float = 0.0  # the share of its KV memory that running requests have reserved

    def missing_bytes(self, pool: ExpertPool) -> int:
        """Returns the bytes that would have to be paged in to run `pool` here now."""
        missing = 0
        for layer, experts in enumerate(pool.experts):
            resident = self.resident[layer] if layer < len(self.resident) else 0
            missing += (sum(1 << expert for expert in experts) & ~resident).bit_count()
        return missing * self.expert_bytes


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker's report that it has loaded: how to reach it, and what it serves. The token is a secret."""

    address: str
    token: str
    metrics_address: str
    pid: int
    model: LoadedModel

    def __repr__(self) -> str:
        return f"WorkerReady(address={self.address!r}, pid={self.pid})"


@dataclass(frozen=True, slots=True)
class Health:
    """The state of a worker's process, as long as it answers at all."""

    progress: int | None  # changes with everything that the engine gets done within a step; None between steps
