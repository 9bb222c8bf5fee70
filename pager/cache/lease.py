"""Leases, by which requests hold their experts; an exact forward holds them in waves."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Generator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from pager.cache.ledger import Holding, Ledger
from pager.errors import ExpertUnavailable, SlotsExhausted
from pager.types import ExpertKey, PagingCounts


class Lease:
    """Experts pinned in slots, and slots promised for those to come. Leaving the block releases it.

    Owned by one request: one thread binds and waits; `release` may be called from any. A failed read fails this lease
    for good: `failed` is set and every `wait` raises it.
    """

    def __init__(
        self,
        ledger: Ledger,
        holding: Holding,
        always_resident: Container[ExpertKey],
        pager: object,
        *,
        is_in_place: bool = False,
    ) -> None:
        self.is_in_place = is_in_place  # it holds nothing: experts are computed where the page cache has them
        self._ledger = ledger
        self._pager = pager  # its reader threads end when nothing refers to it
        self._holding = holding
        self._always_resident = always_resident
        self._limit = holding.reserved + len(holding.keys)
        self._by_layer: dict[int, list[ExpertKey]] = {}
        self._awaited: set[int] = set()
        self._note(list(holding.keys))

    def bind(self, layer: int, experts: Sequence[int]) -> None:
        """Takes experts of `layer` within the reservation: pins hits, joins reads in flight, starts the missing ones.

        Returns at once. Always-resident experts and those held already cost nothing. Slots saved by a shared read stay
        reserved until `shrink`. Raises ValueError beyond the reservation, Cancelled for a released lease.
        """
        keys = self._new([ExpertKey(layer, expert) for expert in experts])
        if len(self._holding.keys) + len(keys) > self._limit:
            raise ValueError(
                f"{len(keys)} more experts of layer {layer} exceed the lease: it holds {len(self._holding.keys)} "
                f"and was made for {self._limit}"
            )
        fits = self._ledger.bind(self._holding, keys)
        assert fits, "a reservation always has its slots"
        self._note(keys)

    def shrink(self) -> None:
        """Gives back what is reserved and not bound: the pool is complete."""
        self._ledger.unreserve(self._holding)
        self._limit = len(self._holding.keys)

    def become(self, keys: Sequence[ExpertKey], num_slots: int = 0) -> bool:
        """Holds `keys` and `num_slots` promised slots from now on, and nothing else; between steps only.

        Returns False, with nothing changed, when that does not fit now. Holding nothing always fits.
        """
        paged = [key for key in dict.fromkeys(keys) if key not in self._always_resident]
        if not self._ledger.become(self._holding, paged, num_slots):
            return False
        self.is_in_place = self.is_in_place and not (paged or num_slots)
        self._limit = len(paged) + num_slots
        self._by_layer.clear()
        self._awaited.clear()
        self._note(paged)
        return True

    def wait(self, layer: int) -> None:
        """Returns when the bound experts of `layer` can be computed with; the time is added to `usage.stall_s`.

        On a GPU the compute stream waits for the copies, not the host. Call it before computing even when `ready()`; it
        is free from the second call on. Raises ExpertUnavailable when any read of this lease failed, Cancelled after
        `release`.
        """
        if layer in self._awaited and self._holding.failed is None:
            return
        self._ledger.wait(self._holding, self._by_layer.get(layer, ()))
        self._awaited.add(layer)

    def ready(self) -> bool:
        """Tells whether all bound experts have been read, and none failed."""
        return self._holding.ready

    def release(self) -> None:
        """Releases everything. Idempotent, from any thread, between steps: a running forward needs its slots.

        Queued reads that no other lease waits for are cancelled; running ones finish.
        """
        self._awaited.clear()
        self._ledger.release(self._holding)

    def lend_reservation(self, borrower: Holding) -> None:
        """Lends the unbound reservation to `borrower` for the time of an exact forward."""
        self._ledger.move_reservation(self._holding, borrower, self._holding.reserved)

    def take_back_reservation(self, borrower: Holding) -> None:
        self._ledger.move_reservation(borrower, self._holding, self._limit - len(self._holding.keys))

    @property
    def failed(self) -> ExpertUnavailable | None:
        return self._holding.failed

    @property
    def capacity(self) -> int:
        """The number of slots that the lease could hold if its tenant were alone."""
        return self._ledger.within_reach(self._holding.meter.tenant)

    @property
    def num_bound(self) -> int:
        return len(self._holding.keys)

    @property
    def num_reserved(self) -> int:
        """The number of slots promised and not bound yet."""
        return self._holding.reserved

    @property
    def usage(self) -> PagingCounts:
        return self._holding.meter.counts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _new(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        held = self._holding.keys
        return [key for key in dict.fromkeys(keys) if key not in held and key not in self._always_resident]

    def _note(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            self._by_layer.setdefault(key.layer, []).append(key)
            self._awaited.discard(key.layer)


NO_SLOT = (
    "every expert slot is held, promised, or in a share that another tenant is guaranteed; raise expert_memory or try "
    "again later"
)


class _Wave(NamedTuple):
    """Experts that are computed together. Waves are made when they are bound: if they were made later, the speed of
    reads would decide what is in one, and so how sums round.
    """

    keys: list[ExpertKey]
    was_there: bool


def demand_waves(
    ledger: Ledger, holding: Holding, keys: Sequence[ExpertKey], without_slot: Sequence[ExpertKey]
) -> Generator[tuple[int, ...], None, None]:
    """Yields every expert once, in waves that stay pinned until the next one is taken; the holding ends empty.

    Loaded experts come first, with them those that need no slot, then those in flight, then the missing ones. While a
    wave is computed the next one is being read: when not everything fits, a wave takes half of the slots. Raises
    ExpertUnavailable, and SlotsExhausted when no slot can be had.
    """
    todo = list(keys)
    unpaged = tuple(key.expert for key in without_slot)
    bound: deque[_Wave] = deque()
    while todo or bound:
        while todo and len(bound) < 2 and (wave := _bind_some(ledger, holding, todo)):
            bound.append(wave)
            todo = [key for key in todo if key not in wave.keys]
        if not bound:
            if ledger.wait_for_room(holding):
                continue
            raise SlotsExhausted(NO_SLOT)
        if unpaged and not bound[0].was_there:
            yield unpaged  # something to compute while the first wave is being read
            unpaged = ()
        current = bound.popleft().keys
        ledger.wait(holding, current)
        yield (*unpaged, *(key.expert for key in current))
        unpaged = ()
        ledger.let_go_of_experts(holding, current)
    if unpaged:
        yield unpaged


def _bind_some(ledger: Ledger, holding: Holding, todo: Sequence[ExpertKey]) -> _Wave | None:
    """Binds what fits of the first group of `todo`: the loaded ones, or else all. Returns None when nothing fits."""
    with ledger.lock:
        index = ledger.index
        loaded = [key for key in todo if index.is_loaded(key)]
        group = loaded or sorted(todo, key=lambda key: not index.is_loading(key))
        room = holding.reserved + ledger.room(holding)
        if not loaded and ledger.slots_needed(holding, group) > room:
            room = min(room, max(1, (room + len(holding.keys)) // 2))
        wave: list[ExpertKey] = []
        for key in group:
            room -= ledger.slots_needed(holding, [key])
            if room < 0:
                break
            wave.append(key)
        fits = ledger.bind(holding, wave)
        assert fits, "the wave was cut to what fits"
        return _Wave(wave, was_there=holding.pending.isdisjoint(wave)) if wave else None
