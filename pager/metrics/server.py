"""The metrics port: `/metrics` of one registry and what is mounted beside it, over HTTP.

Nobody who connects has shown who they are, so connections, threads and the time that each may take are bounded.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from threading import BoundedSemaphore, Lock, Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from pager.errors import ConfigError, PortInUse
from pager.units import format_address

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16  # and as many threads
REQUEST_TIMEOUT_S = 10.0  # from a connection's start until its request has been read
CONNECTION_TIMEOUT_S = 60.0  # until its answer has been sent
FULL_WAIT_S = 1.0  # how long a connection waits for the place of one that was ended for it


class MetricsServer:
    """Owns the port and the threads that answer on it. Every path that is not mounted is a 404."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int = 0) -> None:
        """Port 0 takes a free one. Raises PortInUse, ConfigError."""
        self._apps: dict[str, WSGIApplication] = {"/metrics": make_wsgi_app(registry)}
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, address[:2])
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(f"metrics port {port} on {host} is in use; choose another, or 0 for any") from None
            raise ConfigError(f"metrics can not be served on {host}:{port}: {error.strerror or error}") from None
        self._server.set_app(self._answer)
        self.port = self._server.server_port
        self.address = format_address(host, self.port)
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def mount(self, path: str, app: WSGIApplication) -> None:
        """Has `app` answer for `path` and everything below it."""
        self._apps[path] = app

    def close(self) -> None:
        """Refuses new connections and ends those that are open. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        for mounted, app in self._apps.items():
            if path == mounted or path.startswith(f"{mounted}/"):
                return app(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [f"there is {' and '.join(self._apps)}\n".encode()]


@dataclass(slots=True)
class _Connection:
    """One open connection. `is_read` once its request is complete."""

    opened_s: float
    is_read: bool = False

    def is_overdue(self, now_s: float) -> bool:
        return now_s - self.opened_s > (CONNECTION_TIMEOUT_S if self.is_read else REQUEST_TIMEOUT_S)


class _Server(ThreadingMixIn, WSGIServer):
    """Owns the open connections. When there are too many, the oldest whose request has not come gives way."""

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
        """Called once by a connection's own thread, at its end."""
        with self._lock:
            ended = self._connections.pop(request, None)
        super().shutdown_request(request)
        if ended is not None:
            self._permits.release()

    def service_actions(self) -> None:
        """Called twice a second by the thread that accepts. A time-out of the socket would begin anew with a byte."""
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
        """A client that goes early is no news, and a traceback on standard error is no line of a log."""
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
        """Scrapes are not logged."""


def _end(request: socket.socket) -> None:
    """Its thread, which reads or writes, meets the end of the connection."""
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        log.debug("the connection had ended: %s", error)
