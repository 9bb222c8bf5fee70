"""Which expert is in which slot, who holds it, and what is promised.

Pure integers: no tensors, devices, clocks or locks.

A slot is in one of four states, and every slot in exactly one:

    free       no expert in it
    loading    an expert on its way; held or not, it cannot be evicted
    held       loaded, with at least one pin
    evictable  loaded, no pin; the policy knows it

`num_reserved` slots are promised to leases that have not bound them yet. What keeps the promise is the
invariant `num_free + num_evictable >= num_reserved`: whatever takes a slot out of these two states pays with
a reservation or needs an unreserved one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pager.cache.policy import EvictionPolicy
from pager.types import ExpertKey


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """Read `key` into `slot`."""

    key: ExpertKey
    slot: int


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """What holding some experts takes: made by `CacheIndex.plan`, changes nothing until it is committed."""

    hits: tuple[ExpertKey, ...]  # loaded
    in_flight: tuple[ExpertKey, ...]  # being read for somebody else
    loads: tuple[SlotLoad, ...]  # to be read by whoever commits the plan
    victims: tuple[ExpertKey, ...]  # evicted to make room for the loads
    paid: int  # how many reserved slots of the caller it uses up
    version: int


@dataclass(slots=True)
class _Entry:
    slot: int
    pins: int
    loading: bool


class CacheIndex:
    """The one owner of the slot table. Not thread-safe: its owner locks."""

    def __init__(self, num_slots: int, policy: EvictionPolicy) -> None:
        self.num_slots = num_slots
        self._policy = policy
        self._free = list(range(num_slots - 1, -1, -1))  # a stack: the lowest slot is on top at the start
        self._entries: dict[ExpertKey, _Entry] = {}
        self._reserved = 0
        self._version = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        return len(self._policy)

    @property
    def num_reserved(self) -> int:
        return self._reserved

    @property
    def num_unreserved(self) -> int:
        """Slots that can be had now without breaking a promise."""
        return self.num_free + self.num_evictable - self._reserved

    @property
    def num_resident(self) -> int:
        """Slots that hold an expert or will: loading, held and evictable ones."""
        return len(self._entries)

    @property
    def num_held(self) -> int:
        """Slots that cannot be evicted: held and loading ones."""
        return len(self._entries) - self.num_evictable

    def is_loaded(self, key: ExpertKey) -> bool:
        entry = self._entries.get(key)
        return entry is not None and not entry.loading

    def is_loading(self, key: ExpertKey) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.loading

    def is_evictable(self, key: ExpertKey) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.pins == 0 and not entry.loading

    def pins(self, key: ExpertKey) -> int:
        entry = self._entries.get(key)
        return 0 if entry is None else entry.pins

    def slot_of(self, key: ExpertKey) -> int:
        """The slot of a loaded or loading expert. Raises KeyError for an absent one."""
        return self._entries[key].slot

    def loaded(self) -> Iterator[ExpertKey]:
        return (key for key, entry in self._entries.items() if not entry.loading)

    def slots_needed(self, keys: Collection[ExpertKey]) -> int:
        """How many unreserved slots holding `keys` takes: an expert that somebody holds takes none."""
        return sum(key not in self._entries or self.is_evictable(key) for key in keys)

    def reserve(self, num_slots: int) -> bool:
        """Promises `num_slots`, all or nothing."""
        if num_slots > self.num_unreserved:
            return False
        self._reserved += num_slots
        return True

    def unreserve(self, num_slots: int) -> None:
        assert 0 <= num_slots <= self._reserved, f"{num_slots} of {self._reserved} reserved slots"
        self._reserved -= num_slots

    def plan(
        self, keys: Sequence[ExpertKey], *, reservation: int = 0, spare: Collection[ExpertKey] = ()
    ) -> SlotPlan | None:
        """How to hold all of `keys` (distinct), or None when they do not fit now.

        Pays with the caller's `reservation` first, then with unreserved slots. `spare` may not be victims.
        """
        hits = tuple(key for key in keys if self.is_loaded(key))
        in_flight = tuple(key for key in keys if self.is_loading(key))
        misses = [key for key in keys if key not in self._entries]
        needed = self.slots_needed(keys)
        if needed > reservation + self.num_unreserved:
            return None
        num_victims = max(0, len(misses) - len(self._free))
        untouchable = {*hits, *spare} if num_victims else set()
        candidates = (key for key in self._policy.victims() if key not in untouchable)
        victims = tuple(islice(candidates, num_victims))
        if len(victims) < num_victims:  # only `spare` can cause it
            return None
        free = islice(reversed(self._free), len(misses) - num_victims)
        slots = [*free, *(self._entries[key].slot for key in victims)]
        loads = tuple(SlotLoad(key, slot) for key, slot in zip(misses, slots, strict=True))
        return SlotPlan(hits, in_flight, loads, victims, min(reservation, needed), self._version)

    def commit(self, plan: SlotPlan) -> None:
        """Evicts the victims, gives their slots to the loads, and pins every expert of the plan once."""
        assert plan.version == self._version, "the index changed between plan and commit"
        self._version += 1
        for key in plan.victims:
            self._policy.remove(key)
            del self._entries[key]
        del self._free[len(self._free) - (len(plan.loads) - len(plan.victims)) :]
        for load in plan.loads:
            self._entries[load.key] = _Entry(load.slot, pins=0, loading=True)
            self._pin(load.key)
        for key in (*plan.hits, *plan.in_flight):
            self._pin(key)
        self._reserved -= plan.paid

    def _pin(self, key: ExpertKey) -> None:
        entry = self._entries[key]
        self._policy.use(key)
        if entry.pins == 0 and not entry.loading:
            self._policy.remove(key)
        entry.pins += 1

    def unpin(self, key: ExpertKey) -> None:
        """Takes back one pin. Without pins a loaded expert is evictable; a loading one will be."""
        entry = self._entries[key]
        assert entry.pins > 0, f"{key} is not pinned"
        self._version += 1
        entry.pins -= 1
        if entry.pins == 0 and not entry.loading:
            self._policy.add(key)

    def installed(self, key: ExpertKey) -> None:
        """The data of a loading expert is complete."""
        entry = self._entries[key]
        assert entry.loading, f"{key} is not loading"
        self._version += 1
        entry.loading = False
        if entry.pins == 0:
            self._policy.add(key)

    def abandon(self, key: ExpertKey) -> None:
        """A load was cancelled or failed: its slot is free and all pins on it are void."""
        assert self._entries[key].loading, f"{key} is not loading"
        self._version += 1
        self._free.append(self._entries.pop(key).slot)

    def refresh(self, key: ExpertKey) -> None:
        """An evictable expert will be wanted soon: it goes to where a fresh one would be in the order."""
        if self.is_evictable(key):
            self._version += 1
            self._policy.remove(key)
            self._policy.add(key)

    def check_integrity(self) -> None:
        """Asserts everything that the docstring of this module says."""
        used = [entry.slot for entry in self._entries.values()]
        assert sorted([*used, *self._free]) == list(range(self.num_slots)), "a slot is free or used, and once"
        assert all(entry.pins >= 0 for entry in self._entries.values())
        evictable = {key for key in self._entries if self.is_evictable(key)}
        in_order = list(self._policy.victims())
        assert len(in_order) == len(self._policy) == len(evictable)
        assert set(in_order) == evictable
        assert 0 <= self._reserved <= self.num_free + self.num_evictable, "a promise cannot be kept"
