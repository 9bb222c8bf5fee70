"""Redis where it answers, this process where it does not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from pager.types import ExpertPool
from router_service.breaker import StoreBreaker
from router_service.hints import HintStore, WorkerHolds
from router_service.local_hints import InProcessHints
from router_service.redis_client import RedisUnavailableError

Answer = TypeVar("Answer")


class SharedHints:
    """A HintStore that never raises: what the shared store can not answer, the local one does."""

    def __init__(self, local: InProcessHints, shared: HintStore, breaker: StoreBreaker) -> None:
        self._local = local
        self._shared = shared
        self._breaker = breaker

    async def find_pool(self, keys: Sequence[str]) -> ExpertPool | None:
        found = await self._read(lambda: self._shared.find_pool(keys), None)
        return found or await self._local.find_pool(keys)

    async def remember_pool(self, keys: Sequence[str], pool: ExpertPool) -> None:
        await self._local.remember_pool(keys, pool)
        await self._write(lambda: self._shared.remember_pool(keys, pool), None)

    async def claim(self, request_id: str, tenant: str) -> bool:
        if not await self._local.claim(request_id, tenant):
            return False
        try:
            is_free = await self._write(lambda: self._shared.claim(request_id, tenant), True)
        except BaseException:  # the caller was cancelled while it waited
            await self.release(request_id, tenant)
            raise
        if not is_free:
            await self._local.release(request_id, tenant)
        return is_free

    async def release(self, request_id: str, tenant: str) -> None:
        await self._local.release(request_id, tenant)
        await self._write(lambda: self._shared.release(request_id, tenant), None)

    async def mark_aborted(self, request_id: str, tenant: str) -> bool:
        here = await self._local.mark_aborted(request_id, tenant)
        return await self._write(lambda: self._shared.mark_aborted(request_id, tenant), False) or here

    async def is_aborted(self, request_id: str, tenant: str) -> bool:
        return await self._local.is_aborted(request_id, tenant) or await self._read(
            lambda: self._shared.is_aborted(request_id, tenant), False
        )

    async def heartbeat(self, residency: Mapping[str, WorkerHolds]) -> None:
        await self._local.heartbeat(residency)
        await self._write(lambda: self._shared.heartbeat(residency), None)

    async def residency(self) -> dict[str, WorkerHolds]:
        elsewhere: dict[str, WorkerHolds] = await self._read(self._shared.residency, {})
        return elsewhere | await self._local.residency()

    async def close(self) -> None:
        await self._local.close()
        with suppress(RedisUnavailableError):
            await self._shared.close()

    async def _read(self, question: Callable[[], Awaitable[Answer]], otherwise: Answer) -> Answer:
        try:
            return await self._breaker.read(question)
        except RedisUnavailableError:
            return otherwise

    async def _write(self, question: Callable[[], Awaitable[Answer]], otherwise: Answer) -> Answer:
        try:
            return await self._breaker.write(question)
        except RedisUnavailableError:
            return otherwise
