"""Redis: the client and its breaker. The only module that imports redis."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from pager.errors import ConfigError
from pager.reading import read_bounded

TIMEOUT_S = 0.25
MAX_URL_BYTES = 1 << 16


# What a Redis that is there answers when it takes no commands, or no writes, by the code that begins its error.
_REASON_OF_CODE = {
    "READONLY": "readonly",
    "OOM": "full",
    "MISCONF": "full",
    "BUSY": "busy",
    "LOADING": "loading",
    "MASTERDOWN": "unreachable",  # a replica that answers nothing until it has its primary back
    "MOVED": "moved",
    "ASK": "moved",
    "CLUSTERDOWN": "moved",
}
_MEANINGS = {
    "unreachable": "it cannot be reached",
    "timeout": "it does not answer in time",
    "readonly": "it is a replica and takes no writes",
    "full": "it takes no writes: its memory (maxmemory under noeviction) or its disk is full",
    "busy": "it is busy with somebody's script",
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
    try:
        parse_url(url)
    except ValueError:
        raise ConfigError("the Redis URL cannot be parsed; it reads redis://[user:password@]host:port/db") from None
    return url


def timeouts() -> dict[str, Any]:
    """The options of a connection that bound how long a command may take."""
    return {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}


class RedisClient:
    """A pool of connections. With Redis gone, a command raises RedisUnavailableError within a quarter second.

    After any error the next command connects anew: after a failover the address names another server, and the one
    that was the primary keeps its connections and answers READONLY for ever.
    """

    def __init__(self, url: str) -> None:
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
        except (RedisError, OSError, TimeoutError) as error:
            with suppress(RedisError, OSError, TimeoutError):
                # Those in use belong to commands that will fail by themselves.
                await self._redis.connection_pool.disconnect(inuse_connections=False)
            # The error's own message can quote the URL.
            raise RedisUnavailableError(_reason(error), type(error).__name__) from None

    async def script(self, script: str, keys: tuple[str, ...], *arguments: str | bytes | int) -> Any:
        """Runs a Lua script on these keys: it compares and acts in one step."""
        async with self.commands() as redis:
            return await redis.eval(script, len(keys), *keys, *arguments)

    async def close(self) -> None:
        async with self.commands() as redis:
            await redis.aclose()


def _reason(error: Exception) -> str:
    if isinstance(error, ResponseError | BusyLoadingError):
        code = getattr(error, "status_code", None) or str(error).partition(" ")[0]
        return _REASON_OF_CODE.get(code, "other")
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return "timeout"
    return "unreachable" if isinstance(error, RedisConnectionError | OSError) else "other"


log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0

Answer = TypeVar("Answer")


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
        # Spread over half to all of the pause, so that routers do not come back in step.
        self._asks_again_s = self._clock() + pause_s * (0.5 + 0.5 * self._jitter())

    def succeeded(self) -> None:
        self._failures, self._asks_again_s = 0, 0.0


class Paused(RedisUnavailableError):
    """Raised while the store is left alone after a failure."""


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
