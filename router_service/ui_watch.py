"""What `/ui` shows: residency now, pools, and paging over the last minutes. Bounded, whatever the load."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pager import __version__
from pager.types import ExpertPool, PagingTotals
from router_service import encode
from router_service.hints import HintStore, WorkerHolds
from router_service.ports import ClusterPort, ModelInfo
from router_service.ui_pools import PoolLog, PoolRow

SAMPLE_S = 5.0
NUM_SAMPLES = 60
MAX_WORKERS = 32
MAX_POOLS = 40
_COUNTS = tuple(each.name for each in fields(PagingTotals))
_SERVING = ("ready", "draining")


@dataclass(slots=True)
class Sample:
    """What was paged in `seconds` until `end_unix_s`, by all workers of this router."""

    end_unix_s: float
    seconds: float = 0.0
    paged: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))


class Watch:
    """Owns the samples. Lives on the router's event loop; `beat` is called about once a second."""

    def __init__(
        self,
        model: ModelInfo,
        cluster: ClusterPort,
        hints: HintStore,
        pools: PoolLog,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._cluster = cluster
        self._hints = hints
        self._pools = pools
        self._clock = clock
        self._last_s = clock()
        self._last: dict[str, PagingTotals] = {}  # of each worker that serves
        self._samples: deque[Sample] = deque([Sample(time.time())], NUM_SAMPLES)

    def beat(self) -> None:
        """Adds what was paged since the last beat. Of a worker that is new, what it paged before is not counted."""
        now_s = self._clock()
        if self._samples[-1].seconds >= SAMPLE_S:
            self._samples.append(Sample(time.time()))
        sample = self._samples[-1]
        sample.seconds += now_s - self._last_s
        sample.end_unix_s = time.time()
        serving = {worker.id: worker.paging for worker in self._cluster.workers() if worker.state in _SERVING}
        for worker_id, totals in serving.items():
            before = self._last.get(worker_id, totals)
            for name in _COUNTS:
                sample.paged[name] += max(0, getattr(totals, name) - getattr(before, name))
        self._last_s, self._last = now_s, serving

    async def state(self) -> dict[str, Any]:
        """JSON of at most about 200 kB, for anybody who reaches the port: no tenant and no named pool is named."""
        workers = [
            _worker(each.id, each.state, encode.holds(each), self._model, each.page_in_bytes_per_s)
            for each in self._cluster.workers()
        ]
        known = {worker["id"] for worker in workers}
        for worker_id, holds in sorted((await self._hints.residency()).items()):
            if worker_id not in known:
                workers.append(_worker(worker_id, "ready", holds, self._model, None, remote=True))
        shown = workers[:MAX_WORKERS]
        rows = sorted(self._pools.of_all_tenants(), key=lambda row: row.use.live, reverse=True)
        return {
            "version": __version__,
            "model": {"name": self._model.name, "routed_per_layer": self._model.facts.routed_per_layer},
            "now_unix_s": round(time.time(), 1),
            "workers": shown,
            "workers_left_out": len(workers) - len(shown),
            "pools": [_pool(row, shown) for row in rows[:MAX_POOLS]],
            "pools_left_out": max(0, len(rows) - MAX_POOLS),
            "samples": [_sample(sample) for sample in self._samples],
        }


def _worker(
    worker_id: str,
    state: str,
    holds: WorkerHolds,
    model: ModelInfo,
    page_in_bytes_per_s: float | None,
    *,
    remote: bool = False,
) -> dict[str, Any]:
    held = holds.resident or (0,) * model.facts.num_layers  # not loaded yet
    masks = zip(held, model.facts.routed_per_layer, strict=True)
    return {
        "id": worker_id,
        "state": state,
        "remote": remote,
        "waiting": holds.waiting,
        "running": holds.running,
        "slots": holds.num_slots,
        "expert_bytes": holds.expert_bytes,
        "page_in_bytes_per_s": page_in_bytes_per_s,
        # Per layer, bit e of the little-endian bytes says that expert e is in a slot.
        "resident": [mask.to_bytes((routed + 7) // 8, "little").hex() for mask, routed in masks],
    }


def _pool(row: PoolRow, workers: list[dict[str, Any]]) -> dict[str, Any]:
    pool = row.pool
    return {
        "tenants": row.num_tenants,
        "size": row.size,
        "digest": pool.digest if pool is not None else None,
        "experts": pool.num_experts if pool is not None else None,
        "is_expected": row.is_expected,
        "resident": _resident(pool, workers),
        **asdict(row.use),
    }


def _resident(pool: ExpertPool | None, workers: list[dict[str, Any]]) -> dict[str, int]:
    """How many of the pool's experts each worker holds."""
    if pool is None:
        return {}
    found = {}
    for worker in workers:
        masks = [int.from_bytes(bytes.fromhex(layer), "little") for layer in worker["resident"]]
        layers = zip(pool.experts, masks, strict=True)
        found[worker["id"]] = sum(mask >> expert & 1 for experts, mask in layers for expert in experts)
    return found


def _sample(sample: Sample) -> dict[str, float]:
    return {"end_unix_s": round(sample.end_unix_s, 1), "seconds": round(sample.seconds, 3), **sample.paged}
