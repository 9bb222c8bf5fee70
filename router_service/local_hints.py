"""The hint store of a router that stands alone, and of one whose Redis is gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from pager.types import ExpertPool
from router_service.hints import WorkerHolds

MAX_POOLS = 4096


class InProcessHints:
    """Owns an LRU of pools, and the ids in flight at this router (bounded by its admission)."""

    def __init__(self, max_pools: int = MAX_POOLS) -> None:
        self._max_pools = max_pools
        self._pools: OrderedDict[str, ExpertPool] = OrderedDict()
        self._tenants: dict[str, str] = {}  # of the requests in flight
        self._aborted: set[str] = set()
        self._residency: dict[str, WorkerHolds] = {}

    @property
    def num_pools(self) -> int:
        return len(self._pools)

    @property
    def claims(self) -> Mapping[str, str]:
        """Tenant by request id."""
        return self._tenants

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
        if request_id in self._tenants:
            return False
        self._tenants[request_id] = tenant
        return True

    async def release(self, request_id: str) -> None:
        self._tenants.pop(request_id, None)
        self._aborted.discard(request_id)

    async def mark_aborted(self, request_id: str, tenant: str) -> bool:
        if self._tenants.get(request_id) != tenant:
            return False
        self._aborted.add(request_id)
        return True

    async def is_aborted(self, request_id: str) -> bool:
        return request_id in self._aborted

    async def heartbeat(self, residency: Mapping[str, WorkerHolds]) -> None:
        self._residency = dict(residency)

    async def residency(self) -> dict[str, WorkerHolds]:
        return dict(self._residency)

    async def close(self) -> None:
        self._pools.clear()
