"""The hint store of a router that stands alone, and of one whose Redis is gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set

from pager.types import ExpertPool
from router_service.hints import WorkerHolds

MAX_POOLS = 4096


class InProcessHints:
    """Owns an LRU of pools, and the ids in flight at this router (bounded by its admission)."""

    def __init__(self, max_pools: int = MAX_POOLS) -> None:
        self._max_pools = max_pools
        self._pools: OrderedDict[str, ExpertPool] = OrderedDict()
        self._claims: set[tuple[str, str]] = set()  # tenant and id of the requests in flight
        self._aborted: set[tuple[str, str]] = set()
        self._residency: dict[str, WorkerHolds] = {}

    @property
    def num_pools(self) -> int:
        return len(self._pools)

    @property
    def claims(self) -> Set[tuple[str, str]]:
        """Tenant and request id of what is in flight."""
        return self._claims

    async def find_pool(self, keys: Sequence[str]) -> ExpertPool | None:
        for key in keys:
            if key in self._pools:
                self._pools.move_to_end(key)
                return self._pools[key]
        return None

    async def remember_pool(self, keys: Sequence[str], pool: ExpertPool) -> None:
        for key in keys:
            self._pools[key] = pool
            self._pools.move_to_end(key)
        while len(self._pools) > self._max_pools:
            self._pools.popitem(last=False)

    async def claim(self, request_id: str, tenant: str) -> bool:
        claim = (tenant, request_id)
        if claim in self._claims:
            return False
        self._claims.add(claim)
        return True

    async def release(self, request_id: str, tenant: str) -> None:
        self._claims.discard((tenant, request_id))
        self._aborted.discard((tenant, request_id))

    async def mark_aborted(self, request_id: str, tenant: str) -> bool:
        claim = (tenant, request_id)
        if claim not in self._claims:
            return False
        self._aborted.add(claim)
        return True

    async def is_aborted(self, request_id: str, tenant: str) -> bool:
        return (tenant, request_id) in self._aborted

    async def heartbeat(self, residency: Mapping[str, WorkerHolds]) -> None:
        self._residency = dict(residency)

    async def residency(self) -> dict[str, WorkerHolds]:
        return dict(self._residency)

    async def close(self) -> None:
        self._pools.clear()
