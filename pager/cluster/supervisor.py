"""Keeps one worker alive: starts it, links to it, watches it, and starts it again after a pause when it is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

import ray
from expert_pager.v1 import worker_pb2 as pb

from pager.cluster.actors import Launcher, WorkerProcess
from pager.cluster.token_client import WorkerLink
from pager.cluster.views import Health, LoadedModel, WorkerReady, WorkerState, WorkerView
from pager.errors import PagerError, WorkerLost
from pager.wire import decode_bitmap, decode_paging, optional

log = logging.getLogger(__name__)

POLL_S = 1.0
HEALTH_TIMEOUT_S = 5.0  # after a broken stream: does its process still answer?
EXIT_TIMEOUT_S = 10.0  # of a process that has drained
EXIT_POLL_S = 0.1
FIRST_PAUSE_S = 0.5
HEALTHY_S = 60.0  # after so long in one piece, a loss counts as the first one
LOSSES_BEFORE_GIVING_UP = 3  # only while it has never been ready


class Lost(Exception):
    """This incarnation of the worker is over."""

    def __init__(self, state: WorkerState, why: str) -> None:
        super().__init__(why)
        self.state = state


class Drained(Lost):
    """It was told to end, and has ended what it had."""

    def __init__(self) -> None:
        super().__init__(WorkerState.DEAD, "it has drained")


class WorkerSupervisor:
    """Owns one worker's process, link and state. Lives on one event loop."""

    def __init__(
        self,
        worker_id: str,
        launcher: Launcher,
        *,
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
        self._step_timeout_s = step_timeout_s
        self._buffer_chunks = buffer_chunks
        self._on_change = on_change
        self._process: WorkerProcess | None = None
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
        """A worker of ours ends what any router runs on it, and takes nothing more."""
        if self._process is not None and self.state in (WorkerState.READY, WorkerState.DRAINING):
            await self._launcher.drain(self._process, timeout_s)

    async def close(self) -> None:
        """Ends the worker if it is ours, and every answer that is open on it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if not self.first_ready.cancel() and not self.first_ready.cancelled():
            self.first_ready.exception()  # seen, if nobody else has looked
        await self._tear_down(gracefully=True)

    async def abandon(self) -> None:
        """Fails every answer that is open on the worker, and no more: the Ray that it lived in is lost."""
        self._task.cancel()
        await asyncio.wait([self._task], timeout=EXIT_POLL_S)
        if self.link is not None:
            await self.link.close()
            self.link = None

    # --- one life after the other -----------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        while True:
            lost = await self._live()
            if isinstance(lost, Drained):
                log.info("%s has drained and is started again", self.id)
                self._num_losses = 0
            else:
                log.warning("%s is %s: %s", self.id, lost.state, lost)
            self._enter(lost.state)
            try:
                await self._tear_down(gracefully=False)
            except Exception:
                log.exception("%s could not be cleaned up after", self.id)
            self._num_losses += 1
            if not self.first_ready.done() and self._num_losses >= LOSSES_BEFORE_GIVING_UP:
                times = f"{self._num_losses} times before it was ready"
                self.first_ready.set_exception(WorkerLost(f"{self.id} was lost {times}; the last time: {lost}"))
            await asyncio.sleep(min(self._launcher.longest_pause_s, FIRST_PAUSE_S * 2 ** (self._num_losses - 1)))
            self._num_restarts += 1
            self._enter(WorkerState.STARTING)

    async def _live(self) -> Lost:
        """From launch to loss; says how it ended."""
        try:
            self._process = await self._launcher.launch(self.id)
            answer = await self._launcher.load(self._process)
            if isinstance(answer, PagerError):
                raise answer
            await self._serve(self._process, answer)
        except Lost as lost:
            return lost
        except PagerError as error:
            # What the operator can mend ends a start; later it is waited for.
            if not error.retryable and not self.first_ready.done():
                self.first_ready.set_exception(error)
            return Lost(WorkerState.DEAD, error.message)
        except ray.exceptions.RayError as error:
            return Lost(WorkerState.DEAD, _first_line(error))
        except Exception as error:
            log.exception("supervising %s failed in an unexpected way", self.id)
            return Lost(WorkerState.DEAD, repr(error))
        raise AssertionError("a worker serves until it is lost")

    async def _serve(self, process: WorkerProcess, ready: WorkerReady) -> None:
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
                await _until_gone(process)
                raise Drained
            await self._check(process, HEALTH_TIMEOUT_S)
            log.warning("the stream to %s broke, but its process is well; opening another", self.id)
            await link.close()

    async def _check(self, process: WorkerProcess, answer_within_s: float) -> None:
        """Raises Lost for a worker that hangs or does not answer, RayError for one that is gone."""
        try:
            async with asyncio.timeout(answer_within_s):
                health: Health = await process.actor.health.remote()
        except TimeoutError:
            raise Lost(WorkerState.HUNG, f"does not say how it is within {answer_within_s:g} s") from None
        now_s = time.monotonic()
        if health.progress is None or health.progress != self._progress:
            self._progress, self._progressed_s = health.progress, now_s
        elif now_s - self._progressed_s > self._step_timeout_s:
            raise Lost(
                WorkerState.HUNG,
                f"for {now_s - self._progressed_s:.1f} s its step has read no byte and computed no layer; "
                f"workers.step_timeout_s allows {self._step_timeout_s:g} s",
            )

    async def _tear_down(self, *, gracefully: bool) -> None:
        """Can be cancelled, and called again: what is not ended yet is still known."""
        self._progress = None
        self._load, self._resident = pb.Load(), ()
        self._on_change()
        if self.link is not None:
            await self.link.close()
            self.link = None
        if self._process is not None:
            await self._launcher.end(self._process, gracefully=gracefully)
            self._process = None

    def _on_break(self) -> None:
        """At once, so that nobody places a request here while it is found out what happened."""
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


async def _until_gone(process: WorkerProcess) -> None:
    """Or for as long as a process may take to exit by itself."""
    with suppress(TimeoutError, ray.exceptions.RayError):
        async with asyncio.timeout(EXIT_TIMEOUT_S):
            while True:
                await process.actor.health.remote()
                await asyncio.sleep(EXIT_POLL_S)


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
