"""A worker's threads, and how it drains, with real engines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

THREADS = """
import asyncio, os, threading, time
from pathlib import Path
from pager.cluster.token_client import WorkerLink
from pager.cluster.worker import Worker, load_engine
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
print(len(loaded), len(nameless() - loaded), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_loading_reading_and_stepping_share_one_team_of_threads() -> None:
    """A second team would be more threads than processors, and OpenMP's then sleep between any two operations."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    num_loaded, num_more = map(int, done.stdout.split())
    assert num_loaded >= 2
    assert num_more == 0
