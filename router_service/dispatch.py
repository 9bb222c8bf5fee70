"""Which worker takes a request. Pure: knows no grpc, no clock, and sends nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pager.errors import DeadlineExceeded, NotReady
from pager.types import ExpertPool
from router_service.ports import WorkerPort

_PRIOR_BYTES_PER_S = 1e9
_PRIOR_POSITION_S = 0.25
_CROWDING_S = 0.02  # what one more sequence in a worker's batch costs its neighbours
_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True)
class Placement:
    """A worker, the bytes it lacks of the pool, and how long queue and paging will take there at least."""

    worker_id: str
    missing_bytes: int
    waiting: int
    least_start_s: float


class QueueClock:
    """How long one place in a worker's queue has been lasting. None until a request has waited behind another."""

    def __init__(self) -> None:
        self.position_s: float | None = None

    def observe(self, waiting_ahead: int, queue_s: float) -> None:
        """A request that was placed behind `waiting_ahead` others waited `queue_s`."""
        if waiting_ahead <= 0:
            return
        measured = queue_s / waiting_ahead
        before = measured if self.position_s is None else self.position_s
        self.position_s = before + _SMOOTHING * (measured - before)


def place(
    pool: ExpertPool | None,
    workers: Sequence[WorkerPort],
    *,
    in_flight: Mapping[str, int],
    position_s: float | None = None,
    exclude: Collection[str] = (),
) -> Placement:
    """The ready worker on which the request starts soonest: missing bytes, then its queue, then its batch.

    `in_flight` counts what this router has sent to each worker: the workers' own reports are up to a second old.
    Raises NotReady when there is none.
    """
    ready = [worker for worker in workers if worker.state == "ready" and worker.id not in exclude]
    if not ready:
        raise NotReady("no worker is ready; retry shortly", retry_after_s=1.0)
    missing = {worker.id: 0 if pool is None else worker.missing_bytes(pool) for worker in ready}

    def rank(worker: WorkerPort) -> tuple[float, int, str]:
        load = max(worker.waiting + worker.running, in_flight.get(worker.id, 0))
        paging_s = missing[worker.id] / (worker.page_in_bytes_per_s or _PRIOR_BYTES_PER_S)
        queue_s = worker.waiting * (_PRIOR_POSITION_S if position_s is None else position_s)
        return (paging_s + queue_s + load * _CROWDING_S, load, worker.id)

    best = min(ready, key=rank)
    return Placement(best.id, missing[best.id], best.waiting, _least_start_s(best, missing[best.id], position_s))


def check_deadline(placement: Placement, remaining_s: float | None) -> None:
    """Raises DeadlineExceeded for a request whose deadline passes before its first token."""
    if remaining_s is not None and placement.least_start_s > remaining_s:
        raise DeadlineExceeded(
            f"queue and paging take about {placement.least_start_s:.2f} s and the deadline leaves {remaining_s:.2f} s; "
            "allow more time, ask for a smaller pool, or retry later"
        )


def _least_start_s(worker: WorkerPort, missing_bytes: int, position_s: float | None) -> float:
    # Only what was measured counts here: nobody is refused on a guess.
    paging_s = missing_bytes / worker.page_in_bytes_per_s if worker.page_in_bytes_per_s else 0.0
    return paging_s + worker.waiting * (position_s or 0.0)
