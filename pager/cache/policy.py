"""Which expert to evict next. Pure: knows keys, and no slots, tensors, devices or clocks."""

from __future__ import annotations

from collections import OrderedDict
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


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU}


def make_policy(name: str) -> EvictionPolicy:
    """A fresh policy. Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"unknown eviction policy {name!r}; choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
