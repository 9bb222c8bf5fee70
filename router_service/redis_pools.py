"""Named pools in Redis, for all routers: `expert-pager:1:named-pools:{tenant}` is a hash from name to pool.

The keys don't expire, so a Redis that evicts must evict those that do (`maxmemory-policy volatile-lru`). Models share
them: a pool for another model is found, and refused by name.
"""

from __future__ import annotations

from pager.errors import DamagedPool
from pager.routing.named import NamedPool, decode_named, encode_named
from router_service.pool_store import MAX_POOLS_OF_TENANT, Listing, check_room, name_in_use
from router_service.redis_client import RedisClient

_PUT = """
local is_there = redis.call('hexists', KEYS[1], ARGV[1]) == 1
if is_there and ARGV[3] == 'add' then return 'in use' end
if not is_there and redis.call('hlen', KEYS[1]) >= tonumber(ARGV[4]) then return 'full' end
redis.call('hset', KEYS[1], ARGV[1], ARGV[2])
return 'done'
"""


class RedisPools:
    """A PoolStore whose methods raise RedisUnavailableError when Redis is gone."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client

    async def find(self, tenant: str, name: str) -> NamedPool | None:
        async with self._client.commands() as redis:
            data = await redis.hget(_key(tenant), name)
        return None if data is None else decode_named(data, name)

    async def add(self, tenant: str, named: NamedPool) -> None:
        await self._put(tenant, named, "add")

    async def replace(self, tenant: str, named: NamedPool) -> None:
        await self._put(tenant, named, "replace")

    async def delete(self, tenant: str, name: str) -> bool:
        async with self._client.commands() as redis:
            return bool(await redis.hdel(_key(tenant), name))

    async def all_of(self, tenant: str) -> Listing:
        async with self._client.commands() as redis:
            stored = await redis.hgetall(_key(tenant))
        pools, damaged = [], []
        for field, data in sorted(stored.items()):
            name = field.decode(errors="replace")
            try:
                pools.append(decode_named(data, name))
            except DamagedPool:
                damaged.append(name)
        return Listing(tuple(pools), tuple(damaged))

    async def close(self) -> None:
        await self._client.close()

    async def _put(self, tenant: str, named: NamedPool, verb: str) -> None:
        outcome = await self._client.script(
            _PUT, _key(tenant), named.name, encode_named(named), verb, MAX_POOLS_OF_TENANT
        )
        if outcome == b"in use":
            raise name_in_use(named.name)
        if outcome == b"full":
            check_room(MAX_POOLS_OF_TENANT)


def _key(tenant: str) -> str:
    return f"expert-pager:1:named-pools:{tenant}"
