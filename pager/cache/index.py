"""The state of the slots: which expert is in each, which request holds it, what is promised, and what is evicted next.

Pure integers: no tensors, devices, clocks or locks.

A slot is in one of four states, and every slot in exactly one:

    free       no expert in it
    loading    an expert on its way; held or not, it cannot be evicted
    held       loaded, with at least one pin
    evictable  loaded, no pin; the policy knows it

`num_reserved` slots are promised to leases that have not bound them yet. The promise is kept by the invariant
`num_free + num_evictable >= num_reserved`: whatever takes a slot out of these two states pays with a reservation or
needs an unreserved one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from pager.errors import ConfigError
from pager.types import ExpertKey

# --- eviction policies ------------------------------------------------------------------------------------------------
#
# The choice of the expert to evict next. Pure: knows keys, and no slots, tensors, devices or clocks.


class EvictionPolicy(Protocol):
    """An order over the experts that no request holds. The index reports every event to it and takes victims from it.

    An expert is *evictable* from `add` to `remove`. `use` may come for any expert, resident or not.
    """

    def use(self, key: ExpertKey) -> None:
        """Records that `key` was asked for, whether it was loaded or not. Called before the expert is held."""

    def add(self, key: ExpertKey) -> None:
        """Records that `key` is in a slot and not held any more (or never was: a prefetch)."""

    def remove(self, key: ExpertKey) -> None:
        """Records that `key` is held again, or evicted."""

    def victims(self) -> Iterator[ExpertKey]:
        """Yields the evictable experts, next victim first. The caller may skip some."""

    def __len__(self) -> int:
        """Returns how many experts are evictable."""


class LRU:
    """Evicts the least recently released expert: list and order are one structure, every operation is O(1)."""

    def __init__(self) -> None:
        # Not a dict: after many evictions the front of one is a run of holes that every look-up has to pass.
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def use(self, key: ExpertKey) -> None:
        """Does nothing: recency is set when an expert is released."""

    def add(self, key: ExpertKey) -> None:
        self._order[key] = None

    def remove(self, key: ExpertKey) -> None:
        del self._order[key]

    def victims(self) -> Iterator[ExpertKey]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class LFU:
    """Evicts the expert used least often since the start, evicted or not; among equals, the least recently released."""

    def __init__(self) -> None:
        self._uses: Counter[ExpertKey] = Counter()
        # counts of the evictable experts at the time when they became evictable
        self._count_of: dict[ExpertKey, int] = {}
        self._by_count: dict[int, OrderedDict[ExpertKey, None]] = {}

    def use(self, key: ExpertKey) -> None:
        self._uses[key] += 1

    def add(self, key: ExpertKey) -> None:
        count = self._count_of[key] = self._uses[key]
        self._by_count.setdefault(count, OrderedDict())[key] = None

    def remove(self, key: ExpertKey) -> None:
        count = self._count_of.pop(key)
        del self._by_count[count][key]
        if not self._by_count[count]:
            del self._by_count[count]

    def victims(self) -> Iterator[ExpertKey]:
        for count in sorted(self._by_count):
            yield from self._by_count[count]

    def __len__(self) -> int:
        return len(self._count_of)


class LFRU:
    """Evicts the expert with the lowest number of uses divided by the time since the last one, time being counted in
    uses.

    Every score changes with time: victims are sorted on demand, at a cost in proportion to their number.
    """

    def __init__(self) -> None:
        self._now = 0
        self._uses: Counter[ExpertKey] = Counter()
        self._last: dict[ExpertKey, int] = {}
        self._evictable: OrderedDict[ExpertKey, None] = OrderedDict()

    def use(self, key: ExpertKey) -> None:
        self._now += 1
        self._uses[key] += 1
        self._last[key] = self._now

    def add(self, key: ExpertKey) -> None:
        self._evictable[key] = None

    def remove(self, key: ExpertKey) -> None:
        del self._evictable[key]

    def victims(self) -> Iterator[ExpertKey]:
        yield from sorted(self._evictable, key=self._score)  # stable: among equals, the least recently released first

    def __len__(self) -> int:
        return len(self._evictable)

    def _score(self, key: ExpertKey) -> float:
        return self._uses[key] / (self._now - self._last.get(key, 0) + 1)


class LeastStale:
    """Evicts by passes over the layers rather than by time (after SpecMD's policy of that name, arXiv 2602.03921).

    A use in a layer below the last one begins a pass. First go the experts that no recent pass used, oldest pass first;
    within one pass, those whose layer the current one has passed, because they are needed last, the most recently
    passed first; within one layer, the least recently released. Experts of a pass and a layer are kept together, and
    only those groups are sorted on demand.
    """

    def __init__(self) -> None:
        self._pass = 0
        self._layer = 0
        self._num_layers = 1
        self._pass_of: dict[ExpertKey, int] = {}
        self._group_of: dict[ExpertKey, tuple[int, int]] = {}  # pass and layer of the evictable experts
        self._groups: dict[tuple[int, int], OrderedDict[ExpertKey, None]] = {}

    def use(self, key: ExpertKey) -> None:
        if key.layer < self._layer:
            self._pass += 1
        self._layer = key.layer
        self._num_layers = max(self._num_layers, key.layer + 1)
        self._pass_of[key] = self._pass

    def add(self, key: ExpertKey) -> None:
        group = self._group_of[key] = (self._pass_of.get(key, -1), key.layer)
        self._groups.setdefault(group, OrderedDict())[key] = None

    def remove(self, key: ExpertKey) -> None:
        group = self._group_of.pop(key)
        del self._groups[group][key]
        if not self._groups[group]:
            del self._groups[group]

    def victims(self) -> Iterator[ExpertKey]:
        for group in sorted(self._groups, key=self._score):
            yield from self._groups[group]

    def __len__(self) -> int:
        return len(self._group_of)

    def _score(self, group: tuple[int, int]) -> float:
        # An expert ahead of the pass has not been reached yet: its last use counts as one of this pass.
        last_pass, layer = group
        layers_until_next = (layer - self._layer - 1) % self._num_layers
        return last_pass + (layer > self._layer) - (layers_until_next + 1) / (self._num_layers + 1)


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU, "lfu": LFU, "lfru": LFRU, "least-stale": LeastStale,
}  # fmt: skip

DEFAULT_POLICY = "least-stale"
"""It waits for the fewest bytes on mixed traffic, as `benchmarks/results/policies_*.md` shows and a test checks."""


def make_policy(name: str) -> EvictionPolicy:
    """Returns a new policy. Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}; choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()


# --- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """The order to read `key` into `slot`."""

    key: ExpertKey
    slot: int


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """The slots that holding some experts requires: made by `CacheIndex.plan`, changes nothing until it is
    committed.
    """

    hits: tuple[ExpertKey, ...]  # loaded already
    in_flight: tuple[ExpertKey, ...]  # being read for another request
    loads: tuple[SlotLoad, ...]  # to be read by the caller that commits the plan
    victims: tuple[ExpertKey, ...]  # evicted to make room for the loads
    paid: int  # how many of the caller's reserved slots it uses up
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
        """The slots that can be taken now without breaking a promise."""
        return self.num_free + self.num_evictable - self._reserved

    @property
    def num_resident(self) -> int:
        """The slots that hold an expert or will: loading, held and evictable ones."""
        return len(self._entries)

    @property
    def num_held(self) -> int:
        """The slots that cannot be evicted: held and loading ones."""
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
        """Returns the slot of a loaded or loading expert. Raises KeyError for an absent one."""
        return self._entries[key].slot

    def loaded(self) -> Iterator[ExpertKey]:
        return (key for key, entry in self._entries.items() if not entry.loading)

    def slots_needed(self, keys: Collection[ExpertKey]) -> int:
        """Returns how many unreserved slots holding `keys` takes: an expert that is held already takes none."""
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
        """Plans how to hold all of `keys` (distinct); None when they do not fit now.

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
        if len(victims) < num_victims:  # only `spare` can cause this
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
        """Marks a loading expert as complete."""
        entry = self._entries[key]
        assert entry.loading, f"{key} is not loading"
        self._version += 1
        entry.loading = False
        if entry.pins == 0:
            self._policy.add(key)

    def abandon(self, key: ExpertKey) -> None:
        """Ends a load that was cancelled or failed: its slot is free and all pins on it are void."""
        assert self._entries[key].loading, f"{key} is not loading"
        self._version += 1
        self._free.append(self._entries.pop(key).slot)

    def refresh(self, key: ExpertKey) -> None:
        """Moves an evictable expert that will be needed soon to the place of a fresh one in the order."""
        if self.is_evictable(key):
            self._version += 1
            self._policy.remove(key)
            self._policy.add(key)

    def check_integrity(self) -> None:
        """Asserts every invariant in the docstring of this module."""
        used = [entry.slot for entry in self._entries.values()]
        assert sorted([*used, *self._free]) == list(range(self.num_slots)), "a slot is free or used, and once"
        assert all(entry.pins >= 0 for entry in self._entries.values())
        evictable = {key for key in self._entries if self.is_evictable(key)}
        in_order = list(self._policy.victims())
        assert len(in_order) == len(self._policy) == len(evictable)
        assert set(in_order) == evictable
        assert 0 <= self._reserved <= self.num_free + self.num_evictable, "a promise cannot be kept"
