"""The cluster as a router sees it: one supervisor per worker, their answers, and Prometheus's list of targets.

Knows no Ray: a `RayPort` starts and ends the workers' processes, in a process of its own (`ray_process`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Protocol, Self

from expert_pager.v1 import worker_pb2 as pb

from pager.cluster.placement import Health, LoadedModel, WorkerReady, WorkerState, WorkerView
from pager.cluster.ray_process import RayProcess
from pager.cluster.tokens import WorkerLink
from pager.config import ServiceConfig
from pager.errors import NotReady, PagerError, UnknownWorker, WorkerLost
from pager.reading import replace_file
from pager.types import GenerateRequest, RequestObserver, TokenChunk
from pager.wire import decode_bitmap, decode_paging, optional

# --- supervision of one worker ----------------------------------------------------------------------------------------
#
# Keeps one worker alive: starts it, connects to it, watches it, and starts it again after a pause when it is lost.


log = logging.getLogger(__name__)

POLL_S = 1.0
HEALTH_TIMEOUT_S = 5.0  # how long a worker's process may take to answer after its stream broke
EXIT_TIMEOUT_S = 10.0  # how long a process that has drained may take to exit
EXIT_POLL_S = 0.1
FIRST_PAUSE_S, MOST_DOUBLINGS = 0.5, 16
HEALTHY_S = 60.0  # a loss after this long without one counts as the first
LOSSES_BEFORE_GIVING_UP = 3  # applies only while the worker has never been ready
ROUTER_JOB = "expert-pager-router"
WORKER_JOB = "expert-pager-worker"
ATTACH_TIMEOUT_S = 60.0
DRAIN_POLL_S = 0.02
# How long a lost worker's next launch waits at most. One that another router starts is only looked for.
OWN_PAUSE_S, OTHERS_PAUSE_S = 30.0, 1.0


class Launcher(Protocol):
    """A source of worker processes. Every method runs on the event loop and never blocks it.

    A process is whatever `launch` returned. The methods raise WorkerLost for one that does not answer or has ended, and
    whatever PagerError it reports.
    """

    async def names(self) -> list[str]:
        """Returns the names of the workers that exist, or are to exist where this router starts them."""

    async def launch(self, name: str) -> Any: ...
    async def load(self, process: Any) -> WorkerReady: ...
    async def health(self, process: Any) -> Health: ...
    async def retire(self, process: Any) -> None:
        """Has the worker drain and end; returns at once. One that is gone already has ended."""

    async def drain(self, process: Any, timeout_s: float) -> None: ...
    async def end_worker(self, process: Any, *, gracefully: bool) -> None: ...


class RayPort(Protocol):
    """This router's connection to Ray: its own workers, or those of another router."""

    @property
    def workers(self) -> Launcher: ...
    async def close(self, *, is_lost: bool = False) -> None:
        """Ends Ray as far as this service started it. With `is_lost`, one of its daemons has ended."""


Opening = Callable[[ServiceConfig, Callable[[str], None]], Awaitable[RayPort]]
"""Connects to Ray. The callable is called, with the name of what has ended, once Ray is lost."""


class Lost(Exception):
    """Raised when this process of the worker is lost. With `ends_start`, the service does not start because of it."""

    def __init__(self, state: WorkerState, why: str, *, ends_start: bool = False) -> None:
        super().__init__(why)
        self.state = state
        self.ends_start = ends_start


class Drained(Lost):
    """Raised when the worker was told to drain and has ended its requests."""

    def __init__(self) -> None:
        super().__init__(WorkerState.DEAD, "it has drained")


class WorkerSupervisor:
    """Owns one worker's process, link and state. Lives on one event loop."""

    def __init__(
        self,
        worker_id: str,
        launcher: Launcher,
        *,
        longest_pause_s: float,
        step_timeout_s: float,
        buffer_chunks: int,
        on_change: Callable[[], None],
    ) -> None:
        self.id = worker_id
        self.state = WorkerState.STARTING
        self.link: WorkerLink | None = None
        self.model: LoadedModel | None = None
        self.first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._launcher = launcher
        self._longest_pause_s = longest_pause_s
        self._step_timeout_s = step_timeout_s
        self._buffer_chunks = buffer_chunks
        self._on_change = on_change
        self._process: Any = None  # as its launcher knows it
        self._metrics_address: str | None = None
        self._load = pb.Load()
        self._resident: tuple[int, ...] = ()
        self._num_losses = 0
        self._num_restarts = 0
        self._progress: int | None = None
        self._progressed_s = 0.0
        self._task = asyncio.create_task(self._supervise(), name=f"supervise {worker_id}")

    def view(self) -> WorkerView:
        return WorkerView(
            id=self.id,
            state=self.state,
            waiting=self._load.waiting,
            running=self._load.running,
            num_slots=self.model.num_slots if self.model else 0,
            expert_bytes=self.model.expert_bytes if self.model else 0,
            resident=self._resident,
            page_in_bytes_per_s=self._load.page_in_bytes_per_s or None,
            peak_page_in_bytes_per_s=self._load.peak_page_in_bytes_per_s or None,
            place_s=optional(self._load, "place_s"),
            metrics_address=self._metrics_address,
            num_restarts=self._num_restarts,
            paging=decode_paging(self._load),
            kv_share=self._load.kv_share,
        )

    async def drain(self, timeout_s: float) -> None:
        """Drains a worker of this router: it refuses new requests and ends those that any router runs on it."""
        if self._process is not None and self.state in (WorkerState.READY, WorkerState.DRAINING):
            await self._launcher.drain(self._process, timeout_s)

    async def retire(self) -> None:
        """Has the worker drain and end, whichever router started it. Raises NotReady."""
        if self.state is WorkerState.DRAINING:
            return
        if self._process is None or self.state is not WorkerState.READY:
            raise NotReady(f"{self.id} is {self.state}; drain it once it is ready", retry_after_s=POLL_S)
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._launcher.retire(self._process)
        except (TimeoutError, WorkerLost):
            raise NotReady(f"{self.id} does not answer; try again", retry_after_s=POLL_S) from None

    async def close(self) -> None:
        """Ends the worker if this router started it, and every answer that is open on it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if not self.first_ready.cancel() and not self.first_ready.cancelled():
            self.first_ready.exception()  # marks the exception as retrieved, if nothing else has
        await self._tear_down(gracefully=True)

    async def abandon(self) -> None:
        """Fails every answer that is open on the worker, and does no more: the Ray cluster that it lived in is lost."""
        self._task.cancel()
        await asyncio.wait([self._task], timeout=EXIT_POLL_S)
        if self.link is not None:
            await self.link.close()
            self.link = None

    # --- the worker's processes, one after the other ----------------------------------------------------------------

    async def _supervise(self) -> None:
        while True:
            lost = await self._live()
            if isinstance(lost, Drained):
                log.info("%s has drained and is started again", self.id)
                self._num_losses = 0
            elif not lost.ends_start:  # otherwise the start ends with this error, and whoever started it reports it
                log.warning("%s is %s: %s", self.id, lost.state, lost)
            self._enter(lost.state)
            try:
                await self._tear_down(gracefully=False)
            except Exception:
                log.exception("cleaning up after %s failed", self.id)
            self._num_losses += 1
            if not self.first_ready.done() and self._num_losses >= LOSSES_BEFORE_GIVING_UP:
                times = f"{self._num_losses} times before it was ready"
                self.first_ready.set_exception(WorkerLost(f"{self.id} was lost {times}; the last time: {lost}"))
            pause_s = FIRST_PAUSE_S * 2 ** min(self._num_losses - 1, MOST_DOUBLINGS)
            await asyncio.sleep(min(self._longest_pause_s, pause_s))
            if lost.ends_start:  # another worker was ready before, and the start went on
                log.warning("%s was %s: %s", self.id, lost.state, lost)
            self._num_restarts += 1
            self._enter(WorkerState.STARTING)

    async def _live(self) -> Lost:
        """Runs one process of the worker from its launch to its loss, and returns how it ended."""
        try:
            self._process = await self._launcher.launch(self.id)
            await self._serve(self._process, await self._launcher.load(self._process))
        except Lost as lost:
            return lost
        except PagerError as error:
            # While starting, an error that the operator can mend ends the start; later the supervisor keeps
            # trying.
            ends_start = not error.retryable and not self.first_ready.done()
            if ends_start:
                self.first_ready.set_exception(error)
            return Lost(WorkerState.DEAD, error.message, ends_start=ends_start)
        except Exception as error:
            log.exception("supervising %s failed in an unexpected way", self.id)
            return Lost(WorkerState.DEAD, repr(error))
        raise AssertionError("a worker serves until it is lost")

    async def _serve(self, process: Any, ready: WorkerReady) -> None:
        self.model, self._metrics_address = ready.model, ready.metrics_address
        started_s = time.monotonic()
        while True:  # a stream that breaks while the process is well is opened again
            link = WorkerLink(
                ready.address,
                ready.token,
                buffer_chunks=self._buffer_chunks,
                on_load=self._on_load,
                on_break=self._on_break,
            )
            await link.attach()
            self.link = link
            self._enter(WorkerState.DRAINING if self._load.draining else WorkerState.READY)
            if self.state is WorkerState.READY and not self.first_ready.done():
                self.first_ready.set_result(None)
            while not await _is_set_within(link.broken, POLL_S):
                await self._check(process, self._step_timeout_s)
                if time.monotonic() - started_s > HEALTHY_S:
                    self._num_losses = 0
            if self._load.draining:
                await self._until_gone(process)
                raise Drained
            await self._check(process, HEALTH_TIMEOUT_S)
            log.warning("the stream to %s broke, but its process is healthy; opening another stream", self.id)
            await link.close()

    async def _check(self, process: Any, answer_within_s: float) -> None:
        """Raises Lost for a worker that hangs or does not answer, WorkerLost for one whose process is gone."""
        try:
            async with asyncio.timeout(answer_within_s):
                health = await self._launcher.health(process)
        except TimeoutError:
            raise Lost(WorkerState.HUNG, f"did not answer a health check within {answer_within_s:g} s") from None
        now_s = time.monotonic()
        if health.progress is None or health.progress != self._progress:
            self._progress, self._progressed_s = health.progress, now_s
        elif now_s - self._progressed_s > self._step_timeout_s:
            raise Lost(
                WorkerState.HUNG,
                f"for {now_s - self._progressed_s:.1f} s its step has read no byte and computed no layer; "
                f"workers.step_timeout_s allows {self._step_timeout_s:g} s",
            )

    async def _until_gone(self, process: Any) -> None:
        """Waits until the process is gone, or for as long as a process may take to exit by itself."""
        with suppress(TimeoutError, PagerError):
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                while True:
                    await self._launcher.health(process)
                    await asyncio.sleep(EXIT_POLL_S)

    async def _tear_down(self, *, gracefully: bool) -> None:
        """Ends the process and its link. It can be cancelled and called again, for what has not ended yet."""
        self._progress = None
        self._load, self._resident = pb.Load(), ()
        self._on_change()
        if self.link is not None:
            await self.link.close()
            self.link = None
        if self._process is not None:
            await self._launcher.end_worker(self._process, gracefully=gracefully)
            self._process = None

    def _on_break(self) -> None:
        """Marks the worker not ready at once, so that no request is placed on it while the cause is looked into."""
        if self.state is WorkerState.READY:
            self._enter(WorkerState.DEAD)

    def _on_load(self, load: pb.Load) -> None:
        self._load = load
        self._resident = tuple(decode_bitmap(layer) for layer in load.resident)
        if load.draining and self.state is WorkerState.READY:
            self._enter(WorkerState.DRAINING)

    def _enter(self, state: WorkerState) -> None:
        self.state = state
        self._on_change()


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


# --- the cluster ------------------------------------------------------------------------------------------------------


def write_targets(path: Path, router: str | None, workers: Mapping[str, str]) -> None:
    """Replaces the file in one step; `workers` maps a worker's id to the address of its metrics."""
    groups = [
        {"targets": [address], "labels": {"job": WORKER_JOB, "worker": worker}}
        for worker, address in sorted(workers.items())
    ]
    if router is not None:
        groups.insert(0, {"targets": [router], "labels": {"job": ROUTER_JOB}})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(groups, indent=2).encode(), 0o644)  # Prometheus runs as another user


class RayLost(NotReady):
    """Ray, or the process that is connected to it, was lost while the workers were starting."""

    reason = "RAY_LOST"


class Cluster:
    """Owns the supervisors and this router's connection to Ray. Lives on one event loop; `connect` makes it."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._ray: RayPort | None = None  # None before it is open, and once it is closed
        self._supervisors: dict[str, WorkerSupervisor] = {}
        self._discovery: asyncio.Task[None] | None = None
        self._is_draining = False
        self._targets: tuple[str | None, dict[str, str]] | None = None
        self._router_metrics: str | None = None
        self.ray_lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done when the process of Ray with this name has ended: nothing can be started or watched any more."""

    @classmethod
    async def connect(cls, config: ServiceConfig, opening: Opening | None = None) -> Self:
        """Starts `config.workers.count` workers and returns when one is ready; with 0, finds another router's workers.

        They are supervised from here on. Without an `opening`, a process is started that connects to Ray. Raises
        ConfigError, and whatever keeps the first workers from loading (CheckpointError, BudgetError, PortInUse, ...);
        NotReady when there are no workers to attach to, RayLost.
        """
        cluster = cls(config)
        try:
            cluster._ray = await (opening or RayProcess(config).open)(config, cluster._on_lost)
            await cluster._start(cluster._ray.workers)
        except BaseException as error:
            await cluster.close()
            if isinstance(error, NotReady) and cluster.ray_lost.done():
                raise cluster._loss() from error
            raise
        return cluster

    def workers(self) -> tuple[WorkerView, ...]:
        """Returns all workers by id, ready or not."""
        return tuple(self._supervisors[worker_id].view() for worker_id in sorted(self._supervisors))

    def model(self) -> LoadedModel:
        """Returns the model that the workers serve. Raises NotReady before the first was ready."""
        for supervisor in self._supervisors.values():
            if supervisor.model is not None:
                return supervisor.model
        raise NotReady("no worker has loaded the model yet; retry shortly", retry_after_s=POLL_S)

    async def generate(
        self, worker_id: str, request: GenerateRequest, observer: RequestObserver | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        """Yields the chunks of the answer; the last one carries the usage. Closing the iterator cancels on the worker.

        Raises whatever error the worker's engine refuses or fails the request with; WorkerLost when the worker dies or
        hangs; SlowReader when more than the configured number of chunks is unread; NotReady while draining.
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
        """Cancels the tenant's request, at whichever router and worker. Returns False when there is no such request."""
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
                log.warning("%d requests on %s were cut off", supervisor.link.num_open, supervisor.id)
                supervisor.link.cancel_all(error)

    async def drain(self, timeout_s: float) -> None:
        """Drains the router's own workers. What other routers run on them may go on for the given time."""
        self._is_draining = True
        await asyncio.gather(*(supervisor.drain(timeout_s) for supervisor in self._supervisors.values()))

    async def retire(self, worker_id: str) -> None:
        """Has a worker end what it runs, for any router, and then itself; the router that started it starts another.

        Raises UnknownWorker, or NotReady for one that is not ready.
        """
        supervisor = self._supervisors.get(worker_id)
        if supervisor is None:
            known = ", ".join(sorted(self._supervisors)) or "none"
            raise UnknownWorker(f"there is no worker {worker_id[:60]!r}; there are {known}", field="worker")
        await supervisor.retire()

    async def close(self) -> None:
        """Ends the router's own workers, their segments and Ray, as far as this process started them. Idempotent."""
        self._is_draining = True
        if self._discovery is not None:
            self._discovery.cancel()
            await asyncio.gather(self._discovery, return_exceptions=True)
        is_lost = self.ray_lost.done()
        if is_lost:  # the workers' processes end with Ray
            await asyncio.gather(*(supervisor.abandon() for supervisor in self._supervisors.values()))
        else:
            await asyncio.gather(*(supervisor.close() for supervisor in self._supervisors.values()))
        self._supervisors.clear()
        if self._ray is not None:
            await self._ray.close(is_lost=is_lost)
            self._ray = None

    def _on_lost(self, name: str) -> None:
        if not self.ray_lost.done():
            log.error("Ray's %s has ended: the service drains and exits, and has to be started again", name)
            self.ray_lost.set_result(name)

    def _loss(self) -> RayLost:
        return RayLost(f"Ray's {self.ray_lost.result()} ended while the workers were starting", retry_after_s=POLL_S)

    # --- start-up ---------------------------------------------------------------------------------------------------

    async def _start(self, workers: Launcher) -> None:
        if self._config.workers.count:
            for name in await workers.names():
                self._supervise(name, workers)
            await self._first_ready()
            return
        self._discovery = asyncio.create_task(self._discover(workers))
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
            raise self._loss()
        errors = [error for future in done if isinstance(error := future.exception(), PagerError)]
        if errors:
            raise errors[0]

    async def _discover(self, others: Launcher) -> None:
        while True:
            try:
                for name in await others.names():
                    if name not in self._supervisors:
                        self._supervise(name, others)
            except WorkerLost as error:
                log.warning("the workers of other routers could not be listed: %s; trying again", error)
            await asyncio.sleep(POLL_S)

    def _supervise(self, name: str, launcher: Launcher) -> None:
        self._supervisors[name] = WorkerSupervisor(
            name,
            launcher,
            longest_pause_s=OWN_PAUSE_S if self._config.workers.count else OTHERS_PAUSE_S,
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
    """Returns the addresses by worker. A worker that is being restarted stays a target, so Prometheus knows that it is
    down.

    By then its last address may have been given to another worker; that worker alone is listed with it.
    """
    live_first = sorted(views, key=lambda view: (view.state not in (WorkerState.READY, WorkerState.DRAINING), view.id))
    found: dict[str, str] = {}
    for view in live_first:
        if view.metrics_address is not None and view.metrics_address not in found.values():
            found[view.id] = view.metrics_address
    return found
