"""A real model behind real Ray workers with a shared host tier: same tokens as in process; a kill leaves nothing."""

import asyncio
import contextlib
import itertools
import os
import signal
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer
from tokenizers.models import BPE

from pager.cluster.actors import RayHere
from pager.cluster.cluster import Cluster
from pager.cluster.placement import WorkerState
from pager.cluster.ray_session import RaySession
from pager.config import ClusterConfig, ModelConfig, ServiceConfig, WorkerConfig
from pager.engine.engine import Engine
from pager.engine.interface import EngineLimits, Failure, StreamEvent
from pager.engine.paged_model import load_paged_model
from pager.errors import InvalidRequest, PoolTooSmall, WorkerLost
from pager.memory import Budgets
from pager.types import (
    Count,
    ExpertPool,
    Full,
    GenerateRequest,
    PoolPolicy,
    PoolSource,
    SamplingParams,
    TokenChunk,
    Usage,
)
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "ckpt_emo_tiny"
NAMESPACE = f"model-tests-{os.getpid()}"
CONFIG = ServiceConfig(
    model=ModelConfig(path=str(CHECKPOINT), dtype="float32"),
    workers=WorkerConfig(
        count=2, device="cpu", expert_memory="50%", host_memory="50%", kv_memory="1MiB", num_threads=1
    ),
    cluster=ClusterConfig(namespace=NAMESPACE),
)
PROMPT = tuple(range(5, 25))
EXPERT_BYTES = 3 * 64 * 32 * 4


@pytest.fixture(scope="module", autouse=True)
def session(ray_runtime: None) -> Iterator[RaySession]:
    session = RaySession.open(None, NAMESPACE)
    yield session
    session.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(session: RaySession) -> AsyncIterator[Cluster]:
    cluster = await Cluster.connect(CONFIG, RayHere.open)
    await eventually(lambda: all(view.state is WorkerState.READY for view in cluster.workers()))
    assert len(segments()) == 2, "records and their index"
    yield cluster
    await cluster.close()
    assert segments() == []


def request(
    name: str, *, max_tokens: int = 16, routed: int | None = None, prompt: tuple[int, ...] = PROMPT
) -> GenerateRequest:
    policy = PoolPolicy(size=Full() if routed is None else Count(routed))
    return GenerateRequest(name, "t", prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), policy)


REQUESTS = [request("full"), *(request(f"pool{n}", routed=4, prompt=PROMPT[n:]) for n in range(4))]


async def answer(cluster: Cluster, worker: str, request: GenerateRequest) -> list[int]:
    return [token async for chunk in cluster.generate(worker, request) for token in chunk.token_ids]


def tokens_in_process() -> dict[str, list[int]]:
    events: list[StreamEvent] = []
    paged = load_paged_model(
        CHECKPOINT, dtype="float32", budgets=Budgets(expert_memory="100%", host_memory=0, kv_memory="1MiB")
    )
    engine = Engine(paged, Tokenizer(BPE()), EngineLimits(), sink=events.extend)
    found: dict[str, list[int]] = {}
    for each in REQUESTS:
        engine.submit(each)
        while engine.step():
            pass
        assert not any(isinstance(event, Failure) for event in events)
        found[each.id] = [t for event in events if isinstance(event, TokenChunk) for t in event.token_ids]
        events.clear()
    paged.close()
    return found


def segments() -> list[Path]:
    return sorted(Path("/dev/shm").glob(f"expert-pager-{NAMESPACE}-*"))


async def scrape(address: str) -> dict[tuple[str, str], float]:
    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics") as response:
            return str(response.read().decode())

    families = text_string_to_metric_families(await asyncio.to_thread(read))
    samples = [sample for family in families for sample in family.samples]
    return {(s.name, ",".join(value for _, value in sorted(s.labels.items()))): s.value for s in samples}


async def test_both_workers_answer_together_with_the_tokens_of_an_engine_in_process(cluster: Cluster) -> None:
    expected = await asyncio.to_thread(tokens_in_process)
    for worker in ("worker-0", "worker-1"):
        answers = await asyncio.gather(*(answer(cluster, worker, each) for each in REQUESTS))
        assert dict(zip((each.id for each in REQUESTS), answers, strict=True)) == expected


async def test_what_one_worker_read_another_finds_in_the_host_tier(cluster: Cluster) -> None:
    """Device and host tier hold 30 experts each and a pool 16: after the two others, a device has none of it."""
    wanted, *others = (ExpertPool((tuple(range(first, 12, 3)),) * 4) for first in range(3))

    async def run(worker: str, pool: ExpertPool) -> Usage:
        fixed, two = PoolPolicy(Count(4), PoolSource.FIXED, pool), SamplingParams(max_tokens=2, ignore_eos=True)
        asked = GenerateRequest(f"fixed on {worker}", "t", PROMPT, two, fixed)
        usage = [chunk.usage async for chunk in cluster.generate(worker, asked)][-1]
        assert usage is not None
        return usage

    for worker in ("worker-0", "worker-1"):
        for pool in others * 2:
            await run(worker, pool)
    address = cluster.workers()[1].metrics_address
    assert address is not None
    before = await scrape(address)
    reading = await run("worker-0", wanted)
    one_more = await run("worker-0", ExpertPool(((0, 3, 6, 12), *wanted.experts[1:])))
    finding = await run("worker-1", wanted)
    missing = 16 * EXPERT_BYTES
    assert reading.bytes_from_disk + reading.bytes_from_host == missing
    # To ask for one more, a worker waits for the node, which has heard by then of all that was read before.
    assert one_more.bytes_from_disk + one_more.bytes_from_host == EXPERT_BYTES
    assert (finding.bytes_from_disk, finding.bytes_from_host) == (0, missing)
    found = await scrape(address)
    transferred = "expert_pager_transfer_bytes_total", "device,host"
    assert found[transferred] - before[transferred] == missing
    assert found["expert_pager_resident_bytes", "host"] > 0
    assert found["expert_pager_resident_bytes", "device"] <= found["expert_pager_capacity_bytes", "device"]


async def test_refusals_of_the_engine_arrive_as_what_they_are(cluster: Cluster) -> None:
    with pytest.raises(PoolTooSmall):
        await answer(cluster, "worker-0", request("small", routed=1))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        await answer(cluster, "worker-0", request("odd", prompt=(10**6,)))


async def test_a_kill_in_the_middle_of_answers_leaves_nothing_behind(cluster: Cluster) -> None:
    me = psutil.Process()

    async def kill() -> None:
        """While it pages and streams; returns when it is back and has answered."""
        pid = await worker_pid(cluster, "worker-0")
        begun: set[int] = set()

        async def ask(client: int) -> None:
            for turn in itertools.count():  # so that none is between two answers for long when it comes
                asked = request(f"lost{client}-{turn}", max_tokens=200, prompt=PROMPT[client:])
                async for _ in cluster.generate("worker-0", asked):
                    begun.add(client)

        clients = [asyncio.create_task(ask(client)) for client in range(3)]
        await eventually(lambda: len(begun) == len(clients))
        os.kill(pid, signal.SIGKILL)
        restarts = cluster.workers()[0].num_restarts
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*clients, return_exceptions=True)
        assert all(isinstance(end, WorkerLost) and end.retry_after_s for end in ends)
        assert cluster.workers()[0].num_restarts == restarts, "they waited for another worker"
        await eventually(lambda: cluster.workers()[0].state is not WorkerState.READY)
        assert await answer(cluster, "worker-1", REQUESTS[0])
        await eventually(lambda: cluster.workers()[0].state is WorkerState.READY)
        assert await answer(cluster, "worker-0", REQUESTS[0]) == await answer(cluster, "worker-1", REQUESTS[0])

    await kill()  # what is made once is made now
    fds, processes, shared = me.num_fds(), len(me.children(recursive=True)), segments()
    await kill()
    await eventually(lambda: me.num_fds() <= fds and len(me.children(recursive=True)) <= processes)
    assert segments() == shared
    for view in cluster.workers():
        assert view.metrics_address is not None
        found = await scrape(view.metrics_address)
        for name in ("pinned_bytes", "reserved_bytes"):
            assert found[f"expert_pager_{name}", "device"] == 0
        assert found["expert_pager_kv_used_bytes", ""] == 0


async def worker_pid(cluster: Cluster, worker: str) -> int:
    """From its process metrics' start: the process that listens on its metrics port."""
    view = next(view for view in cluster.workers() if view.id == worker)
    assert view.metrics_address is not None
    port = int(view.metrics_address.rpartition(":")[2])
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray ends those that it has no use for
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp")):
                return int(process.pid)
    raise AssertionError(f"nobody listens on {port}")
