"""What is done about drift: between two forwards, a pool grows or its document becomes exact.

Never waits while it holds something: what does not fit now is tried in halves, and then again after a rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from pager.engine.documents import DocumentRouting
from pager.engine.drift import DriftMonitor
from pager.types import DriftAction, ExpertKey


def answer_drift(document: DocumentRouting) -> None:
    """Looks, every few tokens, at what a document's forwards left outside of its pool, and does what its policy says.

    Only a look waits for the device, and a document whose policy has no drift is never looked at.
    """
    document.awaits_experts = False  # the forward that has just run waited for them
    monitor, step = document.monitor, document.open_step
    if monitor is None or step is None or not monitor.is_due(step.num_unsettled(document)):
        return
    step.settle()
    document.check_measured()
    pool = document.pool
    assert pool is not None, "only what has a pool is measured"
    if not monitor.look(pool.num_experts):
        return
    if monitor.policy.action is DriftAction.EXACT:
        _go_exact(document, monitor)
    elif monitor.is_on_trial or not _begin_trial(document, monitor):
        _widen(document, monitor, pool.num_experts)


def _go_exact(document: DocumentRouting, monitor: DriftMonitor) -> None:
    """Exact forwards page within a reservation, as any exact document's do; without one they could get stuck."""
    lease = document.lease
    if lease is None or lease.page_on_demand(_slots_to_page_in(document)):
        document.go_exact()
        monitor.became_exact()


def _begin_trial(document: DocumentRouting, monitor: DriftMonitor) -> bool:
    """All experts for some tokens: the pool's held as before, the others paged on demand. False without the slots."""
    lease = document.lease
    if lease is not None and not lease.reserve(_slots_to_page_in(document)):
        return False
    document.suspend_pool()
    monitor.begin_trial()
    return True


def _widen(document: DocumentRouting, monitor: DriftMonitor, num_in_pool: int) -> None:
    if document.lease is not None:
        document.lease.shrink()  # the trial is over
    keys = _what_fits(document, monitor.wanted(num_in_pool))
    document.widen(keys)
    monitor.widened(keys)


def _what_fits(document: DocumentRouting, keys: Sequence[ExpertKey]) -> Sequence[ExpertKey]:
    """The first of `keys` that the lease could take now: all, half, a quarter, ..., none."""
    if document.lease is None:
        return keys
    while keys and not document.lease.widen(keys):
        keys = keys[: len(keys) // 2]
    return keys


def _slots_to_page_in(document: DocumentRouting) -> int:
    return max(document.facts.top_k_per_layer)
