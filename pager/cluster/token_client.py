"""The router's end of the token transport: one stream to a worker, many answers in it. Lives on one event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Self

import grpc.aio
from expert_pager.v1 import worker_pb2 as pb
from expert_pager.v1 import worker_pb2_grpc

from pager.cluster.token_server import CHANNEL_OPTIONS, MAX_COMMAND_BYTES, TOKEN_HEADER
from pager.errors import InvalidRequest, PagerError, SlowReader, WorkerLost
from pager.types import Account, GenerateRequest, RequestObserver, TokenChunk
from pager.wire import decode_account, decode_chunk, decode_error, decode_usage, encode_request

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0  # a killed worker that loads a small model is back after some seconds; others may serve at once


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

    def push(self, chunk: TokenChunk) -> bool:
        """False when the reader is too slow: the stream has failed with SlowReader and drops what it held."""
        if len(self._chunks) >= self._limit:
            self._chunks.clear()
            self.fail(SlowReader(f"the client left {self._limit} pieces of its answer unread; read faster"))
            return False
        self._chunks.append(chunk)
        self._finished = chunk.usage is not None
        self._wake()
        return True

    def fail(self, error: PagerError) -> None:
        """What was received is still read; then `error` is raised."""
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
        """`on_break` is called once, after the open answers were failed."""
        self.broken = asyncio.Event()
        self._on_break = on_break
        self._buffer_chunks = buffer_chunks
        self._on_load = on_load
        self._metadata = ((TOKEN_HEADER, token),)
        self._answers: dict[int, AnswerStream] = {}  # by ticket
        self._left: dict[int, AnswerStream] = {}  # nobody reads them any more, and the worker has not ended them yet
        self._tickets = itertools.count(1)
        self._commands: asyncio.Queue[pb.Command | None] = asyncio.Queue()  # None: no more
        self._channel = grpc.aio.insecure_channel(
            address, options=(*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", -1))
        )
        self._stub = worker_pb2_grpc.WorkerStub(self._channel)
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def attach(self, timeout_s: float = 10.0) -> None:
        """Returns once the worker has answered. Raises WorkerLost when it does not."""
        self._call = self._stub.Attach(self._outgoing(), metadata=self._metadata)
        try:
            first = await asyncio.wait_for(self._call.read(), timeout_s)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            await self.close()
            raise WorkerLost(f"the worker does not take a stream: {error}", retry_after_s=RETRY_AFTER_S) from error
        self._on_load(first.load)
        self._reader = asyncio.create_task(self._read(self._call))

    @property
    def num_open(self) -> int:
        return len(self._answers)

    async def generate(
        self, request: GenerateRequest, observer: RequestObserver | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        """Submits at the first step. Leaving the iterator before its end cancels the request on the worker."""
        if self.broken.is_set():
            raise _lost()
        ticket = next(self._tickets)
        command = _submit(request, ticket)
        answer = self._answers[ticket] = AnswerStream(request, self._buffer_chunks, observer)
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
        """Whether the worker had such a request of this tenant and cancels it. A worker that is gone has none."""
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
        """Open answers raise WorkerLost. Idempotent."""
        self._break()
        for task in (self._reader, self._call):
            if task is not None:
                task.cancel()
        await asyncio.sleep(0)  # the call's own tasks end before their channel does
        await self._channel.close(grace=None)

    def _leave(self, ticket: int) -> AnswerStream:
        """Has the worker end it; until it has, what the request has used is not known."""
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
            if message.HasField("usage"):
                self._settle(message.ticket, decode_usage(message.usage).account)
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
        """The worker is done with it; None for a request that it has not taken."""
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
    """Raises InvalidRequest for more than a worker reads, which would end the stream with all that is open on it."""
    command = pb.Command(submit=encode_request(request, ticket))
    if command.ByteSize() > MAX_COMMAND_BYTES:
        raise InvalidRequest(
            f"the request takes {command.ByteSize()} bytes on its way to a worker, and {MAX_COMMAND_BYTES} are the "
            "most; shorten its prompt, its stop strings or its pool"
        )
    return command


def _lost() -> WorkerLost:
    return WorkerLost("the worker that ran this request is gone; send it again", retry_after_s=RETRY_AFTER_S)
