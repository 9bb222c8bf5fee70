"""The token transport: one connection per router and worker, one message per engine step.

A message is a frame: its length in four bytes, then protobuf. The engine's own thread writes what a step has, so that
no other thread takes the interpreter from it between two operations of a forward; all else is done on event loops.
Knows no Ray and no torch: the engine is anything with `submit` and `cancel`.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol, Self

from expert_pager.v1 import worker_pb2 as pb
from google.protobuf.message import DecodeError, Message

from pager.errors import DuplicateRequest, InvalidRequest, PagerError, SlowReader, WorkerLost
from pager.memory import format_address
from pager.observe.logs import facts, trace_id_of
from pager.types import Account, GenerateRequest, RequestObserver, TokenChunk
from pager.wire import (
    add_chunk,
    decode_account,
    decode_chunk,
    decode_error,
    decode_request,
    decode_usage,
    encode_account,
    encode_error,
    encode_request,
)

log = logging.getLogger(__name__)

LOAD_INTERVAL_S = 1.0
MAX_UNREAD_STEPS = 4096  # a router that leaves more than this unread is treated as gone
MAX_COMMAND_BYTES = 16 * 2**20  # the most that a router may send in one message; clients send it 8 MiB at most
MAX_TOKEN_BYTES = 256
INTRODUCTION_TIMEOUT_S = 10.0  # from a connection's start until its token has been read
READ_BYTES = 2**18  # what is read ahead of a connection
RETRY_AFTER_S = 1.0  # a killed worker with a small model is back after some seconds; others may serve at once
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),  # seconds
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 40_000),  # milliseconds until what was sent must be acknowledged
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


# --- frames -----------------------------------------------------------------------------------------------------------

_LENGTH = struct.Struct("!I")
_UNIX = "unix:"


def frame(message: Message | bytes) -> bytes:
    """Returns the message as it is sent: its length, then its content."""
    body = message if isinstance(message, bytes) else message.SerializeToString()
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader, max_bytes: int | None = None) -> bytes | None:
    """Returns the content of the next frame; None where the connection has ended. Raises ValueError for one that is too
    long, of which nothing is read.
    """
    try:
        (num_bytes,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if max_bytes is not None and num_bytes > max_bytes:
            raise ValueError(f"a frame of {num_bytes} bytes, where {max_bytes} are the most")
        return await reader.readexactly(num_bytes)
    except (asyncio.IncompleteReadError, OSError):
        return None


def _notice_loss(writer: asyncio.StreamWriter) -> None:
    """Has the system end the connection when the other machine does not answer any more."""
    connection = writer.get_extra_info("socket")
    if connection.family != socket.AF_UNIX:
        for level, option, value in _KEEPALIVE:
            connection.setsockopt(level, option, value)


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


class TokenServer:
    """Serves an engine to every router that knows `token`. Owns the record of which router sent which request."""

    _engine: TokenEngine
    _load: Callable[[], pb.Load]
    _loop: asyncio.AbstractEventLoop

    def __init__(self, token: str, observer: SubmissionObserver | None = None) -> None:
        self._token = token.encode()
        self._observer = observer or SubmissionObserver()
        self._streams: set[_RouterStream] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._strangers: set[asyncio.Task[None]] = set()  # connections whose token has not been read yet
        self._lock = threading.Lock()  # of the owners, and of each stream's `requests`
        # Kept until the engine's last event of the request, even if its router is gone.
        self._owners: dict[RequestKey, _Owner] = {}
        self._server: asyncio.Server | None = None
        self._load_task: asyncio.Task[None] | None = None

    async def start(self, bind: str, engine: TokenEngine, load: Callable[[], pb.Load]) -> str:
        """Listens on `bind` ("127.0.0.1:0", "unix:/path") and returns the address to dial.

        `load()` reports how busy the engine is; it is called once a second.
        """
        self._engine, self._load = engine, load
        self._loop = asyncio.get_running_loop()
        host, _, port = bind.rpartition(":")
        if bind.startswith(_UNIX):
            path = bind.removeprefix(_UNIX)
            self._server, address = await asyncio.start_unix_server(self._connected, path, limit=READ_BYTES), bind
        else:
            host = host.strip("[]")
            self._server = await asyncio.start_server(self._connected, host, int(port), limit=READ_BYTES)
            address = format_address(host, self._server.sockets[0].getsockname()[1])
        self._load_task = asyncio.create_task(self._push_loads())
        return address

    async def announce_drain(self) -> None:
        """Sends the load report, which now shows the drain, to every router at once."""
        for stream in self._streams:
            stream.push(pb.Push(load=self._load()))

    async def finish(self, timeout_s: float) -> None:
        """Accepts no more routers, and ends every stream when all that was delivered has been sent, or when time is
        up.
        """
        if self._server is not None:
            self._server.close()
        for stranger in self._strangers:
            stranger.cancel()
        for stream in self._streams:
            stream.end()
        if self._connections:
            await asyncio.wait(self._connections, timeout=timeout_s)
        await self.stop()

    async def stop(self) -> None:
        """Ends every stream at once. Idempotent."""
        if self._load_task is not None:
            self._load_task.cancel()
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def deliver(self, events: Sequence[StreamEvent]) -> None:
        """Takes all events of one step from the engine, from any thread, and sends them to their routers."""
        delivery = _Delivery()
        with self._lock:
            for event in events:
                self._add(delivery, event)
            for stream, step in delivery.steps.items():
                stream.push(pb.Push(step=step))
        for key in delivery.failed:
            self._engine.cancel(*key)
        if delivery.ended:
            self._loop.call_soon_threadsafe(_log_ended, delivery.ended)

    # --- connections, on the event loop -----------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        for holder in (self._connections, self._strangers):
            holder.add(connection)
            connection.add_done_callback(holder.discard)
        try:
            if await self._is_own(reader):
                self._strangers.discard(connection)
                await self._serve(reader, writer)
            else:
                await self._refuse(writer)
        except asyncio.CancelledError:
            log.debug("a router's stream was ended")
        except Exception:
            log.exception("a router's stream failed in an unexpected way, and is ended")
        finally:
            writer.transport.abort()

    async def _refuse(self, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(pb.Push(refusal="this worker serves its own routers only")))
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _notice_loss(writer)
        stream = _RouterStream(writer, self._loop)
        stream.push(pb.Push(load=self._load()))
        self._streams.add(stream)
        try:
            while (received := await read_frame(reader, MAX_COMMAND_BYTES)) is not None:
                self._obey(pb.Command.FromString(received), stream)
        finally:
            self._drop(stream)

    async def _is_own(self, reader: asyncio.StreamReader) -> bool:
        """Reads the token with which a connection begins, and tells whether it is this server's."""
        try:
            async with asyncio.timeout(INTRODUCTION_TIMEOUT_S):
                given = await read_frame(reader, MAX_TOKEN_BYTES)
        except (TimeoutError, ValueError):
            return False
        return given is not None and hmac.compare_digest(given, self._token)

    def _obey(self, command: pb.Command, stream: _RouterStream) -> None:
        match command.WhichOneof("command"):
            case "submit":
                self._submit(command.submit, stream)
            case "cancel":
                key = stream.requests.get(command.cancel.ticket)
                if key is not None:
                    self._engine.cancel(*key)
            case "abort":
                abort = command.abort
                is_found = self._engine.cancel(abort.request_id, abort.tenant)
                stream.push(pb.Push(aborted=pb.Aborted(number=abort.number, found=is_found)))

    def _submit(self, message: pb.Submit, stream: _RouterStream) -> None:
        key = RequestKey(message.request_id, message.tenant)
        self._observer.received()
        try:
            with self._lock:
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
                with self._lock:
                    self._forget(key)
                raise
        except Exception as error:
            failure = _failure(message.ticket, error)
            failure.refused = True
            self._observer.refused(failure.error.reason.lower())
            stream.push(pb.Push(step=pb.Step(failures=[failure])))

    def _drop(self, stream: _RouterStream) -> None:
        self._streams.discard(stream)
        stream.close()
        with self._lock:
            keys = list(stream.requests.values())
        for key in keys:
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

    # --- what a step has for each router, with the lock held ----------------------------------------------------------

    def _add(self, delivery: _Delivery, event: StreamEvent) -> None:
        key = RequestKey(event.request_id, event.tenant)
        owner = self._owners.get(key)
        if owner is None:
            return
        step = delivery.steps.get(owner.stream)
        if step is None:
            step = delivery.steps[owner.stream] = pb.Step()
        if owner.has_failed:
            self._settle_failed(step, event, key)
        elif not isinstance(event, TokenChunk):
            step.failures.append(_failure(owner.ticket, event.error, event.account))
            self._end(delivery, key, event.error.reason.lower())
        else:
            self._add_chunk(delivery, step, event, key)

    def _add_chunk(self, delivery: _Delivery, step: pb.Step, chunk: TokenChunk, key: RequestKey) -> None:
        """Adds a chunk. One that cannot be encoded fails its own request: the engine ends it, and drops its events."""
        owner = self._count_answer(key, chunk)
        try:
            add_chunk(step, chunk, owner.ticket)
        except Exception as error:
            step.failures.append(_failure(owner.ticket, error, owner.used if chunk.is_last else None))
            self._owners[key] = owner._replace(has_failed=True)
            delivery.failed.append(key)
            if chunk.is_last:
                self._end(delivery, key, PagerError.reason.lower())
            return
        if chunk.usage is not None and chunk.is_last:
            self._end(delivery, key, chunk.usage.finish_reason.value, owner.used.completion_tokens)

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

    def _end(self, delivery: _Delivery, key: RequestKey, outcome: str, num_tokens: int | None = None) -> None:
        delivery.ended.append((key, self._owners[key].trace_id, outcome, num_tokens))
        self._forget(key)

    def _forget(self, key: RequestKey) -> None:
        owner = self._owners.pop(key)
        del owner.stream.requests[owner.ticket]


Ended = tuple[RequestKey, str, str, int | None]  # with trace id, outcome and the number of tokens


def _log_ended(ended: Sequence[Ended]) -> None:
    for key, trace_id, outcome, num_tokens in ended:
        said = facts(**key._asdict(), trace_id=trace_id, outcome=outcome, completion_tokens=num_tokens)
        log.info("request_id=%s tenant=%s outcome=%s", *key, outcome, extra=said)


class _Delivery:
    """The events of one step, sorted by what is to be done about them. Mutable; one call of `deliver` owns it."""

    def __init__(self) -> None:
        self.steps: dict[_RouterStream, pb.Step] = {}
        self.ended: list[Ended] = []
        self.failed: list[RequestKey] = []  # their chunks could not be encoded; the engine is to end them


class _Owner(NamedTuple):
    stream: _RouterStream
    ticket: int
    trace_id: str
    used: Account = Account()  # by those of its answers that have ended
    has_failed: bool = False  # its router was told that it failed, and the engine has not ended it yet


class _RouterStream:
    """The messages to one router. `push` may be called from any thread and never blocks; all else is for the event
    loop.

    They are written to the connection beside asyncio, which only reads from it, through a descriptor of its own.
    """

    def __init__(self, writer: asyncio.StreamWriter, loop: asyncio.AbstractEventLoop) -> None:
        self.requests: dict[int, RequestKey] = {}  # by ticket
        self._reading = writer.transport
        self._loop = loop
        self._socket = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
        self._socket.setblocking(False)
        self._lock = threading.Lock()
        self._outbox: deque[memoryview] = deque()
        self._is_ending = self._is_closed = False

    def push(self, push: pb.Push) -> None:
        """Sends what the connection takes of the message at once, and the rest later, in the order of the calls."""
        with self._lock:
            if self._is_closed or self._is_ending:
                return
            self._outbox.append(memoryview(frame(push)))
            num_waiting = len(self._outbox)
            is_left = num_waiting == 1 and not self._send()  # otherwise the event loop sends it in its turn
            if num_waiting > MAX_UNREAD_STEPS:
                log.warning("a router left %d steps unread; its stream is closed", MAX_UNREAD_STEPS)
                self._outbox.clear()
                self._is_closed = True
        if num_waiting > MAX_UNREAD_STEPS:
            self._loop.call_soon_threadsafe(self.close)
        elif is_left:
            self._loop.call_soon_threadsafe(self._await_room)

    def end(self) -> None:
        """Takes no more messages; when those that wait have been sent, the router sees the end of the connection."""
        with self._lock:
            self._is_ending = True
            if not (self._outbox or self._is_closed):
                self._say_end()

    def close(self) -> None:
        """Ends the connection at once. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._outbox.clear()
            if self._socket.fileno() >= 0:
                self._loop.remove_writer(self._socket)
                self._socket.close()
        self._reading.abort()

    def _await_room(self) -> None:
        if not self._is_closed:
            self._loop.add_writer(self._socket, self._send_rest)

    def _send_rest(self) -> None:
        with self._lock:
            if not self._is_closed and self._send():
                self._loop.remove_writer(self._socket)
                if self._is_ending:
                    self._say_end()

    def _send(self) -> bool:
        """Sends as much as the connection takes. Returns whether nothing is left. Called with the lock held."""
        try:
            while self._outbox:
                rest = self._outbox[0][self._socket.send(self._outbox[0]) :]
                if rest:
                    self._outbox[0] = rest
                else:
                    self._outbox.popleft()
        except BlockingIOError:
            return False
        except OSError:  # whoever reads from the connection sees its end, too
            self._outbox.clear()
        return True

    def _say_end(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)


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
        self._address, self._token = address, token.encode()
        self._answers: dict[int, AnswerStream] = {}  # by ticket
        self._left: dict[int, AnswerStream] = {}  # not read any more, but not yet ended by the worker
        self._aborts: dict[int, asyncio.Future[bool]] = {}  # by number
        self._numbers = itertools.count(1)  # of tickets and aborts
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.Task[None] | None = None

    async def attach(self, timeout_s: float = 10.0) -> None:
        """Connects, and returns once the worker has answered. Raises WorkerLost when it does not."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, first = await self._connect()
        except (OSError, TimeoutError, ValueError, DecodeError) as error:  # whatever listens there now
            await self.close()
            reason = "it did not answer in time" if isinstance(error, TimeoutError) else str(error)
            raise WorkerLost(f"the worker did not accept a stream: {reason}", retry_after_s=RETRY_AFTER_S) from error
        self._on_load(first)
        self._reader = asyncio.create_task(self._read(reader))

    async def _connect(self) -> tuple[asyncio.StreamReader, pb.Load]:
        """Returns the connection and the worker's first message. Raises OSError."""
        if self._address.startswith(_UNIX):
            path = self._address.removeprefix(_UNIX)
            reader, self._writer = await asyncio.open_unix_connection(path, limit=READ_BYTES)
        else:
            host, _, port = self._address.rpartition(":")
            reader, self._writer = await asyncio.open_connection(host.strip("[]"), int(port), limit=READ_BYTES)
        _notice_loss(self._writer)
        self._writer.write(frame(self._token))
        received = await read_frame(reader, MAX_COMMAND_BYTES)
        first = pb.Push() if received is None else pb.Push.FromString(received)
        if not first.HasField("load"):
            raise ConnectionRefusedError(first.refusal or "it ended the connection")
        return reader, first.load

    @property
    def num_open(self) -> int:
        return len(self._answers)

    async def generate(
        self, request: GenerateRequest, observer: RequestObserver | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        """Submits the request when the iterator is first advanced. Leaving it early cancels it on the worker."""
        if self.broken.is_set():
            raise _lost()
        ticket = next(self._numbers)
        command = _submit(request, ticket)
        limit = self._buffer_chunks * request.sampling.n
        answer = self._answers[ticket] = AnswerStream(request, limit, observer)
        try:
            self._send(command)
            if observer is not None:
                observer.sent()
            async for chunk in answer:
                yield chunk
        finally:
            if ticket in self._answers:
                self._leave(ticket)

    async def abort(self, request_id: str, tenant: str, timeout_s: float = 2.0) -> bool:
        """Returns whether the worker had such a request of this tenant, and cancels it. A lost worker has none."""
        if self.broken.is_set():
            return False
        number = next(self._numbers)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._aborts[number] = answer
        self._send(pb.Command(abort=pb.Abort(number=number, request_id=request_id, tenant=tenant)))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            return False
        finally:
            del self._aborts[number]

    def cancel_all(self, error: PagerError) -> None:
        """Ends every open answer with `error`, and its request on the worker."""
        for ticket in list(self._answers):
            self._leave(ticket).fail(error)

    async def close(self) -> None:
        """Closes the link; open answers raise WorkerLost. Idempotent."""
        self._break()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def _leave(self, ticket: int) -> AnswerStream:
        """Has the worker end the request; until it has, the request's usage is not known."""
        answer = self._left[ticket] = self._answers.pop(ticket)
        self._send(pb.Command(cancel=pb.Cancel(ticket=ticket)))
        return answer

    def _send(self, command: pb.Command) -> None:
        if self._writer is not None:
            self._writer.write(frame(command))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Reads until the connection ends: how it does, does not matter, for the worker cannot be reached over it."""
        try:
            while (received := await read_frame(reader)) is not None:
                push = pb.Push.FromString(received)
                match push.WhichOneof("push"):
                    case "step":
                        self._take(push.step)
                        await asyncio.sleep(0)  # so that steps that came together are read one after the other
                    case "load":
                        self._on_load(push.load)
                    case "aborted" if (answer := self._aborts.get(push.aborted.number)) and not answer.done():
                        answer.set_result(push.aborted.found)
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
        for abort in self._aborts.values():
            if not abort.done():
                abort.set_result(False)
        if self._writer is not None:
            self._writer.transport.abort()
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
