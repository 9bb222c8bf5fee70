"""A worker's threads, and how it drains, with real engines."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pager.cluster.actors import load_engine
from pager.cluster.tokens import WorkerLink
from pager.cluster.worker import Worker
from pager.config import ModelConfig, ServiceConfig, WorkerConfig
from pager.errors import DuplicateRequest, NotReady, PagerError
from pager.types import GenerateRequest, PoolPolicy, SamplingParams, TokenChunk

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "data" / "golden" / "ckpt_emo_tiny"

THREADS = """
import asyncio, os, threading, time
from pathlib import Path
from pager.cluster.tokens import WorkerLink
from pager.cluster.actors import load_engine
from pager.cluster.worker import Worker
from pager.config import ModelConfig, ServiceConfig, WorkerConfig
from pager.types import GenerateRequest, PoolPolicy, SamplingParams

def nameless():
    "The threads that Python knows nothing of, and that no library has given a name: OpenMP's, and some of others."
    known, name = {thread.native_id for thread in threading.enumerate()}, Path("/proc/self/comm").read_text()
    tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) not in known]
    return {task.name for task in tasks if (task / "comm").read_text() == name}

async def answer(ready):
    link = WorkerLink(ready.address, ready.token, buffer_chunks=64, on_load=lambda load: None)
    await link.attach()
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    async for chunk in link.generate(GenerateRequest("r", "t", tuple(range(5, 105)), sampling, PoolPolicy())):
        pass
    await link.close()
    assert chunk.usage.bytes_from_disk > 0

sizes = WorkerConfig(device="cpu", expert_memory="25%", host_memory=0, kv_memory="1MiB", num_threads=3)
worker = Worker(0, ServiceConfig(model=ModelConfig(path="models/emo-tiny"), workers=sizes), "127.0.0.1", load_engine)
ready = worker.load()
loaded = nameless()
asyncio.run(answer(ready))
end_s = time.monotonic() + 30
while nameless() - loaded and time.monotonic() < end_s:  # gRPC's have no name at first
    time.sleep(0.1)
print(ready.model.plan_facts["num_threads"], len(loaded), len(nameless() - loaded), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_loading_reading_and_stepping_share_one_team_of_threads() -> None:
    """A second team would be more threads than processors, and OpenMP's then sleep between any two operations."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    num_threads, num_loaded, num_more = map(int, done.stdout.split())
    assert num_threads == 3, "the configuration says so"
    assert num_loaded >= 2
    assert num_more == 0


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker in this process that has loaded a small model."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = WorkerConfig(device="cpu", expert_memory="50%", host_memory=0, kv_memory="1MiB", num_threads=1)
    config = ServiceConfig(model=ModelConfig(path=str(CHECKPOINT), dtype="float32"), workers=sizes)
    worker = Worker(0, config, "127.0.0.1", load_engine)
    ready = worker.load()
    assert not isinstance(ready, PagerError), ready
    yield worker
    worker.close()


@asynccontextmanager
async def linked(worker: Worker) -> AsyncIterator[WorkerLink]:
    ready = worker.ready()
    assert ready is not None
    link = WorkerLink(ready.address, ready.token, buffer_chunks=1024, on_load=lambda load: None)
    await link.attach()
    try:
        yield link
    finally:
        await link.close()


def request(id_: str, max_tokens: int) -> GenerateRequest:
    return GenerateRequest(id_, "t", (5, 6, 7), SamplingParams(max_tokens=max_tokens, ignore_eos=True), PoolPolicy())


def refuses(worker: Worker) -> bool:
    assert worker._loaded is not None
    try:
        worker._loaded.engine.submit(request("late", 1))
    except NotReady:
        return True
    except DuplicateRequest:  # the one before it runs still
        pass
    return False


async def test_a_drain_waits_for_no_announcement_and_loses_nothing(worker: Worker) -> None:
    """The loop that announces is held up until the engine drains, or until the drain has given up."""
    async with linked(worker) as link:
        answers = [link.generate(request(str(number), 100)) for number in range(3)]
        chunks = [[await anext(answer)] for answer in answers]
        raised: list[BaseException] = []

        def drain() -> None:
            try:
                worker.drain(120)
            except BaseException as error:
                raised.append(error)

        released = threading.Event()
        worker._loop.loop.call_soon_threadsafe(released.wait, 120)
        draining = threading.Thread(target=drain, daemon=True)
        draining.start()
        try:
            while draining.is_alive() and not refuses(worker):  # noqa: ASYNC110 - in another thread
                await asyncio.sleep(0.01)
        finally:
            released.set()
        for seen, answer in zip(chunks, answers, strict=True):
            seen += [chunk async for chunk in answer]
        await asyncio.to_thread(draining.join)
    assert not raised
    assert [num_tokens(seen) for seen in chunks] == [100] * 3
    assert all(seen[-1].usage is not None for seen in chunks)


def num_tokens(chunks: list[TokenChunk]) -> int:
    return sum(len(chunk.token_ids) for chunk in chunks)


async def test_a_drain_ends_where_the_loop_never_comes_back(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody hears of it then, but the process ends, and another takes its place."""
    monkeypatch.setattr("pager.cluster.worker.CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr("pager.threads.STOP_TIMEOUT_S", 0.2)
    released = threading.Event()
    worker._loop.loop.call_soon_threadsafe(released.wait)
    try:
        await asyncio.wait_for(asyncio.to_thread(worker.drain, 0.2), 120)
    finally:
        released.set()
        await asyncio.to_thread(end_what_was_left_behind, worker)
    assert refuses(worker)


def end_what_was_left_behind(worker: Worker) -> None:
    """Ends what a process would have ended with: a collection of it later on would warn in another test."""
    worker._loop._thread.join()
    loop = worker._loop.loop

    async def end() -> None:
        await worker._server.stop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    loop.run_until_complete(end())
    loop.close()
