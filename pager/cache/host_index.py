"""Who may read or write which record of the host tier. The seam between one process and many.

A node's segment has one index: in process where there is one worker, in the node's control actor where there are more.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pager.cache.index import CacheIndex
from pager.cache.policy import make_policy
from pager.types import ExpertKey


class HostState(StrEnum):
    HIT = "hit"  # the record holds the expert; pinned for the asker until `unpin`
    CLAIMED = "claimed"  # the asker fills the record, then publishes or abandons it; pinned as well
    BUSY = "busy"  # somebody else is filling it; nothing is pinned
    FULL = "full"  # no record can be had now; nothing is pinned


@dataclass(frozen=True, slots=True)
class HostGrant:
    """What the asker may do. `record` means something for HIT and CLAIMED only."""

    key: ExpertKey
    state: HostState
    record: int = -1


class HostIndex(Protocol):
    """Thread-safe. `owner` names a worker: what it pinned can be taken back when it dies.

    An implementation that can not be reached answers FULL: a worker goes on without its host tier.
    """

    def lookup_or_claim(self, keys: Sequence[ExpertKey], owner: str) -> list[HostGrant]:
        """A grant for each key, in order. Never waits."""

    def publish(self, keys: Sequence[ExpertKey], owner: str) -> None:
        """The claimed records are complete, anybody may read them; the owner's pins stay."""

    def abandon(self, keys: Sequence[ExpertKey], owner: str) -> None:
        """The claimed records could not be filled; their pins are void."""

    def unpin(self, keys: Sequence[ExpertKey], owner: str) -> None:
        """The owner has read the records."""


class LocalHostIndex:
    """A CacheIndex under a lock: records are its slots."""

    def __init__(self, num_records: int, policy: str = "lru") -> None:
        self._index = CacheIndex(num_records, make_policy(policy))
        self._pins: dict[str, Counter[ExpertKey]] = {}
        self._lock = threading.Lock()

    @property
    def num_resident(self) -> int:
        """Records in use."""
        with self._lock:
            return self._index.num_resident

    @property
    def num_pinned(self) -> int:
        """Of these, the ones that somebody reads or fills."""
        with self._lock:
            return self._index.num_held

    def lookup_or_claim(self, keys: Sequence[ExpertKey], owner: str) -> list[HostGrant]:
        with self._lock:
            return [self._grant(key, owner) for key in keys]

    def publish(self, keys: Sequence[ExpertKey], owner: str) -> None:
        with self._lock:
            for key in keys:
                if self._holds(key, owner):
                    self._index.installed(key)

    def abandon(self, keys: Sequence[ExpertKey], owner: str) -> None:
        with self._lock:
            for key in keys:
                if self._holds(key, owner):
                    self._index.abandon(key)
                    self._forget(key, owner)

    def unpin(self, keys: Sequence[ExpertKey], owner: str) -> None:
        with self._lock:
            for key in keys:
                if self._holds(key, owner):
                    self._index.unpin(key)
                    self._forget(key, owner)

    def drop_owner(self, owner: str) -> None:
        """Takes back all claims and pins of a worker that died. The caller lets no late word of it claim more."""
        with self._lock:
            for key, count in self._pins.pop(owner, Counter()).items():
                if self._index.is_loading(key):
                    self._index.abandon(key)
                    continue
                for _ in range(count):
                    self._index.unpin(key)

    def check_integrity(self) -> None:
        with self._lock:
            self._index.check_integrity()
            held = sum((pins for pins in self._pins.values()), Counter())
            for key, count in held.items():
                assert self._index.pins(key) == count, key

    def _grant(self, key: ExpertKey, owner: str) -> HostGrant:
        if self._index.is_loading(key):
            return HostGrant(key, HostState.BUSY)
        plan = self._index.plan([key])
        if plan is None:
            return HostGrant(key, HostState.FULL)
        self._index.commit(plan)
        self._pins.setdefault(owner, Counter())[key] += 1
        state = HostState.HIT if plan.hits else HostState.CLAIMED
        return HostGrant(key, state, self._index.slot_of(key))

    def _holds(self, key: ExpertKey, owner: str) -> bool:
        """False for a worker that was taken for dead: its late words change nothing."""
        return self._pins.get(owner, Counter())[key] > 0

    def _forget(self, key: ExpertKey, owner: str) -> None:
        pins = self._pins[owner]
        pins[key] -= 1
        if pins[key] == 0:
            del pins[key]
