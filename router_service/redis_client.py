"""The door to Redis: the only module that imports it. Its errors leave as RedisUnavailableError."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

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


REASONS = ("unreachable", "timeout", "readonly", "full", "busy", "loading", "moved", "other")

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
    """Redis cannot be reached, or refused the command. `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(_MEANINGS[reason] + (f" ({detail})" if detail else ""))
        self.reason = reason

    @property
    def still_reads(self) -> bool:
        """Only writes are refused; what is there can be read."""
        return self.reason in ("readonly", "full")


def redis_url(env: Mapping[str, str]) -> str | None:
    """From REDIS_URL, or the file that REDIS_URL_FILE names.

    Raises ConfigError, which never quotes the URL: it holds a password.
    """
    url, path = env.get("REDIS_URL"), env.get("REDIS_URL_FILE")
    if url and path:
        raise ConfigError("REDIS_URL and REDIS_URL_FILE are both set; keep one")
    if path:
        try:
            url = read_bounded(path, MAX_URL_BYTES).decode("utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"REDIS_URL_FILE {path} can not be read: {type(error).__name__}") from None
    if not url:
        return None
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError("the Redis URL must start with redis://, rediss:// or unix://")
    try:
        parse_url(url)
    except ValueError:
        raise ConfigError("the Redis URL can not be parsed; it reads redis://[user:password@]host:port/db") from None
    return url


class RedisClient:
    """A pool of connections. With Redis gone, a command raises RedisUnavailableError within a quarter second.

    After any error the next command connects anew: after a failover the address names another server, and the one
    that was the primary keeps its connections and answers READONLY for ever.
    """

    def __init__(self, url: str) -> None:
        # Any: the client's types leave open whether values are bytes or text; here they are bytes.
        self._redis: Any = Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=64,
        )

    @asynccontextmanager
    async def commands(self) -> AsyncIterator[Any]:
        """The client, for as long as the block takes."""
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
