"""Whether to ask a store that failed a moment ago."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from router_service.redis_client import RedisUnavailableError

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0

Answer = TypeVar("Answer")


class Breaker:
    """Owns whether the store behind it is asked: after a failure not for a while, after more failures for longer."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
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

    def succeeded(self) -> None:
        self._failures, self._asks_again_s = 0, 0.0


class Paused(RedisUnavailableError):
    """The store failed a moment ago and is left alone for now."""


class StoreBreaker:
    """The breaker of one Redis: a replica, or a full one, refuses writes and goes on to answer reads.

    So reads and writes have a breaker each. A failure that concerns both opens both, and a write that succeeds closes
    both; the store is degraded until either of them is closed.
    """

    def __init__(
        self,
        on_degraded: Callable[[bool], None] = lambda _: None,
        on_failure: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`on_failure` receives the reason of every failure, `on_degraded` every failure and the first success after.

        A reason is one of `redis_client.REASONS`.
        """
        self._on_degraded = on_degraded
        self._on_failure = on_failure
        self._reads, self._writes = Breaker(clock, jitter), Breaker(clock, jitter)
        self._last_reason = "other"

    @property
    def is_degraded(self) -> bool:
        return self._reads.is_degraded or self._writes.is_degraded

    @property
    def pause_s(self) -> float:
        """How long the store is left alone from now by those that have to leave it alone longest."""
        return max(self._reads.pause_s, self._writes.pause_s)

    async def read(self, question: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer to a question that changes nothing. Raises RedisUnavailableError."""
        return await self._ask(question, [self._reads])

    async def write(self, question: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer to a command that changes something. Raises RedisUnavailableError."""
        return await self._ask(question, [self._writes, self._reads])

    async def _ask(self, question: Callable[[], Awaitable[Answer]], concerned: list[Breaker]) -> Answer:
        if not concerned[0].allows():
            raise Paused(self._last_reason)
        try:
            answer = await question()
        except RedisUnavailableError as error:
            self._failed(error)
            raise
        was_degraded = self.is_degraded
        for breaker in concerned:
            breaker.succeeded()
        if was_degraded and not self.is_degraded:
            self._on_degraded(False)
        return answer

    def _failed(self, error: RedisUnavailableError) -> None:
        self._last_reason = error.reason
        self._writes.failed()
        if not error.still_reads:
            self._reads.failed()
        log.warning("Redis failed: %s; trying again in %.1f s", error, self.pause_s)
        self._on_failure(error.reason)
        self._on_degraded(True)
