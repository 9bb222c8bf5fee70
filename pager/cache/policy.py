"""Which expert to evict next. Pure: knows keys, and no slots, tensors, devices or clocks."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

from pager.errors import ConfigError
from pager.types import ExpertKey


class EvictionPolicy(Protocol):
    """An order over the experts that nobody holds. The index tells it what happens and asks for victims.

    An expert is *evictable* from `add` to `remove`. `use` may come for any expert, resident or not.
    """

    def use(self, key: ExpertKey) -> None:
        """Somebody asked for `key`, whether it was there or not. Called before the expert is held."""

    def add(self, key: ExpertKey) -> None:
        """`key` is in a slot and nobody holds it any more (or nobody ever did: a prefetch)."""

    def remove(self, key: ExpertKey) -> None:
        """`key` is held again, or evicted."""

    def victims(self) -> Iterator[ExpertKey]:
        """The evictable experts, next victim first. The caller may pass over some."""

    def __len__(self) -> int:
        """How many experts are evictable."""


class LRU:
    """Evicts what was let go of longest ago: list and order are one structure, every operation is O(1)."""

    def __init__(self) -> None:
        # Not a dict: after many evictions the front of one is a run of holes that every look has to pass.
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def use(self, key: ExpertKey) -> None:
        """Recency is set when an expert is let go of, so a use needs no note."""

    def add(self, key: ExpertKey) -> None:
        self._order[key] = None

    def remove(self, key: ExpertKey) -> None:
        del self._order[key]

    def victims(self) -> Iterator[ExpertKey]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class LFU:
    """Evicts what was used least often since the start, evicted or not; of equals, what was let go of longest ago."""

    def __init__(self) -> None:
        self._uses: Counter[ExpertKey] = Counter()
        self._count_of: dict[ExpertKey, int] = {}  # of the evictable ones, as counted when they became so
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
    """Evicts the lowest number of uses divided by the time since the last one, time being counted in uses.

    Every score changes with time: victims are sorted when they are asked for, which costs as much as there are.
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
        yield from sorted(self._evictable, key=self._score)  # stable: of equals, what was let go of longest ago

    def __len__(self) -> int:
        return len(self._evictable)

    def _score(self, key: ExpertKey) -> float:
        return self._uses[key] / (self._now - self._last.get(key, 0) + 1)


class LeastStale:
    """Evicts by passes over the layers rather than by time (after SpecMD's policy of that name, arXiv 2602.03921).

    A use in a layer below the last one begins a pass. First go the experts that no recent pass used, oldest pass first;
    of one pass, those whose layer the current one has left behind, for they are needed last, the latest left first; of
    one layer, what was let go of longest ago. Experts of a pass and a layer are kept together, and only those groups
    are sorted when victims are asked for.
    """

    def __init__(self) -> None:
        self._pass = 0
        self._layer = 0
        self._num_layers = 1
        self._pass_of: dict[ExpertKey, int] = {}
        self._group_of: dict[ExpertKey, tuple[int, int]] = {}  # of the evictable ones: pass and layer
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
        # An expert ahead of the pass has not had its turn: its last use counts as one of this pass.
        last_pass, layer = group
        layers_until_next = (layer - self._layer - 1) % self._num_layers
        return last_pass + (layer > self._layer) - (layers_until_next + 1) / (self._num_layers + 1)


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU, "lfu": LFU, "lfru": LFRU, "least-stale": LeastStale,
}  # fmt: skip

DEFAULT_POLICY = "least-stale"
"""Waits for the fewest bytes on mixed traffic: `benchmarks/results/policies_*.md`, to which a test holds it."""


def make_policy(name: str) -> EvictionPolicy:
    """A fresh policy. Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}; choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
