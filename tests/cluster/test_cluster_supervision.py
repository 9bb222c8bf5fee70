"""Real Ray, real worker processes and sockets; a stand-in for the engine, so that a test can make it hang."""

import asyncio
import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch

from pager.cluster.actors import OwnWorkers, RayHere
from pager.cluster.cluster import Cluster, _metrics_targets
from pager.cluster.placement import LoadedModel, WorkerState, WorkerView
from pager.cluster.ray_session import RaySession
from pager.cluster.worker import HostAccess, LoadedEngine
from pager.config import ClusterConfig, ModelConfig, RouterConfig, ServiceConfig, WorkerConfig
from pager.errors import Cancelled, CheckpointError, DuplicateRequest, NotReady, PagerError, WorkerLost
from pager.observe.worker_metrics import WORKER_FAMILIES, TierBytes
from pager.types import (
    Account,
    ExpertKey,
    ExpertShape,
    FinishReason,
    GenerateRequest,
    PagingCounts,
    PoolPolicy,
    RoutingFacts,
    SamplingParams,
    TokenChunk,
    Usage,
)
from tests.support.processes import worker_pids
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = 665  # with this token a step takes SLOW_S, and gets somewhere all the time
SLOW_S = 12.0
HANG = 666  # a prompt with this token makes the engine's step block for ever
DIE = 667  # and with this one the process is killed in the middle of loading or running


@dataclass(frozen=True)
class Status:
    waiting: int
    running: int
    is_stepping: bool
    progress: int
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_total: int = 8
    place_s: float | None = None


NOTHING = Account()


@dataclass(frozen=True)
class Failure:
    request_id: str
    error: PagerError
    tenant: str
    account: Account = NOTHING


@dataclass
class StandIn:
    """An engine that answers every request with `max_tokens` pieces, one every 2 ms, from a thread of its own."""

    sink: Callable[[list[Any]], None]
    left: dict[str, int] = field(default_factory=dict)
    requests: dict[str, GenerateRequest] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    is_stepping: bool = False
    progress: int = 0
    stopped: bool = False
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, request: GenerateRequest) -> None:
        with self.lock:
            if self.closed:
                raise NotReady("shutting down", retry_after_s=1.0)
            if request.id in self.requests:
                raise DuplicateRequest("in use")
            self.requests[request.id] = request
            self.left[request.id] = request.sampling.max_tokens

    def cancel(self, request_id: str, tenant: str) -> bool:
        with self.lock:
            request = self.requests.get(request_id)
            if request is None or tenant != request.tenant:
                return False
            self.cancelled.add(request_id)
            return True

    def status(self) -> Status:
        return Status(0, len(self.requests), self.is_stepping, self.progress)

    def stop(self, drain_s: float = 0.0) -> None:
        self.closed = True
        end_s = time.monotonic() + drain_s
        while self.requests and time.monotonic() < end_s:
            time.sleep(0.002)
        self.stopped = True
        with self.running:
            pass
        error = NotReady("shutting down", retry_after_s=1.0)
        self.sink([Failure(request.id, error, request.tenant) for request in self.requests.values()])
        self.requests.clear()

    def run(self) -> None:
        with self.running:
            while not self.stopped:
                self.step()

    def step(self) -> None:
        self.is_stepping = True
        self.progress += 1
        with self.lock:
            hang = any(HANG in request.prompt_token_ids for request in self.requests.values())
            slow = any(SLOW in request.prompt_token_ids for request in self.requests.values())
            events = [self.advance(request_id) for request_id in list(self.requests)]
        if hang:
            time.sleep(3600)
        end_s = time.monotonic() + SLOW_S
        while slow and time.monotonic() < end_s:
            time.sleep(0.01)
            self.progress += 1
        self.is_stepping = False
        if events:
            self.sink(events)
        time.sleep(0.002)

    def advance(self, request_id: str) -> Any:
        tenant = self.requests[request_id].tenant
        if request_id in self.cancelled:
            self.forget(request_id)
            return Failure(request_id, Cancelled("cancelled"), tenant)
        self.left[request_id] -= 1
        if self.left[request_id] > 0:
            return TokenChunk(request_id, (os.getpid(),), "piece ", tenant=tenant)
        self.forget(request_id)
        usage = Usage("exact", FinishReason.LENGTH, 1, 1, None, PagingCounts(), 0.0, None, 0.0, 0.0, "f")
        return TokenChunk(request_id, (os.getpid(),), "end", usage, tenant)

    def forget(self, request_id: str) -> None:
        self.cancelled.discard(request_id)
        del self.requests[request_id], self.left[request_id]


MODEL = LoadedModel(
    "stand-in", "f", 64, 64, 8, RoutingFacts((4,), (0,), (1,)), "", "", "2 slots", 2, (), "float32", "cpu", 100
)


RECORD_BYTES = 3 * 8 * 4 * 4


def hold_two_records(host: HostAccess) -> None:
    """One that is read and one that is half written, as a worker holds them when it is killed in the middle."""
    opened = SimpleNamespace(slot_shape=ExpertShape(8, 4), slot_dtype=torch.float32)
    tier = host.attach(opened, SimpleNamespace(host_bytes=6 * RECORD_BYTES))  # type: ignore[arg-type]
    read, _ = tier.acquire([ExpertKey(os.getpid(), expert) for expert in range(2)])
    tier.publish([read])


def load_stand_in(config: ServiceConfig, sink: Any, observer: Any, host: HostAccess | None) -> LoadedEngine:
    if config.model.path == "broken":
        raise CheckpointError("shard 2 of 3 is not there; download it again")
    if config.model.path == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    if host is not None:
        hold_two_records(host)
    engine = StandIn(sink)
    return LoadedEngine(
        engine,
        MODEL,
        10,
        resident=lambda: [[1, 3]],
        paging=lambda: PagingCounts(5, 3, 700, 0),
        tiers=lambda: {"device": TierBytes(200, 100, 0, 0)},
        page_in=lambda experts, timeout_s: None,
        close=lambda: None,
    )


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", autouse=True)
def session(ray_runtime: None) -> Iterator[RaySession]:
    session = RaySession.open(None, "tests")
    yield session
    session.close()
    assert session.folder is not None
    assert not session.folder.path.exists()


def config(tmp_path: Path, count: int = 1, model: str = "stand-in", **workers: Any) -> ServiceConfig:
    return ServiceConfig(
        model=ModelConfig(path=model),
        workers=WorkerConfig(count=count, device="cpu", num_threads=1, **workers),
        router=RouterConfig(stream_buffer_chunks=10**6),
        cluster=ClusterConfig(namespace=tmp_path.name, file_sd=str(tmp_path / "targets.json")),
    )


async def connect(config: ServiceConfig) -> Cluster:
    return await Cluster.connect(config, functools.partial(RayHere.open, load=load_stand_in))


@contextlib.asynccontextmanager
async def cluster(config: ServiceConfig) -> AsyncIterator[Cluster]:
    cluster = await connect(config)
    try:
        yield cluster
    finally:
        await cluster.close()


def request(request_id: str, max_tokens: int = 5, token: int = 1, tenant: str = "t") -> GenerateRequest:
    return GenerateRequest(request_id, tenant, (token,), SamplingParams(max_tokens=max_tokens), PoolPolicy())


async def answer(cluster: Cluster, worker: str, request: GenerateRequest) -> list[TokenChunk]:
    return [chunk async for chunk in cluster.generate(worker, request)]


def ready(cluster: Cluster) -> list[str]:
    return [view.id for view in cluster.workers() if view.state is WorkerState.READY]


def pid_of(chunks: list[TokenChunk]) -> int:
    return chunks[0].token_ids[0]


async def test_two_workers_answer_at_the_same_time_and_say_what_they_are(tmp_path: Path) -> None:
    async with cluster(config(tmp_path, count=2)) as both:
        await eventually(lambda: ready(both) == ["worker-0", "worker-1"])
        asked = [answer(both, f"worker-{index % 2}", request(str(index), 20)) for index in range(8)]
        answers = await asyncio.gather(*asked)
        assert all([chunk.text for chunk in chunks] == ["piece "] * 19 + ["end"] for chunks in answers)
        assert len({pid_of(chunks) for chunks in answers}) == 2
        assert both.model() == MODEL
        view = both.workers()[0]
        assert (view.num_slots, view.expert_bytes, view.resident) == (2, 100, (0b1010,))
        targets = json.loads((tmp_path / "targets.json").read_text())
        assert [group["labels"]["worker"] for group in targets] == ["worker-0", "worker-1"]
        for group in targets:
            text = await asyncio.to_thread(_get, f"http://{group['targets'][0]}/metrics")
            assert 'expert_pager_model_info{device="cpu",dtype="float32",' in text
            assert 'expert_pager_capacity_bytes{tier="device"} 200.0' in text


def _get(url: str) -> str:
    with urllib.request.urlopen(url) as response:
        return str(response.read().decode())


async def test_a_killed_worker_fails_its_streams_at_once_and_comes_back(tmp_path: Path) -> None:
    async with cluster(config(tmp_path, count=2)) as both:
        await eventually(lambda: len(ready(both)) == 2)
        pid = pid_of(await answer(both, "worker-0", request("who")))
        lost = [asyncio.create_task(answer(both, "worker-0", request(f"l{index}", 10**6))) for index in range(3)]
        kept = asyncio.create_task(answer(both, "worker-1", request("kept", 400)))
        await eventually(lambda: both.workers()[0].running == 3)
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            outcomes = await asyncio.gather(*lost, return_exceptions=True)
        assert all(isinstance(outcome, WorkerLost) and outcome.retry_after_s for outcome in outcomes)
        assert both.workers()[0].num_restarts == 0, "they waited for another worker"
        with pytest.raises(WorkerLost):
            await answer(both, "worker-0", request("too early"))
        assert (await kept)[-1].usage is not None
        await eventually(lambda: both.workers()[0].state is WorkerState.READY)
        assert both.workers()[0].num_restarts == 1
        again = await answer(both, "worker-0", request("l0"))
        assert pid_of(again) != pid
        assert again[-1].usage is not None


async def test_a_worker_that_is_started_again_stays_a_target_whose_scrapes_are_whole_or_fail(tmp_path: Path) -> None:
    async with cluster(config(tmp_path)) as one:
        os.kill(pid_of(await answer(one, "worker-0", request("who"))), signal.SIGKILL)
        num_refused = num_whole = 0
        async with asyncio.timeout(180):
            while not num_whole:
                (group,) = json.loads((tmp_path / "targets.json").read_text())
                assert group["labels"]["worker"] == "worker-0"
                try:
                    text = await asyncio.to_thread(_get, f"http://{group['targets'][0]}/metrics")
                except OSError:
                    num_refused += 1
                else:
                    assert all(f"\n{family.exposed}" in text for family in WORKER_FAMILIES)
                    num_whole += one.workers()[0].num_restarts
                await asyncio.sleep(0.01)
        assert num_refused > 0


async def test_the_port_of_a_lost_worker_that_another_has_is_the_others_target() -> None:
    lost = WorkerView("worker-0", WorkerState.STARTING, metrics_address="127.0.0.1:1")
    other = WorkerView("worker-1", WorkerState.READY, metrics_address="127.0.0.1:2")
    never = WorkerView("worker-2", WorkerState.STARTING)
    assert _metrics_targets([lost, other, never]) == {"worker-0": "127.0.0.1:1", "worker-1": "127.0.0.1:2"}
    assert _metrics_targets([lost, replace(other, metrics_address="127.0.0.1:1")]) == {"worker-1": "127.0.0.1:1"}


async def test_kills_leave_no_files_processes_or_sockets_behind(tmp_path: Path) -> None:
    me = psutil.Process()

    def held() -> tuple[int, int, int]:
        segments = list(Path("/dev/shm").glob(f"expert-pager-{tmp_path.name}-*"))
        return me.num_fds(), len(worker_pids()), len(segments)

    async with cluster(config(tmp_path, host_memory="1MiB")) as one:
        pid = pid_of(await answer(one, "worker-0", request("a")))

        async def kill_and_wait(pid: int) -> int:
            os.kill(pid, signal.SIGKILL)
            await eventually(lambda: ready(one) == [])
            await eventually(lambda: ready(one) == ["worker-0"])
            return pid_of(await answer(one, "worker-0", request("a")))

        pid = await kill_and_wait(pid)  # the first one warms up what is made once
        await asyncio.sleep(1)
        before = held()
        for _ in range(3):
            pid = await kill_and_wait(pid)
        await eventually(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))


async def test_a_step_without_progress_is_noticed_and_the_worker_replaced(tmp_path: Path) -> None:
    async with cluster(config(tmp_path, step_timeout_s=5.0)) as one:
        pid = pid_of(await answer(one, "worker-0", request("long, and alive", 1, token=SLOW)))
        assert pid_of(await answer(one, "worker-0", request("who"))) == pid, "it was working all the time"
        states = []
        stuck = asyncio.create_task(answer(one, "worker-0", request("stuck", 10, token=HANG)))
        with pytest.raises(WorkerLost):
            await asyncio.wait_for(stuck, 120)
        states.append(one.workers()[0].state)
        assert states == [WorkerState.HUNG]
        await eventually(lambda: ready(one) == ["worker-0"])
        assert pid_of(await answer(one, "worker-0", request("who"))) != pid
        await eventually(lambda: not psutil.pid_exists(pid))  # its raylet looks after the dead, when it has time


async def test_a_worker_that_is_gone_or_does_not_answer_can_be_drained_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has died has nothing to end; of one that does not answer, the caller hears so."""
    async with cluster(config(tmp_path)) as one:
        pid = pid_of(await answer(one, "worker-0", request("who")))
        os.kill(pid, signal.SIGKILL)
        assert ready(one) == ["worker-0"], "nobody has noticed yet"
        await asyncio.wait_for(one.retire("worker-0"), 120)
        await eventually(lambda: one.workers()[0].num_restarts == 1 and ready(one) == ["worker-0"])

        monkeypatch.setattr("pager.cluster.cluster.HEALTH_TIMEOUT_S", 0.3)
        pid = pid_of(await answer(one, "worker-0", request("who")))
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(NotReady, match="worker-0 does not answer; try again"):
                await asyncio.wait_for(one.retire("worker-0"), 120)
        finally:
            os.kill(pid, signal.SIGCONT)


def node_control(namespace: str) -> Any:
    return ray.get_actor(f"node-{ray.get_runtime_context().get_node_id()}", namespace)


async def test_what_a_killed_worker_held_of_the_host_tier_is_given_back(tmp_path: Path) -> None:
    async with cluster(config(tmp_path, count=2, host_memory="1MiB")) as both:
        await eventually(lambda: len(ready(both)) == 2)
        node = node_control(tmp_path.name)
        assert await node.host_bytes.remote() == (4 * RECORD_BYTES, 4 * RECORD_BYTES)
        os.kill(pid_of(await answer(both, "worker-0", request("who"))), signal.SIGKILL)
        await eventually(lambda: ready(both) == ["worker-1"])
        await eventually(lambda: len(ready(both)) == 2)
        # What it had written stays for others, and is nobody's; its next life holds two of its own.
        assert await node.host_bytes.remote() == (5 * RECORD_BYTES, 4 * RECORD_BYTES)


async def test_a_node_without_a_host_tier_has_a_control_actor_too_and_gets_another_when_it_dies(tmp_path: Path) -> None:
    async with cluster(config(tmp_path)) as one:
        node = node_control(tmp_path.name)
        assert await node.host_bytes.remote() == (0, 0)
        await asyncio.to_thread(ray.kill, node)
        pid = pid_of(await answer(one, "worker-0", request("goes on")))
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: ready(one) == [])
        await eventually(lambda: ready(one) == ["worker-0"])
        assert await node_control(tmp_path.name).host_bytes.remote() == (0, 0)
        assert pid_of(await answer(one, "worker-0", request("goes on"))) != pid


async def test_a_second_router_shares_the_workers_and_outlives_neither_of_them(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with cluster(settings) as first:
        attached = replace(settings, workers=replace(settings.workers, count=0))
        second = await connect(attached)
        try:
            assert ready(second) == ["worker-0"]
            here, there = await asyncio.gather(
                answer(first, "worker-0", request("a", 30)), answer(second, "worker-0", request("b", 30))
            )
            assert pid_of(here) == pid_of(there)
            running = asyncio.create_task(answer(first, "worker-0", request("mine", 10**6, tenant="me")))
            await eventually(lambda: first.workers()[0].running == 1)
            with pytest.raises(DuplicateRequest):
                await answer(second, "worker-0", request("mine"))
            assert not await second.abort("mine", "somebody else")
            assert await second.abort("mine", "me")
            with pytest.raises(Cancelled):
                await running
            assert not await second.abort("mine", "me")

            os.kill(pid_of(there), signal.SIGKILL)  # both see it come back
            await eventually(lambda: ready(first) == [] and ready(second) == [])
            await eventually(lambda: ready(first) == ready(second) == ["worker-0"])
            assert (await answer(second, "worker-0", request("c")))[-1].usage is not None
        finally:
            await second.close()
        assert (await answer(first, "worker-0", request("d")))[-1].usage is not None


async def test_requests_of_a_router_that_goes_are_cancelled(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with cluster(settings) as first:
        second = await connect(replace(settings, workers=replace(settings.workers, count=0)))
        orphan = asyncio.create_task(answer(second, "worker-0", request("orphan", 10**6)))
        await eventually(lambda: first.workers()[0].running == 1)
        await second.close()
        with pytest.raises(WorkerLost):
            await orphan
        await eventually(lambda: first.workers()[0].running == 0)


SECOND_ROUTER = """
import asyncio, sys
from pager.cluster.cluster import Cluster
from pager.config import ClusterConfig, ServiceConfig, WorkerConfig
from pager.types import GenerateRequest, PoolPolicy, SamplingParams

async def main(ray_address, namespace):
    config = ServiceConfig(workers=WorkerConfig(count=0), cluster=ClusterConfig(ray_address, namespace))
    cluster = await Cluster.connect(config)
    request = GenerateRequest("theirs", "t", (1,), SamplingParams(max_tokens=10**6), PoolPolicy())
    async for chunk in cluster.generate("worker-0", request):
        print(chunk.token_ids[0], flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_router_in_another_process_joins_by_address_and_its_requests_die_with_it(tmp_path: Path) -> None:
    async with cluster(config(tmp_path)) as first:
        pid = pid_of(await answer(first, "worker-0", request("who")))
        where = (ray.get_runtime_context().gcs_address, tmp_path.name)
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-c", SECOND_ROUTER, *where)
        other = await asyncio.create_subprocess_exec(*command, stdout=pipe, limit=2**24)
        try:
            assert other.stdout is not None
            assert int(await asyncio.wait_for(other.stdout.readline(), 180)) == pid
            await eventually(lambda: first.workers()[0].running == 1)
        finally:
            other.kill()
            await other.communicate()
        await eventually(lambda: first.workers()[0].running == 0)


async def test_nothing_listens_beyond_the_loopback(tmp_path: Path) -> None:
    async with cluster(config(tmp_path)) as one:
        await answer(one, "worker-0", request("warm"))
        everybody = [psutil.Process(), *psutil.Process().children(recursive=True)]
        hosts = set()
        for process in everybody:
            with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends those that it has no use for
                listening = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
                hosts |= {each.laddr.ip.removeprefix("::ffff:") for each in listening}
        assert hosts == {"127.0.0.1"}


async def test_sigterm_has_a_worker_end_what_it_runs_and_another_takes_its_place(tmp_path: Path) -> None:
    async with cluster(config(tmp_path, count=2, drain_s=60)) as both:
        await eventually(lambda: len(ready(both)) == 2)
        pid = pid_of(await answer(both, "worker-0", request("who")))
        running = [both.generate("worker-0", request(f"r{index}", 2000)) for index in range(4)]
        started = [await anext(chunks) for chunks in running]
        os.kill(pid, signal.SIGTERM)
        await eventually(lambda: both.workers()[0].state is WorkerState.DRAINING)
        with pytest.raises(WorkerLost):
            await answer(both, "worker-0", request("late"))
        assert ready(both) == ["worker-1"]
        answers = await asyncio.gather(*map(_read_all, running))
        assert [len(chunks) for chunks in answers] == [1999] * 4
        assert all(chunks[-1].usage is not None for chunks in answers)
        assert {pid_of([chunk]) for chunk in started} == {pid}
        await eventually(lambda: len(ready(both)) == 2)
        assert pid_of(await answer(both, "worker-0", request("who"))) != pid
        await eventually(lambda: not psutil.pid_exists(pid))  # its raylet looks after the dead, when it has time


async def test_what_does_not_end_within_a_workers_drain_is_told_to_try_again(tmp_path: Path) -> None:
    async with cluster(config(tmp_path, drain_s=0.5)) as one:
        endless = one.generate("worker-0", request("endless", 10**6))
        pid = pid_of([await anext(endless)])
        os.kill(pid, signal.SIGTERM)
        with pytest.raises(NotReady) as caught:
            await _read_all(endless)
        assert caught.value.retry_after_s
        await eventually(lambda: ready(one) == ["worker-0"])


async def test_who_owns_the_workers_lets_them_end_what_others_run_there(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with cluster(settings) as owner:
        attached = replace(settings, workers=replace(settings.workers, count=0))
        async with cluster(attached) as other:
            endless = owner.generate("worker-0", request("endless", 10**6))
            await anext(endless)
            theirs = other.generate("worker-0", request("theirs", 600))
            await anext(theirs)
            owner.cut_off()
            with pytest.raises(NotReady):
                await _read_all(endless)
            with pytest.raises(NotReady):
                await answer(owner, "worker-0", request("late"))
            draining = asyncio.create_task(owner.drain(timeout_s=60))
            assert len(await _read_all(theirs)) == 599
            await draining


async def _read_all(chunks: AsyncIterator[TokenChunk]) -> list[TokenChunk]:
    return [chunk async for chunk in chunks]


async def test_what_the_operator_must_mend_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="shard 2 of 3"):
        await connect(config(tmp_path, model="broken"))
    await eventually(lambda: not worker_pids())


async def test_a_launch_that_is_given_up_while_its_name_is_taken_ends(tmp_path: Path, session: RaySession) -> None:
    async with cluster(config(tmp_path)) as one:
        launch = asyncio.create_task(OwnWorkers(config(tmp_path), session, load_stand_in).launch("worker-0"))
        await asyncio.sleep(0)  # it has asked Ray
        launch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await launch
        assert (await answer(one, "worker-0", request("goes on")))[-1].usage is not None


async def test_a_worker_that_does_not_say_where_it_is_makes_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, unreachable = OwnWorkers._create, list[Any]()

    async def fail() -> None:
        raise ray.exceptions.ActorUnavailableError("not now", None)

    def create_unreachable_first(self: OwnWorkers, name: str) -> Any:
        actor = create(self, name)
        if not unreachable:
            actor.whereabouts = SimpleNamespace(remote=fail)
            unreachable.append(actor)
        return actor

    monkeypatch.setattr(OwnWorkers, "_create", create_unreachable_first)
    async with cluster(config(tmp_path)) as one:
        assert unreachable
        assert one.workers()[0].num_restarts >= 1
        assert (await answer(one, "worker-0", request("a")))[-1].usage is not None
        await eventually(lambda: len(worker_pids()) == 1)


async def test_a_worker_that_dies_while_it_loads_is_given_up_after_some_tries(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match="3 times before it was ready"):
        await connect(config(tmp_path, model="deadly"))
