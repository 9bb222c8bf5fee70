"""The process that is connected to Ray for a router: what crosses, and how the two end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from pager.cluster import ray_process
from pager.cluster.cluster import Cluster, RayLost
from pager.cluster.placement import LoadedModel, WorkerReady
from pager.cluster.ray_process import RayProcess
from pager.config import ClusterConfig, ModelConfig, ServiceConfig, WorkerConfig, load_config
from pager.errors import BudgetError, CheckpointError, NotReady, PagerError, PoolTooLarge, PortInUse, WorkerLost
from pager.types import RoutingFacts, SamplingParams
from tests.support.waiting import WAIT_S, eventually

ROOT = Path(__file__).parents[2]

# Opens Ray for a worker that it never starts, and prints what it is told.
ROUTER = """
import asyncio, sys
from pager.cluster.ray_process import RayProcess
from pager.config import ClusterConfig, ModelConfig, ServiceConfig, WorkerConfig

async def main(namespace):
    process = RayProcess()
    cluster = ClusterConfig("local", namespace)
    config = ServiceConfig(ModelConfig("none"), WorkerConfig(count=1, device="cpu"), cluster=cluster)
    await process.open(config, lambda name: print("lost", name, flush=True))
    assert "ray" not in sys.modules
    print(process.pid, flush=True)
    if await asyncio.to_thread(sys.stdin.readline) == "launch\\n":
        try:
            await process.launch("worker-0")
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    await process.close(is_lost=True)
    await process.close()

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def router(namespace: str) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "protos")])
    process = subprocess.Popen(
        [sys.executable, "-c", ROUTER, namespace],
        env=os.environ | {"PYTHONPATH": path, "REDIS_URL": "redis://:s3cret@nowhere"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process, psutil.Process(int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def config_of(namespace: str) -> ServiceConfig:
    workers = WorkerConfig(count=1, device="cpu")
    return ServiceConfig(ModelConfig("none"), workers, cluster=ClusterConfig("local", namespace))


def folder_of(driver: psutil.Process) -> Path:
    """Of the embedded Ray's logs."""
    lines = " ".join(" ".join(each.cmdline()) for each in driver.children(recursive=True))
    found = re.search(r"--log_dir=(/tmp/expert-pager-[^/ ]+)", lines)
    assert found, lines
    return Path(found[1])


async def wait_gone(processes: list[psutil.Process], folder: Path) -> None:
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=WAIT_S)
    assert alive == []
    await eventually(lambda: not folder.exists())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_runtime")
async def test_a_router_that_is_killed_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    with router(tmp_path.name) as (process, driver):
        assert not any("s3cret" in value for value in driver.environ().values())
        left, folder = [driver, *driver.children(recursive=True)], folder_of(driver)
        assert len(left) > 2
        process.kill()
        await wait_gone(left, folder)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_runtime")
async def test_a_process_that_is_killed_is_a_loss_of_ray_and_calls_are_answered(tmp_path: Path) -> None:
    with router(tmp_path.name) as (process, driver):
        left, folder = driver.children(recursive=True), folder_of(driver)
        driver.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, left, timeout=WAIT_S)
        assert alive == []
        said, _ = await asyncio.to_thread(process.communicate, "launch\n", WAIT_S)
        assert said.splitlines() == ["lost driver", "NotReady the process that is connected to Ray has ended"]
        assert process.returncode == 0
    for log in folder.rglob("*"):  # the next start removes what it left, its lock is free
        assert log.exists()
    with router(tmp_path.name) as (process, driver):
        left = [driver, *driver.children(recursive=True)]
        assert not folder.exists()
        folder = folder_of(driver)
        process.communicate("end\n", timeout=WAIT_S)
        assert process.returncode == 0
        await wait_gone(left, folder)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_runtime")
async def test_a_process_that_stops_answering_is_killed_and_is_a_loss_of_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_process, "PING_EVERY_S", 0.1)
    monkeypatch.setattr(ray_process, "PING_TIMEOUT_S", 3.0)
    process, lost = RayProcess(), list[str]()
    driver = psutil.Process(process.pid)
    try:
        await process.open(config_of(tmp_path.name), lost.append)
        left = [driver, *driver.children(recursive=True)]
        driver.suspend()
        with pytest.raises(NotReady, match="has ended"):
            async with asyncio.timeout(WAIT_S):
                await process.launch("worker-0")
        await eventually(lambda: lost == ["driver"])
    finally:
        driver.kill()
        await process.close()
    _, alive = await asyncio.to_thread(psutil.wait_procs, left, timeout=WAIT_S)
    assert alive == []


async def test_a_process_that_ends_before_ray_is_open_is_a_loss_of_ray(tmp_path: Path) -> None:
    process = RayProcess()
    starting = asyncio.create_task(Cluster.connect(config_of(tmp_path.name), process.open))
    psutil.Process(process.pid).kill()
    with pytest.raises(RayLost, match="Ray's driver ended while the workers were starting"):
        await starting
    process.end()


async def test_a_router_that_ends_while_ray_opens_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_process, "OPENING_TIMEOUT_S", 0.1)
    monkeypatch.setattr(ray_process, "EXIT_TIMEOUT_S", 0.1)
    process = RayProcess()
    there = psutil.Process(process.pid)
    there.suspend()
    opening = asyncio.create_task(process.open(config_of(tmp_path.name), print))
    await eventually(lambda: process._calls)
    before_s = time.monotonic()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert time.monotonic() - before_s < ray_process.CLOSE_TIMEOUT_S
    assert not there.is_running()


async def test_a_process_that_is_never_opened_ends_with_its_router() -> None:
    process = RayProcess()
    there = psutil.Process(process.pid)
    process.end()
    assert not there.is_running()
    process.end()
    with pytest.raises(NotReady, match="has ended"):
        await process.names()


def test_what_a_worker_reports_crosses_as_it_is() -> None:
    model = LoadedModel(
        "m", "f", 64, 32, 8, RoutingFacts((4, 0), (1, 0), (2, 0), 100), "T", "s", "2 slots", 2, ("a", "b"), "float32",
        "cpu", 100, {"num_slots": 2, "share": 0.5, "where": None}, "",
        sampling=SamplingParams(temperature=0.7, stop=("x",)),
    )  # fmt: skip
    ready = WorkerReady("127.0.0.1:1", "t", "127.0.0.1:2", 7, model)
    crossed = ray_process._ready_of(json.loads(json.dumps(asdict(ready))))
    assert crossed == ready
    assert type(crossed.model) is LoadedModel


@pytest.mark.parametrize(
    "config",
    [
        load_config(overrides={"model.path": "a", "workers.count": 3, "workers.expert_memory": "25%"}),
        ServiceConfig(ModelConfig("a"), WorkerConfig(per_node=2, count=4), cluster=ClusterConfig("10.0.0.1:6379", "n")),
    ],
)
def test_settings_cross_as_they_are(config: ServiceConfig) -> None:
    assert ray_process._config_of(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("shard 2 of 3 is not there"),
        BudgetError("25 MiB", field="workers.expert_memory"),
        PortInUse("port 1"),
        WorkerLost("gone", retry_after_s=1.5),
        PoolTooLarge(96, 64, field="pools.default_size"),
        PagerError("internal"),
    ],
)
def test_errors_cross_with_their_kind_and_facts(error: PagerError) -> None:
    crossed = ray_process._error_of(json.loads(json.dumps(ray_process._facts_of(error))))
    assert type(crossed) is type(error)
    assert (crossed.message, crossed.field, crossed.retry_after_s) == (error.message, error.field, error.retry_after_s)
    assert crossed.retryable == error.retryable
    assert crossed.__dict__ == error.__dict__
