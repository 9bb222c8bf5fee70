"""A router service on a real socket, in front of workers that live in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc
from redis.asyncio import Redis

from pager.cluster.placement import WorkerState, WorkerView
from pager.errors import NotReady, PagerError, UnknownWorker, WorkerLost
from pager.pools.pick import pick_pool
from pager.types import (
    DriftReport,
    ExpertKey,
    FinishReason,
    Full,
    GenerateRequest,
    ModelInfo,
    PageIn,
    PagingCounts,
    RoutingFacts,
    RoutingScores,
    TokenChunk,
    Usage,
)
from router_service.app import Choices, Service, build_service
from router_service.keys import Gate
from router_service.prediction import Encoded, Passes
from router_service.server import RouterServer
from router_service.service import Pipeline
from router_service.ui import Watch
from tests.support.processes import RedisProcess, start_redis

FACTS = RoutingFacts(experts_per_layer=(0, 9, 9), shared_per_layer=(0, 1, 1), top_k_per_layer=(0, 2, 2))
MODEL = ModelInfo(
    name="tiny",
    fingerprint="f" * 16,
    context_length=64,
    kv_token_limit=48,
    vocab_size=256,
    facts=FACTS,
    tokenizer_class="ByteTokenizer",
    tokenizer_sha256="",
    plan="16 slots",
)


# What a worker tells of a watched request's first token, and of the others.
WATCHED: dict[bool, dict[str, Any]] = {
    True: {"page_ins": (PageIn(ExpertKey(1, 7), "disk", 0.002), PageIn(ExpertKey(2, 7), "host", 0.004))},
    False: {"outside_mass": 0.25},
}


class ByteTokenizer:
    longest_token_bytes = 1

    def encode(self, text: str, most: int, /, *, add_special_tokens: bool = True) -> Encoded:
        ids = list(text.encode())
        return Encoded(len(ids), ids if len(ids) <= most else ())


class FirstTokenScorer:
    """Scores that depend on the first token only, so that a test can say which pool a prompt has."""

    def __init__(self, source: str = "trunk") -> None:
        self.source = source
        self.num_calls = 0

    def scores(self, token_ids: Any, /) -> RoutingScores:
        self.num_calls += 1
        return replace(scores_for(token_ids[0], self.source), num_tokens=len(token_ids))


def scores_for(token: int, source: str) -> RoutingScores:
    def layer(routed: int) -> np.ndarray:
        weights_R = np.arange(1, routed + 1, dtype=np.float64)
        return np.roll(weights_R, token) / weights_R.sum() if routed else np.zeros(0)

    return RoutingScores(tuple(layer(routed) for routed in FACTS.routed_per_layer), source, 1)


def a_worker(worker_id: str, **facts: Any) -> WorkerView:
    """A worker that is ready and has loaded nothing, but for what `facts` say."""
    usual: dict[str, Any] = {"state": WorkerState.READY, "num_slots": 16, "expert_bytes": 1000, "resident": (0, 0, 0)}
    return WorkerView(id=worker_id, **(usual | facts))


@dataclass
class InProcessCluster:
    """Answers every prompt with its own bytes, one a chunk, as fast as it is read. `hold` waits before a chunk.

    `fail`: per worker (at which chunk, with what error), one entry a call; without an error the stream just stops.
    """

    views: dict[str, WorkerView] = field(default_factory=lambda: {"w0": a_worker("w0"), "w1": a_worker("w1")})
    open: dict[tuple[str, str], GenerateRequest] = field(default_factory=dict)  # by tenant and id
    received: list[tuple[str, GenerateRequest]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    aborted: set[tuple[str, str]] = field(default_factory=set)
    hold: dict[int, asyncio.Event] = field(default_factory=dict)  # before the n-th chunk
    reached: dict[int, asyncio.Event] = field(default_factory=dict)
    fail: dict[str, list[tuple[int, Exception | None]]] = field(default_factory=dict)
    pad: str = ""
    is_cut_off: bool = False

    def cut_off(self) -> None:
        self.is_cut_off = True
        for event in self.hold.values():
            event.set()

    def workers(self) -> tuple[WorkerView, ...]:
        return tuple(self.views.values())

    def change(self, worker_id: str, **facts: Any) -> None:
        self.views[worker_id] = replace(self.views[worker_id], **facts)

    async def retire(self, worker_id: str) -> None:
        if worker_id not in self.views:
            raise UnknownWorker(f"there is no worker {worker_id!r}", field="worker")
        self.retired.append(worker_id)

    async def abort(self, request_id: str, tenant: str) -> bool:
        if (tenant, request_id) not in self.open:
            return False
        self.aborted.add((request_id, tenant))
        return True

    async def generate(
        self, worker_id: str, request: GenerateRequest, observer: Any
    ) -> AsyncGenerator[TokenChunk, None]:
        self.received.append((worker_id, request))
        observer.sent()
        self.open[request.tenant, request.id] = request
        error_at = self.fail[worker_id].pop(0) if self.fail.get(worker_id) else None
        finished = False
        try:
            count = request.sampling.max_tokens
            for index in range(count):
                if index in self.reached:
                    self.reached[index].set()
                if index in self.hold:
                    await self.hold[index].wait()
                if self.is_cut_off:
                    raise NotReady("shutting down", retry_after_s=1.0)
                if error_at is not None and error_at[0] == index:
                    finished = True
                    if error_at[1] is None:
                        return
                    raise error_at[1]
                for answer in range(request.sampling.n):  # the second begins with the second byte
                    token = request.prompt_token_ids[(index + answer) % len(request.prompt_token_ids)]
                    usage = self._usage(request) if index == count - 1 else None
                    num_going_on = request.sampling.n - 1 - (answer if usage else 0)
                    chunk = TokenChunk(
                        request.id, (token,), chr(token) + self.pad, usage, index=answer, num_going_on=num_going_on
                    )
                    finished = chunk.is_last
                    if chunk.is_last and usage is not None:
                        observer.settled(usage.account)
                    yield replace(chunk, **WATCHED[index == 0]) if request.is_watched else chunk
        finally:
            del self.open[request.tenant, request.id]
            if not finished:
                self.cancelled.append(request.id)

    def _usage(self, request: GenerateRequest) -> Usage:
        policy = request.pool
        pool = policy.fixed
        if pool is None and not isinstance(policy.size, Full):
            pool = pick_pool(scores_for(request.prompt_token_ids[0] + 1, "prefill"), policy.size, FACTS)
        return Usage(
            mode="exact" if pool is None else "pool",
            finish_reason=FinishReason.LENGTH,
            prompt_tokens=len(request.prompt_token_ids),
            completion_tokens=request.sampling.max_tokens,
            pool=pool,
            paging=PagingCounts(11, 13, 5, 7, 0.25),
            out_of_pool_mass=0.125,
            predicted_recall=None,
            queue_s=0.5,
            time_to_first_token_s=0.75,
            model_fingerprint=MODEL.fingerprint,
            drift=DriftReport(0.5, 2, 3, exact_from=7) if policy.drift is not None else None,
        )


@dataclass
class Running:
    cluster: InProcessCluster
    scorer: FirstTokenScorer
    service: Service
    server: RouterServer
    channel: grpc.aio.Channel
    stub: Any

    @property
    def pipeline(self) -> Pipeline:
        return self.service.pipeline

    @property
    def watch(self) -> Watch:
        return self.service.watch

    def another_server(self, gate: Gate | None = None) -> RouterServer:
        """Of the same pipeline, which does not listen yet."""
        return RouterServer(self.pipeline, self.service.bounds, self.watch, gate=gate)

    def metric(self, name: str, **labels: str) -> float:
        return self.pipeline.metrics.registry.get_sample_value(f"expert_pager_router_{name}", labels) or 0.0


@asynccontextmanager
async def running_service(
    cluster: InProcessCluster | None = None,
    *,
    redis_url: str | None = None,
    pools_path: Path | None = None,
    write_timeout_s: float = 30.0,
    max_connection_age_s: float = 300.0,
    **choices: Any,
) -> AsyncIterator[Running]:
    cluster = cluster or InProcessCluster()
    scorer = FirstTokenScorer()
    gate, audit, stop = choices.pop("gate", None), choices.pop("audit", None), choices.pop("stop", lambda: None)
    service = build_service(
        choices.pop("model", MODEL),
        cluster,
        choices.pop("passes", None) or Passes({"trunk": lambda: scorer}, ("trunk",)),
        choices.pop("encoder", None) or ByteTokenizer(),
        Choices(redis_url=redis_url, pools_path=pools_path, **choices),
    )
    server = RouterServer(
        service.pipeline,
        service.bounds,
        service.watch,
        write_timeout_s,
        max_connection_age_s,
        gate=gate,
        audit=audit,
        stop=stop,
    )
    await server.start("127.0.0.1", 0)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Running(cluster, scorer, service, server, channel, pb_grpc.ExpertPagerStub(channel))
    finally:
        await server.stop()
        await service.close()


@pytest.fixture
def make_scorer() -> type[FirstTokenScorer]:
    return FirstTokenScorer


@pytest.fixture
def serve() -> Callable[..., Any]:
    """`async with serve(...) as service:` starts one; several may run side by side."""
    return running_service


@pytest.fixture
async def service() -> AsyncIterator[Running]:
    async with running_service() as running:
        yield running


@pytest.fixture
def make_cluster() -> type[InProcessCluster]:
    return InProcessCluster


@pytest.fixture(scope="session")
def make_worker() -> Callable[..., WorkerView]:
    return a_worker


@pytest.fixture(scope="session")
def facts() -> RoutingFacts:
    return FACTS


@pytest.fixture
def model() -> ModelInfo:
    return MODEL


@pytest.fixture
def lost() -> Callable[[], PagerError]:
    return lambda: WorkerLost("the worker died", retry_after_s=0.5)


@pytest.fixture
def redis_at(
    redis_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., RedisProcess]]:
    """Starts a Redis, on a port of choice when one is given, with options of redis-server."""
    # One that lives may take its time, as it does on a busy machine; one that was killed refuses at once.
    monkeypatch.setattr("router_service.redis.TIMEOUT_S", 60.0)
    started: list[RedisProcess] = []

    def start(port: int | None = None, *options: str) -> RedisProcess:
        started.append(start_redis(redis_server, tmp_path, port, *options))
        return started[-1]

    yield start
    for redis in started:
        redis.kill()


@pytest.fixture
def redis(redis_at: Callable[..., RedisProcess]) -> RedisProcess:
    return redis_at()


@pytest.fixture
async def redis_client(redis: RedisProcess) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis.url) as client:
        yield client
