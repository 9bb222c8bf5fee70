"""The process that is connected to Ray on a router's behalf, so that the router itself has no Ray in its memory.

The router starts it first of all, supervises its workers by calls to it, and has Ray ended by it. They talk over a
socket, in lines of JSON; tokens go past it, from the workers to the router. It ends with its router, and the workers
that it started with it. `main` is the process's side.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Self

from google.protobuf import json_format

from pager.cluster.placement import Health, WorkerReady
from pager.config import ServiceConfig
from pager.errors import NotReady, PagerError
from pager.observe import logs

if TYPE_CHECKING:
    from pager.cluster.actors import RayHere, WorkerProcess
    from pager.cluster.spare import Spares

log = logging.getLogger(__name__)

# The spares first: what they import takes longest.
PROGRAM = """
import sys
from pager.cluster.spare import Spares
spares = Spares.of(sys.argv[1:])
from pager.cluster.ray_process import main
main(spares)
"""
MOST_LINE_BYTES = 2**24
CLOSE_TIMEOUT_S = 60.0
OPENING_TIMEOUT_S = 10.0  # for what is being opened when the router ends; then the process is killed, and Ray with it
EXIT_TIMEOUT_S = 10.0
PING_EVERY_S = 2.0
PING_TIMEOUT_S = 20.0  # less than a worker has for a health check, which would take the blame
# Ray imports these where they are installed, to send their objects between processes; none is sent.
UNUSED = ("pyarrow", "pydantic", "starlette", "aiohttp")
NAME = "driver"  # what it is called when it has ended before its router, as Ray's daemons have names
# Names of variables that hold a secret. Ray's own and OpenTelemetry's are kept: Ray's processes and the workers need
# them.
SECRET_NAME = re.compile(r"(?!RAY_|OTEL_)(.*_)?(PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIALS?|KEY)(_.*)?", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\w+://[^/\s]*:[^/\s]*@")  # a URL with a password
REDIS = ("REDIS_URL", "REDIS_URL_FILE")


def secrets_in(environment: Mapping[str, str]) -> list[str]:
    """Returns the names of the variables that hold a secret which none of Ray's processes needs."""
    return [
        name
        for name, value in environment.items()
        if name in REDIS or SECRET_NAME.fullmatch(name) or SECRET_VALUE.match(value)
    ]


class RayProcess:
    """A router's end: `RayPort` and `Launcher` in one, by calls to the process. A worker's process is a number here."""

    def __init__(self, config: ServiceConfig | None = None) -> None:
        """Starts the process, which imports Ray and waits for `open`.

        With the settings that it will be opened with, it starts the first workers' processes too.
        """
        words = []
        if config is not None and config.cluster.joined is None:
            words = [str(config.workers.count), str(config.workers.most_threads)]
        here, there = socket.socketpair()
        secrets = set(secrets_in(os.environ))
        environment = {name: value for name, value in os.environ.items() if name not in secrets}
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, *words],
                stdin=there.fileno(),
                stdout=2,  # standard output is for the router's ready line
                env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for the router, which drains
            )
        self._socket: socket.socket | None = here
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.Task[None] | None = None
        self._pings: asyncio.Task[None] | None = None
        self._ids = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._on_lost: Callable[[str], None] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def workers(self) -> Self:
        return self

    async def open(self, config: ServiceConfig, on_lost: Callable[[str], None]) -> Self:
        """Has Ray started or joined. `on_lost` is called once Ray is lost, or this process. Raises what Ray's own
        opening raises.
        """
        assert self._socket is not None, "opened once"
        reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=MOST_LINE_BYTES)
        self._socket, self._on_lost = None, on_lost
        self._reader = asyncio.create_task(self._read(reader), name="ray process")
        try:
            await self._call("open", asdict(config))
        except BaseException:
            await self.close()
            raise
        self._pings = asyncio.create_task(self._ping(), name="pings of the ray process")
        return self

    async def close(self, *, is_lost: bool = False) -> None:
        """Ends the process and what it has started. Idempotent."""
        self._on_lost = None  # its end is expected from now on
        timeout_s = OPENING_TIMEOUT_S if self._pings is None else CLOSE_TIMEOUT_S
        if self._pings is not None:
            self._pings.cancel()
        if self._writer is not None:
            with suppress(PagerError, TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._call("close", is_lost)
            self._writer.close()
            self._writer = None
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, EXIT_TIMEOUT_S)
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self.end()

    def end(self) -> None:
        """Ends a process that was never opened, or that did not end by itself. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    # --- the workers' processes -------------------------------------------------------------------------------------

    async def names(self) -> list[str]:
        return [str(name) for name in await self._call("names")]

    async def launch(self, name: str) -> int:
        return int(await self._call("launch", name))

    async def load(self, process: int) -> WorkerReady:
        return _ready_of(await self._call("load", process))

    async def health(self, process: int) -> Health:
        return Health(**await self._call("health", process))

    async def retire(self, process: int) -> None:
        await self._call("retire", process)

    async def drain(self, process: int, timeout_s: float) -> None:
        with suppress(NotReady):  # the workers have ended with the process
            await self._call("drain", process, timeout_s)

    async def end_worker(self, process: int, *, gracefully: bool) -> None:
        with suppress(NotReady):
            await self._call("end_worker", process, gracefully)

    # --- calls ------------------------------------------------------------------------------------------------------

    async def _call(self, name: str, *arguments: Any) -> Any:
        """Calls a method of `_Calls`. Raises the PagerError that it raised, and NotReady when the process has ended.

        A call that is cancelled here is cancelled there too.
        """
        writer = self._writer
        if writer is None or self._reader is None or self._reader.done():
            raise _ended()
        number = next(self._ids)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        _write(writer, {"id": number, "call": name, "arguments": arguments})
        try:
            return await answer
        except asyncio.CancelledError:
            _write(writer, {"id": number})
            raise
        finally:
            self._calls.pop(number, None)

    async def _ping(self) -> None:
        """Kills a process that does not answer any more, so that what waits for it ends and its loss is noticed."""
        with suppress(NotReady):  # it has ended
            while True:
                await asyncio.sleep(PING_EVERY_S)
                try:
                    async with asyncio.timeout(PING_TIMEOUT_S):
                        await self._call("ping")
                except TimeoutError:
                    log.error(
                        "the process that is connected to Ray has not answered for %g s and is killed", PING_TIMEOUT_S
                    )
                    self._process.kill()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._take(json.loads(line))
        except OSError:
            pass  # the same as its end
        finally:
            for answer in self._calls.values():
                if not answer.done():
                    answer.set_exception(_ended())
            self._lose(NAME)

    def _take(self, message: dict[str, Any]) -> None:
        if "lost" in message:
            self._lose(message["lost"])
            return
        answer = self._calls.get(message["id"])
        if answer is None or answer.done():
            return  # it was cancelled
        if "error" in message:
            answer.set_exception(_error_of(message["error"]))
        else:
            answer.set_result(message["value"])

    def _lose(self, name: str) -> None:
        if self._on_lost is not None:
            self._on_lost(name)


def _ended() -> NotReady:
    return NotReady("the process that is connected to Ray has ended", retry_after_s=1.0)


def _write(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


def _ready_of(facts: dict[str, Any]) -> WorkerReady:
    from pydantic import TypeAdapter

    return TypeAdapter(WorkerReady).validate_python(facts)


def _error_of(facts: dict[str, Any]) -> PagerError:
    from expert_pager.v1 import worker_pb2

    from pager.wire import decode_error

    return decode_error(json_format.ParseDict(facts, worker_pb2.Error()))


# --- the process ------------------------------------------------------------------------------------------------------


def main(spares: Spares) -> None:
    """Runs the process: answers the calls that come over its standard input, until the router closes it or ends."""
    # It ends with its router, which may drain first. A handler is not inherited by the processes that Ray starts.
    signal.signal(signal.SIGTERM, lambda *_: None)
    calls = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # Ray's processes inherit it
    os.close(nothing)
    sys.modules.update(dict.fromkeys(UNUSED))  # type: ignore[arg-type] # imports of None fail as if it was not there
    import pager.cluster.actors  # noqa: F401 - takes a while, in which the router imports its own

    asyncio.run(_Calls(spares).serve(calls))
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)  # threads that wait for a lost Ray never return


class _Calls:
    """The process's end: each public method but `serve` is one that the router calls by its name."""

    METHODS = ("open", "ping", "names", "launch", "load", "health", "retire", "drain", "end_worker", "close")

    def __init__(self, spares: Spares) -> None:
        self._spares = spares
        self._opening: asyncio.Task[RayHere] | None = None
        self._here: RayHere | None = None
        self._is_lost = False
        self._numbers = itertools.count(1)
        self._processes: dict[int, WorkerProcess] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self, calls: socket.socket) -> None:
        reader, self._writer = await asyncio.open_connection(sock=calls, limit=MOST_LINE_BYTES)
        with suppress(OSError):
            while line := await reader.readline():
                message = json.loads(line)
                number = message["id"]
                if "call" in message:
                    self._running[number] = asyncio.create_task(self._answer(number, message))
                elif number in self._running:
                    self._running[number].cancel()
        for task in list(self._running.values()):
            task.cancel()
        with suppress(PagerError):
            await self.close(is_lost=True)  # whoever would wait for an orderly end has gone

    async def _answer(self, number: int, message: dict[str, Any]) -> None:
        assert self._writer is not None, "calls come over the connection"
        assert message["call"] in self.METHODS, message["call"]
        try:
            value = await getattr(self, message["call"])(*message["arguments"])
            _write(self._writer, {"id": number, "value": value})
        except PagerError as error:
            _write(self._writer, {"id": number, "error": _facts_of(error)})
        except Exception as error:
            log.exception("a call of %s failed in an unexpected way", message["call"])
            _write(self._writer, {"id": number, "error": _facts_of(PagerError(repr(error)))})
        finally:
            del self._running[number]

    async def open(self, settings: dict[str, Any]) -> None:
        from pager.cluster.actors import RayHere

        config = _config_of(settings)
        logs.configure(config.log.format, "router")
        self._opening = asyncio.create_task(RayHere.open(config, self._lose, spares=self._spares))
        self._here = await asyncio.shield(self._opening)
        signal.signal(signal.SIGTERM, lambda *_: None)  # Ray's core has replaced it with one that aborts

    async def ping(self) -> None:
        """Does nothing; its answer says that the process runs."""

    async def names(self) -> list[str]:
        return await self._ray.workers.names()

    async def launch(self, name: str) -> int:
        process = await self._ray.workers.launch(name)
        number = next(self._numbers)
        self._processes[number] = process
        return number

    async def load(self, process: int) -> dict[str, Any]:
        return asdict(await self._ray.workers.load(self._processes[process]))

    async def health(self, process: int) -> dict[str, Any]:
        return asdict(await self._ray.workers.health(self._processes[process]))

    async def retire(self, process: int) -> None:
        await self._ray.workers.retire(self._processes[process])

    async def drain(self, process: int, timeout_s: float) -> None:
        await self._ray.workers.drain(self._processes[process], timeout_s)

    async def end_worker(self, process: int, gracefully: bool) -> None:
        if process in self._processes:
            await self._ray.workers.end_worker(self._processes[process], gracefully=gracefully)
            del self._processes[process]

    async def close(self, is_lost: bool) -> None:
        """Ends Ray as far as this process started it. An opening that goes on comes to its end first."""
        if self._opening is None:
            return
        opening, self._opening = self._opening, None
        here = await opening
        await here.close(is_lost=is_lost)

    @property
    def _ray(self) -> RayHere:
        assert self._here is not None, "the router opens it first"
        return self._here

    def _lose(self, name: str) -> None:
        if self._writer is not None:
            _write(self._writer, {"lost": name})


def _facts_of(error: PagerError) -> dict[str, Any]:
    from pager.wire import encode_error

    return json_format.MessageToDict(encode_error(error))


def _config_of(settings: dict[str, Any]) -> ServiceConfig:
    defaults = ServiceConfig()
    sections = {each.name: type(getattr(defaults, each.name)) for each in fields(ServiceConfig)}
    return ServiceConfig(**{name: section(**settings[name]) for name, section in sections.items()})
