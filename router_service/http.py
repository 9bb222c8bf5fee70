"""The HTTP front: one ASGI application beside the gRPC server, on the router's own event loop.

It calls the pipeline as the gRPC methods do. What is specific to OpenAI or Anthropic is in the modules of these names.
This module has the server and the course of one exchange: bounds, errors, events, clients that leave or do not read.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from http import HTTPStatus
from itertools import accumulate
from typing import Any

import grpc
import h11
import uvicorn
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pager.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    PagerError,
    PortInUse,
    SlowReader,
    Unauthenticated,
)
from pager.memory import format_address
from pager.observe import tracing
from pager.observe.logs import request_id, trace_context, traceparent_of
from pager.observe.metrics import Guard
from pager.types import TokenChunk
from router_service import requests
from router_service.access_log import AuditLog, CallRecorder
from router_service.admission import Caller, Quotas
from router_service.keys import OPEN_PAGES, Gate
from router_service.requests import MAX_METADATA_BYTES, Ask, check_json
from router_service.service import Call, Pipeline
from router_service.status import DEFAULT_RETRY_S, code_of
from router_service.tls import TlsFiles

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 * 2**20
MAX_DISCARDED_BYTES = 32 * 2**20
DISCARD_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
HEAD_TIMEOUT_S = 20.0  # from the first byte of a request to the end of its headers
KEEP_ALIVE_S = 75
MAX_CONNECTIONS = 4096
REQUEST_ID = "x-request-id"
CHALLENGE = 'Bearer realm="expert-pager"'
# Browsers ask for the key themselves.
PAGE_CHALLENGE = 'Basic realm="expert-pager: any name, and a key as the password"'
CLIENT_CLOSED = 499  # the status that proxies log; the client has left and does not read it

_Code = grpc.StatusCode
_STATUS: Mapping[grpc.StatusCode, int] = {
    _Code.INVALID_ARGUMENT: 400,
    _Code.FAILED_PRECONDITION: 400,
    _Code.UNAUTHENTICATED: 401,
    _Code.PERMISSION_DENIED: 403,
    _Code.NOT_FOUND: 404,
    _Code.UNIMPLEMENTED: 404,
    _Code.ALREADY_EXISTS: 409,
    _Code.RESOURCE_EXHAUSTED: 429,
    _Code.CANCELLED: CLIENT_CLOSED,
    _Code.INTERNAL: 500,
    _Code.DATA_LOSS: 500,
    _Code.UNAVAILABLE: 503,
    _Code.DEADLINE_EXCEEDED: 504,
}


class BodyTooLarge(InvalidRequest):
    """The body has more bytes than the service accepts."""


def status_of(error: PagerError) -> int:
    """Returns the HTTP status of an error: that of its gRPC code, except for a body that is too large."""
    return 413 if isinstance(error, BodyTooLarge) else _STATUS[code_of(error)]


ErrorBody = Callable[[PagerError, int], dict[str, Any]]


class Exchange:
    """One request and its answer: JSON, or a stream of events that begins with the first one."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, write_timeout_s: float) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._write_timeout_s = write_timeout_s
        self._writing = asyncio.Lock()
        self.has_begun = False
        self.headers: dict[str, str] = {}
        self.caller: Caller | None = None
        self.num_bytes = 0

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The request's headers, in the form of gRPC's metadata."""
        return tuple(
            (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in self._scope["headers"]
        )

    @property
    def tls_names(self) -> Sequence[str]:
        """The names in the client's certificate."""
        return tls_names_of(self._scope)

    @property
    def peer(self) -> str:
        """The client's address."""
        return format_address(*self._scope["client"][:2]) if self._scope.get("client") else ""

    def path_parameter(self, name: str) -> str:
        """Returns a part of the path, by its name in the route."""
        return str(self._scope["path_params"][name])

    async def json(self) -> Any:
        """Reads the body. Raises InvalidRequest, BodyTooLarge or DeadlineExceeded."""
        kind = Request(self._scope).headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise InvalidRequest(f"the content type is {kind[:60]!r}; send application/json", field="content-type")
        data = await self._body()
        self.num_bytes = len(data)
        await check_json(data)
        try:
            body = from_json(data, allow_inf_nan=False)
        except ValueError as error:
            raise InvalidRequest(f"the body is not JSON: {str(error)[:120]}") from None
        await asyncio.sleep(0)  # yields to the event loop before the contents are checked
        return body

    async def _body(self) -> bytes:
        length = Request(self._scope).headers.get("content-length", "")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            await self._discard()
            raise _too_large()
        parts, num_bytes = [], 0
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Cancelled("the client has left")
                    parts.append(message.get("body", b""))
                    num_bytes += len(parts[-1])
                    if num_bytes > MAX_BODY_BYTES:
                        await self._discard()
                        raise _too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise DeadlineExceeded(f"the whole body did not arrive within {READ_TIMEOUT_S:g} s; send less") from None

    async def _discard(self) -> None:
        """Reads on for a while, since many clients read the answer only after sending everything."""
        num_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_TIMEOUT_S):
                while num_bytes < MAX_DISCARDED_BYTES:
                    message = await self._receive()
                    num_bytes += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return

    async def answer(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        """Sends the whole answer at once. A callable, for a body too large for the loop, is called in a thread."""
        data = (await _text_of(body)).encode("utf-8", "replace")
        await self._begin(status, "application/json", {"content-length": str(len(data)), **(headers or {})})
        await self._write(data, more=False)

    async def event(self, data: Any, name: str | None = None) -> None:
        """Sends the next event of a stream, made as in `answer`. Raises SlowReader for a client that does not read."""
        async with self._writing:
            if not self.has_begun:
                await self._begin(200, "text/event-stream", {"cache-control": "no-cache", "x-accel-buffering": "no"})
            text = data if isinstance(data, str) else await _text_of(data)
            prefix = "" if name is None else f"event: {name}\n"
            await self._write(f"{prefix}data: {text}\n\n".encode("utf-8", "replace"), more=True)

    async def end(self) -> None:
        """Ends the stream."""
        await self._write(b"", more=False)

    async def gone(self) -> None:
        """Returns when the client has left."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _begin(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        self.has_begun = True
        all_headers = {"content-type": kind, **headers, **self.headers}
        encoded = [(name.encode(), value.encode("latin-1", "replace")) for name, value in all_headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _write(self, data: bytes, more: bool) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise SlowReader(f"the client read nothing for {self._write_timeout_s:g} s; read faster") from None


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


async def _text_of(body: Any) -> str:
    if callable(body):
        # Piece by piece: one call for the whole text would hold the interpreter, and with it the event loop.
        return await asyncio.to_thread(lambda: "".join(_ENCODER.iterencode(body())))
    return _ENCODER.encode(body)


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes; send less, or use gRPC")


def tls_names_of(scope: Scope) -> Sequence[str]:
    """Returns the names in the client's certificate, which TLS has checked."""
    names: Sequence[str] = scope.get("state", {}).get("tls_names", ())
    return names


def names_in(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Returns the names in a certificate in the form of Python's ssl: its alternative names, else its common name."""
    if not certificate:
        return ()
    found = tuple(str(value) for _, value in certificate.get("subjectAltName", ()))
    subject = [pair for part in certificate.get("subject", ()) for pair in part]
    return found or tuple(str(value) for name, value in subject if name == "commonName")


Handler = Callable[[Exchange, str], Awaitable[None]]
"""Answers one exchange for one tenant."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """The state that all endpoints share."""

    recorder: CallRecorder
    gate: Gate
    quotas: Quotas
    write_timeout_s: float


class Endpoint:
    """An ASGI application for one route: the boundary that turns every error below it into an answer."""

    def __init__(self, method: str, handler: Handler, error_body: ErrorBody, boundary: Boundary) -> None:
        self._method = method
        self._handler = handler
        self._error_body = error_body
        self._boundary = boundary

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shared = self._boundary
        exchange = Exchange(scope, receive, send, shared.write_timeout_s)
        metadata = exchange.metadata
        with tracing.call(f"http/{self._method}", metadata):
            trace_context.set(tracing.traceparent() or traceparent_of(metadata))
            tenant = shared.gate.claimed_tenant(metadata)
            with shared.recorder.call(self._method, tenant, peer=lambda: exchange.peer) as outcome:
                self._name(exchange, metadata)
                exchange.caller = caller = shared.gate.check(self._method, metadata, exchange.tls_names)
                try:
                    await shared.quotas.request(caller)
                finally:
                    exchange.headers.update(await shared.quotas.headers(caller))
                await self._handler(exchange, caller.tenant)
            if outcome.error is not None:
                with suppress(SlowReader, OSError):  # the error is recorded, and no client is left to receive it
                    await self._fail(exchange, outcome.error)

    @staticmethod
    def _name(exchange: Exchange, metadata: Sequence[tuple[str, str]]) -> None:
        """Takes the request's id from its headers, and sends it back. Raises InvalidRequest."""
        given = next((value for name, value in metadata if name == REQUEST_ID), "")
        id_ = requests.request_id(given) if given else requests.new_id()
        request_id.set(id_)
        exchange.headers[REQUEST_ID] = id_
        if trace := trace_context.get():
            exchange.headers["traceparent"] = trace

    async def _fail(self, exchange: Exchange, error: PagerError) -> None:
        status = status_of(error)
        body = self._error_body(error, status)
        if exchange.has_begun:  # for a stream, its last event, which Anthropic's clients know by its name
            await exchange.event(body, "error" if body.get("type") == "error" else None)
            await exchange.end()
            return
        headers = {}
        if isinstance(error, Unauthenticated):
            headers["www-authenticate"] = CHALLENGE
        if error.retryable:
            headers["retry-after"] = str(max(1, round(error.retry_after_s or DEFAULT_RETRY_S)))
        await exchange.answer(status, body, headers)


class GuardedPage:
    """An ASGI application in front of another: a page that only callers with one of its roles see."""

    def __init__(self, path: str, page: ASGIApp, gate: Gate, audit: AuditLog | None) -> None:
        self._path = path
        self._page = page
        self._gate = gate
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, KEEP_ALIVE_S)
        refusal = page_refusal(self._gate, self._path, exchange.metadata, exchange.tls_names)
        if refusal is None:
            await self._page(scope, receive, send)
            return
        if self._audit is not None:
            self._audit.record(self._path, code_of(refusal).name, refusal, exchange.peer)
        challenge = _challenge(refusal, self._path)
        await PlainTextResponse(f"{refusal.message}\n", status_of(refusal), challenge)(scope, receive, send)


def page_refusal(
    gate: Gate, path: str, headers: Iterable[tuple[str, str]], tls_names: Iterable[str] = ()
) -> PagerError | None:
    """Returns why a caller may not see a page; None for a caller who may."""
    if not gate.is_on or path in OPEN_PAGES:
        return None
    try:
        gate.check(path, headers, tls_names)
    except PagerError as error:
        return error
    return None


def _challenge(error: PagerError, path: str) -> dict[str, str]:
    if not isinstance(error, Unauthenticated):
        return {}
    return {"www-authenticate": CHALLENGE if path.startswith("/ui/") else PAGE_CHALLENGE}  # /ui has a field for the key


def page_guard(gate: Gate, audit: AuditLog | None, *, open_metrics: bool) -> Guard:
    """Returns the check of callers for the pages of the metrics port, which has no TLS."""

    def guard(environ: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]], bytes] | None:
        path = str(environ.get("PATH_INFO", ""))
        if open_metrics and path == "/metrics":
            return None
        given = ((name[5:], value) for name, value in environ.items() if name.startswith("HTTP_"))
        error = page_refusal(gate, path, [(name.replace("_", "-").lower(), value) for name, value in given])
        if error is None:
            return None
        if audit is not None:
            audit.record(path, code_of(error).name, error, str(environ.get("REMOTE_ADDR", "")))
        status = HTTPStatus(status_of(error))
        return f"{status.value} {status.phrase}", list(_challenge(error, path).items()), f"{error.message}\n".encode()

    return guard


async def until_gone(exchange: Exchange, work: Awaitable[None]) -> None:
    """Awaits `work`, and cancels it when the client leaves. Raises Cancelled then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(exchange.gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client has left")
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def run_all(
    pipeline: Pipeline, call: Call, asks: Sequence[Ask], seen: Callable[[int, TokenChunk], Awaitable[None]]
) -> None:
    """Runs all answers of a call at once; `seen` gets their chunks with their numbers, counted over all asks.

    What is reported of a prompt is repeated for each of its answers. The first failure ends the others, and is
    raised.
    """

    async def one(first: int, ask: Ask) -> None:
        async def send(chunk: TokenChunk) -> None:
            for index in range(ask.sampling.n) if chunk.prompt_logprobs else (chunk.index,):
                await seen(first + index, chunk)

        await pipeline.generate(call, ask, send)

    if len(asks) == 1:
        await one(0, asks[0])
        return
    firsts = accumulate((ask.sampling.n for ask in asks), initial=0)
    tasks = [asyncio.create_task(one(first, ask)) for first, ask in zip(firsts, asks, strict=False)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def new_call(exchange: Exchange, tenant: str) -> Call:
    """Returns the call of an exchange whose body has been read."""
    return Call(tenant, exchange.num_bytes, caller=exchange.caller)


# --- the server -----------------------------------------------------------------------------------------------------


class _Protocol(H11Protocol):
    """Ends a connection that does not send a whole head in time, which uvicorn would keep forever.

    The time of a new connection begins when it is made, that of a later request with its first bytes.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "tls_names": names_in(transport.get_extra_info("peercert"))}
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and self.conn.their_state is not h11.IDLE:  # the head is complete
            self._stop_head_timer()
        elif self._head_timer is None and self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Server(uvicorn.Server):
    """A server inside of a process that handles signals itself."""

    def capture_signals(self) -> Any:
        return nullcontext()


class HttpServer:
    """Owns the listening port of the HTTP front."""

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self.port = 0
        self.address = ""

    async def start(self, host: str, port: int, tls: TlsFiles | None = None) -> None:
        """Listens; port 0 takes a free one, which `self.port` then has. Raises PortInUse or ConfigError."""
        config = uvicorn.Config(
            self._app,
            host=host,
            port=port,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=True,
            timeout_keep_alive=KEEP_ALIVE_S,
            limit_concurrency=MAX_CONNECTIONS,
            h11_max_incomplete_event_size=MAX_METADATA_BYTES,
            backlog=1024,
        )
        config.load()
        if tls is not None:
            config.ssl = tls.context()
            self._renewing = asyncio.create_task(_renew(tls, config.ssl))
        self._server = _Server(config)
        bound = _bind(host, port)
        self.port = bound.getsockname()[1]
        self.address = format_address(host, self.port)
        self._serving = asyncio.create_task(self._server.serve([bound]))
        while not self._server.started and not self._serving.done():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.005)
        if self._serving.done():
            self._serving.result()

    async def stop(self, grace_s: float = 0.5) -> None:
        """Accepts no more requests, gives those in flight `grace_s` to end, and closes. Idempotent."""
        if self._renewing is not None:
            self._renewing.cancel()
        if self._server is None or self._serving is None:
            return
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        await asyncio.gather(self._serving, return_exceptions=True)


RENEW_EVERY_S = 2.0


async def _renew(tls: TlsFiles, context: ssl.SSLContext) -> None:
    """Uses the current files for new handshakes; files that cannot be used are skipped until they can."""
    used, complaint = tls.read(), ""
    while True:
        await asyncio.sleep(RENEW_EVERY_S)
        try:
            found = await asyncio.to_thread(tls.read)
        except ConfigError as error:
            if error.message != complaint:
                log.warning("%s; HTTP continues with the previous certificate", error)
            complaint = error.message
            continue
        complaint = ""
        if found != used:
            tls.load_into(context, found)
            used = found


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} on {host} is in use; choose another (router.http_port)") from None
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return bound


def not_found(paths: Iterable[str]) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    """Answers for unknown paths and methods."""
    known = ", ".join(sorted(paths))

    async def handler(request: Request, error: Exception) -> JSONResponse:
        headers = error.headers if isinstance(error, HTTPException) else None
        if isinstance(error, HTTPException) and error.status_code == 405:
            methods = dict(headers or {}).get("Allow", "")
            message = f"{request.method[:20]} is no method of {request.url.path[:100]!r}; send {methods}"
            told = {"message": message, "type": "invalid_request_error", "param": None, "code": "method_not_allowed"}
            return JSONResponse({"error": told}, 405, headers)
        message = f"there is nothing at {request.url.path[:100]!r}; there is {known}"
        told = {"message": message, "type": "not_found_error", "param": None, "code": "unknown_path"}
        return JSONResponse({"error": told}, 404, headers)

    return handler
