"""The worker's end of the token transport: one gRPC stream per router, one message per engine step and router.

Everything here lives on one event loop; only `TokenServer.deliver` may be called from another thread. Knows no Ray
and no torch: the engine is anything with `submit` and `cancel`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, Protocol

import grpc.aio
from expert_pager.v1 import worker_pb2 as pb
from expert_pager.v1 import worker_pb2_grpc

from pager.errors import DuplicateRequest, PagerError
from pager.observe.logs import facts, trace_id_of
from pager.types import Account, GenerateRequest, TokenChunk
from pager.wire import decode_request, encode_account, encode_chunk, encode_error

log = logging.getLogger(__name__)

TOKEN_HEADER = "x-expert-pager-token"
LOAD_INTERVAL_S = 1.0
MAX_UNREAD_STEPS = 4096  # a router that has stopped reading is treated as gone
MAX_COMMAND_BYTES = 16 * 2**20  # what a router may send at once; clients send it 8 MiB at most
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.max_receive_message_length", MAX_COMMAND_BYTES),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what is small when it comes is small when it is read
    ("grpc.max_concurrent_streams", 128),  # of a connection: a router has one, and an Abort now and then
)


class RequestFailure(Protocol):
    """How the engine says that one request ended without an answer."""

    @property
    def request_id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def error(self) -> PagerError: ...
    @property
    def account(self) -> Account: ...


class TokenEngine(Protocol):
    """What the transport needs of an engine; both are thread-safe and return at once."""

    def submit(self, request: GenerateRequest) -> None: ...
    def cancel(self, request_id: str, tenant: str) -> bool: ...


StreamEvent = TokenChunk | RequestFailure


class SubmissionObserver:
    """Hears what routers send and which of it is not taken; every method does nothing by default."""

    def received(self) -> None:
        """A router has sent a request."""

    def refused(self, reason: str) -> None:
        """It was not taken, for the `reason` of the error in lower case."""


class RequestKey(NamedTuple):
    """Names a request in flight: an id is its tenant's own."""

    request_id: str
    tenant: str


class TokenServer(worker_pb2_grpc.WorkerServicer):
    """Serves an engine to every router that knows `token`. Owns which router brought which open request."""

    _engine: TokenEngine
    _load: Callable[[], pb.Load]

    def __init__(self, token: str, observer: SubmissionObserver | None = None) -> None:
        self._gate = _OwnRouters(token)
        self._observer = observer or SubmissionObserver()
        self._streams: set[_RouterStream] = set()
        # Until the engine's last event of the request, its router gone or not.
        self._owners: dict[RequestKey, _Owner] = {}
        self._server: grpc.aio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._load_task: asyncio.Task[None] | None = None

    async def start(self, bind: str, engine: TokenEngine, load: Callable[[], pb.Load]) -> str:
        """Listens on `bind` ("127.0.0.1:0", "unix:/path") and returns the address to dial.

        `load()` says how busy the engine is; it is asked once a second.
        """
        self._engine, self._load = engine, load
        self._loop = asyncio.get_running_loop()
        self._server = grpc.aio.server(interceptors=[self._gate], options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(bind)
        await self._server.start()
        self._load_task = asyncio.create_task(self._push_loads())
        return bind if bind.startswith("unix:") else f"{bind.rpartition(':')[0]}:{port}"

    async def announce_drain(self) -> None:
        """Every router hears at once what the load report says now."""
        for stream in self._streams:
            stream.push(pb.Push(load=self._load()))

    async def finish(self, timeout_s: float) -> None:
        """Takes nothing more, and ends every stream when all that was delivered has been sent, or when time is up."""
        for stream in self._streams:
            stream.end()
        if self._server is not None:
            await self._server.stop(timeout_s)

    async def stop(self) -> None:
        if self._load_task is not None:
            self._load_task.cancel()
        if self._server is not None:
            await self._server.stop(grace=None)

    def deliver(self, events: Sequence[StreamEvent]) -> None:
        """The engine's sink: all events of one step, from any thread."""
        assert self._loop is not None, "deliver() before start()"
        self._loop.call_soon_threadsafe(self._dispatch, events)

    # --- gRPC methods -----------------------------------------------------------------------------------------------

    async def Attach(self, commands: AsyncIterator[pb.Command], context: Any) -> AsyncIterator[pb.Push]:  # noqa: N802
        stream = _RouterStream()
        stream.push(pb.Push(load=self._load()))
        self._streams.add(stream)
        reader = asyncio.create_task(self._read(commands, stream))
        try:
            async for push in stream:
                yield push
        finally:
            reader.cancel()
            self._drop(stream)

    async def Abort(self, message: pb.AbortRequest, context: Any) -> pb.AbortReply:  # noqa: N802
        return pb.AbortReply(found=self._engine.cancel(message.request_id, message.tenant))

    # --- the loop's own -----------------------------------------------------------------------------------------------

    async def _read(self, commands: AsyncIterator[pb.Command], stream: _RouterStream) -> None:
        try:
            async for command in commands:
                if command.WhichOneof("command") == "submit":
                    self._submit(command.submit, stream)
                elif (key := stream.requests.get(command.cancel.ticket)) is not None:
                    self._engine.cancel(*key)
        finally:
            stream.close()

    def _submit(self, message: pb.Submit, stream: _RouterStream) -> None:
        key = RequestKey(message.request_id, message.tenant)
        self._observer.received()
        try:
            if key in self._owners:
                raise DuplicateRequest(
                    f"request id {message.request_id!r} is in use; choose another", field="request_id"
                )
            # Set first: the engine may answer before submit() returns.
            self._owners[key] = _Owner(stream, message.ticket, trace_id_of(message.traceparent))
            stream.requests[message.ticket] = key
            try:
                self._engine.submit(decode_request(message))
            except Exception:
                self._forget(key)
                raise
        except Exception as error:
            failure = _failure(message.ticket, error)
            failure.refused = True
            self._observer.refused(failure.error.reason.lower())
            stream.push(pb.Push(step=pb.Step(failures=[failure])))

    def _dispatch(self, events: Sequence[StreamEvent]) -> None:
        steps: dict[_RouterStream, pb.Step] = {}
        for event in events:
            key = RequestKey(event.request_id, event.tenant)
            owner = self._owners.get(key)
            if owner is None:
                continue
            step = steps.setdefault(owner.stream, pb.Step())
            if owner.has_failed:
                self._settle_failed(step, event, key)
            elif not isinstance(event, TokenChunk):
                step.failures.append(_failure(owner.ticket, event.error, event.account))
                self._ended(key, event.error.reason.lower())
            else:
                self._add_chunk(step, event, key)
        for stream, step in steps.items():
            stream.push(pb.Push(step=step))

    def _add_chunk(self, step: pb.Step, chunk: TokenChunk, key: RequestKey) -> None:
        """A chunk that cannot be encoded fails its request alone: the engine ends it, and later events are dropped."""
        owner = self._owners[key]
        try:
            step.chunks.append(encode_chunk(chunk, owner.ticket))
        except Exception as error:
            account = None if chunk.usage is None else chunk.usage.account
            step.failures.append(_failure(owner.ticket, error, account))
            self._owners[key] = owner._replace(has_failed=True)
            self._engine.cancel(*key)
            if chunk.usage is not None:
                self._ended(key, PagerError.reason.lower())
            return
        if chunk.usage is not None:
            self._ended(key, chunk.usage.finish_reason.value, chunk.usage.completion_tokens)

    def _settle_failed(self, step: pb.Step, event: StreamEvent, key: RequestKey) -> None:
        """Of a request whose router knows that it has failed, only what it has used is of interest."""
        if not isinstance(event, TokenChunk):
            account = event.account
        elif event.usage is not None:
            account = event.usage.account
        else:
            return
        step.failures.append(pb.Failure(ticket=self._owners[key].ticket, account=encode_account(account)))
        self._forget(key)

    def _ended(self, key: RequestKey, outcome: str, num_tokens: int | None = None) -> None:
        trace_id = self._owners[key].trace_id
        said = facts(**key._asdict(), trace_id=trace_id, outcome=outcome, completion_tokens=num_tokens)
        log.info("request_id=%s tenant=%s outcome=%s", *key, outcome, extra=said)
        self._forget(key)

    def _forget(self, key: RequestKey) -> None:
        owner = self._owners.pop(key)
        del owner.stream.requests[owner.ticket]

    def _drop(self, stream: _RouterStream) -> None:
        self._streams.discard(stream)
        stream.close()
        for key in list(stream.requests.values()):
            self._engine.cancel(*key)

    async def _push_loads(self) -> None:
        last = None
        while True:
            await asyncio.sleep(LOAD_INTERVAL_S)
            load = self._load()
            if load != last:
                for stream in self._streams:
                    stream.push(pb.Push(load=load))
            last = load


class _OwnRouters(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses a call of any method that has not the token, before its first message is read."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._refusal = grpc.stream_stream_rpc_method_handler(self._refuse)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        given = dict(handler_call_details.invocation_metadata).get(TOKEN_HEADER, "")
        if hmac.compare_digest(given.encode(), self._token):
            return await continuation(handler_call_details)
        return self._refusal

    @staticmethod
    async def _refuse(_: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this worker serves its own routers only")


class _Owner(NamedTuple):
    stream: _RouterStream
    ticket: int
    trace_id: str
    has_failed: bool = False  # its router was told so, and the engine has not ended it yet


class _RouterStream:
    """What waits to be sent to one router; iterating takes it until the stream is closed."""

    def __init__(self) -> None:
        self.requests: dict[int, RequestKey] = {}  # by ticket
        self._outbox: deque[pb.Push] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._ending = False

    def push(self, push: pb.Push) -> None:
        if self._closed:
            return
        self._outbox.append(push)
        if len(self._outbox) > MAX_UNREAD_STEPS:
            log.warning("a router has left %d steps unread; its stream is closed", MAX_UNREAD_STEPS)
            self.close()
        self._wake.set()

    def end(self) -> None:
        """Nothing more comes; what waits is still sent."""
        self._ending = True
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[pb.Push]:
        while not self._closed:
            while self._outbox and not self._closed:
                yield self._outbox.popleft()
            self._wake.clear()
            if self._ending and not self._outbox:
                return
            if not self._closed and not self._outbox:
                await self._wake.wait()


def _failure(ticket: int, error: Exception, account: Account | None = None) -> pb.Failure:
    used = None if account is None else encode_account(account)
    try:
        if isinstance(error, PagerError):
            return pb.Failure(ticket=ticket, error=encode_error(error), account=used)
    except Exception:
        log.exception("an error could not be encoded")
    log.error("a request failed in an unexpected way", exc_info=error)
    error = PagerError("internal error in the worker; its log has the details")
    return pb.Failure(ticket=ticket, error=encode_error(error), account=used)
