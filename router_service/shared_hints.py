"""Redis where it answers, this process where it does not."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from pager.types import ExpertPool
from router_service.hints import HintStore, WorkerHolds
from router_service.local_hints import InProcessHints
from router_service.redis_hints import HintsUnavailableError

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

    def allows(self) -> bool:
        return self._clock() >= self._asks_again_s

    def failed(self) -> None:
        pause_s = min(_FIRST_PAUSE_S * 2**self._failures, _LONGEST_PAUSE_S)
        self._failures = min(self._failures + 1, 16)
        # Spread over half to all of the pause, so that routers do not come back in step.
        self._asks_again_s = self._clock() + pause_s * (0.5 + 0.5 * self._jitter())

    def succeeded(self) -> None:
        self._failures = 0
        self._asks_again_s = 0.0


class SharedHints:
    """A HintStore that never raises: what the shared store can not answer, the local one does."""

    def __init__(
        self,
        local: InProcessHints,
        shared: HintStore,
        on_degraded: Callable[[bool], None],
        breaker: Breaker | None = None,
    ) -> None:
        self._local = local
        self._shared = shared
        self._on_degraded = on_degraded
        self._breaker = breaker or Breaker()

    async def find_pool(self, keys: Sequence[str]) -> ExpertPool | None:
        found = await self._ask(lambda: self._shared.find_pool(keys), None)
        return found or await self._local.find_pool(keys)

    async def remember_pool(self, keys: Sequence[str], pool: ExpertPool) -> None:
        await self._local.remember_pool(keys, pool)
        await self._ask(lambda: self._shared.remember_pool(keys, pool), None)

    async def claim(self, request_id: str, tenant: str) -> bool:
        if not await self._local.claim(request_id, tenant):
            return False
        try:
            is_free = await self._ask(lambda: self._shared.claim(request_id, tenant), True)
        except BaseException:  # the caller was cancelled while it waited
            await self.release(request_id)
            raise
        if not is_free:
            await self._local.release(request_id)
        return is_free

    async def release(self, request_id: str) -> None:
        await self._local.release(request_id)
        await self._ask(lambda: self._shared.release(request_id), None)

    async def mark_aborted(self, request_id: str, tenant: str) -> bool:
        here = await self._local.mark_aborted(request_id, tenant)
        return await self._ask(lambda: self._shared.mark_aborted(request_id, tenant), False) or here

    async def is_aborted(self, request_id: str) -> bool:
        return await self._local.is_aborted(request_id) or await self._ask(
            lambda: self._shared.is_aborted(request_id), False
        )

    async def heartbeat(self, residency: Mapping[str, WorkerHolds]) -> None:
        await self._local.heartbeat(residency)
        await self._ask(lambda: self._shared.heartbeat(residency), None)

    async def residency(self) -> dict[str, WorkerHolds]:
        elsewhere: dict[str, WorkerHolds] = await self._ask(self._shared.residency, {})
        return elsewhere | await self._local.residency()

    async def close(self) -> None:
        await self._local.close()
        with suppress(HintsUnavailableError):
            await self._shared.close()

    async def _ask(self, question: Callable[[], Awaitable[Answer]], otherwise: Answer) -> Answer:
        if not self._breaker.allows():
            return otherwise
        try:
            answer = await question()
        except HintsUnavailableError:
            self._breaker.failed()
            self._on_degraded(True)
            return otherwise
        if self._breaker.is_degraded:
            self._on_degraded(False)
        self._breaker.succeeded()
        return answer
