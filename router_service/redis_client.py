"""The door to Redis: the only module that imports it. Its errors leave as RedisUnavailableError."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from pager.errors import ConfigError
from pager.reading import read_bounded

TIMEOUT_S = 0.25
MAX_URL_BYTES = 1 << 16


class RedisUnavailableError(Exception):
    """Redis can not be reached, or refused the command."""


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
    """A pool of connections. With Redis gone, a command raises RedisUnavailableError within a quarter second."""

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
            # The error's own message can quote the URL.
            raise RedisUnavailableError(type(error).__name__) from None

    async def script(self, script: str, key: str, *arguments: str | bytes | int) -> Any:
        """Runs a Lua script on one key: it compares and acts in one step."""
        async with self.commands() as redis:
            return await redis.eval(script, 1, key, *arguments)

    async def close(self) -> None:
        async with self.commands() as redis:
            await redis.aclose()
