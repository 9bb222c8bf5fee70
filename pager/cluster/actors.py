"""A process's own connection to Ray: the actors, the launchers that start, find and kill them, and the state that the
workers of one node share.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import select
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pager.cluster.placement import Health, WorkerReady
from pager.cluster.ray_session import WORKER_RESOURCE, RaySession, num_gpus, pass_on
from pager.cluster.spare import Spares, import_for_worker
from pager.cluster.worker import EngineLoader, HostAccess, LoadedEngine, Sink, Worker, WorkerObserver
from pager.config import ServiceConfig
from pager.errors import ConfigError, NotReady, PagerError, WorkerLost
from pager.observe import logs
from pager.store.appearing import SHM, remove_abandoned

if TYPE_CHECKING:
    from pager.cache.host_index import HostIndex, HostSegment
    from pager.cache.tiers import HostTier
    from pager.memory import Plan
    from pager.models.open_model import OpenModel

# --- control of one node's workers ------------------------------------------------------------------------------------
#
# One control per node holds what its workers share: their processes' lives, and the files of the host tier. It is an
# actor where workers call it or its node is another; workers map the segment and its index themselves and call the
# actor for no record (`pager.cache.host_index`).


log = logging.getLogger(__name__)

SEGMENT_PREFIX = "expert-pager-"


class NodeControl:
    """Knows the worker processes of its node and owns the segment of its host tier, where there is one.

    It notices the end of every worker's process, however it ended, and releases what that worker had claimed or
    pinned. Its methods run one at a time, beside one thread for each worker, which waits for that worker's end. It does
    not import torch.
    """

    def __init__(self, namespace: str) -> None:
        self._prefix = f"{SEGMENT_PREFIX}{namespace}-"
        self._segment: HostSegment | None = None
        self._index: HostIndex | None = None
        self._made_for: tuple[object, ...] = ()
        self._workers: dict[str, int] = {}  # the workers that are alive, each with the descriptor of its process
        self._lock = threading.Lock()
        remove_leftovers()

    # --- worker processes -------------------------------------------------------------------------------------------

    def watch(self, owner: str, pid: int) -> None:
        """Registers a worker's process that has started; it is called `owner` from now on."""
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            log.warning("%s ended before it was watched", owner)
            return
        self._workers[owner] = process
        threading.Thread(target=self._await_end, args=(owner, process), name=f"watch {owner}", daemon=True).start()

    def end(self, owner: str) -> bool:
        """Kills a worker's process. Returns True once it is gone, with its memory and all that it held; until then,
        call again.
        """
        with self._lock:
            if owner not in self._workers:
                return True
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._workers[owner], signal.SIGKILL)
            return False

    def _await_end(self, owner: str, process: int) -> None:
        ended = select.poll()
        ended.register(process, select.POLLIN)
        ended.poll()
        with self._lock:
            os.close(self._workers.pop(owner))
            if self._index is not None:
                self._index.clear_dead()

    # --- host tier --------------------------------------------------------------------------------------------------

    def open_segment(self, budget_bytes: int, record_bytes: int, model: str) -> tuple[str, int] | PagerError:
        """Returns the name and the records of the node's segment. The first caller sizes it; `model` names the model it
        is for.

        Errors are returned, not raised.
        """
        from pager.cache.host_index import HostIndex, HostSegment  # which need numpy

        asked = (budget_bytes, record_bytes, model)
        with self._lock:
            if self._segment is None:
                try:
                    name = self._prefix + secrets.token_hex(6)
                    self._segment = HostSegment.within(budget_bytes, name, record_bytes)
                except PagerError as error:
                    return error
                self._index = HostIndex(name, self._segment.num_records)
                self._made_for = asked
            elif asked != self._made_for:
                return ConfigError(f"this node's host tier is for {self._made_for}, not {asked}; restart the service")
            return self._segment.name, self._segment.num_records

    def host_bytes(self) -> tuple[int, int]:
        """Returns the bytes of the host tier's records that are in use, and how many of them are pinned."""
        with self._lock:
            if self._segment is None or self._index is None:
                return 0, 0
            record = self._segment.nbytes // self._segment.num_records
            return self._index.num_resident * record, self._index.num_pinned * record

    def close(self) -> None:
        """Removes the segment. Idempotent."""
        with self._lock:
            if self._index is not None:
                self._index.close()
            if self._segment is not None:
                self._segment.close()
            self._index = self._segment = None


def remove_leftovers() -> None:
    """Unlinks segments of this user whose owner ended without cleaning up, so that their lock is free."""
    remove_abandoned(SHM.glob(f"{SEGMENT_PREFIX}*"), lambda path: path.unlink(missing_ok=True))


# --- the actors -------------------------------------------------------------------------------------------------------


WORKER_PREFIX = "worker-"
GRACE_S = 5.0
POLL_S = 0.2
END_POLL_S = 0.02


def load_engine(config: ServiceConfig, sink: Sink, observer: WorkerObserver, host: HostAccess | None) -> LoadedEngine:
    """Loads the engine from a checkpoint. Imports torch when it is called, after the thread counts are set, in a
    process that was none of the spares.
    """
    import_for_worker()
    from pager.cluster.loading import load_engine as load

    return load(config, sink, observer, host)


class NodeHostTier:
    """A worker's access to the host tier of its node. It calls the control actor once, for the segment's name."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._tier: HostTier | None = None

    def attach(self, opened: OpenModel, plan: Plan) -> HostTier:
        """Returns this worker's view of the segment. Raises BudgetError, ConfigError."""
        from pager.cache.tiers import HostTier, record_bytes

        shape, dtype = opened.slot_shape, opened.slot_dtype
        model = f"{shape} of {dtype}"
        answer = ray.get(self._node.open_segment.remote(plan.host_bytes, record_bytes(shape, dtype), model))
        if isinstance(answer, PagerError):
            raise answer
        name, num_records = answer
        self._tier = HostTier.attach(name, num_records, shape, dtype)
        return self._tier

    def used_bytes(self) -> tuple[int, int]:
        """Returns the resident and the pinned bytes of all workers of the node."""
        return self._tier.used_bytes() if self._tier is not None else (0, 0)


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """The node that a worker is on, and its process there; the node's control actor knows it as `owner`."""

    node_id: str
    owner: str
    pid: int


# A worker that dies is started again by its supervisor, which backs off between attempts; Ray must not restart it too.
# `health` has a thread of its own and answers while the model loads.
@ray.remote(max_restarts=0, max_task_retries=0, enable_task_events=False, concurrency_groups={"health": 1, "drain": 1})
class WorkerActor:
    def __init__(self, name: str, index: int, config: ServiceConfig, bind_host: str | None, load: EngineLoader) -> None:
        logs.configure(config.log.format, name)
        self._owner = f"{name}-{secrets.token_hex(4)}"
        self._worker = Worker(index, config, bind_host or ray.util.get_node_ip_address(), load)
        self._drain_s = config.workers.drain_s
        self._is_retiring = False
        signal.signal(signal.SIGTERM, self._terminated)  # Ray creates actors on the main thread

    def whereabouts(self) -> Whereabouts:
        return Whereabouts(ray.get_runtime_context().get_node_id(), self._owner, os.getpid())

    def load(self, node: Any, with_host_tier: bool) -> WorkerReady | PagerError:
        return self._worker.load(NodeHostTier(node) if with_host_tier else None)

    @ray.method(concurrency_group="health")  # type: ignore[untyped-decorator]
    def health(self) -> Health:
        return self._worker.health()

    @ray.method(concurrency_group="health")  # type: ignore[untyped-decorator]
    def ready(self) -> WorkerReady | None:
        return self._worker.ready()

    @ray.method(concurrency_group="drain")  # type: ignore[untyped-decorator]
    def drain(self, timeout_s: float) -> None:
        self._worker.drain(timeout_s)

    def close(self) -> None:
        self._worker.close()

    def _terminated(self, *_: object) -> None:
        """Handles SIGTERM on a thread of its own, because the current one is Ray's."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.retire()

    @ray.method(concurrency_group="drain")  # type: ignore[untyped-decorator]
    def retire(self) -> None:
        """Drains the worker and ends the process, as SIGTERM does. Returns at once."""
        if self._is_retiring:
            return
        self._is_retiring = True
        Thread(target=self._drain_and_exit, name="drain", daemon=True).start()

    def _drain_and_exit(self) -> None:
        log.info("draining for %g s at most", self._drain_s)
        status = 1
        try:
            self._worker.drain(self._drain_s)
            status = 0
        except Exception:
            log.exception("the drain failed")
        finally:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # Ray's own exit takes seconds


NodeActor = ray.remote(max_restarts=0, enable_task_events=False)(NodeControl)


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """One process of a worker, from its launch to its end."""

    actor: Any
    at: Whereabouts | None = None  # None for a worker that another router started


class ControlActor:
    """A node's control in an actor of its own, which its workers can call."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def watch(self, owner: str, pid: int) -> None:
        await self.actor.watch.remote(owner, pid)

    async def end(self, owner: str) -> bool:
        return bool(await self.actor.end.remote(owner))

    async def close(self) -> None:
        await _within(GRACE_S, self.actor.close.remote)
        await asyncio.to_thread(ray.kill, self.actor, no_restart=True)


class ControlHere:
    """The control of this process's node, without a host tier: no worker calls it, so that it needs no actor."""

    actor = None

    def __init__(self, namespace: str) -> None:
        self._control = NodeControl(namespace)

    async def watch(self, owner: str, pid: int) -> None:
        self._control.watch(owner, pid)

    async def end(self, owner: str) -> bool:
        return self._control.end(owner)

    async def close(self) -> None:
        self._control.close()


class OwnWorkers:
    """Starts and kills this router's own workers, as a `Launcher`. Owns the controls of their nodes too."""

    def __init__(self, config: ServiceConfig, session: RaySession, load_engine: EngineLoader) -> None:
        """Raises ConfigError when the cluster has fewer GPUs than the workers need, unless nodes may still join."""
        self._config = config
        self._session = session
        self._load_engine = load_engine
        self._namespace = config.cluster.namespace
        self._nodes: dict[str, ControlActor | ControlHere] = {}
        self._nodes_lock = asyncio.Lock()
        self._uses_gpu = _uses_gpu(config, num_gpus())

    async def names(self) -> list[str]:
        return [f"{WORKER_PREFIX}{index}" for index in range(self._config.workers.count)]

    async def launch(self, name: str) -> WorkerProcess:
        creation = asyncio.ensure_future(asyncio.to_thread(self._create, name))
        try:
            async with _translated():
                actor = await asyncio.shield(creation)
                at: Whereabouts = await actor.whereabouts.remote()
        except BaseException:  # nothing else knows of the process yet
            with suppress(PagerError):  # nothing was created
                await asyncio.to_thread(ray.kill, await creation, no_restart=True)
            raise
        return WorkerProcess(actor, at)

    async def load(self, process: WorkerProcess) -> WorkerReady:
        assert process.at is not None, "an own worker has a node and a process"
        at, node = process.at, await self._node(process.at.node_id)
        async with _translated():
            loading = process.actor.load.remote(node.actor, self._has_host_tier)  # runs while a control actor starts
            try:
                await node.watch(at.owner, at.pid)
            except ray.exceptions.RayActorError:
                self._forget_node(at.node_id, node)  # the next process of this worker gets another control actor
                raise
            return _ready_of(await loading)

    async def health(self, process: WorkerProcess) -> Health:
        return await _health_of(process)

    async def retire(self, process: WorkerProcess) -> None:
        await _retire(process)

    async def drain(self, process: WorkerProcess, timeout_s: float) -> None:
        """Makes the worker refuse new requests from any router, and returns when those it runs have ended or failed."""
        await _within(timeout_s + 2 * GRACE_S, lambda: process.actor.drain.remote(timeout_s))

    async def end_worker(self, process: WorkerProcess, *, gracefully: bool) -> None:
        """Returns when the process is gone, so that the next one does not take its memory beside it."""
        if gracefully:
            await _within(GRACE_S, process.actor.close.remote)
        await asyncio.to_thread(ray.kill, process.actor, no_restart=True)
        node = self._nodes.get(process.at.node_id) if process.at else None
        if process.at is not None and node is not None:
            try:
                await _await_end(node, process.at.owner)
            except ray.exceptions.RayError as error:
                log.warning("the control actor of %s is lost and will be started again: %s", process.at.owner, error)
                self._forget_node(process.at.node_id, node)

    async def close(self) -> None:
        """Ends the nodes' controls. To be called after all workers have ended."""
        for node in self._nodes.values():
            await node.close()
        self._nodes.clear()

    @property
    def _has_host_tier(self) -> bool:
        asked = self._config.workers.host_memory
        return self._uses_gpu if asked is None else asked not in (0, "0")

    def _create(self, name: str) -> Any:
        index = int(name.removeprefix(WORKER_PREFIX))
        arguments = (name, index, self._config, self._session.bind_host, self._load_engine)
        resources = {} if self._config.workers.per_node is None else {WORKER_RESOURCE: 1}
        return self._create_named(WorkerActor, name, arguments, num_gpus=int(self._uses_gpu), resources=resources)

    def _forget_node(self, node_id: str, lost: Any) -> None:
        if self._nodes.get(node_id) is lost:
            del self._nodes[node_id]

    def _create_node(self, node_id: str) -> ControlActor | ControlHere:
        if self._session.daemons and not self._has_host_tier and node_id == ray.get_runtime_context().get_node_id():
            return ControlHere(self._namespace)
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return ControlActor(
            self._create_named(NodeActor, f"node-{node_id}", (self._namespace,), scheduling_strategy=there)
        )

    def _create_named(self, actor_class: Any, name: str, arguments: tuple[Any, ...], **options: Any) -> Any:
        try:
            return actor_class.options(name=name, namespace=self._namespace, num_cpus=0, **options).remote(*arguments)
        except ValueError as error:  # Ray raises ValueError for a name that is taken
            raise NotReady(
                f"{name} exists in namespace {self._namespace!r} already, or is still ending: {error}",
                retry_after_s=1.0,
            ) from None

    async def _node(self, node_id: str) -> ControlActor | ControlHere:
        """Returns the node's control, and starts it with the first worker there."""
        async with self._nodes_lock:
            if node_id not in self._nodes:
                self._nodes[node_id] = await asyncio.to_thread(self._create_node, node_id)
            return self._nodes[node_id]


class OthersWorkers:
    """Finds the workers that another router started, as a `Launcher`. It never ends one."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    async def names(self) -> list[str]:
        """Returns the names of the workers that exist now."""
        async with _translated():
            actors = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        found = [actor["name"] for actor in actors if actor["namespace"] == self._namespace]
        return sorted(name for name in found if name.startswith(WORKER_PREFIX))

    async def launch(self, name: str) -> WorkerProcess:
        try:
            async with _translated():
                return WorkerProcess(await asyncio.to_thread(ray.get_actor, name, self._namespace))
        except ValueError:
            raise NotReady(f"{name} does not exist now", retry_after_s=1.0) from None

    async def load(self, process: WorkerProcess) -> WorkerReady:
        async with _translated():
            while True:
                ready: WorkerReady | None = await process.actor.ready.remote()
                if ready is not None:
                    return ready
                await asyncio.sleep(POLL_S)

    async def health(self, process: WorkerProcess) -> Health:
        return await _health_of(process)

    async def retire(self, process: WorkerProcess) -> None:
        await _retire(process)

    async def drain(self, process: WorkerProcess, timeout_s: float) -> None:
        pass

    async def end_worker(self, process: WorkerProcess, *, gracefully: bool) -> None:
        pass

    async def close(self) -> None:
        pass


class RayHere:
    """This process's own connection to Ray, as a `RayPort`: its own workers, or those of another router."""

    def __init__(
        self, session: RaySession, workers: OwnWorkers | OthersWorkers, on_lost: Callable[[str], None]
    ) -> None:
        self.workers = workers
        self._session = session
        self._on_lost = on_lost
        self._watched: list[int] = []  # descriptors of the daemons' processes
        for name, pid in session.daemons.items():
            process = os.pidfd_open(pid)
            self._watched.append(process)
            asyncio.get_running_loop().add_reader(process, self._on_daemon_end, name, process)

    @classmethod
    async def open(
        cls,
        config: ServiceConfig,
        on_lost: Callable[[str], None],
        load: EngineLoader = load_engine,
        spares: Spares | None = None,
    ) -> Self:
        """Starts Ray, or joins the configured cluster. The first workers of a Ray that is started are the `spares`.

        Raises ConfigError or NotReady.
        """
        pass_on(config.log.format)
        cluster, num_workers = config.cluster, config.workers.count
        session = await asyncio.to_thread(RaySession.open, cluster.joined, cluster.namespace, num_workers, spares)
        pass_on(config.log.format)
        try:
            workers = OwnWorkers(config, session, load) if num_workers else OthersWorkers(cluster.namespace)
            return cls(session, workers, on_lost)
        except BaseException:
            await asyncio.to_thread(session.close)
            raise

    async def close(self, *, is_lost: bool = False) -> None:
        """Ends Ray as far as this process started it. With `is_lost`, one of its daemons has ended."""
        for process in self._watched:
            asyncio.get_running_loop().remove_reader(process)
            os.close(process)
        self._watched.clear()
        is_lost = is_lost and bool(self._session.daemons)
        if not is_lost:
            await self.workers.close()
        await asyncio.to_thread(self._session.close, is_lost=is_lost)
        if is_lost:
            remove_leftovers()  # cleans up for a control actor, which had no time for it

    def _on_daemon_end(self, name: str, process: int) -> None:
        asyncio.get_running_loop().remove_reader(process)
        self._on_lost(name)


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    """Inside this context, an error of Ray is raised as WorkerLost."""
    try:
        yield
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        raise WorkerLost(lines[0] if lines else type(error).__name__, retry_after_s=1.0) from error


async def _health_of(process: WorkerProcess) -> Health:
    async with _translated():
        health: Health = await process.actor.health.remote()
        return health


async def _retire(process: WorkerProcess) -> None:
    async with _translated():
        with suppress(ray.exceptions.RayActorError):  # it had nothing to end, and has ended before it could answer
            await process.actor.retire.remote()


def _ready_of(answer: WorkerReady | PagerError) -> WorkerReady:
    if isinstance(answer, PagerError):
        raise answer
    return answer


def _uses_gpu(config: ServiceConfig, found: int) -> bool:
    workers = config.workers
    if workers.device == "cpu" or (workers.device == "auto" and found == 0):
        return False
    if workers.device.startswith("cuda:"):
        raise ConfigError(
            f"workers.device is {workers.device!r}, but Ray assigns each worker its GPU; use 'cuda', and "
            "limit the GPUs with CUDA_VISIBLE_DEVICES"
        )
    # with workers.per_node, workers wait until their nodes have joined
    if workers.count > found and workers.per_node is None:
        raise ConfigError(
            f"workers.count is {workers.count}, device {workers.device!r} takes a GPU for each, and Ray finds {found}; "
            "start fewer workers, or use device 'cpu'"
        )
    return True


async def _await_end(node: ControlActor | ControlHere, owner: str) -> None:
    """Has the worker's process killed and waits until it is gone, with its memory and its pins."""
    try:
        async with asyncio.timeout(GRACE_S):
            while not await node.end(owner):  # noqa: ASYNC110 - a process's end is no event here
                await asyncio.sleep(END_POLL_S)
    except TimeoutError:
        log.warning("the process of %s does not end; the next one will need memory beside it", owner)


async def _within(timeout_s: float, call: Callable[[], Awaitable[None]]) -> None:
    """Waits a little for an actor that is about to be killed anyway, even if it is dead or stuck."""
    try:
        async with asyncio.timeout(timeout_s):
            await call()
    except (TimeoutError, ray.exceptions.RayError) as error:
        log.debug("an actor did not end by itself: %s", error)
