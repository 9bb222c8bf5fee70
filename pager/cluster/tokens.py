"""The token transport: one gRPC stream per router and worker, one message per engine step.

Each end lives on one event loop; only `TokenServer.deliver` may be called from another thread. Knows no Ray and no
torch: the engine is anything with `submit` and `cancel`.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import grpc.aio
from expert_pager.v1 import worker_pb2 as pb
from expert_pager.v1 import worker_pb2_grpc

from pager.errors import DuplicateRequest, InvalidRequest, PagerError, SlowReader, WorkerLost
from pager.observe.logs import facts, trace_id_of
from pager.types import Account, GenerateRequest, RequestObserver, TokenChunk
from pager.wire import (
    decode_account,
    decode_chunk,
    decode_error,
    decode_request,
    decode_usage,
    encode_account,
    encode_chunk,
    encode_error,
    encode_request,
)

log = logging.getLogger(__name__)

TOKEN_HEADER = "x-expert-pager-token"
LOAD_INTERVAL_S = 1.0
MAX_UNREAD_STEPS = 4096  # a router that leaves more than this unread is treated as gone
MAX_COMMAND_BYTES = 16 * 2**20  # the most that a router may send in one message; clients send it 8 MiB at most
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
    # none: a message that is small on the wire is then small in memory too
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_concurrent_streams", 128),  # per connection; a router has one stream and now and then an Abort
)
RETRY_AFTER_S = 1.0  # a killed worker with a small model is back after some seconds; others may serve at once


# --- server: the worker's end -----------------------------------------------------------------------------------------


class RequestFailure(Protocol):
    """The engine's report that one request ended without an answer."""

    @property
    def request_id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def error(self) -> PagerError: ...
    @property
    def account(self) -> Account: ...


class TokenEngine(Protocol):
    """The interface that the transport needs of an engine. Both methods are thread-safe and return at once."""

    def submit(self, request: GenerateRequest) -> None: ...
    def cancel(self, request_id: str, tenant: str) -> bool: ...


StreamEvent = TokenChunk | RequestFailure


class SubmissionObserver:
    """Observes what routers send and which of it is refused; by default every method does nothing."""

    def received(self) -> None:
        """Called when a router has sent a request."""

    def refused(self, reason: str) -> None:
        """Called when a request was refused; `reason` is the name of the error in lower case."""


class RequestKey(NamedTuple):
    """Identifies a request in flight. An id is unique within its tenant only."""

    request_id: str
    tenant: str


class TokenServer(worker_pb2_grpc.WorkerServicer):
    """Serves an engine to every router that knows `token`. Owns the record of which router sent which request."""

    _engine: TokenEngine
    _load: Callable[[], pb.Load]

    def __init__(self, token: str, observer: SubmissionObserver | None = None) -> None:
        self._gate = _OwnRouters(token)
        self._observer = observer or SubmissionObserver()
        self._streams: set[_RouterStream] = set()
        # Kept until the engine's last event of the request, even if its router is gone.
        self._owners: dict[RequestKey, _Owner] = {}
        self._server: grpc.aio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._load_task: asyncio.Task[None] | None = None

    async def start(self, bind: str, engine: TokenEngine, load: Callable[[], pb.Load]) -> str:
        """Listens on `bind` ("127.0.0.1:0", "unix:/path") and returns the address to dial.

        `load()` reports how busy the engine is; it is called once a second.
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
        """Sends the load report, which now shows the drain, to every router at once."""
        for stream in self._streams:
            stream.push(pb.Push(load=self._load()))

    async def finish(self, timeout_s: float) -> None:
        """Refuses new requests, and ends every stream when all that was delivered has been sent, or when time is up."""
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
        """Takes all events of one step from the engine, from any thread."""
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

    # --- private, on the event loop -----------------------------------------------------------------------------------

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
        """Adds a chunk. One that cannot be encoded fails its own request: the engine ends it, and drops its events."""
        owner = self._count_answer(key, chunk)
        try:
            step.chunks.append(encode_chunk(chunk, owner.ticket))
        except Exception as error:
            step.failures.append(_failure(owner.ticket, error, owner.used if chunk.is_last else None))
            self._owners[key] = owner._replace(has_failed=True)
            self._engine.cancel(*key)
            if chunk.is_last:
                self._ended(key, PagerError.reason.lower())
            return
        if chunk.usage is not None and chunk.is_last:
            self._ended(key, chunk.usage.finish_reason.value, owner.used.completion_tokens)

    def _count_answer(self, key: RequestKey, chunk: TokenChunk) -> _Owner:
        """Adds what an answer has used to its request's account, if the chunk is the last one of an answer."""
        if chunk.usage is not None:
            owner = self._owners[key]
            self._owners[key] = owner._replace(used=owner.used.with_answer(chunk.usage.account))
        return self._owners[key]

    def _settle_failed(self, step: pb.Step, event: StreamEvent, key: RequestKey) -> None:
        """Handles the last event of a request that its router knows to have failed: only its usage still matters."""
        if not isinstance(event, TokenChunk):
            account = event.account
        else:
            account = self._count_answer(key, event).used
            if not event.is_last:
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
    """Refuses every call without the token, before its first message is read."""

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
    used: Account = Account()  # by those of its answers that have ended
    has_failed: bool = False  # its router was told that it failed, and the engine has not ended it yet


class _RouterStream:
    """The messages that wait to be sent to one router. Iterating takes them until the stream is closed."""

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
            log.warning("a router left %d steps unread; its stream is closed", MAX_UNREAD_STEPS)
            self.close()
        self._wake.set()

    def end(self) -> None:
        """Accepts no more messages; those that wait are still sent."""
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


# --- client: the router's end -----------------------------------------------------------------------------------------


class AnswerStream:
    """The chunks of one request, at most `limit` of them unread. Owned by its `WorkerLink`; read by one task."""

    def __init__(self, request: GenerateRequest, limit: int, observer: RequestObserver | None = None) -> None:
        self.request = request
        self.observer = observer
        self._limit = limit
        self._chunks: deque[TokenChunk] = deque()
        self._error: PagerError | None = None
        self._finished = False
        self._waiter: asyncio.Future[None] | None = None
        self.used = Account()  # by those of its answers that have ended

    def push(self, chunk: TokenChunk) -> bool:
        """Adds a chunk. Returns False when the reader is too slow: the stream has failed with SlowReader and drops what
        it held.
        """
        if len(self._chunks) >= self._limit:
            self._chunks.clear()
            self.fail(SlowReader(f"the client left {self._limit} pieces of its answer unread; read faster"))
            return False
        self._chunks.append(chunk)
        self._finished = chunk.is_last
        self._wake()
        return True

    def fail(self, error: PagerError) -> None:
        """Fails the stream: the chunks received so far can still be read, then `error` is raised."""
        if not self._finished:
            self._error = error
            self._finished = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenChunk:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._chunks.popleft()


class WorkerLink:
    """One router's stream to one worker. Owns the answers open on it; when it breaks, each raises WorkerLost."""

    def __init__(
        self,
        address: str,
        token: str,
        *,
        buffer_chunks: int,
        on_load: Callable[[pb.Load], None],
        on_break: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes the link. `on_break` is called once, after the open answers have failed."""
        self.broken = asyncio.Event()
        self._on_break = on_break
        self._buffer_chunks = buffer_chunks
        self._on_load = on_load
        self._metadata = ((TOKEN_HEADER, token),)
        self._answers: dict[int, AnswerStream] = {}  # by ticket
        self._left: dict[int, AnswerStream] = {}  # not read any more, but not yet ended by the worker
        self._tickets = itertools.count(1)
        self._commands: asyncio.Queue[pb.Command | None] = asyncio.Queue()  # None ends the stream
        self._channel = grpc.aio.insecure_channel(
            address, options=(*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", -1))
        )
        self._stub = worker_pb2_grpc.WorkerStub(self._channel)
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def attach(self, timeout_s: float = 10.0) -> None:
        """Connects, and returns once the worker has answered. Raises WorkerLost when it does not."""
        self._call = self._stub.Attach(self._outgoing(), metadata=self._metadata)
        try:
            first = await asyncio.wait_for(self._call.read(), timeout_s)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            await self.close()
            raise WorkerLost(f"the worker did not accept a stream: {error}", retry_after_s=RETRY_AFTER_S) from error
        self._on_load(first.load)
        self._reader = asyncio.create_task(self._read(self._call))

    @property
    def num_open(self) -> int:
        return len(self._answers)

    async def generate(
        self, request: GenerateRequest, observer: RequestObserver | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        """Submits the request when the iterator is first advanced. Leaving it early cancels it on the worker."""
        if self.broken.is_set():
            raise _lost()
        ticket = next(self._tickets)
        command = _submit(request, ticket)
        limit = self._buffer_chunks * request.sampling.n
        answer = self._answers[ticket] = AnswerStream(request, limit, observer)
        try:
            self._commands.put_nowait(command)
            if observer is not None:
                observer.sent()
            async for chunk in answer:
                yield chunk
        finally:
            if ticket in self._answers:
                self._leave(ticket)

    async def abort(self, request_id: str, tenant: str, timeout_s: float = 2.0) -> bool:
        """Returns whether the worker had such a request of this tenant, and cancels it. A lost worker has none."""
        message = pb.AbortRequest(request_id=request_id, tenant=tenant)
        try:
            reply = await self._stub.Abort(message, metadata=self._metadata, timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.found)

    def cancel_all(self, error: PagerError) -> None:
        """Ends every open answer with `error`, and its request on the worker."""
        for ticket in list(self._answers):
            self._leave(ticket).fail(error)

    async def close(self) -> None:
        """Closes the link; open answers raise WorkerLost. Idempotent."""
        self._break()
        for task in (self._reader, self._call):
            if task is not None:
                task.cancel()
        await asyncio.sleep(0)  # the call's own tasks end before their channel does
        await self._channel.close(grace=None)

    def _leave(self, ticket: int) -> AnswerStream:
        """Has the worker end the request; until it has, the request's usage is not known."""
        answer = self._left[ticket] = self._answers.pop(ticket)
        self._commands.put_nowait(pb.Command(cancel=pb.Cancel(ticket=ticket)))
        return answer

    async def _outgoing(self) -> AsyncIterator[pb.Command]:
        while (command := await self._commands.get()) is not None:
            yield command

    async def _read(self, call: Any) -> None:
        try:
            while (push := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                if push.WhichOneof("push") == "load":
                    self._on_load(push.load)
                else:
                    self._take(push.step)
        except grpc.aio.AioRpcError:
            pass  # how a stream ends does not matter: the worker cannot be reached over it
        except Exception:
            log.exception("reading from a worker failed in an unexpected way; its stream is given up")
        finally:
            self._break()

    def _take(self, step: pb.Step) -> None:
        for message in step.chunks:
            answer = self._answers.get(message.ticket)
            if answer is not None:
                chunk = decode_chunk(message, answer.request)
                if not answer.push(chunk):
                    self._leave(message.ticket)
            ended = answer or self._left.get(message.ticket)
            if message.HasField("usage") and ended is not None:
                ended.used = ended.used.with_answer(decode_usage(message.usage).account)
                if not message.num_going_on:
                    self._settle(message.ticket, ended.used)
        for failure in step.failures:
            answer = self._answers.get(failure.ticket)
            if answer is not None:
                error = decode_error(failure.error)
                error.is_refusal = failure.refused
                answer.fail(error)
            if failure.refused or failure.HasField("account"):
                self._settle(failure.ticket, None if failure.refused else decode_account(failure.account))
            elif answer is not None:
                self._left[failure.ticket] = self._answers.pop(failure.ticket)

    def _settle(self, ticket: int, account: Account | None) -> None:
        """Records that the worker is done with the request; `None` stands for a request that it has not accepted."""
        answer = self._answers.pop(ticket, None) or self._left.pop(ticket, None)
        if answer is not None and answer.observer is not None and account is not None:
            answer.observer.settled(account)

    def _break(self) -> None:
        if self.broken.is_set():
            return
        self.broken.set()
        for answer in self._answers.values():
            answer.fail(_lost())
        self._answers.clear()
        self._left.clear()
        self._commands.put_nowait(None)
        self._on_break()


def _submit(request: GenerateRequest, ticket: int) -> pb.Command:
    """Raises InvalidRequest for a message larger than a worker reads, which would end the stream and all that is open
    on it.
    """
    command = pb.Command(submit=encode_request(request, ticket))
    if command.ByteSize() > MAX_COMMAND_BYTES:
        raise InvalidRequest(
            f"the request takes {command.ByteSize()} bytes on its way to a worker, which accepts {MAX_COMMAND_BYTES}; "
            "shorten its prompt, its stop strings or its pool"
        )
    return command


def _lost() -> WorkerLost:
    return WorkerLost("the worker that ran this request is gone; send it again", retry_after_s=RETRY_AFTER_S)
