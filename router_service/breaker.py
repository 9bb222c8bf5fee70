"""Whether to ask a store that failed a moment ago. Knows no store."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class Breaker:
    """Owns whether the store behind it is asked: after a failure not for a while, after more failures for longer."""

    def __init__(
        self,
        on_degraded: Callable[[bool], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`on_degraded` hears of every failure, and of the first success after it."""
        self._on_degraded = on_degraded
        self._clock = clock
        self._jitter = jitter
        self._failures = 0
        self._asks_again_s = 0.0

    @property
    def is_degraded(self) -> bool:
        return self._failures > 0

    @property
    def pause_s(self) -> float:
        """How long the store is left alone from now."""
        return max(0.0, self._asks_again_s - self._clock())

    def allows(self) -> bool:
        return self._clock() >= self._asks_again_s

    def failed(self) -> None:
        pause_s = min(_FIRST_PAUSE_S * 2**self._failures, _LONGEST_PAUSE_S)
        self._failures = min(self._failures + 1, 16)
        # Spread over half to all of the pause, so that routers do not come back in step.
        self._asks_again_s = self._clock() + pause_s * (0.5 + 0.5 * self._jitter())
        self._on_degraded(True)

    def succeeded(self) -> None:
        was_degraded, self._failures, self._asks_again_s = self.is_degraded, 0, 0.0
        if was_degraded:
            self._on_degraded(False)
