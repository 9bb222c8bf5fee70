"""The choice of a worker for a request, the interface of the workers to a router, and what a router knows of them.

Pure: no grpc, no ray, no clock; the simulator runs the choice as the router does.

A pool that is known before its prefill (a codeword's, a named one, or one in the request) has a home: the first ready
worker in the pool's own order of all workers, which every router computes alike from their names and slots (rendezvous
hashing; Thaler and Ravishankar, 1998). So requests of one pool meet on one worker, and the pool is paged once. When a
worker joins or leaves, only the pools move whose first worker it is or was. A worker that has more than its part of all
requests is skipped (Mirrokni et al., "Consistent Hashing with Bounded Loads", 2018), so that a hot pool spreads to the
next worker in its order, and no further than it has to; cold pools share their home's slots.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from pager.errors import DeadlineExceeded, NotReady
from pager.types import (
    ExpertPool,
    GenerateRequest,
    ModelInfo,
    PagingCounts,
    RequestObserver,
    TokenChunk,
    WorkerResidency,
)

_PRIOR_BYTES_PER_S = 1e9
_PRIOR_PLACE_S = 0.25
_CROWDING_S = 0.02  # the cost of one more request in a worker's batch to the others in it
_REPORT_AGE_S = 1.5  # a worker reports once a second
MOST_LOAD = 1.25
"""A worker with more than this multiple of its part of all requests takes no more of its own pools either."""
ALWAYS_WELCOME = 4
"""With no more requests than this, a worker takes its own pools: they share a batch, another worker would page anew."""


class Candidate(Protocol):
    """A worker as last reported: a `WorkerView`, or one of a simulation."""

    @property
    def id(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def page_in_bytes_per_s(self) -> float | None: ...
    @property
    def peak_page_in_bytes_per_s(self) -> float | None: ...
    @property
    def place_s(self) -> float | None: ...

    def missing_bytes(self, pool: ExpertPool) -> int: ...


class ClusterPort(Protocol):
    """The workers behind a router, as its pipeline uses them; `pager.cluster.cluster.Cluster` is the real one."""

    def workers(self) -> Sequence[WorkerView]: ...

    def generate(
        self, worker_id: str, request: GenerateRequest, observer: RequestObserver
    ) -> AsyncGenerator[TokenChunk, None]:
        """Yields the chunks of the answer; the last one carries the usage. Closing it cancels the request on the
        worker.

        `observer` is called when the request was sent and, at its end there, with what it has used.

        Raises PagerError: WorkerLost, SlowReader, DeadlineExceeded, Cancelled, and whatever the worker's engine
        refuses.
        """

    async def abort(self, request_id: str, tenant: str) -> bool: ...

    async def retire(self, worker_id: str) -> None:
        """Has a worker drain and end. Raises UnknownWorker or NotReady."""

    def cut_off(self) -> None:
        """Takes no more requests, and ends the open ones with NotReady."""


Worker = TypeVar("Worker", bound=Candidate)


@dataclass(frozen=True, slots=True)
class Placement:
    """A worker, the bytes of the pool that it lacks, and the least time that paging them in takes."""

    worker_id: str
    missing_bytes: int
    least_paging_s: float


def place(
    pool: ExpertPool | None,
    workers: Sequence[Candidate],
    *,
    in_flight: Mapping[str, int],
    exclude: Collection[str] = (),
    home_key: str = "",
) -> Placement:
    """Returns the ready worker for the request: one of the homes of its pool or, without a `home_key`, any. Of these it
    is the one on which the request starts soonest, by missing bytes, then its queue, then its batch.

    `home_key` is the name under which a pool recurs: a codeword's, or a digest. `in_flight` counts the requests that
    this router has sent to each worker, since the workers' own reports are up to a second old. Raises NotReady when no
    worker is ready.
    """
    ready = [worker for worker in workers if worker.state == "ready" and worker.id not in exclude]
    if not ready:
        raise NotReady("no worker is ready; retry shortly", retry_after_s=1.0)
    loads = {worker.id: max(worker.waiting + worker.running, in_flight.get(worker.id, 0)) for worker in ready}
    near = ready if pool is None or not home_key else homes(home_key, ready, loads)[:2]
    missing = {worker.id: 0 if pool is None else worker.missing_bytes(pool) for worker in near}
    if near is not ready and (len(near) == 1 or missing[near[0].id] == 0 or missing[near[1].id] > 0):
        near = near[:1]  # the second home is considered only where it still holds what the first would have to page

    def rank(worker: Candidate) -> tuple[float, int, str]:
        paging_s = missing[worker.id] / (worker.page_in_bytes_per_s or _PRIOR_BYTES_PER_S)
        queue_s = worker.waiting * (_PRIOR_PLACE_S if worker.place_s is None else worker.place_s)
        return (paging_s + queue_s + loads[worker.id] * _CROWDING_S, loads[worker.id], worker.id)

    best = min(near, key=rank)
    return Placement(best.id, missing[best.id], _least_paging_s(best, missing[best.id]))


def homes(key: str, workers: Sequence[Worker], loads: Mapping[str, int]) -> list[Worker]:
    """Returns the workers in the key's order, without those that have more than their part of all requests; never
    empty.

    A worker's part is proportional to its slots, and so is the part of all keys whose first worker it is.
    """
    slots = {worker.id: max(1, worker.num_slots) for worker in workers}
    most = MOST_LOAD * (sum(loads.values()) + 1) / sum(slots.values())  # per slot
    by_id = {worker.id: worker for worker in workers}
    order = _order(key, tuple(sorted(slots.items())))
    return [by_id[id_] for id_ in order if loads[id_] < max(ALWAYS_WELCOME, most * slots[id_])]


@lru_cache(maxsize=4096)
def _order(key: str, weights: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Returns worker ids, best first. A worker of twice the weight comes first for twice as many keys."""

    def score(id_: str, weight: int) -> float:
        digest = hashlib.blake2b(f"{key}\n{id_}".encode(), digest_size=8).digest()
        return -math.log((int.from_bytes(digest, "little") + 1) / 2**64) / weight

    return tuple(id_ for _, id_ in sorted((score(id_, weight), id_) for id_, weight in weights))


def check_deadline(least_s: float, remaining_s: float | None) -> None:
    """Raises DeadlineExceeded for a request whose deadline passes before its pool can be loaded.

    The wait in the worker's line is left to the worker, which knows the request's place in it.
    """
    if remaining_s is not None and least_s > remaining_s:
        raise DeadlineExceeded(
            f"paging its experts takes at least {least_s:.2f} s and the deadline leaves {remaining_s:.2f} s; allow "
            "more time, ask for a smaller pool, or retry later"
        )


def _least_paging_s(worker: Candidate, missing_bytes: int) -> float:
    """Returns the least paging time at the fastest measured throughput, if it has paged since its last report."""
    if not worker.peak_page_in_bytes_per_s:
        return 0.0
    return max(0.0, missing_bytes / worker.peak_page_in_bytes_per_s - _REPORT_AGE_S)


# --- views of a worker ------------------------------------------------------------------------------------------------


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
    unread_gates: str = ""  # its type, where its gates pick in ways of their own, which no predictor reads


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
