"""Which store named pools live in."""

from __future__ import annotations

from pathlib import Path

from pager.errors import ConfigError
from router_service.breaker import StoreBreaker
from router_service.folder_pools import FolderPools
from router_service.pool_store import MemoryPools, PoolStore
from router_service.redis_client import RedisClient
from router_service.redis_pools import RedisPools
from router_service.shared_pools import SharedPools


def open_pools(redis_url: str | None, path: Path | None, breaker: StoreBreaker | None = None) -> PoolStore:
    """Redis, else a folder, else this process. Raises ConfigError for two of them, and for a folder that is none."""
    if redis_url is not None and path is not None:
        raise ConfigError(
            f"named pools are kept in Redis where REDIS_URL names one, so their folder {path} can take no effect; "
            "keep one of the two"
        )
    if redis_url is not None:
        return SharedPools(RedisPools(RedisClient(redis_url)), breaker or StoreBreaker())
    return MemoryPools() if path is None else FolderPools(path)
