"""Which evictions and prefetches were for nothing. Pure: keys and times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from pager.types import ExpertKey

REGRETTED_WITHIN_S = 60.0


class Regrets:
    """Owns when each expert was last evicted, and which prefetched ones nobody has used yet.

    An eviction is regretted when its expert is read again within REGRETTED_WITHIN_S; a prefetch is wasted when its
    expert is evicted before its first use.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._evicted_s: dict[ExpertKey, float] = {}
        self._unused: set[ExpertKey] = set()

    def evicted(self, keys: Iterable[ExpertKey]) -> int:
        """How many of them a prefetch had brought in vain."""
        now_s = self._clock()
        self._evicted_s.update(dict.fromkeys(keys, now_s))
        wasted = self._unused.intersection(keys)
        self._unused -= wasted
        return len(wasted)

    def loaded(self, keys: Iterable[ExpertKey], *, ahead: bool) -> int:
        """How many of them were evicted a moment ago. `ahead`: nobody has asked for them yet."""
        soonest_s = self._clock() - REGRETTED_WITHIN_S
        if ahead:
            self._unused.update(keys)
        return sum(self._evicted_s.pop(key, -1e300) >= soonest_s for key in keys)

    def used(self, keys: Iterable[ExpertKey]) -> int:
        """How many of them were prefetched, and are used for the first time now."""
        if not self._unused:
            return 0
        used = self._unused.intersection(keys)
        self._unused -= used
        return len(used)

    def lost(self, key: ExpertKey) -> None:
        """It could not be read: neither used nor wasted."""
        self._unused.discard(key)
