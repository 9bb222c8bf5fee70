"""Redis: the client, its breaker, and the stores that routers share. The only module that imports redis.

It does so where Redis is used: a router without it saves the 9 MiB.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from limits import RateLimitItem
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError

from pager.errors import ConfigError, PoolStoreUnavailable
from pager.pools.pick import decode_named, encode_named
from pager.predict.learning import Learned, decode_learned, encode_learned
from pager.reading import read_bounded
from pager.types import ExpertPool, NamedPool, PoolListing, RoutingFacts, WorkerResidency
from router_service import pools
from router_service.admission import Caller, Quotas
from router_service.hints import (
    InProcessHints,
    LocalClaims,
    Turn,
    decode_pool,
    decode_turn,
    decode_worker,
    encode_pool,
    encode_worker,
)
from router_service.pools import FolderPools, MemoryPools, PoolStore, check_room, listing_of, name_in_use

log = logging.getLogger(__name__)

TIMEOUT_S = 0.25
MAX_URL_BYTES = 1 << 16
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # of a store that has failed
POOL_TTL_S = 3600
LEARNED_TTL_S = 30 * 24 * 3600
CLAIM_TTL_MS = 30_000  # renewed once a second; the ids of a router that died are free after this time
HOLDS_TTL_MS = 5_000
MAX_WORKERS = 1024
MAX_CACHED = 256  # named pools that a router remembers
_ABORTED = b"/aborted"

Answer = TypeVar("Answer")
PoolAnswer = TypeVar("PoolAnswer")
Way = Callable[[Callable[[], Awaitable[PoolAnswer]]], Awaitable[PoolAnswer]]

# Why a Redis that answers refuses commands or writes, by the code that begins its error.
_REASON_OF_CODE = {
    "READONLY": "readonly",
    "OOM": "full",
    "MISCONF": "full",
    "BUSY": "busy",
    "LOADING": "loading",
    "MASTERDOWN": "unreachable",  # a replica that answers nothing until it is connected to its primary again
    "MOVED": "moved",
    "ASK": "moved",
    "CLUSTERDOWN": "moved",
}
_MEANINGS = {
    "unreachable": "it cannot be reached",
    "timeout": "it does not answer in time",
    "readonly": "it is a replica and takes no writes",
    "full": "it takes no writes: its memory (maxmemory under noeviction) or its disk is full",
    "busy": "it is busy with a script",
    "loading": "it is still loading its data",
    "moved": "it is a node of a Redis Cluster, which is not supported; name a single primary",
    "other": "it refused a command",
}


class RedisUnavailableError(Exception):
    """Redis cannot be reached, or refused the command. `reason` is one of `metrics.REDIS_REASONS`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(_MEANINGS[reason] + (f" ({detail})" if detail else ""))
        self.reason = reason

    @property
    def still_reads(self) -> bool:
        """True when only writes are refused and reads still work."""
        return self.reason in ("readonly", "full")


def redis_url(env: Mapping[str, str]) -> str | None:
    """Reads the URL from REDIS_URL, or from the file that REDIS_URL_FILE names.

    Raises ConfigError, which never quotes the URL: it holds a password.
    """
    url, path = env.get("REDIS_URL"), env.get("REDIS_URL_FILE")
    if url and path:
        raise ConfigError("REDIS_URL and REDIS_URL_FILE are both set; keep one")
    if path:
        try:
            url = read_bounded(path, MAX_URL_BYTES).decode("utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"REDIS_URL_FILE {path} cannot be read: {type(error).__name__}") from None
    if not url:
        return None
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError("the Redis URL must start with redis://, rediss:// or unix://")
    from redis.asyncio.connection import parse_url

    try:
        parse_url(url)
    except ValueError:
        raise ConfigError("the Redis URL cannot be parsed; it reads redis://[user:password@]host:port/db") from None
    return url


def timeouts() -> dict[str, Any]:
    """Returns the options of a connection that bound how long a command may take."""
    return {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}


class RedisClient:
    """A pool of connections. When Redis is unreachable, a command raises RedisUnavailableError within a quarter second.

    After any error the next command connects anew: after a failover the address names another server, and the previous
    primary keeps its connections and answers READONLY forever.
    """

    def __init__(self, url: str) -> None:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        self._errors = (RedisError, OSError, TimeoutError)
        # Any: the client's types leave open whether values are bytes or text; here they are bytes.
        self._redis: Any = Redis.from_url(
            url,
            **timeouts(),
            retry=Retry(NoBackoff(), 0),
            max_connections=64,
        )

    @asynccontextmanager
    async def commands(self) -> AsyncIterator[Any]:
        """Yields the client for the duration of the block."""
        try:
            yield self._redis
        except self._errors as error:
            with suppress(*self._errors):
                # Connections in use belong to commands that will fail by themselves.
                await self._redis.connection_pool.disconnect(inuse_connections=False)
            # The error's own message can quote the URL.
            raise RedisUnavailableError(_reason(error), type(error).__name__) from None

    async def script(self, script: str, keys: tuple[str, ...], *arguments: str | bytes | int) -> Any:
        """Runs a Lua script on these keys; it compares and changes in one step."""
        async with self.commands() as redis:
            return await redis.eval(script, len(keys), *keys, *arguments)

    async def close(self) -> None:
        async with self.commands() as redis:
            await redis.aclose()


def _reason(error: Exception) -> str:
    from redis import exceptions

    if isinstance(error, exceptions.ResponseError | exceptions.BusyLoadingError):
        code = getattr(error, "status_code", None) or str(error).partition(" ")[0]
        return _REASON_OF_CODE.get(code, "other")
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return "timeout"
    return "unreachable" if isinstance(error, exceptions.ConnectionError | OSError) else "other"


class Breaker:
    """A circuit breaker: after a failure the store is left alone for a while, after more failures for longer."""

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
        """Returns how long the store is left alone from now on."""
        return max(0.0, self._asks_again_s - self._clock())

    def allows(self) -> bool:
        return self._clock() >= self._asks_again_s

    def failed(self) -> None:
        pause_s = min(_FIRST_PAUSE_S * 2**self._failures, _LONGEST_PAUSE_S)
        self._failures = min(self._failures + 1, 16)
        # Spread over half to all of the pause, so that routers do not reconnect in step.
        self._asks_again_s = self._clock() + pause_s * (0.5 + 0.5 * self._jitter())

    def succeeded(self) -> None:
        self._failures, self._asks_again_s = 0, 0.0


class Paused(RedisUnavailableError):
    """Raised while the store is left alone after a failure."""


class StoreBreaker:
    """The breakers of one Redis. A replica, or a full one, refuses writes but answers reads.

    So reads and writes have a breaker each. A failure that concerns both opens both, and a write that succeeds closes
    both; the store is degraded until both are closed.
    """

    def __init__(
        self,
        on_degraded: Callable[[bool], None] = lambda _: None,
        on_failure: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`on_failure` receives the reason of every failure, `on_degraded` every failure and the first success after.

        A reason is one of `metrics.REDIS_REASONS`.
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
        """Returns how long the store is left alone from now on, by the longer of the two breakers."""
        return max(self._reads.pause_s, self._writes.pause_s)

    async def read(self, question: Callable[[], Awaitable[Answer]]) -> Answer:
        """Runs a command that changes nothing and returns its answer. Raises RedisUnavailableError."""
        return await self._ask(question, [self._reads])

    async def write(self, question: Callable[[], Awaitable[Answer]]) -> Answer:
        """Runs a command that changes something and returns its answer. Raises RedisUnavailableError."""
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


# --- the shared stores ------------------------------------------------------------------------------------------------


# Compares and changes in one step: the claim may expire, or pass to another router, in between.
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
    """A HintStore in Redis. Without Redis, each method raises RedisUnavailableError within a quarter second."""

    def __init__(self, client: RedisClient, facts: RoutingFacts, fingerprint: str) -> None:
        self._client = client
        self._facts = facts
        self._prefix = f"expert-pager:1:{fingerprint}"

    async def find_pool(self, keys: Sequence[str], token_ids: Sequence[int] = ()) -> ExpertPool | None:
        async with self._client.commands() as redis:
            values = await redis.mget([f"{self._prefix}:pool:{key}" for key in keys])
        for value in filter(None, values):
            turn, pool = decode_turn(value), decode_pool(value, self._facts)
            if pool is not None and (turn is None or turn.is_continued_by(token_ids)):
                return pool
        return None

    async def remember_pool(self, keys: Sequence[str], pool: ExpertPool, turn: Turn | None = None) -> None:
        value = encode_pool(pool, turn)
        async with self._client.commands() as redis, redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.set(f"{self._prefix}:pool:{key}", value, ex=POOL_TTL_S)
            await pipeline.execute()

    async def report(self, workers: Sequence[WorkerResidency]) -> None:
        async with self._client.commands() as redis, redis.pipeline(transaction=False) as pipeline:
            for worker in workers:
                pipeline.set(f"{self._prefix}:holds:{worker.id}", encode_worker(worker), px=HOLDS_TTL_MS)
            pipeline.ping()
            await pipeline.execute()

    async def residency(self) -> dict[str, WorkerResidency]:
        prefix = f"{self._prefix}:holds:"
        async with self._client.commands() as redis:
            names: list[bytes] = []
            async for name in redis.scan_iter(match=f"{prefix}*", count=256):
                names.append(name)
                if len(names) >= MAX_WORKERS:
                    break
            values = await redis.mget(names) if names else []
        found = {}
        for name, value in zip(names, values, strict=True):
            worker_id = name.decode(errors="replace").removeprefix(prefix)
            worker = decode_worker(worker_id, value, self._facts)
            if worker is not None:
                found[worker_id] = worker
        return found

    async def close(self) -> None:
        await self._client.close()


class RedisClaims:
    """Claims in Redis. When Redis is unreachable, each method raises RedisUnavailableError within a quarter second."""

    def __init__(self, client: RedisClient, fingerprint: str) -> None:
        self._client = client
        self._prefix = f"expert-pager:1:{fingerprint}:claim:"
        self._router = uuid.uuid4().hex
        self._held: set[str] = set()  # keys

    async def claim(self, request_id: str, tenant: str) -> bool:
        key = self._key(request_id, tenant)
        self._held.add(key)  # before the answer, so that a cancelled caller releases what Redis may have accepted
        async with self._client.commands() as redis, redis.pipeline() as pipeline:
            pipeline.set(key, self._router, nx=True, px=CLAIM_TTL_MS)
            pipeline.get(key)
            _, holder = await pipeline.execute()
        # Decided by the claim's holder, not by the answer of SET: a renewal may have set it for this router.
        is_mine = holder is not None and holder.startswith(self._router.encode())
        if not is_mine:
            self._held.discard(key)
        return is_mine

    async def release(self, request_id: str, tenant: str) -> None:
        key = self._key(request_id, tenant)
        if key in self._held:
            self._held.discard(key)
            await self._client.script(_RELEASE, (key,), self._router)

    async def mark_aborted(self, request_id: str, tenant: str) -> bool:
        return bool(await self._client.script(_MARK_ABORTED, (self._key(request_id, tenant),)))

    async def is_aborted(self, request_id: str, tenant: str) -> bool:
        async with self._client.commands() as redis:
            value = await redis.get(self._key(request_id, tenant))
        return value is not None and value.endswith(_ABORTED)

    async def renew(self) -> None:
        """Keeps the claims that are held here from expiring; called about once a second."""
        async with self._client.commands() as redis, redis.pipeline(transaction=False) as pipeline:
            held = list(self._held)
            for key in held:
                pipeline.pexpire(key, CLAIM_TTL_MS)
            pipeline.ping()
            renewed = await pipeline.execute()
            # Redis lost these claims, or was unreachable when they were made.
            lost = [key for key, is_there in zip(held, renewed, strict=False) if not is_there]
            for key in lost:
                if key in self._held:
                    pipeline.set(key, self._router, nx=True, px=CLAIM_TTL_MS)
            await pipeline.execute()

    async def close(self) -> None:
        await self._client.close()

    def _key(self, request_id: str, tenant: str) -> str:
        return f"{self._prefix}{tenant}:{request_id}"  # no tenant's name has a colon


# Both scripts take the hash of a tenant and that of the counts, where a tenant's number is set to the length of its
# hash: a count that another program changed is right again after the tenant's next pool.
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
    """A PoolStore whose methods raise RedisUnavailableError when Redis is unreachable."""

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

    async def all_of(self, tenant: str) -> PoolListing:
        async with self._client.commands() as redis:
            stored = await redis.hgetall(_key(tenant))
        return await listing_of((field.decode(errors="replace"), data) for field, data in sorted(stored.items()))

    async def close(self) -> None:
        await self._client.close()

    async def _put(self, tenant: str, named: NamedPool, verb: str) -> None:
        limits = pools.MAX_POOLS_OF_TENANT, pools.MAX_POOLS
        outcome = await self._client.script(
            _PUT, (_key(tenant), _COUNTS), tenant, named.name, encode_named(named), verb, *limits
        )
        if outcome == b"in use":
            raise name_in_use(named.name)
        if isinstance(outcome, list):
            check_room(*outcome)


def _key(tenant: str) -> str:
    return f"expert-pager:1:named-pools:{tenant}"


class _Shared:
    """The base of stores that replace a shared store while it is unreachable."""

    def __init__(self, breaker: StoreBreaker) -> None:
        self._breaker = breaker

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


class SharedHints(_Shared):
    """A HintStore that never raises: the local store answers what the shared one cannot."""

    def __init__(self, local: InProcessHints, shared: RedisHints, claims: RedisClaims, breaker: StoreBreaker) -> None:
        """Makes the store. `claims` are renewed with each report, under one verdict of the breaker: a renewal succeeds
        where a write is refused, and would hide that.
        """
        super().__init__(breaker)
        self._local = local
        self._shared = shared
        self._claims = claims

    async def find_pool(self, keys: Sequence[str], token_ids: Sequence[int] = ()) -> ExpertPool | None:
        found = await self._read(lambda: self._shared.find_pool(keys, token_ids), None)
        return found or await self._local.find_pool(keys, token_ids)

    async def remember_pool(self, keys: Sequence[str], pool: ExpertPool, turn: Turn | None = None) -> None:
        await self._local.remember_pool(keys, pool, turn)
        await self._write(lambda: self._shared.remember_pool(keys, pool, turn), None)

    async def report(self, workers: Sequence[WorkerResidency]) -> None:
        await self._local.report(workers)
        await self._write(lambda: self._renew_and_report(workers), None)

    async def _renew_and_report(self, workers: Sequence[WorkerResidency]) -> None:
        await self._claims.renew()
        await self._shared.report(workers)

    async def residency(self) -> dict[str, WorkerResidency]:
        elsewhere: dict[str, WorkerResidency] = await self._read(self._shared.residency, {})
        return elsewhere | await self._local.residency()

    async def close(self) -> None:
        await self._local.close()
        with suppress(RedisUnavailableError):
            await self._shared.close()


class SharedClaims(_Shared):
    """Claims that never raise: while the shared ones are unreachable, an id is unique at this router alone."""

    def __init__(self, local: LocalClaims, shared: RedisClaims, breaker: StoreBreaker) -> None:
        super().__init__(breaker)
        self._local = local
        self._shared = shared

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

    async def close(self) -> None:
        await self._local.close()
        with suppress(RedisUnavailableError):
            await self._shared.close()


_SAVE_LEARNED = """
local found = redis.call('hget', KEYS[1], 'version')
if found and found ~= ARGV[1] then return 0 end
redis.call('hset', KEYS[1], 'version', ARGV[2], 'learned', ARGV[3])
redis.call('expire', KEYS[1], ARGV[4])
return 1
"""


class RedisLearned:
    """A LearnedStore whose methods raise RedisUnavailableError when Redis is gone."""

    def __init__(self, client: RedisClient, facts: RoutingFacts, fingerprint: str) -> None:
        self._client = client
        self._num_outputs = sum(facts.routed_per_layer)
        self._key = f"expert-pager:1:{fingerprint}:learned-codewords"

    async def version(self) -> int | None:
        async with self._client.commands() as redis:
            found = await redis.hget(self._key, "version")
        return int(found) if found is not None and found.isdigit() else None

    async def load(self) -> Learned | None:
        async with self._client.commands() as redis:
            return decode_learned(await redis.hget(self._key, "learned"), self._num_outputs)

    async def save(self, learned: Learned, replaces: int) -> bool:
        data = encode_learned(learned)
        saved = await self._client.script(_SAVE_LEARNED, (self._key,), replaces, learned.version, data, LEARNED_TTL_S)
        return bool(saved)


class SharedLearned(_Shared):
    """A LearnedStore that never raises: while the shared one is away, each router learns by itself."""

    def __init__(self, shared: RedisLearned, breaker: StoreBreaker) -> None:
        super().__init__(breaker)
        self._shared = shared

    async def version(self) -> int | None:
        return await self._read(self._shared.version, None)

    async def load(self) -> Learned | None:
        return await self._read(self._shared.load, None)

    async def save(self, learned: Learned, replaces: int) -> bool:
        return await self._write(lambda: self._shared.save(learned, replaces), True)


class SharedPools:
    """A PoolStore. Redis is read every time, so that no router uses a pool that another one deleted or replaced; while
    it is unreachable, a pool that was used here before can still be used.
    """

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

    async def all_of(self, tenant: str) -> PoolListing:
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

    async def _ask(self, way: Way[PoolAnswer], question: Callable[[], Awaitable[PoolAnswer]]) -> PoolAnswer:
        """Calls Redis; `way` is the breaker's read or write. Raises PoolStoreUnavailable."""
        try:
            return await way(question)
        except RedisUnavailableError as error:
            raise PoolStoreUnavailable(
                f"the store of named pools (Redis) does not answer this now: {error}; retry later, or give the pool's "
                "experts instead",
                retry_after_s=max(0.1, self._breaker.pause_s),
            ) from None


def open_pools(redis_url: str | None, path: Path | None, breaker: StoreBreaker | None = None) -> PoolStore:
    """Opens the store in Redis, a folder or this process. Raises ConfigError for two of them, or an unusable folder."""
    if redis_url is not None and path is not None:
        raise ConfigError(
            f"named pools are kept in Redis where REDIS_URL names one, so their folder {path} would have no effect; "
            "keep one of the two"
        )
    if redis_url is not None:
        return SharedPools(RedisPools(RedisClient(redis_url)), breaker or StoreBreaker())
    return MemoryPools() if path is None else FolderPools(path)


class SharedQuotas(Quotas):
    """Quotas that all routers count together; while Redis is unreachable, each router counts by itself."""

    def __init__(self, url: str, breaker: StoreBreaker) -> None:
        super().__init__()
        scheme, _, rest = url.partition(":")
        self._storage = RedisStorage(
            f"async+redis+unix:{rest}" if scheme == "unix" else f"async+{url}",
            wrap_exceptions=True,
            implementation="redispy",
            key_prefix="expert-pager:1:quota",
            **timeouts(),
        )
        self._shared = FixedWindowRateLimiter(self._storage)
        self._breaker = breaker

    async def close(self) -> None:
        bridge: Any = self._storage.bridge
        from redis.exceptions import RedisError

        with suppress(RedisError, OSError, TimeoutError):
            await bridge.get_connection().aclose()

    async def _ask(
        self, question: Callable[..., Awaitable[Answer]], item: RateLimitItem, caller: Caller, **options: int
    ) -> Answer:
        async def ask() -> Answer:
            try:
                return await question(self._shared, item, caller.id, **options)
            except (StorageError, OSError, TimeoutError) as error:
                cause = getattr(error, "storage_error", error)
                raise RedisUnavailableError(_reason(cause), type(cause).__name__) from None

        through = self._breaker.write if question is FixedWindowRateLimiter.hit else self._breaker.read
        try:
            return await through(ask)
        except RedisUnavailableError:
            return await super()._ask(question, item, caller, **options)
