"""Hints that all routers of a model share, in Redis.

Keys: `expert-pager:1:{fingerprint}:pool:{key}` (a pool), `…:claim:{tenant}:{request id}` (the router, then
`/aborted`) and `…:holds:{worker id}`. Every key expires. No prompt text, no token ids.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from pager.types import ExpertPool, RoutingFacts
from router_service.hints import WorkerHolds, decode_holds, decode_pool, encode_holds, encode_pool
from router_service.redis_client import RedisClient

POOL_TTL_S = 3600
CLAIM_TTL_MS = 30_000  # renewed by the heartbeat; a router that died frees its ids after this
HOLDS_TTL_MS = 5_000
MAX_WORKERS = 1024
_ABORTED = b"/aborted"

# Compare and act in one step: the claim may expire, or pass to another router, in between.
_MARK_ABORTED = """
local claim = redis.call('get', KEYS[1])
if not claim then return 0 end
if string.sub(claim, -8) ~= '/aborted' then redis.call('set', KEYS[1], claim .. '/aborted', 'KEEPTTL') end
return 1
"""
_RELEASE = """
local claim = redis.call('get', KEYS[1])
if claim and string.find(claim, ARGV[1], 1, true) == 1 then return redis.call('del', KEYS[1]) end
return 0
"""


class RedisHints:
    """A HintStore in Redis. With Redis gone, each method raises RedisUnavailableError within a quarter second."""

    def __init__(self, url: str, facts: RoutingFacts, fingerprint: str) -> None:
        self._facts = facts
        self._prefix = f"expert-pager:1:{fingerprint}"
        self._router = uuid.uuid4().hex
        self._claims: set[str] = set()  # keys
        self._client = RedisClient(url)

    async def find_pool(self, keys: Sequence[str]) -> ExpertPool | None:
        async with self._client.commands() as redis:
            values = await redis.mget([self._key("pool", key) for key in keys])
        pools = (decode_pool(value, self._facts) for value in values)
        return next((pool for pool in pools if pool is not None), None)

    async def remember_pool(self, keys: Sequence[str], pool: ExpertPool) -> None:
        value = encode_pool(pool)
        async with self._client.commands() as redis, redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.set(self._key("pool", key), value, ex=POOL_TTL_S)
            await pipeline.execute()

    async def claim(self, request_id: str, tenant: str) -> bool:
        key = self._claim_key(request_id, tenant)
        self._claims.add(key)  # before the answer: a cancelled caller releases what Redis may have taken
        async with self._client.commands() as redis, redis.pipeline() as pipeline:
            pipeline.set(key, self._router, nx=True, px=CLAIM_TTL_MS)
            pipeline.get(key)
            _, holder = await pipeline.execute()
        # By its holder, not by the answer of SET: a heartbeat in between may have set it for us.
        is_mine = holder is not None and holder.startswith(self._router.encode())
        if not is_mine:
            self._claims.discard(key)
        return is_mine

    async def release(self, request_id: str, tenant: str) -> None:
        key = self._claim_key(request_id, tenant)
        if key in self._claims:
            self._claims.discard(key)
            await self._client.script(_RELEASE, (key,), self._router)

    async def mark_aborted(self, request_id: str, tenant: str) -> bool:
        return bool(await self._client.script(_MARK_ABORTED, (self._claim_key(request_id, tenant),)))

    async def is_aborted(self, request_id: str, tenant: str) -> bool:
        async with self._client.commands() as redis:
            value = await redis.get(self._claim_key(request_id, tenant))
        return value is not None and value.endswith(_ABORTED)

    async def heartbeat(self, residency: Mapping[str, WorkerHolds]) -> None:
        async with self._client.commands() as redis, redis.pipeline(transaction=False) as pipeline:
            claims = list(self._claims)
            for key in claims:
                pipeline.pexpire(key, CLAIM_TTL_MS)
            for worker_id, holds in residency.items():
                pipeline.set(self._key("holds", worker_id), encode_holds(holds), px=HOLDS_TTL_MS)
            pipeline.ping()
            renewed = await pipeline.execute()
            # Redis lost these, or was away when they were made.
            lost = [key for key, is_there in zip(claims, renewed, strict=False) if not is_there]
            for key in lost:
                if key in self._claims:
                    pipeline.set(key, self._router, nx=True, px=CLAIM_TTL_MS)
            await pipeline.execute()

    async def residency(self) -> dict[str, WorkerHolds]:
        prefix = self._key("holds", "")
        async with self._client.commands() as redis:
            names: list[bytes] = []
            async for name in redis.scan_iter(match=f"{prefix}*", count=256):
                names.append(name)
                if len(names) >= MAX_WORKERS:
                    break
            values = await redis.mget(names) if names else []
        found = {}
        for name, value in zip(names, values, strict=True):
            holds = decode_holds(value, self._facts)
            if holds is not None:
                found[name.decode(errors="replace").removeprefix(prefix)] = holds
        return found

    async def close(self) -> None:
        await self._client.close()

    def _claim_key(self, request_id: str, tenant: str) -> str:
        return self._key("claim", f"{tenant}:{request_id}")  # no tenant's name has a colon

    def _key(self, kind: str, name: str) -> str:
        return f"{self._prefix}:{kind}:{name}"
