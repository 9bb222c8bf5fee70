"""preStop of a worker's pod, on real Ray with a real engine: two nodes that take a worker each, as two pods would."""

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.parameter import RayParams

from pager.cluster.actors import RayHere
from pager.cluster.cluster import Cluster
from pager.cluster.placement import WorkerState
from pager.cluster.ray_session import OBJECT_STORE_BYTES, WORKER_RESOURCE, _EmbeddedNode, start_embedded, stop_ray
from pager.config import ClusterConfig, ModelConfig, ServiceConfig, WorkerConfig
from pager.errors import NotReady, WorkerLost
from pager.types import Count, GenerateRequest, PoolPolicy, SamplingParams
from tests.support.processes import has_ended, worker_pids
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
DRAIN = ROOT / "deploy" / "docker" / "bin" / "expert-pager-worker-drain"
NAMESPACE = f"pre-stop-tests-{os.getpid()}"
PODS = ("127.0.0.2", "127.0.0.3")
CONFIG = ServiceConfig(
    model=ModelConfig(path=str(ROOT / "tests" / "data" / "golden" / "ckpt_emo_tiny"), dtype="float32"),
    workers=WorkerConfig(
        count=1, per_node=1, device="cpu", expert_memory="50%", host_memory=0, kv_memory="4MiB", num_threads=1,
        drain_s=120,
    ),
    cluster=ClusterConfig(namespace=NAMESPACE),
)  # fmt: skip
NUM_TOKENS, NUM_CLIENTS = 200, 3


@pytest.fixture
def pods(ray_runtime: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A node that takes no worker, where the driver is, and one at each address of PODS."""
    # A cluster's, not one that an embedded Ray of an earlier test has kept to the loopback: `ray` on a node looks for
    # 127.0.0.1 at the address that others see.
    monkeypatch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", True)
    folder = tempfile.mkdtemp(prefix="ray-")
    start_embedded(
        namespace=NAMESPACE, num_cpus=0, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
        _temp_dir=folder,
    )  # fmt: skip
    nodes = []
    try:
        for address in PODS:
            settings = RayParams(
                gcs_address=ray.get_runtime_context().gcs_address, node_ip_address=address, num_cpus=0,
                resources={WORKER_RESOURCE: 1}, object_store_memory=OBJECT_STORE_BYTES, temp_dir=folder,
            )  # fmt: skip
            nodes.append(_EmbeddedNode(settings, head=False, shutdown_at_exit=False, spawn_reaper=False))
        yield
    finally:
        for each in nodes:
            each.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        stop_ray()
        shutil.rmtree(folder, ignore_errors=True)


def address_of(pid: int) -> str:
    """Of the node whose raylet is the process's parent."""
    words = psutil.Process(pid).parent().cmdline()
    (address,) = [word.partition("=")[2] for word in words if word.startswith("--node_ip_address=")]
    return str(address)


class Load:
    """Clients that ask one thing after the other, until a worker takes nothing more."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._clients = [asyncio.create_task(self._ask(number)) for number in range(NUM_CLIENTS)]
        self.num_tokens: list[int] = []  # of each answer that began
        self.num_ended_while_draining = 0

    async def ended(self) -> None:
        await asyncio.gather(*self._clients)

    async def _ask(self, number: int) -> None:
        sampling, policy = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True), PoolPolicy(size=Count(4))
        for turn in itertools.count():
            request = GenerateRequest(f"{number}-{turn}", "t", tuple(range(5, 25)), sampling, policy)
            num_tokens = 0
            try:
                async for chunk in self._cluster.generate("worker-0", request):
                    num_tokens += len(chunk.token_ids)
            except (WorkerLost, NotReady):  # where a router would place it again
                assert num_tokens == 0
                return
            self.num_tokens.append(num_tokens)
            self.num_ended_while_draining += self._cluster.workers()[0].state is WorkerState.DRAINING


@pytest.mark.usefixtures("pods")
async def test_a_pods_end_loses_no_token_and_its_worker_starts_elsewhere() -> None:
    cluster = await Cluster.connect(CONFIG, RayHere.open)
    try:
        (pid,) = worker_pids()
        leaving = address_of(pid)
        load = Load(cluster)
        await eventually(lambda: load.num_tokens)
        env = os.environ | {"POD_IP": leaving, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        pre_stop = await asyncio.create_subprocess_exec(sys.executable, DRAIN, "150", env=env, stderr=subprocess.PIPE)
        await load.ended()
        assert set(load.num_tokens) == {NUM_TOKENS}
        assert load.num_ended_while_draining >= 1
        _, said = await pre_stop.communicate()
        assert "may place another worker" not in said.decode()
        assert pre_stop.returncode == 0
        assert has_ended(pid)
        await eventually(lambda: cluster.workers()[0].state is WorkerState.READY and worker_pids())
        (pid,) = worker_pids()
        assert {leaving, address_of(pid)} == set(PODS)
    finally:
        await cluster.close()
