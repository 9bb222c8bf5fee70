"""The cluster as a router sees it: supervised workers, their answers, and the list of `/metrics` for Prometheus."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

from pager.cluster.actors import OthersWorkers, OwnWorkers, load_engine
from pager.cluster.node import remove_leftovers
from pager.cluster.ray_session import RaySession, pass_on
from pager.cluster.supervisor import WorkerSupervisor
from pager.cluster.views import LoadedModel, WorkerState, WorkerView
from pager.cluster.worker import EngineLoader
from pager.config import ServiceConfig
from pager.errors import NotReady, PagerError, WorkerLost
from pager.types import GenerateRequest, RequestObserver, TokenChunk

ROUTER_JOB = "expert-pager-router"
WORKER_JOB = "expert-pager-worker"


def write_targets(path: Path, router: str | None, workers: Mapping[str, str]) -> None:
    """Replaces the file in one step; `workers` maps a worker's id to the address of its metrics."""
    groups = [
        {"targets": [address], "labels": {"job": WORKER_JOB, "worker": worker}}
        for worker, address in sorted(workers.items())
    ]
    if router is not None:
        groups.insert(0, {"targets": [router], "labels": {"job": ROUTER_JOB}})
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(groups, file, indent=2)
        os.fchmod(file.fileno(), 0o644)  # Prometheus runs as somebody else
    os.replace(temporary, path)


log = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 60.0
POLL_S = 1.0
DRAIN_POLL_S = 0.02


class RayLost(NotReady):
    """The embedded Ray lost a daemon while the workers were starting: this process cannot use Ray any more."""

    reason = "RAY_LOST"


class Cluster:
    """Owns the supervisors and this router's connection to Ray. Lives on one event loop; `connect` makes it."""

    def __init__(self, config: ServiceConfig, session: RaySession, own: OwnWorkers | None) -> None:
        self._config = config
        self._session = session
        self._own = own
        self._supervisors: dict[str, WorkerSupervisor] = {}
        self._discovery: asyncio.Task[None] | None = None
        self._is_draining = False
        self._targets: tuple[str | None, dict[str, str]] | None = None
        self._router_metrics: str | None = None
        self.ray_lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done when the embedded Ray has lost the daemon of this name: nothing can be started, or known, any more."""
        self._watched: list[int] = []  # the daemons' processes

    @classmethod
    async def connect(cls, config: ServiceConfig, load: EngineLoader = load_engine) -> Self:
        """Starts `config.workers.count` workers and returns when one is ready; with 0, finds another router's workers.

        They are supervised from here on. Raises ConfigError, and what keeps the first workers from loading
        (CheckpointError, BudgetError, PortInUse, ...); NotReady when there are no workers to attach to, RayLost.
        """
        pass_on(config.log.format)
        session = await asyncio.to_thread(
            RaySession.open, config.cluster.joined, config.cluster.namespace, config.workers.count
        )
        pass_on(config.log.format)
        cluster = None
        try:
            own = OwnWorkers(config, session, load) if config.workers.count else None
            cluster = cls(config, session, own)
            cluster._watch_daemons()
            await cluster._start()
        except BaseException:
            await (cluster.close() if cluster else asyncio.to_thread(session.close))
            raise
        return cluster

    def workers(self) -> tuple[WorkerView, ...]:
        """All of them, ready or not, by id."""
        return tuple(self._supervisors[worker_id].view() for worker_id in sorted(self._supervisors))

    def model(self) -> LoadedModel:
        """What the workers serve. Raises NotReady before the first was ready."""
        for supervisor in self._supervisors.values():
            if supervisor.model is not None:
                return supervisor.model
        raise NotReady("no worker has loaded the model yet; retry shortly", retry_after_s=POLL_S)

    async def generate(
        self, worker_id: str, request: GenerateRequest, observer: RequestObserver | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of the answer; the last one carries the usage. Closing the iterator cancels on the worker.

        Raises what the worker's engine refuses or fails with; WorkerLost when it dies or hangs; SlowReader when more
        than the configured number of chunks is unread; NotReady while draining.
        """
        if self._is_draining:
            raise NotReady("the service is shutting down; send the request to another", retry_after_s=POLL_S)
        supervisor = self._supervisors.get(worker_id)
        link = supervisor.link if supervisor and supervisor.state is WorkerState.READY else None
        if link is None:
            raise WorkerLost(f"{worker_id} is not ready; send the request again", retry_after_s=POLL_S)
        async with aclosing(link.generate(request, observer)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def abort(self, request_id: str, tenant: str) -> bool:
        """Cancels the tenant's request, whichever router and worker it is on. False when there is none such."""
        links = [supervisor.link for supervisor in self._supervisors.values() if supervisor.link is not None]
        return any(await asyncio.gather(*(link.abort(request_id, tenant) for link in links)))

    def publish_router_metrics(self, address: str) -> None:
        """Adds the router's own `/metrics` to the file_sd file."""
        self._router_metrics = address
        self._write_targets()

    def cut_off(self) -> None:
        """Takes no more requests, and ends the open ones with NotReady."""
        self._is_draining = True
        error = NotReady("the service is shutting down; send the request to another", retry_after_s=POLL_S)
        for supervisor in self._supervisors.values():
            if supervisor.link is not None and supervisor.link.num_open:
                log.warning("%d requests on %s are cut off", supervisor.link.num_open, supervisor.id)
                supervisor.link.cancel_all(error)

    async def drain(self, timeout_s: float) -> None:
        """Own workers take nothing more, and what other routers run on them may go on for so long."""
        self._is_draining = True
        await asyncio.gather(*(supervisor.drain(timeout_s) for supervisor in self._supervisors.values()))

    async def close(self) -> None:
        """Ends own workers, their segments and Ray, as far as this process started them. Idempotent."""
        self._is_draining = True
        for process in self._watched:
            asyncio.get_running_loop().remove_reader(process)
            os.close(process)
        self._watched.clear()
        if self._discovery is not None:
            self._discovery.cancel()
            await asyncio.gather(self._discovery, return_exceptions=True)
        is_lost = self.ray_lost.done()
        if is_lost:  # their processes end with Ray
            await asyncio.gather(*(supervisor.abandon() for supervisor in self._supervisors.values()))
        else:
            await asyncio.gather(*(supervisor.close() for supervisor in self._supervisors.values()))
            if self._own is not None:
                await self._own.close()
        self._supervisors.clear()
        self._own = None
        await asyncio.to_thread(self._session.close, is_lost=is_lost)
        if is_lost:
            remove_leftovers()  # of the node's control actor, which had no time for it
        self._session = RaySession(None, owns_ray=False, folder=None)

    def _watch_daemons(self) -> None:
        for name, pid in self._session.daemons.items():
            process = os.pidfd_open(pid)
            self._watched.append(process)
            asyncio.get_running_loop().add_reader(process, self._on_daemon_end, name, process)

    def _on_daemon_end(self, name: str, process: int) -> None:
        asyncio.get_running_loop().remove_reader(process)
        if not self.ray_lost.done():
            log.error("Ray's %s has ended: the service drains and exits, to be started again", name)
            self.ray_lost.set_result(name)

    # --- start ------------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        if self._own is not None:
            for name in self._own.names():
                self._supervise(name)
            await self._first_ready()
            return
        others = OthersWorkers(self._config.cluster.namespace)
        self._discovery = asyncio.create_task(self._discover(others))
        try:
            async with asyncio.timeout(ATTACH_TIMEOUT_S):
                while not any(view.state is WorkerState.READY for view in self.workers()):  # noqa: ASYNC110
                    await asyncio.sleep(DRAIN_POLL_S)
        except TimeoutError:
            raise NotReady(
                f"no worker of namespace {self._config.cluster.namespace!r} was ready within {ATTACH_TIMEOUT_S:g} s; "
                "start the router that owns the workers first, or set workers.count"
            ) from None

    async def _first_ready(self) -> None:
        pending: set[asyncio.Future[Any]] = {supervisor.first_ready for supervisor in self._supervisors.values()}
        done, _ = await asyncio.wait(pending | {self.ray_lost}, return_when=asyncio.FIRST_COMPLETED)
        if self.ray_lost.done():
            raise RayLost(f"Ray's {self.ray_lost.result()} ended while the workers were starting", retry_after_s=POLL_S)
        errors = [error for future in done if isinstance(error := future.exception(), PagerError)]
        if errors:
            raise errors[0]

    async def _discover(self, others: OthersWorkers) -> None:
        while True:
            for name in await others.names():
                if name not in self._supervisors:
                    self._supervise(name, others)
            await asyncio.sleep(POLL_S)

    def _supervise(self, name: str, others: OthersWorkers | None = None) -> None:
        launcher = others or self._own
        assert launcher is not None, "a worker is ours or somebody else's"
        self._supervisors[name] = WorkerSupervisor(
            name,
            launcher,
            step_timeout_s=self._config.workers.step_timeout_s,
            buffer_chunks=self._config.router.stream_buffer_chunks,
            on_change=self._write_targets,
        )

    def _write_targets(self) -> None:
        if self._config.cluster.file_sd is None:
            return
        targets = (self._router_metrics, _metrics_targets(self.workers()))
        if targets == self._targets:
            return
        try:
            write_targets(Path(self._config.cluster.file_sd), *targets)
        except OSError as error:
            log.warning("the metrics targets could not be written to %s: %s", self._config.cluster.file_sd, error)
        else:
            self._targets = targets


def _metrics_targets(views: Iterable[WorkerView]) -> dict[str, str]:
    """Addresses by worker. One that is started again stays a target, so that Prometheus knows that it is down.

    Its last address may by then be that of another worker, which has been given the port, and is that one's alone.
    """
    live_first = sorted(views, key=lambda view: (view.state not in (WorkerState.READY, WorkerState.DRAINING), view.id))
    found: dict[str, str] = {}
    for view in live_first:
        if view.metrics_address is not None and view.metrics_address not in found.values():
            found[view.id] = view.metrics_address
    return found
