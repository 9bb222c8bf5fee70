"""Against a real Redis, which is killed in the middle."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from pager.cluster.placement import WorkerState, WorkerView
from pager.errors import ConfigError
from pager.types import ExpertPool, RoutingFacts, WorkerResidency
from router_service.hints import Claims, HintStore, InProcessHints, LocalClaims, Turn, encode_pool
from router_service.redis import (
    Breaker,
    RedisClaims,
    RedisClient,
    RedisHints,
    RedisUnavailableError,
    SharedClaims,
    SharedHints,
    StoreBreaker,
    redis_url,
)
from tests.router_service.conftest import InProcessCluster, Running
from tests.support.calls import rest
from tests.support.processes import RedisProcess

POOL = ExpertPool(((), (0, 3, 7), (1, 2)))
WORKER = WorkerResidency("w0", WorkerState.READY, 1, 2, 16, 1000, resident=(0, 0b101, 0xFF), is_remote=True)


@dataclass
class Shared:
    """The hints and the claims of one router."""

    hints: HintStore
    claims: Claims

    async def heartbeat(self, workers: Sequence[WorkerResidency]) -> None:
        if isinstance(self.claims, RedisClaims):
            await self.claims.renew()
        await self.hints.report(workers)

    async def close(self) -> None:
        await self.hints.close()
        await self.claims.close()


def shared_stores(url: str, facts: RoutingFacts, fingerprint: str) -> Shared:
    client = RedisClient(url)
    return Shared(RedisHints(client, facts, fingerprint), RedisClaims(client, fingerprint))


def away_or_not(url: str, facts: RoutingFacts, breaker: StoreBreaker) -> Shared:
    """As a router has them, which goes on without Redis."""
    client = RedisClient(url)
    hints, claims = RedisHints(client, facts, "f"), RedisClaims(client, "f")
    return Shared(SharedHints(InProcessHints(), hints, claims, breaker), SharedClaims(LocalClaims(), claims, breaker))


@pytest.fixture
async def pair(redis: RedisProcess, facts: RoutingFacts) -> AsyncIterator[list[Shared]]:
    """Two routers' stores in one Redis."""
    stores = [shared_stores(redis.url, facts, "f") for _ in range(2)]
    yield stores
    for store in stores:
        await store.close()


@pytest.fixture
def client(redis_client: Redis) -> Redis:
    return redis_client


async def test_routers_share_pools(pair: list[Shared], client: Redis) -> None:
    a, b = pair
    await a.hints.remember_pool(["whole", "half"], POOL)
    assert await b.hints.find_pool(["other", "half"]) == POOL
    assert await b.hints.find_pool(["other"]) is None
    assert all([await client.ttl(key) > 0 for key in await client.keys("*")])


async def test_routers_share_the_pools_of_turns(pair: list[Shared]) -> None:
    a, b = pair
    await a.hints.remember_pool(["turn"], POOL, Turn.of([1, 2], 3))
    assert await b.hints.find_pool(["turn"], [1, 2, 3, 4]) == POOL
    assert await b.hints.find_pool(["turn"], [1, 2, 4]) is None


@pytest.mark.parametrize("value", [b"\x00\xff", b"{}", b"x" * 500_000, encode_pool(ExpertPool(((0,), (1,))))])
async def test_a_foreign_value_is_a_miss_and_the_next_key_counts(
    pair: list[Shared], client: Redis, value: bytes
) -> None:
    a, _ = pair
    await a.hints.remember_pool(["good", "bad"], POOL)
    [bad] = await client.keys("*:bad")
    await client.set(bad, value)
    assert await a.hints.find_pool(["bad"]) is None
    assert await a.hints.find_pool(["bad", "good"]) == POOL


async def test_a_value_of_another_type_is_no_answer(pair: list[Shared], client: Redis) -> None:
    a, _ = pair
    await a.hints.remember_pool(["k"], POOL)
    [key] = await client.keys("*:k")
    await client.delete(key)
    await client.lpush(key, "x")
    assert await a.hints.find_pool(["k"]) is None


async def test_a_claim_holds_at_every_router_until_its_owner_releases_it(pair: list[Shared]) -> None:
    a, b = pair
    assert await a.claims.claim("r", "t")
    assert not await b.claims.claim("r", "t")
    await b.claims.release("r", "t")
    assert not await b.claims.claim("r", "t")
    await a.claims.release("r", "t")
    assert await b.claims.claim("r", "t")


async def test_an_abort_crosses_routers_but_not_tenants(pair: list[Shared]) -> None:
    a, b = pair
    await a.claims.claim("r", "t")
    assert not await b.claims.mark_aborted("r", "tt")
    assert not await b.claims.mark_aborted("r", "")
    assert not await a.claims.is_aborted("r", "t")
    assert await b.claims.mark_aborted("r", "t")
    assert await b.claims.mark_aborted("r", "t")
    assert await a.claims.is_aborted("r", "t")
    await a.claims.release("r", "t")
    assert not await b.claims.mark_aborted("r", "t")


async def test_an_id_is_its_tenants_own_at_every_router(pair: list[Shared]) -> None:
    a, b = pair
    assert await a.claims.claim("r", "t")
    assert await b.claims.claim("r", "u")
    assert await a.claims.claim("u:r", "t"), "an id that looks like a tenant and an id"
    assert await b.claims.mark_aborted("r", "u")
    assert not await a.claims.is_aborted("r", "t")
    await b.claims.release("r", "u")
    assert not await b.claims.claim("r", "t")
    assert await a.claims.claim("r", "u")


async def test_a_heartbeat_brings_lost_claims_back_and_tells_who_holds_what(pair: list[Shared], client: Redis) -> None:
    a, b = pair
    await a.claims.claim("r", "t")
    await client.flushdb()
    await a.heartbeat([WORKER])
    assert not await b.claims.claim("r", "t")
    assert await b.hints.residency() == {"w0": WORKER}


async def test_models_do_not_meet(redis: RedisProcess, facts: RoutingFacts, pair: list[Shared]) -> None:
    other = shared_stores(redis.url, facts, "g")
    await pair[0].hints.remember_pool(["k"], POOL)
    await pair[0].claims.claim("r", "t")
    assert await other.hints.find_pool(["k"]) is None
    assert await other.claims.claim("r", "t")
    await other.close()


async def test_a_dead_redis_is_named_without_its_url(redis: RedisProcess, facts: RoutingFacts) -> None:
    store = shared_stores(redis.url.replace("//", "//:s3cret@"), facts, "f")
    redis.kill()
    with pytest.raises(RedisUnavailableError) as caught:
        await store.hints.find_pool(["k"])
    assert "s3cret" not in str(caught.value)
    await store.close()


# --- when it goes away ----------------------------------------------------------------------------------------------


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_breaker_pauses_longer_after_every_failure() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock, jitter=lambda: 1.0)
    pauses = []
    for _ in range(9):
        breaker.failed()
        before = clock.now_s
        while not breaker.allows():
            clock.now_s += 0.25
        pauses.append(clock.now_s - before)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    breaker.succeeded()
    assert breaker.allows()
    assert not breaker.is_degraded


async def test_the_local_store_answers_while_redis_is_gone_and_redis_when_it_is_back(
    redis_at: Callable[..., RedisProcess], facts: RoutingFacts
) -> None:
    redis, clock, degraded = redis_at(), Clock(), list[bool]()
    breaker = StoreBreaker(degraded.append, clock=clock, jitter=lambda: 1.0)
    router = away_or_not(redis.url, facts, breaker)
    await router.hints.remember_pool(["k"], POOL)
    assert await router.claims.claim("r", "t")
    redis.kill()
    assert await router.hints.find_pool(["k"]) == POOL
    assert degraded == [True]
    assert not await router.claims.claim("r", "t")
    assert await router.claims.claim("s", "t")
    assert await router.claims.mark_aborted("s", "t")
    assert await router.claims.is_aborted("s", "t")
    assert await router.hints.residency() == {}
    redis_at(redis.port)
    clock.now_s = 100.0
    await router.heartbeat([WORKER])
    assert degraded == [True, False]
    peer = shared_stores(redis.url, facts, "f")
    assert not await peer.claims.claim("r", "t")
    assert await peer.hints.residency() == {"w0": WORKER}
    await router.claims.release("r", "t")
    assert await peer.claims.claim("r", "t")
    await router.close()
    await peer.close()


# --- when it is there and refuses -----------------------------------------------------------------------------------


class Address:
    """A TCP address that passes connections on to a port which changes; those that are open stay where they are."""

    def __init__(self, port: int) -> None:
        self.behind = port
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.behind)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._copy(source, sink)))

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                sink.write(data)
        finally:
            sink.close()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def replicate(redis: RedisProcess, primary: RedisProcess | None) -> None:
    """Has `redis` follow `primary`, read-only; None makes it a primary again."""
    async with Redis.from_url(redis.url) as client:
        await client.execute_command("REPLICAOF", *(("127.0.0.1", primary.port) if primary else ("NO", "ONE")))  # type: ignore[no-untyped-call]


async def test_after_a_failover_the_next_command_goes_to_the_new_primary(
    redis_at: Callable[..., RedisProcess], facts: RoutingFacts
) -> None:
    old, new = redis_at(), redis_at()
    address = Address(old.port)
    store = shared_stores(await address.open(), facts, "f")
    await store.hints.remember_pool(["k"], POOL)
    await replicate(old, new)
    address.behind = new.port
    with pytest.raises(RedisUnavailableError, match="replica") as caught:
        await store.hints.remember_pool(["k"], POOL)
    assert caught.value.reason == "readonly"
    await store.hints.remember_pool(["k"], POOL)  # a connection that was kept would still lead to the old one
    assert await store.claims.claim("r", "t")
    assert await store.hints.find_pool(["k"]) == POOL
    await store.close()
    await address.close()


async def test_a_redis_that_takes_no_writes_goes_on_to_answer_reads_and_counts_as_degraded(
    redis: RedisProcess, redis_at: Callable[..., RedisProcess], facts: RoutingFacts
) -> None:
    clock, degraded, reasons = Clock(), list[bool](), list[str]()
    breaker = StoreBreaker(degraded.append, reasons.append, clock, jitter=lambda: 1.0)
    router = away_or_not(redis.url, facts, breaker)
    await replicate(redis, redis_at())
    await router.hints.remember_pool(["k"], POOL)
    assert (degraded, reasons) == ([True], ["readonly"])
    async with Redis.from_url(redis.url) as client:  # its own data went when it became a replica
        await client.config_set("replica-read-only", "no")
        await client.set("expert-pager:1:f:pool:theirs", encode_pool(POOL))
        await client.config_set("replica-read-only", "yes")
    assert await router.hints.find_pool(["theirs"]) == POOL, "read from Redis although writes are refused"
    assert breaker.is_degraded, "a read that succeeds does not hide that writes are refused"
    clock.now_s = 1.0
    await router.heartbeat([WORKER])
    assert (degraded, reasons) == ([True, True], ["readonly", "readonly"])
    await replicate(redis, None)
    clock.now_s = 100.0
    await router.heartbeat([WORKER])
    assert degraded == [True, True, False]
    await router.close()


async def test_a_full_redis_says_so(redis: RedisProcess, redis_client: Redis, facts: RoutingFacts) -> None:
    store = shared_stores(redis.url, facts, "f")
    await store.hints.remember_pool(["k"], POOL)
    await redis_client.config_set("maxmemory-policy", "noeviction")
    await redis_client.config_set("maxmemory", "1")
    with pytest.raises(RedisUnavailableError, match="noeviction") as caught:
        await store.hints.remember_pool(["l"], POOL)
    assert (caught.value.reason, caught.value.still_reads) == ("full", True)
    with pytest.raises(RedisUnavailableError) as caught:
        await store.claims.claim("r", "t")  # in a transaction
    assert caught.value.reason == "full"
    assert await store.hints.find_pool(["k"]) == POOL
    await redis_client.config_set("maxmemory", "0")
    assert await store.claims.claim("r", "t")
    await store.close()


async def test_a_redis_that_runs_a_script_for_ever_is_left_alone_and_asked_again(
    redis: RedisProcess, redis_client: Redis, facts: RoutingFacts
) -> None:
    await redis_client.config_set("busy-reply-threshold", 1)
    breaker = StoreBreaker(clock=(clock := Clock()), jitter=lambda: 1.0)
    router = away_or_not(redis.url, facts, breaker)
    async with Redis.from_url(redis.url) as other:
        script = asyncio.ensure_future(other.eval("while true do end", 0))
        while not breaker.is_degraded:
            await router.hints.residency()
        with pytest.raises(RedisUnavailableError, match="busy with a script"):
            await breaker.read(router.hints.residency)
        await redis_client.script_kill()
        with pytest.raises(ResponseError):
            await script
    clock.now_s = 1.0
    await router.heartbeat([WORKER])
    assert not breaker.is_degraded
    await router.close()


async def test_a_node_of_a_redis_cluster_is_named(redis_at: Callable[..., RedisProcess], facts: RoutingFacts) -> None:
    with socket.socket() as probe:  # by itself it takes 10,000 more than its port, which may be no port at all
        probe.bind(("127.0.0.1", 0))
        bus_port = probe.getsockname()[1]
    redis = redis_at(None, "--cluster-enabled", "yes", "--cluster-port", str(bus_port))
    store = shared_stores(redis.url, facts, "f")
    with pytest.raises(RedisUnavailableError, match="single primary") as caught:
        await store.hints.remember_pool(["k"], POOL)
    assert caught.value.reason == "moved"
    await store.close()


async def test_a_refused_write_is_counted_by_its_reason_and_named_to_whom_it_concerns(
    serve: Callable[..., Any], redis: RedisProcess, redis_client: Redis
) -> None:
    async with serve(redis_url=redis.url) as service:
        await answer(service, request())
        await redis_client.config_set("maxmemory-policy", "noeviction")
        await redis_client.config_set("maxmemory", "1")
        while service.metric("redis_degraded") == 0:
            await answer(service, request())
        assert service.metric("redis_failures_total", reason="full") >= 1
        calibrate = pb.CalibrateRequest(name="law", examples=[pb.Example(text=b"abc")], pool=pb.PoolPolicy(count=3))
        with pytest.raises(grpc.aio.AioRpcError, match="noeviction") as caught:
            await service.stub.Calibrate(calibrate)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# --- the service ----------------------------------------------------------------------------------------------------


def request(request_id: str = "", **fields: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=3)
    return pb.GenerateRequest(
        request_id=request_id, text=b"abc", sampling=sampling, pool=pb.PoolPolicy(count=3), **fields
    )


async def answer(service: Running, wire: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [message async for message in service.stub.Generate(wire)]


async def test_two_routers_share_what_they_learn(serve: Callable[..., Any], redis: RedisProcess) -> None:
    async with serve(redis_url=redis.url) as one, serve(redis_url=redis.url) as two:
        await answer(one, request())
        await answer(two, request())
        assert (one.scorer.num_calls, two.scorer.num_calls) == (1, 0)
        one.cluster.hold[1] = asyncio.Event()
        running = one.stub.Generate(request("same"))
        await running.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await two.stub.Generate(request("same")).read()
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        running.cancel()


async def test_an_abort_through_another_router_reaches_a_request_on_its_way(
    serve: Callable[..., Any], redis: RedisProcess
) -> None:
    async with serve(redis_url=redis.url) as one, serve(redis_url=redis.url) as two:
        one.cluster.hold[0], one.cluster.reached[0] = asyncio.Event(), asyncio.Event()
        call = one.stub.Generate(request("early"))
        first = asyncio.ensure_future(call.read())
        await one.cluster.reached[0].wait()
        assert (await two.stub.Abort(pb.AbortRequest(request_id="early"))).aborted
        one.cluster.hold[0].set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await first
        assert caught.value.code() is grpc.StatusCode.CANCELLED


async def test_a_router_shows_workers_that_only_another_one_reaches(
    serve: Callable[..., Any],
    redis: RedisProcess,
    make_cluster: type[InProcessCluster],
    make_worker: Callable[..., WorkerView],
) -> None:
    far = make_cluster(views={"far": make_worker("far", resident=(0, 1, 2), running=3)})
    async with serve(far, redis_url=redis.url), serve(redis_url=redis.url) as near:
        workers = {}
        while "far" not in workers:
            reply = await near.stub.GetResidency(pb.GetResidencyRequest())
            workers = {worker.worker: worker for worker in reply.workers}
        assert workers["far"].remote
        assert (workers["far"].running, workers["far"].resident_experts) == (3, 2)
        assert not workers["w0"].remote


async def test_requests_go_on_when_redis_dies_mid_stream(serve: Callable[..., Any], redis: RedisProcess) -> None:
    async with serve(redis_url=redis.url) as service:
        await answer(service, request())
        assert service.metric("redis_degraded") == 0
        service.cluster.hold[1] = asyncio.Event()
        running = service.stub.Generate(request("mid"))
        await running.read()
        redis.kill()
        service.cluster.hold[1].set()
        assert [(await running.read()).text for _ in range(2)] == ["b", "c"]
        assert await rest(running) == []
        assert service.metric("redis_degraded") == 1
        assert len(await answer(service, request("mid"))) == 3
        assert service.scorer.num_calls == 1  # what it had learnt is still here


async def test_a_request_that_ends_with_the_service_gives_its_id_back(
    serve: Callable[..., Any], redis: RedisProcess, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(redis_url=redis.url) as service:
        release = service.pipeline.stores.claims.release

        async def take_time(request_id: str, tenant: str) -> None:
            await asyncio.sleep(0.2)
            await release(request_id, tenant)

        monkeypatch.setattr(service.pipeline.stores.claims, "release", take_time)
        service.cluster.hold[1] = asyncio.Event()
        running = service.stub.Generate(request("held"))
        await running.read()
        assert len(await redis_client.keys("*:claim:default:held")) == 1
    assert await redis_client.keys("*:claim:default:held") == []


async def test_a_service_starts_without_its_redis(serve: Callable[..., Any]) -> None:
    async with serve(redis_url="redis://127.0.0.1:1/0") as service:
        assert len(await answer(service, request())) == 3
        assert service.metric("redis_degraded") == 1


def test_the_url_comes_from_the_environment_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "redis-url"
    path.write_text("redis://:secret@host:1/0\n")
    assert redis_url({}) is None
    assert redis_url({"REDIS_URL": "redis://host"}) == "redis://host"
    assert redis_url({"REDIS_URL_FILE": str(path)}) == "redis://:secret@host:1/0"
    with pytest.raises(ConfigError, match="both set"):
        redis_url({"REDIS_URL": "redis://host", "REDIS_URL_FILE": str(path)})
    with pytest.raises(ConfigError, match="cannot be read"):
        redis_url({"REDIS_URL_FILE": str(tmp_path / "missing")})
    with pytest.raises(ConfigError) as caught:
        redis_url({"REDIS_URL": "http://:secret@host"})
    assert "secret" not in str(caught.value)


def test_a_url_that_can_not_be_parsed_is_refused_without_quoting_it() -> None:
    with pytest.raises(ConfigError, match="cannot be parsed") as caught:
        redis_url({"REDIS_URL": "redis://:secret@host:port/0"})
    assert "secret" not in str(caught.value)
