"""Workers of several nodes: they go where there is room for them, and the others wait. Real Ray, a real model."""

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from pager.cluster.actors import OwnWorkers, RayHere, load_engine
from pager.cluster.cluster import Cluster
from pager.cluster.placement import WorkerReady, WorkerState
from pager.cluster.ray_session import OBJECT_STORE_BYTES, WORKER_RESOURCE, RaySession, start_embedded, stop_ray
from pager.cluster.worker import Worker, WorkerObserver
from pager.config import ClusterConfig, ModelConfig, ServiceConfig, WorkerConfig, load_config
from pager.errors import BudgetError, ConfigError, PortInUse
from pager.memory import Machine

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "ckpt_emo_tiny"
NAMESPACE = f"per-node-tests-{os.getpid()}"


def config(**workers: object) -> ServiceConfig:
    settings = {"device": "cpu", "expert_memory": "50%", "host_memory": 0, "kv_memory": "1MiB", "num_threads": 1}
    return ServiceConfig(
        model=ModelConfig(path=str(CHECKPOINT), dtype="float32"),
        workers=WorkerConfig(**(settings | workers)),  # type: ignore[arg-type]
        cluster=ClusterConfig(namespace=NAMESPACE),
    )


def free_ports(count: int) -> int:
    """The first of so many that are free one after the other."""
    for first in range(20000, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture
def node_for_one(ray_runtime: None) -> Iterator[None]:
    """A Ray node that takes one worker."""
    folder = tempfile.mkdtemp(prefix="ray-")
    start_embedded(
        namespace=NAMESPACE, num_cpus=1, resources={WORKER_RESOURCE: 1}, object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False, _temp_dir=folder,
    )  # fmt: skip
    yield
    stop_ray()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.usefixtures("node_for_one")
async def test_a_worker_starts_where_a_node_takes_it_and_the_next_one_waits() -> None:
    port = free_ports(1)
    cluster = await Cluster.connect(config(count=2, per_node=1, metrics_port=port), RayHere.open)
    try:
        states = {view.state for view in cluster.workers()}
        assert states == {WorkerState.READY, WorkerState.STARTING}
        (ready,) = [view for view in cluster.workers() if view.state is WorkerState.READY]
        assert ready.metrics_address == f"127.0.0.1:{port}"  # whichever of the two it is
        await asyncio.sleep(1)  # it is not lost, and not started again
        (waiting,) = [view for view in cluster.workers() if view.state is not WorkerState.READY]
        assert (waiting.state, waiting.num_restarts) == (WorkerState.STARTING, 0)
    finally:
        await cluster.close()


@pytest.mark.usefixtures("node_for_one")
async def test_gpus_may_come_later_where_nodes_do() -> None:
    session = RaySession("127.0.0.1", owns_ray=False, folder=None)
    workers = OwnWorkers(config(count=2, per_node=1, device="cuda"), session, load_engine)
    assert await workers.names() == ["worker-0", "worker-1"]


def test_workers_of_a_node_take_the_metrics_ports_that_are_free() -> None:
    first = free_ports(2)
    workers = [
        Worker(index, config(count=8, per_node=2, metrics_port=first), "127.0.0.1", load_engine) for index in (3, 6, 7)
    ]
    answers = [worker.load() for worker in workers]
    for worker in workers:
        worker.close()
    *ready, refused = answers
    addresses = [answer.metrics_address for answer in ready if isinstance(answer, WorkerReady)]
    assert addresses == [f"127.0.0.1:{first}", f"127.0.0.1:{first + 1}"]
    assert isinstance(refused, PortInUse)


@pytest.mark.parametrize(
    ("count", "per_node", "sharing"), [(1, None, 1), (4, None, 4), (4, 1, 1), (4, 2, 2), (0, None, 1)]
)
def test_a_node_is_divided_among_those_on_it(count: int, per_node: int | None, sharing: int) -> None:
    assert WorkerConfig(count=count, per_node=per_node).sharing_a_node == sharing


@pytest.mark.parametrize(("count", "per_node", "fits"), [(1, None, True), (2, None, True), (2, 2, True), (2, 4, False)])
def test_a_worker_plans_with_its_part_of_the_node(
    monkeypatch: pytest.MonkeyPatch, count: int, per_node: int | None, fits: bool
) -> None:
    found = Machine(128 * 2**20)  # for two of these workers, not for four
    monkeypatch.setattr(Machine, "detect", lambda device="cpu": found)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = config(count=count, per_node=per_node, max_running=4)

    with nullcontext() if fits else pytest.raises(BudgetError, match=r"of the 32\.0 MiB found"):
        load_engine(asked, lambda events: None, WorkerObserver(), None).close()


@pytest.mark.slow
async def test_an_embedded_cluster_takes_workers_that_are_counted_a_node() -> None:
    cluster = await Cluster.connect(config(count=1, per_node=1), RayHere.open)
    try:
        assert [view.state for view in cluster.workers()] == [WorkerState.READY]
    finally:
        await cluster.close()


@pytest.mark.parametrize(("address", "is_refused"), [("local", True), ("10.0.0.1:6379", False)])
def test_one_node_is_not_asked_for_workers_that_it_does_not_take(address: str, is_refused: bool) -> None:
    settings = {"model.path": "a", "workers.count": 4, "workers.per_node": 2, "cluster.ray_address": address}
    with pytest.raises(ConfigError, match="workers would wait for ever") if is_refused else nullcontext():
        load_config(overrides=settings)
