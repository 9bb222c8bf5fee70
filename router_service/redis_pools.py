"""Named pools in Redis, for all routers: `expert-pager:1:named-pools:{tenant}` is a hash from name to pool, and
`expert-pager:1:named-pool-counts` one from tenant to the number of its pools.

The keys don't expire, so a Redis that evicts must evict those that do (`maxmemory-policy volatile-lru`). Models share
them: a pool for another model is found, and refused by name.
"""

from __future__ import annotations

from pager.routing.named import NamedPool, decode_named, encode_named
from router_service import pool_store
from router_service.pool_store import Listing, check_room, listing_of, name_in_use
from router_service.redis_client import RedisClient

# Both take the hash of a tenant and that of the counts, where a tenant's number is set to what its hash has: a count
# that somebody else changed is right again with the tenant's next pool.
_PUT = """
local is_there = redis.call('hexists', KEYS[1], ARGV[2]) == 1
if is_there and ARGV[4] == 'add' then return 'in use' end
if not is_there then
  local mine, all = redis.call('hlen', KEYS[1]), 0
  for _, count in ipairs(redis.call('hvals', KEYS[2])) do all = all + (tonumber(count) or 0) end
  if mine >= tonumber(ARGV[5]) or mine >= tonumber(ARGV[6]) - all then return {mine, all} end
end
redis.call('hset', KEYS[1], ARGV[2], ARGV[3])
redis.call('hset', KEYS[2], ARGV[1], redis.call('hlen', KEYS[1]))
return 'done'
"""
_DELETE = """
local deleted = redis.call('hdel', KEYS[1], ARGV[2])
local left = redis.call('hlen', KEYS[1])
if left == 0 then redis.call('hdel', KEYS[2], ARGV[1]) else redis.call('hset', KEYS[2], ARGV[1], left) end
return deleted
"""
_COUNTS = "expert-pager:1:named-pool-counts"


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
        return bool(await self._client.script(_DELETE, (_key(tenant), _COUNTS), tenant, name))

    async def all_of(self, tenant: str) -> Listing:
        async with self._client.commands() as redis:
            stored = await redis.hgetall(_key(tenant))
        return await listing_of((field.decode(errors="replace"), data) for field, data in sorted(stored.items()))

    async def close(self) -> None:
        await self._client.close()

    async def _put(self, tenant: str, named: NamedPool, verb: str) -> None:
        limits = pool_store.MAX_POOLS_OF_TENANT, pool_store.MAX_POOLS
        outcome = await self._client.script(
            _PUT, (_key(tenant), _COUNTS), tenant, named.name, encode_named(named), verb, *limits
        )
        if outcome == b"in use":
            raise name_in_use(named.name)
        if isinstance(outcome, list):
            check_room(*outcome)


def _key(tenant: str) -> str:
    return f"expert-pager:1:named-pools:{tenant}"
