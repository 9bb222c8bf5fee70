"""What is done about drift: between two forwards, a pool grows or its document becomes exact.

Nobody waits while holding. Where a change's slots are not to be had at once, the document lets go of all its experts
until they are; so what an answer gets depends on the worker's slots and never on who holds them at that moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from itertools import chain

from pager.pools.document import DocumentRouting
from pager.pools.drift import DriftMonitor
from pager.types import DriftAction, ExpertKey, ExpertPool


class _Kind(Enum):
    TRIAL = auto()  # all experts for some tokens, the pool held as before and the others paged on demand
    WIDEN = auto()
    EXACT = auto()


@dataclass(frozen=True, slots=True)
class Change:
    """What a document becomes, and what its lease is to hold for it."""

    kind: _Kind
    held: tuple[ExpertKey, ...] = ()
    num_slots: int = 0  # promised and unbound, for what is paged on demand
    added: tuple[ExpertKey, ...] = ()  # to the pool, the most wanted first
    num_left_out: int = 0  # of those wanted: for them the worker has no slots, whoever runs there


def answer_drift(document: DocumentRouting) -> None:
    """Looks, every few tokens, at what a document's forwards left outside of its pool, and does what its policy says.

    Only a look waits for the device, and a document whose policy has no drift is never looked at. Where the slots for
    it are not to be had, `document.change` says what is still to be made of it: `make_change` tries again.
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
    document.change = _change(document, monitor, pool)
    if not make_change(document):
        assert document.lease is not None
        document.lease.become(())


def make_change(document: DocumentRouting) -> bool:
    """Makes what `document.change` says of the document; False, with nothing changed, without the slots for it."""
    change, monitor, lease = document.change, document.monitor, document.lease
    assert change is not None, "nothing is to be changed"
    assert monitor is not None, "only drift changes a document"
    if lease is not None and not lease.become(change.held, change.num_slots):
        return False
    document.change = None
    if change.kind is _Kind.EXACT:
        document.go_exact()
        monitor.became_exact()
    elif change.kind is _Kind.TRIAL:
        document.suspend_pool()
        monitor.begin_trial()
    else:
        document.widen(change.added)
        monitor.widened(change.added, change.num_left_out)
    return True


def _change(document: DocumentRouting, monitor: DriftMonitor, pool: ExpertPool) -> Change:
    top_k = max(document.facts.top_k_per_layer)
    if monitor.policy.action is DriftAction.EXACT:
        return Change(_Kind.EXACT, num_slots=top_k)  # enough for any exact document
    held, lease = tuple(pool.keys()), document.lease
    if not monitor.is_on_trial and (lease is None or len(held) + top_k <= lease.capacity):
        return Change(_Kind.TRIAL, held, top_k)
    wanted = monitor.wanted(pool.num_experts)
    added = wanted if lease is None else wanted[: max(0, lease.capacity - len(held))]
    return Change(_Kind.WIDEN, tuple(chain(held, added)), added=added, num_left_out=len(wanted) - len(added))
