"""The costs of paging: for one request, for the whole pager, and which evictions and prefetches were wasted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from pager.types import ExpertKey, PagingCounts


class Tier(StrEnum):
    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


class Lookup(StrEnum):
    """The result of looking an expert up in a tier."""

    HIT = "hit"
    HIT_IN_FLIGHT = "hit_in_flight"  # already being read for another request
    MISS = "miss"


class Cause(StrEnum):
    """The reason why an expert was needed."""

    LEASE = "lease"
    DEMAND = "demand"
    PREFETCH = "prefetch"


@dataclass(slots=True)
class TierReads:
    """The reads from one tier for one request; from the first read's start to the last one's end, monotonic."""

    started_s: float
    ended_s: float = 0.0
    num_experts: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class UsageMeter:
    """The account of one request while it runs: its lease, its demands and its prefetches add to it. Mutable."""

    tenant: str = ""  # whose request it is, for what it is guaranteed of the slots
    counts: PagingCounts = field(default_factory=PagingCounts)
    reads: dict[Tier, TierReads] = field(default_factory=dict)
    is_closed: bool = False  # later reads are charged to no request
    # those not taken yet; None where they are not recorded
    page_ins: deque[tuple[ExpertKey, Tier, float]] | None = None

    def add_read(self, key: ExpertKey, source: Tier, nbytes: int, started_s: float, ended_s: float) -> None:
        if self.page_ins is not None:
            self.page_ins.append((key, source, ended_s))
        reads = self.reads.setdefault(source, TierReads(started_s))
        reads.started_s, reads.ended_s = min(reads.started_s, started_s), max(reads.ended_s, ended_s)
        reads.num_experts += 1
        reads.num_bytes += nbytes
        self.counts += read_from(source, nbytes)


def read_from(tier: Tier, nbytes: int) -> PagingCounts:
    return PagingCounts(bytes_from_host=nbytes) if tier is Tier.HOST else PagingCounts(bytes_from_disk=nbytes)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The device tier since the start (counts) and now (bytes)."""

    paging: PagingCounts
    hits_in_flight: int  # of the experts hit, those that were being read for another request
    evictions: int
    failed_loads: int
    capacity_bytes: int
    resident_bytes: int  # loaded or loading
    held_bytes: int  # the part that cannot be evicted now
    reserved_bytes: int  # promised to leases and not bound yet

    @property
    def hit_rate(self) -> float:
        """The share of all requested experts that needed no read of their own; 1.0 when none was requested."""
        total = self.paging.num_lookups
        return self.paging.experts_hit / total if total else 1.0


class PagerObserver(Protocol):
    """Receives every event once, from any thread and under the pager's lock: be quick and do not call back."""

    def lookups(self, tier: Tier, result: Lookup, count: int) -> None: ...

    def transferred(self, source: Tier, destination: Tier, nbytes: int, seconds: float) -> None: ...

    def paged(self, cause: Cause, count: int, again: int) -> None:
        """Called when `count` experts were given slots to be read into, `again` of which had been evicted within a
        minute.
        """

    def prefetched(self, used: int, wasted: int) -> None:
        """Called when prefetched experts were used for the first time, or evicted without a use."""

    def evicted(self, cause: Cause, count: int) -> None: ...

    def stalled(self, seconds: float, cause: Cause) -> None: ...

    def uncharged(self, source: Tier, nbytes: int) -> None:
        """Called when an expert was read for no request: at the start, or for one that has ended."""

    def quarantined(self, tier: Tier) -> None: ...

    def traced(self, written: int, lost: int) -> None:
        """Called when events of the trace were written to its file, or lost because of a full or slow disk."""


class NoObserver:
    """An observer that ignores everything."""

    def lookups(self, tier: Tier, result: Lookup, count: int) -> None:
        pass

    def transferred(self, source: Tier, destination: Tier, nbytes: int, seconds: float) -> None:
        pass

    def paged(self, cause: Cause, count: int, again: int) -> None:
        pass

    def prefetched(self, used: int, wasted: int) -> None:
        pass

    def evicted(self, cause: Cause, count: int) -> None:
        pass

    def stalled(self, seconds: float, cause: Cause) -> None:
        pass

    def uncharged(self, source: Tier, nbytes: int) -> None:
        pass

    def quarantined(self, tier: Tier) -> None:
        pass

    def traced(self, written: int, lost: int) -> None:
        pass


REGRETTED_WITHIN_S = 60.0


class Regrets:
    """Owns the times of each expert's last eviction, and the prefetched experts that were not used yet.

    An eviction is regretted when its expert is read again within REGRETTED_WITHIN_S; a prefetch is wasted when its
    expert is evicted before its first use.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._evicted_s: dict[ExpertKey, float] = {}
        self._unused: set[ExpertKey] = set()

    def evicted(self, keys: Iterable[ExpertKey]) -> int:
        """Records evictions. Returns how many of the experts a prefetch had read in vain."""
        now_s = self._clock()
        self._evicted_s.update(dict.fromkeys(keys, now_s))
        wasted = self._unused.intersection(keys)
        self._unused -= wasted
        return len(wasted)

    def loaded(self, keys: Iterable[ExpertKey], *, ahead: bool) -> int:
        """Records loads. Returns how many of them were evicted shortly before. `ahead`: no request has used them
        yet.
        """
        soonest_s = self._clock() - REGRETTED_WITHIN_S
        if ahead:
            self._unused.update(keys)
        return sum(self._evicted_s.pop(key, -1e300) >= soonest_s for key in keys)

    def used(self, keys: Iterable[ExpertKey]) -> int:
        """Records uses. Returns how many of the experts were prefetched, and are used for the first time now."""
        if not self._unused:
            return 0
        used = self._unused.intersection(keys)
        self._unused -= used
        return len(used)

    def lost(self, key: ExpertKey) -> None:
        """Records a failed read: neither used nor wasted."""
        self._unused.discard(key)
