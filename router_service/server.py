"""Builds and runs the gRPC server: the service, health, reflection, and the pulse behind them."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable

import grpc
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pager.errors import ConfigError, PortInUse
from pager.metrics.loop_lag import LoopLag
from pager.units import format_address
from router_service import encode
from router_service.boundary import ErrorBoundary
from router_service.message_bounds import CORE_MESSAGE_BYTES, CORE_METADATA_BYTES, MAX_OTHER_BYTES
from router_service.service import SERVICE_NAME, Backend, ExpertPagerService
from router_service.tls import TlsFiles
from router_service.unseen_calls import WATCHED, UnseenCalls, watched_servers

log = logging.getLogger("expert_pager.router")

PULSE_S = 0.25
HEARTBEAT_PULSES = 4
CUT_OFF_S = 2.0  # for the last status to get to those who read
MAX_ANSWER_BYTES = 8 * 2**20
MAX_PENDING_CALLS = 16384
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server on the port would start, and take half of the calls
    ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
    # What gRPC refuses by itself gets a bare status: its bounds lie beyond those that the service checks.
    ("grpc.max_metadata_size", CORE_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", CORE_METADATA_BYTES),
    # Calls that wait for the event loop. By default gRPC cancels some beyond 1000, and all that wait for 30 s.
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    ("grpc.server_max_unrequested_time_in_server", 3600),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RouterServer:
    """Owns the listening port and the pulse. `""` is liveness; the service's name is readiness."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._boundary = ErrorBoundary(SERVICE_NAME, backend.metrics, backend.bounds)
        others = watched_servers()
        self._server = grpc.aio.server(
            interceptors=(self._boundary,),
            options=(*_OPTIONS, WATCHED, ("grpc.max_receive_message_length", CORE_MESSAGE_BYTES)),
        )
        (server_id,) = watched_servers() - others
        self._unseen = UnseenCalls(server_id)
        self._lag = LoopLag(backend.metrics.loop_lag)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        pb_grpc.add_ExpertPagerServicer_to_server(ExpertPagerService(backend), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._health_server: grpc.aio.Server | None = None
        self._pulse: asyncio.Task[None] | None = None
        self.port = 0
        self.health_port = 0

    async def start(self, host: str, port: int, tls: TlsFiles | None = None, health_port: int | None = None) -> None:
        """Listens; port 0 takes a free one, found in `self.port` and `self.health_port`.

        `health_port` has health alone, and never TLS: who probes a pod can not speak it. Raises PortInUse, ConfigError.
        """
        self.port = await self._bind(self._server, host, port, "router.port", tls)
        if health_port is not None:
            self._health_server = grpc.aio.server(
                options=(*_OPTIONS, ("grpc.max_receive_message_length", MAX_OTHER_BYTES))
            )
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
            self.health_port = await self._bind(self._health_server, host, health_port, "router.health_port")
        await self._set_readiness()
        for server in self._servers:
            await server.start()
        self._pulse = asyncio.create_task(self._beat())
        await self._lag.start()

    async def drain(self, timeout_s: float) -> bool:
        """NOT_SERVING everywhere, new requests refused, those in flight awaited. True when all ended in time."""
        self._backend.admission.close()
        await self._health.enter_graceful_shutdown()
        return await self._ended_within(timeout_s)

    async def cut_off(self) -> None:
        """What is in flight ends with a status that says to send it again."""
        self._backend.cluster.cut_off()
        await self._ended_within(CUT_OFF_S)

    async def _ended_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._backend.admission.num_requests:  # noqa: ASYNC110 - seconds, once in a process's life
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return False
        return True

    async def stop(self, grace_s: float = 0.5) -> None:
        """Cancels what is still in flight after `grace_s`, and returns when that has given back what it held."""
        if self._pulse is not None:
            self._pulse.cancel()
            await asyncio.gather(self._pulse, return_exceptions=True)
        await self._lag.stop()
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        await self._ended_within(CUT_OFF_S)  # gRPC does not wait for what a cancelled call does last

    async def wait(self) -> None:
        await self._server.wait_for_termination()

    @property
    def _servers(self) -> list[grpc.aio.Server]:
        return [self._server] if self._health_server is None else [self._server, self._health_server]

    async def _bind(self, server: grpc.aio.Server, host: str, port: int, key: str, tls: TlsFiles | None = None) -> int:
        try:
            if tls is None:
                return server.add_insecure_port(format_address(host, port))
            return server.add_secure_port(format_address(host, port), tls.credentials())
        except RuntimeError:
            await self.stop(0)
            raise _bind_error(host, port, key) from None

    async def _beat(self) -> None:
        beat = 0
        while True:
            await _logged(self._set_readiness)
            self._backend.metrics.dropped("unseen", self._unseen.look(self._boundary.num_seen))
            if beat % HEARTBEAT_PULSES == 0:
                await _logged(self._heartbeat)
            beat += 1
            await asyncio.sleep(PULSE_S)

    async def _set_readiness(self) -> None:
        states = [worker.state for worker in self._backend.cluster.workers()]
        await self._health.set(SERVICE_NAME, _SERVING if "ready" in states else _NOT_SERVING)
        for state in ("starting", "ready", "draining", "hung", "dead"):
            self._backend.metrics.workers.labels(state).set(states.count(state))
        for worker in self._backend.cluster.workers():
            self._backend.metrics.restarted(worker.id, worker.num_restarts)

    async def _heartbeat(self) -> None:
        self._backend.watch.beat()
        workers = self._backend.cluster.workers()
        ready = {worker.id: encode.holds(worker) for worker in workers if worker.state == "ready"}
        await self._backend.hints.heartbeat(ready)


async def _logged(step: Callable[[], Awaitable[None]]) -> None:
    """One failed beat must not end the pulse: readiness would stay as it is for ever."""
    try:
        await step()
    except Exception:
        log.exception("the router's pulse failed once; it goes on")


def _bind_error(host: str, port: int, key: str) -> ConfigError | PortInUse:
    """gRPC says only that it failed; the socket says why."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return ConfigError(f"can not listen on {host}:{port}: {error.strerror or error}")
    return PortInUse(f"port {port} on {host} is in use; choose another ({key})")
