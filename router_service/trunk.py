"""The process that runs the model's trunk for a router, so that the router itself needs neither torch nor transformers.

It is started when a pass first needs the trunk, or with the service, and ends with its router. One that was started for
a prompt ends when none has needed it for a while. Starting takes seconds. It gets paths and token ids and returns
scores, over pipes, as bytes and JSON.

Run as a program, this module is that process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np

from pager.errors import CheckpointError, ConfigError, InvalidRequest, NotReady, PagerError, UnsupportedModel
from pager.types import RoutingScores

log = logging.getLogger("expert_pager.router")

IDLE_S = 3600.0
START_TIMEOUT_S = 300.0  # on a machine that is otherwise busy
ANSWER_TIMEOUT_S = 120.0
RETRY_S = 30.0  # after a start that failed
_HEAD = struct.Struct("<II")  # the lengths of a message's JSON and of the bytes behind it
_ERRORS = {each.__name__: each for each in (CheckpointError, ConfigError, InvalidRequest, UnsupportedModel)}
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "TMPDIR", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class TrunkOf:
    """The trunk to load: that of a checkpoint, with the stand-ins of its fitted file if it has one."""

    model: str
    device: str
    dtype: str | None
    has_file: bool


class TrunkProcess:
    """A `TrunkScorer` that runs in another process. `scores` is for one thread at a time, the rest for the event loop.

    With `stays`, it does not end for want of prompts, and whoever waits for it reports what keeps it from starting.
    """

    def __init__(self, of: TrunkOf, *, stays: bool) -> None:
        self._of = of
        self._stays = stays
        self._starting: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._facts: dict[str, Any] = {}
        self._failed_s = -RETRY_S
        self._used_s = 0.0
        self._is_closed = False
        self._in_use = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """The loaded model's fingerprint; empty before the process is ready."""
        return str(self._facts.get("fingerprint", ""))

    @property
    def has_stand_ins(self) -> bool:
        return bool(self._facts.get("has_stand_ins"))

    @property
    def is_ready(self) -> bool:
        return bool(self._facts) and self._process is not None and self._process.poll() is None

    def wake(self) -> None:
        """Starts the process if it does not run, and does not wait for it. A failure is logged."""
        if not self.is_ready and self._starting is None and time.monotonic() - self._failed_s > RETRY_S:
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._started)

    async def ready(self) -> None:
        """Starts the process if it does not run, and waits until it has loaded the trunk. Raises PagerError."""
        while not self.is_ready:
            self.wake()
            if self._starting is None:
                raise NotReady("the model's trunk cannot be loaded now; send the request again", retry_after_s=RETRY_S)
            await asyncio.shield(self._starting)

    def scores(self, token_ids: Sequence[int], /) -> RoutingScores:
        """Scores a prompt. Raises InvalidRequest as the trunk does, NotReady when the process has ended."""
        with self._in_use:
            self._used_s = time.monotonic()
            head, body = self._ask({}, np.asarray(token_ids, np.int64).tobytes(), ANSWER_TIMEOUT_S)
        ends = np.cumsum(head["routed"])[:-1]
        return RoutingScores(tuple(np.split(np.frombuffer(body, np.float64), ends)), "trunk", len(token_ids))

    def rest(self) -> None:
        """Ends a process that no prompt has needed for a while. Called now and then."""
        if self._stays or not self.is_ready or time.monotonic() - self._used_s < IDLE_S:
            return
        if self._in_use.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._in_use.release()

    async def close(self) -> None:
        self._is_closed = True
        if self._starting is not None:
            self._end()  # which its start notices
            await asyncio.gather(self._starting, return_exceptions=True)
        self._end()

    async def _start(self) -> None:
        started_s = time.monotonic()
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # The workers need the cores; a routing-only pass is short and runs one at a time.
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // 2))
        self._facts = {}
        self._process = subprocess.Popen(  # noqa: ASYNC220 - it is started within milliseconds
            [sys.executable, "-m", "router_service.trunk"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"},
            start_new_session=True,  # Ctrl-C is for the router, which drains
        )
        self._used_s = time.monotonic()
        self._facts, _ = await asyncio.to_thread(self._ask, asdict(self._of), b"", START_TIMEOUT_S)
        self._used_s = time.monotonic()
        log.info("the trunk was loaded in %.1f s", self._used_s - started_s)

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed_s = time.monotonic()
            self._end()
            if not (self._stays or self._is_closed):
                log.warning("the trunk could not be loaded, and prompts are scored without it: %s", error)

    def _ask(self, head: dict[str, Any], body: bytes, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        """Sends a message and returns the answer. Raises the error that it holds, and NotReady where none comes."""
        process, answer = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            with suppress(OSError, ValueError):  # ValueError: the pipe was closed
                _write(process.stdin, head, body)
                if select.select([process.stdout], [], [], timeout_s)[0]:
                    answer = _read(process.stdout)
        if answer is None:
            self._end()
            raise NotReady("the process that runs the model's trunk ended; send the request again", retry_after_s=1.0)
        if "error" in answer[0]:
            raise _error_of(answer[0])
        return answer

    def _end(self) -> None:
        self._facts = {}
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _error_of(head: dict[str, Any]) -> PagerError:
    return _ERRORS.get(str(head.get("kind")), PagerError)(head["error"], field=head.get("field"))


def _write(stream: IO[bytes], head: dict[str, Any], body: bytes) -> None:
    encoded = json.dumps(head).encode()
    stream.write(_HEAD.pack(len(encoded), len(body)) + encoded + body)
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Reads a message; None where the other side has ended."""
    lengths = stream.read(_HEAD.size)
    if len(lengths) < _HEAD.size:
        return None
    num_head, num_body = _HEAD.unpack(lengths)
    head, body = stream.read(num_head), stream.read(num_body)
    return (json.loads(head), body) if len(body) == num_body else None


# --- the process ------------------------------------------------------------------------------------------------------


def _serve() -> None:
    """Loads the trunk that the first message names, then scores the ids of each further one, until the router ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with the router, which may drain first
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    first = _read(sys.stdin.buffer)
    if first is None:
        return
    try:
        trunk = _load(TrunkOf(**first[0]))
    except Exception as error:
        _write(answers, _as_head(error), b"")
        return
    facts = {"fingerprint": trunk.fingerprint, "has_stand_ins": trunk.has_stand_ins}
    _write(answers, facts, b"")
    while (message := _read(sys.stdin.buffer)) is not None:
        try:
            means = trunk.scores(np.frombuffer(message[1], np.int64).tolist()).mean_LR
        except Exception as error:
            _write(answers, _as_head(error), b"")
        else:
            means_O = np.concatenate(means).astype(np.float64)
            _write(answers, {"routed": [len(mean_R) for mean_R in means]}, means_O.tobytes())


def _load(of: TrunkOf) -> Any:
    from pathlib import Path

    from pager.cluster.spare import lean_imports
    from pager.memory import resolve_device

    with lean_imports():
        import torch

        from pager.predict.fitted import PredictorFile
        from pager.predict.trunk import TrunkPredictor

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    stand_ins = PredictorFile.load(Path(of.model)).stand_ins if of.has_file else {}
    return TrunkPredictor.load(of.model, device=resolve_device(of.device), dtype=of.dtype, stand_ins=stand_ins)


def _as_head(error: Exception) -> dict[str, Any]:
    if isinstance(error, PagerError):
        return {"error": error.message, "kind": type(error).__name__, "field": error.field}
    return {"error": f"the trunk failed: {type(error).__name__}: {error}"[:1000]}


if __name__ == "__main__":
    _serve()
