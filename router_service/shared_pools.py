"""Named pools in Redis, and the few that this process has seen for when it does not answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from pager.errors import PoolStoreUnavailable
from pager.routing.named import NamedPool
from router_service.breaker import StoreBreaker
from router_service.pool_store import Listing
from router_service.redis_client import RedisUnavailableError
from router_service.redis_pools import RedisPools

MAX_CACHED = 256
Answer = TypeVar("Answer")
Way = Callable[[Callable[[], Awaitable[Answer]]], Awaitable[Answer]]


class SharedPools:
    """A PoolStore. Redis is asked every time, so that no router goes on with a pool that another one deleted or
    replaced; while it is away, a pool that was used here before can still be used."""

    def __init__(self, shared: RedisPools, breaker: StoreBreaker) -> None:
        self._shared = shared
        self._breaker = breaker
        self._seen: OrderedDict[tuple[str, str], NamedPool] = OrderedDict()

    async def find(self, tenant: str, name: str) -> NamedPool | None:
        try:
            found = await self._ask(self._breaker.read, lambda: self._shared.find(tenant, name))
        except PoolStoreUnavailable:
            seen = self._seen.get((tenant, name))
            if seen is None:
                raise
            return seen
        self._saw(tenant, name, found)
        return found

    async def add(self, tenant: str, named: NamedPool) -> None:
        await self._ask(self._breaker.write, lambda: self._shared.add(tenant, named))
        self._saw(tenant, named.name, named)

    async def replace(self, tenant: str, named: NamedPool) -> None:
        await self._ask(self._breaker.write, lambda: self._shared.replace(tenant, named))
        self._saw(tenant, named.name, named)

    async def delete(self, tenant: str, name: str) -> bool:
        is_deleted = await self._ask(self._breaker.write, lambda: self._shared.delete(tenant, name))
        self._saw(tenant, name, None)
        return is_deleted

    async def all_of(self, tenant: str) -> Listing:
        return await self._ask(self._breaker.read, lambda: self._shared.all_of(tenant))

    async def close(self) -> None:
        with suppress(RedisUnavailableError):
            await self._shared.close()

    def _saw(self, tenant: str, name: str, named: NamedPool | None) -> None:
        self._seen.pop((tenant, name), None)
        if named is not None:
            self._seen[tenant, name] = named
        while len(self._seen) > MAX_CACHED:
            self._seen.popitem(last=False)

    async def _ask(self, way: Way[Answer], question: Callable[[], Awaitable[Answer]]) -> Answer:
        """`way` is the breaker's read or write. Raises PoolStoreUnavailable."""
        try:
            return await way(question)
        except RedisUnavailableError as error:
            raise PoolStoreUnavailable(
                f"the store of named pools (Redis) does not serve this now: {error}; retry later, or give the pool's "
                "experts instead",
                retry_after_s=max(0.1, self._breaker.pause_s),
            ) from None
