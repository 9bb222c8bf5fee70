"""Where named pools live. What a user made: nothing expires, and nothing makes room for something else.

Tenants name themselves, so the room of all is bounded too, and shared out so that a few cannot take it: a tenant may
have as many pools as it leaves free for others. Of N tenants that want all, each gets a share of 1 / (N + 1), and as
much stays free for one that comes later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from pager.errors import DamagedPool, PoolNameInUse, TooManyPools
from pager.routing.named import NamedPool, decode_named

MAX_POOLS_OF_TENANT = 256
MAX_POOLS = 16_384  # of all tenants


@dataclass(frozen=True, slots=True)
class Listing:
    """A tenant's pools by name; `damaged` names what is stored and can not be read."""

    pools: tuple[NamedPool, ...]
    damaged: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """All that are taken."""
        return frozenset((*(named.name for named in self.pools), *self.damaged))


class PoolStore(Protocol):
    """Pools by tenant and name. Every method raises PoolStoreUnavailable when the store can not be reached."""

    async def find(self, tenant: str, name: str) -> NamedPool | None:
        """Raises DamagedPool."""

    async def add(self, tenant: str, named: NamedPool) -> None:
        """Raises PoolNameInUse or TooManyPools. Of two at a time under one name, one is refused."""

    async def replace(self, tenant: str, named: NamedPool) -> None:
        """Adds it, or takes the place of the one of that name. Raises TooManyPools."""

    async def delete(self, tenant: str, name: str) -> bool:
        """False when there was none."""

    async def all_of(self, tenant: str) -> Listing: ...

    async def close(self) -> None: ...


class MemoryPools:
    """For as long as this process lives."""

    def __init__(self) -> None:
        self._pools: dict[str, dict[str, NamedPool]] = {}

    async def find(self, tenant: str, name: str) -> NamedPool | None:
        return self._pools.get(tenant, {}).get(name)

    async def add(self, tenant: str, named: NamedPool) -> None:
        if await self.find(tenant, named.name) is not None:
            raise name_in_use(named.name)
        await self.replace(tenant, named)

    async def replace(self, tenant: str, named: NamedPool) -> None:
        mine = self._pools.get(tenant, {})
        if named.name not in mine:
            check_room(len(mine), sum(map(len, self._pools.values())))
        self._pools.setdefault(tenant, mine)[named.name] = named

    async def delete(self, tenant: str, name: str) -> bool:
        mine = self._pools.get(tenant, {})
        is_there = mine.pop(name, None) is not None
        if is_there and not mine:
            del self._pools[tenant]
        return is_there

    async def all_of(self, tenant: str) -> Listing:
        return Listing(tuple(named for _, named in sorted(self._pools.get(tenant, {}).items())))

    async def close(self) -> None:
        self._pools.clear()


async def listing_of(stored: Iterable[tuple[str, bytes]]) -> Listing:
    """Name and bytes of each pool, decoded one by one: hundreds of large ones take a while."""
    pools, damaged = [], []
    for name, data in stored:
        try:
            pools.append(decode_named(data, name))
        except DamagedPool:
            damaged.append(name)
        await asyncio.sleep(0)
    return Listing(tuple(pools), tuple(damaged))


def name_in_use(name: str) -> PoolNameInUse:
    return PoolNameInUse(f"there is a pool {name!r}; choose another name, or ask to `replace` it", field="name")


def check_room(num_of_tenant: int, num_of_all: int) -> None:
    """Checks before one more is added. Raises TooManyPools."""
    if num_of_tenant >= MAX_POOLS_OF_TENANT:
        raise TooManyPools(f"this tenant has its {MAX_POOLS_OF_TENANT} named pools; delete one that is not needed")
    if num_of_tenant >= MAX_POOLS - num_of_all:
        raise TooManyPools(
            f"the store of named pools is nearly full, and a tenant may have no more of them than it leaves free for "
            f"others; this one has {num_of_tenant}: delete one that is not needed"
        )
