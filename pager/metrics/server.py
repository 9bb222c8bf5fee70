"""`/metrics` over HTTP."""

from __future__ import annotations

import errno
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from pager.errors import ConfigError, PortInUse


class MetricsServer:
    """`/metrics` of one registry over HTTP, in a thread of its own."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int = 0) -> None:
        """Port 0 takes a free one. Raises PortInUse, ConfigError."""
        self._server: WSGIServer
        self._thread: Thread
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(f"metrics port {port} on {host} is in use; choose another, or 0 for any") from None
            raise ConfigError(f"metrics can not be served on {host}:{port}: {error.strerror or error}") from None
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
