"""Descriptions of metrics and the server that exposes them; the one module that imports prometheus_client."""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from socketserver import ThreadingMixIn
from threading import BoundedSemaphore, Lock, Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from pager.errors import ConfigError, PortInUse
from pager.memory import format_address

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
OUTPUT_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80
)  # fmt: skip
PAGE_IN_S = (
    5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5
)  # fmt: skip
STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)
STALL_S = (1e-4, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROUTE_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LOOP_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
POOL_EXPERTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
COVERAGE = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1)
RATIO = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)


PREFIX = "expert_pager"
_UNITS = {"seconds": "s", "bytes": "bytes", "ratio": "0 to 1", "info": ""}
INTERVAL_S = 0.02  # between two looks at how late an event loop is
MAX_CONNECTIONS = 16  # and as many threads
REQUEST_TIMEOUT_S = 10.0  # from a connection's start until its request has been read
CONNECTION_TIMEOUT_S = 60.0  # until its answer has been sent
FULL_WAIT_S = 1.0  # how long a connection waits for the place of one that was ended for it


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Labels:
    """The label names of a metric, and every combination of values that a series can have."""

    names: tuple[str, ...] = ()
    series: tuple[tuple[str, ...], ...] = ((),)

    def values(self, name: str) -> list[str]:
        """Returns the values of one label, each once, in order."""
        at = self.names.index(name)
        return list(dict.fromkeys(series[at] for series in self.series))


def every(**values: Iterable[str]) -> Labels:
    """Returns labels with every combination of the values."""
    return Labels(tuple(values), tuple(itertools.product(*values.values())))


@dataclass(frozen=True, slots=True)
class Metric:
    """The description of one metric.

    `name` is without prefix and `_total`; an info metric's series are not known beforehand.
    """

    name: str
    kind: Kind
    meaning: str
    question: str
    labels: Labels = Labels()
    buckets: tuple[float, ...] = ()

    @property
    def exposed(self) -> str:
        """The metric's name in a query, without what a histogram appends."""
        suffix = {Kind.COUNTER: "_total", Kind.INFO: "_info"}.get(self.kind, "")
        return f"{PREFIX}_{self.name}{suffix}"

    @property
    def samples(self) -> tuple[str, ...]:
        """The names that its samples have in a scrape."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(self.exposed + suffix for suffix in ("_bucket", "_count", "_sum"))
        return (self.exposed,)

    @property
    def unit(self) -> str:
        return _UNITS.get(self.exposed.removesuffix("_total").rpartition("_")[2], "1")


class Instruments:
    """The prometheus_client objects of some metrics in one registry; every series exists from the start."""

    def __init__(self, families: Sequence[Metric], registry: CollectorRegistry) -> None:
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        for family in families:
            made = _make(family, registry)
            for values in family.labels.series if family.labels.names else ():
                made.labels(*values)
            self._made[family.name] = made

    def counter(self, name: str) -> Counter:
        found = self._made[name]
        assert isinstance(found, Counter)
        return found

    def gauge(self, name: str) -> Gauge:
        found = self._made[name]
        assert isinstance(found, Gauge)
        return found

    def histogram(self, name: str) -> Histogram:
        found = self._made[name]
        assert isinstance(found, Histogram)
        return found


def _make(family: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name, text, labels = f"{PREFIX}_{family.name}", family.meaning, family.labels.names
    match family.kind:
        case Kind.COUNTER:
            return Counter(name, text, labels, registry=registry)
        case Kind.HISTOGRAM:
            return Histogram(name, text, labels, buckets=family.buckets, registry=registry)
        case Kind.GAUGE:
            return Gauge(name, text, labels, registry=registry)
        case Kind.INFO:
            return Gauge(family.exposed, text, labels, registry=registry)


class LoopLag:
    """A task that wakes up every `INTERVAL_S` and reports by how much each wake-up was late.

    A wake-up is late while something else holds the loop: a callback, another thread that holds the GIL, or other
    programs that have the processor. Everything that the loop serves waited as long. A task belongs to the loop that
    starts it.
    """

    def __init__(self, observe: Callable[[float], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._observe = observe
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the task. Must be called on the loop that is watched."""
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _watch(self) -> None:
        while True:
            before_s = self._clock()
            await asyncio.sleep(INTERVAL_S)
            self._observe(max(0.0, self._clock() - before_s - INTERVAL_S))


@contextmanager
def importing() -> Iterator[None]:
    """Surrounds imports of large libraries. What they make is left out of collections of garbage, of which there is
    none meanwhile; they take a tenth less time so.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave_out_of_collections() -> None:
    """Excludes all objects that exist now from garbage collection. For a process that has finished starting.

    Libraries and a model are half a million objects, which a full collection searches in a quarter of a second while
    all threads stand.
    """
    gc.collect()
    gc.freeze()


Guard = Callable[[Mapping[str, Any]], "tuple[str, list[tuple[str, str]], bytes] | None"]
"""Looks at a request, as WSGI has it: status, headers and body for whoever may not see what is asked for."""


class MetricsServer:
    """The metrics server: owns the port and the threads that answer on it. A path that is not mounted is a 404."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int = 0, guard: Guard | None = None) -> None:
        """Opens the port; 0 takes a free one. Raises PortInUse, ConfigError."""
        self._guard = guard
        self._metrics: WSGIApplication = make_wsgi_app(registry)
        self._apps: dict[str, WSGIApplication] = {}
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, address[:2])
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(f"metrics port {port} on {host} is in use; choose another, or 0 for any") from None
            raise ConfigError(f"metrics cannot be served on {host}:{port}: {error.strerror or error}") from None
        self._server.set_app(self._answer)
        self.port = self._server.server_port
        self.address = format_address(host, self.port)
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def mount(self, path: str, app: WSGIApplication) -> None:
        """Lets `app` answer for `path` and everything below it."""
        self._apps[path] = app

    def close(self) -> None:
        """Refuses new connections and ends those that are open. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        refusal = None if self._guard is None else self._guard(environ)
        if refusal is not None:
            status, headers, body = refusal
            start_response(status, headers)
            return [body]
        if path == "/metrics":
            return self._metrics(environ, start_response)
        for mounted, app in self._apps.items():
            if path == mounted or path.startswith(f"{mounted}/"):
                return app(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [f"there is {' and '.join(('/metrics', *self._apps))}\n".encode()]


@dataclass(slots=True)
class _Connection:
    """One open connection; `is_read` is True once its request is complete."""

    opened_s: float
    is_read: bool = False

    def is_overdue(self, now_s: float) -> bool:
        return now_s - self.opened_s > (CONNECTION_TIMEOUT_S if self.is_read else REQUEST_TIMEOUT_S)


class _Server(ThreadingMixIn, WSGIServer):
    """The WSGI server: owns the open connections. Beyond the bound, the oldest without a request is closed."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, family: int, address: tuple[Any, ...]) -> None:
        self.address_family = family
        self._permits = BoundedSemaphore(MAX_CONNECTIONS)
        self._connections: dict[socket.socket, _Connection] = {}  # oldest first
        self._lock = Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._permits.acquire(blocking=False):
            self._end_oldest_unread()
            if not self._permits.acquire(timeout=FULL_WAIT_S):
                super().shutdown_request(request)
                return
        with self._lock:
            self._connections[request] = _Connection(time.monotonic())
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forgets a connection. Called once, by the connection's own thread, at its end."""
        with self._lock:
            ended = self._connections.pop(request, None)
        super().shutdown_request(request)
        if ended is not None:
            self._permits.release()

    def service_actions(self) -> None:
        """Closes what has taken too long, twice a second: a socket's own time-out would begin anew with every byte."""
        now_s = time.monotonic()
        with self._lock:
            for request, connection in self._connections.items():
                if connection.is_overdue(now_s):
                    _end(request)

    def has_read(self, request: socket.socket) -> None:
        with self._lock:
            self._connections[request].is_read = True

    def _end_oldest_unread(self) -> None:
        with self._lock:
            unread = (request for request, connection in self._connections.items() if not connection.is_read)
            oldest = next(unread, None)
            if oldest is not None:
                _end(oldest)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that leave early, which need no traceback on standard error."""
        log.debug("a connection to the metrics port failed", exc_info=True)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            for request in self._connections:
                _end(request)


class _Handler(WSGIRequestHandler):
    server: _Server

    def parse_request(self) -> bool:
        is_whole = super().parse_request()
        if is_whole:
            self.server.has_read(self.connection)
        return is_whole

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: scrapes are too frequent."""


def _end(request: socket.socket) -> None:
    """Shuts the connection down; the thread that reads or writes it sees its end."""
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        log.debug("the connection had ended: %s", error)
