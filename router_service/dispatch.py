"""The choice of a worker for a request, and the interface of the workers to the router. Pure: no grpc, no clock."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pager.cluster.worker import WorkerView
from pager.errors import DeadlineExceeded, NotReady
from pager.types import ExpertPool, GenerateRequest, RequestObserver, TokenChunk

_PRIOR_BYTES_PER_S = 1e9
_PRIOR_PLACE_S = 0.25
_CROWDING_S = 0.02  # the cost of one more request in a worker's batch to the others in it
_REPORT_AGE_S = 1.5  # a worker reports once a second


class ClusterPort(Protocol):
    """The workers behind this router, as the pipeline uses them; `pager.cluster.cluster.Cluster` is the real one."""

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

    def cut_off(self) -> None:
        """Takes no more requests, and ends the open ones with NotReady."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A worker, the bytes of the pool that it lacks, and the least time that paging them in takes."""

    worker_id: str
    missing_bytes: int
    least_paging_s: float


def place(
    pool: ExpertPool | None,
    workers: Sequence[WorkerView],
    *,
    in_flight: Mapping[str, int],
    exclude: Collection[str] = (),
) -> Placement:
    """Returns the ready worker on which the request starts soonest: by missing bytes, then its queue, then its batch.

    `in_flight` counts the requests that this router has sent to each worker, since the workers' own reports are up to a
    second old. Raises NotReady when no worker is ready.
    """
    ready = [worker for worker in workers if worker.state == "ready" and worker.id not in exclude]
    if not ready:
        raise NotReady("no worker is ready; retry shortly", retry_after_s=1.0)
    missing = {worker.id: 0 if pool is None else worker.missing_bytes(pool) for worker in ready}

    def rank(worker: WorkerView) -> tuple[float, int, str]:
        load = max(worker.waiting + worker.running, in_flight.get(worker.id, 0))
        paging_s = missing[worker.id] / (worker.page_in_bytes_per_s or _PRIOR_BYTES_PER_S)
        queue_s = worker.waiting * (_PRIOR_PLACE_S if worker.place_s is None else worker.place_s)
        return (paging_s + queue_s + load * _CROWDING_S, load, worker.id)

    best = min(ready, key=rank)
    return Placement(best.id, missing[best.id], _least_paging_s(best, missing[best.id]))


def check_deadline(least_s: float, remaining_s: float | None) -> None:
    """Raises DeadlineExceeded for a request whose deadline passes before its pool can be loaded.

    The wait in the worker's line is left to the worker, which knows the request's place in it.
    """
    if remaining_s is not None and least_s > remaining_s:
        raise DeadlineExceeded(
            f"paging its experts takes at least {least_s:.2f} s and the deadline leaves {remaining_s:.2f} s; allow "
            "more time, ask for a smaller pool, or retry later"
        )


def _least_paging_s(worker: WorkerView, missing_bytes: int) -> float:
    """Returns the least paging time at the fastest measured throughput, as if the worker had paged since its last
    report.
    """
    if not worker.peak_page_in_bytes_per_s:
        return 0.0
    return max(0.0, missing_bytes / worker.peak_page_in_bytes_per_s - _REPORT_AGE_S)
