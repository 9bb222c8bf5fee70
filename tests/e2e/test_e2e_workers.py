"""Workers that are killed or frozen mid-stream, and two workers behind two routers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

from tests.support.processes import free_port

PROMPT = "It is ordered that the respondent shall "
SERVING, NOT_SERVING = 1, 2
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
PASSWORD = "only-in-the-environment"


def outcome(call: Any) -> grpc.RpcError | None:
    """Reads a stream to its end: None for an answer, else the error."""
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return error
    return None


@dataclass(frozen=True)
class Held:
    """What may not grow when workers come and go: of router processes, of the machine, of the service."""

    descriptors: tuple[int, ...]
    shared_memory: frozenset[str]
    num_workers: int
    num_processes: int

    @classmethod
    def by(cls, *services: Any, redis_port: int = 0) -> Held:
        processes = services[0].processes()
        return cls(
            tuple(num_descriptors(service.process.pid, redis_port) for service in services),
            frozenset(name for name in os.listdir("/dev/shm") if services[0].namespace in name),
            len(services[0].worker_pids()),
            len(processes),
        )

    @classmethod
    def baseline(cls, *services: Any, redis_port: int = 0) -> Held:
        """What is held when nothing has come or gone for a while: Ray opens some connections late."""
        held = cls.by(*services, redis_port=redis_port)
        while True:
            time.sleep(3)
            before, held = held, cls.by(*services, redis_port=redis_port)
            if held == before:
                return held

    @classmethod
    def comes_back_to(cls, baseline: Held, *services: Any, redis_port: int = 0) -> None:
        end_s = time.monotonic() + 60
        while not (now := cls.by(*services, redis_port=redis_port)).is_within(baseline):
            assert time.monotonic() < end_s, f"{now} exceeds {baseline}"
            time.sleep(0.2)

    def is_within(self, other: Held) -> bool:
        return (
            all(mine <= theirs for mine, theirs in zip(self.descriptors, other.descriptors, strict=True))
            and self.shared_memory <= other.shared_memory
            and self.num_workers <= other.num_workers
            and self.num_processes <= other.num_processes
        )


def num_descriptors(pid: int, redis_port: int) -> int:
    """Without the pooled connections to Redis: there are as many as there were calls at one time, whoever dies."""
    process = psutil.Process(pid)
    pooled = [each for each in process.net_connections("tcp") if each.raddr and each.raddr.port == redis_port]
    return int(process.num_fds()) - len(pooled)


def kill_mid_stream(service: Any, calls: list[Any]) -> list[Any]:
    """Kills a worker while all `calls` stream; what became of them."""
    for call in calls:
        next(call)
    os.kill(service.worker_pids()[0], signal.SIGKILL)
    return [outcome(call) for call in calls]


def assert_lost(service: Any, error: Any) -> None:
    found = service.refusal_of(error)
    assert (found.code, found.reason) == (UNAVAILABLE, "WORKER_LOST")
    assert found.retry_s is not None
    assert found.retry_s > 0


def is_at_rest(worker: pb.WorkerResidency) -> bool:
    return (worker.state, worker.waiting, worker.running) == ("ready", 0, 0)


# --- one worker -------------------------------------------------------------------------------------------------------


def test_a_frozen_worker_is_not_serving_and_then_replaced(idle_service: Any, until: Callable[..., None]) -> None:
    service = idle_service
    [pid] = service.worker_pids()
    call = service.open(PROMPT, pool=8, max_tokens=900)
    next(call)
    os.kill(pid, signal.SIGSTOP)
    assert_lost(service, outcome(call))
    until(lambda: service.health() == NOT_SERVING, 30)
    assert service.health("") == SERVING, "the router itself is alive"
    service.wait_until_ready()
    assert service.generate(PROMPT, pool=8, max_tokens=2).usage.completion_tokens == 2
    until(lambda: not psutil.pid_exists(pid), 30)


def test_a_killed_worker_ends_its_streams_and_leaves_nothing_behind(
    idle_service: Any, until: Callable[..., None]
) -> None:
    service = idle_service
    before, [pid] = Held.baseline(service), service.worker_pids()
    calls = [service.open(PROMPT, pool=8, max_tokens=900) for _ in range(4)]
    for error in kill_mid_stream(service, calls):
        assert_lost(service, error)
    refused = service.refusal(PROMPT, max_tokens=2)  # while its worker is away
    assert (refused.code, refused.retry_s is not None) == (UNAVAILABLE, True)
    service.wait_until_ready()
    assert service.generate(PROMPT, pool=8, max_tokens=2).usage.completion_tokens == 2
    service.wait_until_idle()
    until(lambda: is_at_rest(service.residency()["worker-0"]), 30)
    assert pid not in service.worker_pids()
    Held.comes_back_to(before, service)


# --- two workers with a host tier, two routers, Redis -----------------------------------------------------------------


class Redis:
    def __init__(self, program: Path, folder: Path, port: int) -> None:
        self._program = program
        # One that lives may take its time, as it does on a busy machine; one that was killed refuses at once.
        patience = "socket_timeout=30&socket_connect_timeout=30"
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{port}/0?{patience}"
        self.port = port
        self._folder = folder

    def start(self) -> None:
        settings = f"port {self.port}\nbind 127.0.0.1\nsave ''\nrequirepass {PASSWORD}\ndir {self._folder}\n"
        (self._folder / "redis.conf").write_text(settings)
        with (self._folder / "redis.log").open("ab") as log:
            command = [str(self._program), str(self._folder / "redis.conf")]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def redis(redis_server: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(redis_server, tmp_path_factory.mktemp("redis"), free_port())
    server.start()
    yield server
    server.kill()


@dataclass(frozen=True)
class Routers:
    """The first one has started two workers, the second one has joined them."""

    first: Any
    second: Any
    redis_port: int


@pytest.fixture(scope="module")
def routers(
    redis: Redis, tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., Any], model: Path
) -> Iterator[Routers]:
    folder = tmp_path_factory.mktemp("routers")
    secret = folder / "redis-url"
    secret.write_text(redis.url + "\n")
    budgets = ("--dtype", "float32", "--expert-memory", "30%", "--host-memory", "100%", "--workers", 2)
    with serve(folder / "first", model, *budgets, REDIS_URL_FILE=str(secret)) as first:
        first.wait_until_ready(2)
        found = re.search(r"embedded Ray at (\S+);", first.log)
        assert found

        limits = {"MAX_REQUESTS": "4", "MAX_REQUESTS_PER_TENANT": "2", "MAX_TOKENS": "2000"}
        env = {f"EXPERT_PAGER_ROUTER_{name}": value for name, value in limits.items()}
        env |= {"RAY_AUTH_MODE": "token", "EXPERT_PAGER_CLUSTER_NAMESPACE": first.namespace}
        join = ("--dtype", "float32", "--workers", 0, "--ray-address", found[1])
        with serve(folder / "second", model, *join, REDIS_URL=redis.url, **env) as second:
            second.wait_until_ready(2)
            yield Routers(first, second, redis.port)


def test_two_workers_serve_at_the_same_time(routers: Routers) -> None:
    first, workers = routers.first, ("worker-0", "worker-1")

    def counted(name: str, **labels: str) -> list[float]:
        return [first.metrics(worker).total(f"expert_pager_{name}_total", **labels) for worker in workers]

    tokens, requests = counted("step_tokens"), counted("requests", outcome="length")
    calls = [first.open(PROMPT, pool=first.random_pool(number, 8), max_tokens=500) for number in range(6)]
    for call in calls:
        next(call)
    running = [first.metrics(worker).total("expert_pager_requests_running") for worker in workers]
    assert min(running) >= 1
    assert [outcome(call) for call in calls] == [None] * 6
    assert all(after - before >= 500 for before, after in zip(tokens, counted("step_tokens"), strict=True))
    ended = zip(requests, counted("requests", outcome="length"), strict=True)
    assert all(after > before for before, after in ended)


def test_routers_share_pools_ids_and_aborts(routers: Routers) -> None:
    first, second = routers.first, routers.second
    tenant = (("x-tenant-id", "shared"),)
    chosen = first.generate(PROMPT, pool=12, max_tokens=2, tenant="shared").usage.pool
    route = pb.RouteRequest(text=PROMPT.encode(), pool=pb.PoolPolicy(count=12))
    assert second.stub.Route(route, metadata=tenant).observed.digest == chosen.digest
    named = second.generate(PROMPT, pool=pb.PoolPolicy(digest=chosen.digest), max_tokens=2, tenant="shared")
    assert named.usage.pool.layers == chosen.layers
    assert set(first.residency()) == set(second.residency()) == {"worker-0", "worker-1"}

    call = first.open(PROMPT, pool=8, max_tokens=900, request_id="one-of-a-kind", tenant="shared")
    next(call)
    refused = second.refusal(PROMPT, max_tokens=2, request_id="one-of-a-kind", tenant="shared")
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
    abort = pb.AbortRequest(request_id="one-of-a-kind")
    assert not second.stub.Abort(abort, metadata=(("x-tenant-id", "other"),)).aborted
    next(call)
    assert second.stub.Abort(abort, metadata=tenant).aborted
    error: Any = outcome(call)
    assert error.code() is grpc.StatusCode.CANCELLED
    first.wait_until_idle()
    assert not second.stub.Abort(abort, metadata=tenant).aborted


def test_admission_refuses_at_once_beyond_its_bounds(routers: Routers) -> None:
    second = routers.second
    calls = [second.open(PROMPT, pool=8, max_tokens=450, tenant=tenant) for tenant in ("a", "a", "b")]
    for call in calls:
        next(call)
    refused = second.refusal(PROMPT, max_tokens=2, tenant="a")
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_OVERLOADED")
    assert refused.retry_s is not None
    assert "'a'" in refused.message
    refused = second.refusal(PROMPT, max_tokens=900, tenant="b")
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert "2000 admitted tokens" in refused.message
    calls.append(second.open(PROMPT, pool=8, max_tokens=450, tenant="b"))
    next(calls[-1])
    refused = second.refusal(PROMPT, max_tokens=2, tenant="c")
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert refused.retry_s is not None
    assert "4 requests are in flight" in refused.message
    assert routers.first.generate(PROMPT, pool=8, max_tokens=2).usage.completion_tokens == 2  # it has its own bounds
    for call in calls:
        next(call)  # they were running all the time
        call.cancel()
    second_metrics = second.metrics("router")
    assert second_metrics.total("expert_pager_router_admission_rejections_total") >= 3
    second.wait_until_idle()
    assert second.generate(PROMPT, pool=8, max_tokens=2, tenant="a").usage.completion_tokens == 2


def test_killing_one_of_two_workers_costs_its_streams_only(routers: Routers, until: Callable[..., None]) -> None:
    first, second = routers.first, routers.second

    def wait_until_at_rest() -> None:
        for router in (first, second):
            until(lambda router=router: all(is_at_rest(worker) for worker in router.residency().values()), 30)

    def kill_one() -> list[Any]:
        wait_until_at_rest()
        calls = []
        for _ in range(2):  # these are placed by load alone, the second one beside the first: each worker has one
            calls.append(first.open(PROMPT, max_tokens=600))
            next(calls[-1])
        for number, router in enumerate([first, first, second, second]):
            calls.append(router.open(PROMPT, pool=first.random_pool(50 + number, 8), max_tokens=400))
        outcomes = kill_mid_stream(first, calls)
        # At once: the other worker is there.
        assert first.generate(PROMPT, pool=8, max_tokens=2).usage.completion_tokens == 2
        assert second.generate(PROMPT, pool=8, max_tokens=2).usage.completion_tokens == 2
        for router in (first, second):
            router.wait_until_ready(2)
        first.wait_until_idle()
        return outcomes

    pools = disjoint_pools(first.routed_per_layer, 5)  # together all experts, and no worker has slots for those
    for pool in pools:  # before there is anybody dead whose records others had to read past
        first.generate(PROMPT, pool=pool, max_tokens=1)
    kill_one()  # what is made once is made now
    before = Held.baseline(first, second, redis_port=routers.redis_port)
    outcomes = kill_one()
    lost = [error for error in outcomes if error is not None]
    assert 0 < len(lost) < len(outcomes)
    for error in lost:
        assert_lost(first, error)
    Held.comes_back_to(before, first, second, redis_port=routers.redis_port)
    wait_until_at_rest()
    assert_host_tier_is_whole(first, pools, until)


def assert_host_tier_is_whole(router: Any, pools: list[pb.PoolPolicy], until: Callable[..., None]) -> None:
    """No record is claimed or pinned for a dead worker: all experts fit, and then none comes from disk again."""
    for pool in pools:
        router.generate(PROMPT, pool=pool, max_tokens=1)
    all_bytes = router.plan["num_routed"] * router.plan["expert_bytes"]

    def is_whole() -> bool:
        metrics = router.metrics("worker-0")
        names = ("capacity", "resident", "pinned")
        held = [metrics.total(f"expert_pager_{name}_bytes", tier="host") for name in names]
        return held == [all_bytes, all_bytes, 0]

    until(is_whole, 30)  # a record is given back without waiting for the node to hear of it
    from_disk, from_host = transferred(router, "disk"), transferred(router, "host")
    usages = [router.generate(PROMPT, pool=pool, max_tokens=1).usage for pool in pools]
    assert [usage.bytes_from_disk for usage in usages] == [0] * len(pools)
    assert transferred(router, "disk") == from_disk
    assert transferred(router, "host") - from_host >= sum(usage.bytes_from_host for usage in usages) > 0


def disjoint_pools(routed_per_layer: list[int], count: int) -> list[pb.PoolPolicy]:
    dealt = [
        [pb.LayerExperts(experts=range(first, routed, count)) for routed in routed_per_layer] for first in range(count)
    ]
    return [pb.PoolPolicy(experts=pb.FixedPool(layers=layers)) for layers in dealt]


def transferred(router: Any, source: str) -> float:
    """Bytes that all workers have read from there."""
    return float(router.worker_metrics().total("expert_pager_transfer_bytes_total", source=source))


def test_requests_go_on_without_redis_and_a_metric_says_so(
    routers: Routers, redis: Redis, until: Callable[..., None]
) -> None:
    def degraded(router: Any) -> float:
        return float(router.metrics("router").total("expert_pager_router_redis_degraded"))

    both = (routers.first, routers.second)
    assert [degraded(router) for router in both] == [0, 0]
    calls = [router.open(PROMPT, pool=8, max_tokens=300) for router in both]
    for call in calls:
        next(call)
    redis.kill()
    assert [outcome(call) for call in calls] == [None, None]
    for router in both:
        assert router.generate(PROMPT, pool=8, max_tokens=2).usage.completion_tokens == 2
        until(lambda router=router: degraded(router) == 1, 30)
        assert router.health() == SERVING
    redis.start()
    until(lambda: [degraded(router) for router in both] == [0, 0], 60)


def test_the_secret_of_redis_is_in_no_command_line_and_no_log(routers: Routers) -> None:
    for router in (routers.first, routers.second):
        assert PASSWORD not in router.log
        for process in [psutil.Process(router.process.pid), *router.processes()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                assert PASSWORD not in " ".join(process.cmdline())
