"""The Ray actors: thin shells around `Worker` and `NodeControl`, and what starts, finds and kills them."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pager.cluster.node import NodeControl, NodeHostTier
from pager.cluster.ray_session import RaySession, num_gpus
from pager.cluster.views import Health, WorkerReady
from pager.cluster.worker import EngineLoader, Worker
from pager.config import ServiceConfig
from pager.errors import ConfigError, NotReady, PagerError

log = logging.getLogger(__name__)

WORKER_PREFIX = "worker-"
GRACE_S = 5.0
POLL_S = 0.2


# A worker that dies is started again by its supervisor, which knows about backoff; Ray must not do it too. `health`
# has a thread of its own and answers while the model loads.
@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"health": 1})
class WorkerActor:
    def __init__(self, name: str, index: int, config: ServiceConfig, bind_host: str | None, load: EngineLoader) -> None:
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s")
        self._owner = f"{name}-{os.getpid()}"
        self._worker = Worker(index, config, bind_host or ray.util.get_node_ip_address(), load)

    def whereabouts(self) -> tuple[str, str]:
        """The node this runs on, and the name under which it pins records of that node's host tier."""
        return ray.get_runtime_context().get_node_id(), self._owner

    def load(self, node: Any) -> WorkerReady | PagerError:
        return self._worker.load(None if node is None else NodeHostTier(node, self._owner))

    @ray.method(concurrency_group="health")  # type: ignore[untyped-decorator]
    def health(self) -> Health:
        return self._worker.health()

    @ray.method(concurrency_group="health")  # type: ignore[untyped-decorator]
    def ready(self) -> WorkerReady | None:
        return self._worker.ready()

    def close(self) -> None:
        self._worker.close()


NodeActor = ray.remote(max_restarts=0)(NodeControl)


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """One incarnation of a worker."""

    actor: Any
    node: Any = None  # its node's control actor, where there is a host tier
    owner: str = ""


class Launcher(Protocol):
    """Where worker processes come from. All calls are for the event loop and never block it.

    `longest_pause_s` bounds the growing pause before a lost worker is launched again.
    """

    longest_pause_s: float

    async def launch(self, name: str) -> WorkerProcess: ...
    async def load(self, process: WorkerProcess) -> WorkerReady | PagerError: ...
    async def end(self, process: WorkerProcess, *, gracefully: bool) -> None: ...


class OwnWorkers:
    """Starts workers, and kills them. Owns the node control actors too."""

    longest_pause_s = 30.0

    def __init__(self, config: ServiceConfig, session: RaySession, load_engine: EngineLoader) -> None:
        """Raises ConfigError when the cluster has fewer GPUs than the workers need."""
        self._config = config
        self._session = session
        self._load_engine = load_engine
        self._namespace = config.cluster.namespace
        self._nodes: dict[str, Any] = {}
        self._uses_gpu = _uses_gpu(config, num_gpus())

    def names(self) -> list[str]:
        return [f"{WORKER_PREFIX}{index}" for index in range(self._config.workers.count)]

    async def launch(self, name: str) -> WorkerProcess:
        creation = asyncio.ensure_future(asyncio.to_thread(self._create, name))
        try:
            actor = await asyncio.shield(creation)
            node_id, owner = await actor.whereabouts.remote()
            node = await asyncio.to_thread(self._node, node_id) if self._has_host_tier else None
        except asyncio.CancelledError:  # nobody else knows of it yet
            ray.kill(await creation, no_restart=True)
            raise
        return WorkerProcess(actor, node, owner)

    async def load(self, process: WorkerProcess) -> WorkerReady | PagerError:
        answer: WorkerReady | PagerError = await process.actor.load.remote(process.node)
        return answer

    async def end(self, process: WorkerProcess, *, gracefully: bool) -> None:
        if gracefully:
            await _within(GRACE_S, process.actor.close)
        await asyncio.to_thread(ray.kill, process.actor, no_restart=True)
        if process.node is not None:
            await _within(GRACE_S, partial(process.node.drop_owner.remote, process.owner))

    async def close(self) -> None:
        for node in self._nodes.values():
            await _within(GRACE_S, node.close)
            await asyncio.to_thread(ray.kill, node, no_restart=True)
        self._nodes.clear()

    @property
    def _has_host_tier(self) -> bool:
        asked = self._config.workers.host_memory
        return self._uses_gpu if asked is None else asked not in (0, "0")

    def _create(self, name: str) -> Any:
        index = int(name.removeprefix(WORKER_PREFIX))
        actor_class: Any = WorkerActor
        options = {"name": name, "namespace": self._namespace, "num_cpus": 0, "num_gpus": int(self._uses_gpu)}
        arguments = (name, index, self._config, self._session.bind_host, self._load_engine)
        try:
            return actor_class.options(**options).remote(*arguments)
        except ValueError as error:  # Ray's word for a name that is taken
            raise NotReady(
                f"{name} exists in namespace {self._namespace!r} already, or is still ending: {error}",
                retry_after_s=1.0,
            ) from None

    def _node(self, node_id: str) -> Any:
        if node_id not in self._nodes:
            self._nodes[node_id] = NodeActor.options(
                name=f"node-{node_id}",
                namespace=self._namespace,
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(self._namespace)
        return self._nodes[node_id]


class OthersWorkers:
    """Finds the workers that another router started. Never ends one."""

    longest_pause_s = 1.0  # to look is cheap

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    async def names(self) -> list[str]:
        """Those that are there now."""
        actors = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        found = [actor["name"] for actor in actors if actor["namespace"] == self._namespace]
        return sorted(name for name in found if name.startswith(WORKER_PREFIX))

    async def launch(self, name: str) -> WorkerProcess:
        try:
            return WorkerProcess(await asyncio.to_thread(ray.get_actor, name, self._namespace))
        except ValueError:
            raise NotReady(f"{name} is not there now", retry_after_s=1.0) from None

    async def load(self, process: WorkerProcess) -> WorkerReady | PagerError:
        while True:
            ready: WorkerReady | None = await process.actor.ready.remote()
            if ready is not None:
                return ready
            await asyncio.sleep(POLL_S)

    async def end(self, process: WorkerProcess, *, gracefully: bool) -> None:
        pass


def _uses_gpu(config: ServiceConfig, found: int) -> bool:
    workers = config.workers
    if workers.device == "cpu" or (workers.device == "auto" and found == 0):
        return False
    if workers.device.startswith("cuda:"):
        raise ConfigError(
            f"workers.device is {workers.device!r}, but Ray gives each worker its GPU; use 'cuda', and say with "
            "CUDA_VISIBLE_DEVICES which GPUs there are"
        )
    if workers.count > found:
        raise ConfigError(
            f"workers.count is {workers.count}, device {workers.device!r} takes a GPU for each, and Ray finds {found}; "
            "start fewer workers, or use device 'cpu'"
        )
    return True


async def _within(timeout_s: float, call: Callable[[], Any]) -> None:
    """Calls an actor and waits a little; one that is dead or stuck is about to be killed anyway."""
    remote = getattr(call, "remote", call)
    try:
        async with asyncio.timeout(timeout_s):
            await remote()
    except (TimeoutError, ray.exceptions.RayError) as error:
        log.debug("an actor did not end by itself: %s", error)
