"""The one place where messages come in, errors become gRPC statuses, and a call's outcome is counted and logged."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from pager import tracing
from pager.errors import DeadlineExceeded, InvalidRequest, PagerError, UnknownMethod
from pager.logs import request_id, trace_context, traceparent_of
from router_service import decode
from router_service.access_log import AccessLog
from router_service.message_bounds import CORE_MESSAGE_BYTES, MAX_OTHER_BYTES, MessageBounds, check_metadata, malformed
from router_service.metrics import RouterMetrics
from router_service.status import to_wire
from router_service.tenants import tenant_in

log = logging.getLogger("expert_pager.router")

READ_TIMEOUT_S = 60.0  # for a message to have come whole; what has come of it is held in memory

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Message, Context], Awaitable[Message | None]]


class ErrorBoundary(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every method of a server. A PagerError reaches the client as the table says; anything else as INTERNAL,
    with its traceback in the log and nothing of it on the wire.

    Methods get their message once its bytes are known to be within bounds. To gRPC they are methods that read a stream,
    which has one message: so the message is read in here, and one that gRPC refuses to receive is noticed.
    """

    def __init__(self, service_name: str, metrics: RouterMetrics, bounds: MessageBounds) -> None:
        self._prefix = f"/{service_name}/"
        self._metrics = metrics
        self._access_log = AccessLog()
        self._bounds = bounds
        self.num_seen = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        self.num_seen += 1
        name = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_unary_rpc_method_handler(self._unknown(name))
        if handler.request_streaming:  # reflection, which answers an empty question with an error of its own
            parse = handler.request_deserializer
            return grpc.stream_stream_rpc_method_handler(
                handler.stream_stream,
                request_deserializer=lambda data: parse(data if len(data) <= MAX_OTHER_BYTES else b""),
                response_serializer=handler.response_serializer,
            )
        method = handler.unary_stream if handler.response_streaming else handler.unary_unary
        wrap = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        # The request stays bytes until it is inside the boundary: what can not be parsed gets details like any error.
        guarded = self._guarded(name, method, handler.request_deserializer)
        return wrap(guarded, request_deserializer=None, response_serializer=handler.response_serializer)

    def _unknown(self, path: str) -> Any:
        async def call(messages: AsyncIterator[bytes], context: Context) -> None:
            self._metrics.dropped("unknown_method")
            _fail(context, UnknownMethod(f"there is no method {path[:200]!r} here; is the client of another version?"))

        return call

    async def _message(self, name: str, messages: AsyncIterator[bytes], context: Context) -> bytes:
        """The call's one message, within its bounds. Raises InvalidRequest, PromptTooLong or DeadlineExceeded."""
        check_metadata(context.invocation_metadata())
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                async for data in messages:
                    if name == "Generate":
                        request_id.set(decode.id_in(data))
                    self._bounds.check(name, data)
                    return data
        except TimeoutError:
            raise DeadlineExceeded(
                f"the call's message did not come whole within {READ_TIMEOUT_S:g} s; send less, or faster"
            ) from None
        # Where gRPC has refused it, the client has gRPC's own status by now, and not this one.
        self._metrics.dropped("no_message")
        raise InvalidRequest(
            f"the call ended without a message that can be received: one of at most {CORE_MESSAGE_BYTES} bytes, "
            "uncompressed or in gzip or deflate"
        )

    def _guarded(self, path: str, method: Method, parse: Callable[[bytes], Message]) -> Any:
        is_ours = path.startswith(self._prefix)
        name = path.removeprefix(self._prefix)

        async def call(messages: AsyncIterator[bytes], context: Context) -> Message | None:
            if not is_ours:
                return await bare(messages, context)
            with tracing.call(path[1:], context.invocation_metadata()):
                return await traced(messages, context)

        async def bare(messages: AsyncIterator[bytes], context: Context) -> Message | None:
            try:
                return await method(_parsed(parse, await self._message(name, messages, context)), context)
            except PagerError as error:
                _fail(context, error)
            return None

        async def traced(messages: AsyncIterator[bytes], context: Context) -> Message | None:
            started = time.perf_counter()
            request_id.set("")
            trace_context.set(tracing.traceparent() or traceparent_of(context.invocation_metadata()))
            self._access_log.begin()
            self._metrics.began(name)
            code, failure = "OK", None
            try:
                return await method(_parsed(parse, await self._message(name, messages, context)), context)
            except asyncio.CancelledError:
                code = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
                raise
            except PagerError as error:
                failure = error
                if error.is_refusal:
                    self._metrics.refused(error.reason)
                code = _fail(context, error)
            except Exception as error:
                # Not the message: it can quote what the user wrote.
                frames = "".join(traceback.format_tb(error.__traceback__))
                log.error("%s request_id=%s failed with %s\n%s", name, request_id.get(), type(error).__name__, frames)
                code = _fail(context, PagerError("internal error; the service's log has it under the request id"))
            finally:
                tracing.end_call(code)
                tenant = tenant_in(context.invocation_metadata())
                self._metrics.ended(name, code, tenant)
                self._access_log.end(name, tenant, code, failure, time.perf_counter() - started)
            return None

        return call


def _parsed(parse: Callable[[bytes], Message], data: bytes) -> Message:
    try:
        return parse(data)
    except DecodeError:
        raise malformed() from None


def _fail(context: Context, error: PagerError) -> str:
    """The call will end with the error's status; returns the name of its code."""
    wire = to_wire(error, request_id.get() or None)
    # Not `context.abort`: it raises, and every caller would have to let that through.
    context.set_code(wire.code)
    context.set_details(wire.message)
    context.set_trailing_metadata(wire.trailing_metadata)
    return wire.code.name
