"""Exact forwards: any number of experts of a layer through however few slots there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pager.cache.holding import Holding
from pager.cache.ledger import Ledger
from pager.errors import SlotsExhausted
from pager.types import ExpertKey


class _Wave(NamedTuple):
    keys: list[ExpertKey]
    was_there: bool
    """When it was bound. Later, the speed of reads would decide what is yielded together, and so how sums round."""


def demand_waves(
    ledger: Ledger, holding: Holding, keys: Sequence[ExpertKey], always_resident: Sequence[ExpertKey]
) -> Iterator[tuple[int, ...]]:
    """Yields every expert once, in waves that stay pinned until the next one is asked for; the holding ends empty.

    Loaded experts come first, always-resident ones with them, then those in flight, then the missing ones. While a
    wave is computed the next one is being read: when not everything fits, a wave takes half of the slots.
    Raises ExpertUnavailable, and SlotsExhausted when not one slot is to be had.
    """
    todo = list(keys)
    unpaged = tuple(key.expert for key in always_resident)
    bound: deque[_Wave] = deque()
    while todo or bound:
        while todo and len(bound) < 2 and (wave := _bind_some(ledger, holding, todo)):
            bound.append(wave)
            todo = [key for key in todo if key not in wave.keys]
        if not bound:
            if ledger.wait_for_room():
                continue
            raise SlotsExhausted("every expert slot is held or promised; raise expert_memory or try again later")
        if unpaged and not bound[0].was_there:
            yield unpaged  # to compute while the first wave is being read
            unpaged = ()
        current = bound.popleft().keys
        ledger.wait(holding, current)
        yield (*unpaged, *(key.expert for key in current))
        unpaged = ()
        ledger.let_go_of_experts(holding, current)
    if unpaged:
        yield unpaged


def _bind_some(ledger: Ledger, holding: Holding, todo: Sequence[ExpertKey]) -> _Wave | None:
    """Binds what fits of the first group of `todo`: those loaded now, or else all. None when nothing does."""
    with ledger.lock:
        index = ledger.index
        loaded = [key for key in todo if index.is_loaded(key)]
        group = loaded or sorted(todo, key=lambda key: not index.is_loading(key))
        room = holding.reserved + index.num_unreserved
        if not loaded and index.slots_needed(group) > room:
            room = min(room, max(1, (room + len(holding.keys)) // 2))
        wave: list[ExpertKey] = []
        for key in group:
            room -= index.slots_needed([key])
            if room < 0:
                break
            wave.append(key)
        fits = ledger.bind(holding, wave)
        assert fits, "the wave was cut to what fits"
        return _Wave(wave, was_there=holding.pending.isdisjoint(wave)) if wave else None
