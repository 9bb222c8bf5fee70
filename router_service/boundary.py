"""The one place where errors become gRPC statuses, and where a call's outcome is counted and logged."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from pager import tracing
from pager.errors import InvalidRequest, PagerError
from pager.logs import request_id, trace_context, traceparent_of
from router_service.access_log import AccessLog
from router_service.metrics import RouterMetrics
from router_service.status import to_wire
from router_service.tenants import tenant_in

log = logging.getLogger("expert_pager.router")

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Message, Context], Awaitable[Message | None]]


class ErrorBoundary(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every method of one service. A PagerError reaches the client as the table says; anything else as INTERNAL,
    with its traceback in the log and nothing of it on the wire."""

    def __init__(self, service_name: str, metrics: RouterMetrics) -> None:
        self._prefix = f"/{service_name}/"
        self._metrics = metrics
        self._access_log = AccessLog()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        name = handler_call_details.method.removeprefix(self._prefix)
        method = handler.unary_stream if handler.response_streaming else handler.unary_unary
        wrap = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        # The request stays bytes until it is inside the boundary: what can not be parsed gets details like any error.
        guarded = self._guarded(name, method, handler.request_deserializer)
        return wrap(guarded, request_deserializer=None, response_serializer=handler.response_serializer)

    def _guarded(self, name: str, method: Method, parse: Callable[[bytes], Message]) -> Any:
        async def call(data: bytes, context: Context) -> Message | None:
            with tracing.call(self._prefix[1:] + name, context.invocation_metadata()):
                return await traced(data, context)

        async def traced(data: bytes, context: Context) -> Message | None:
            started = time.perf_counter()
            request_id.set("")
            trace_context.set(tracing.traceparent() or traceparent_of(context.invocation_metadata()))
            self._access_log.begin()
            code, failure = "OK", None
            try:
                return await method(_parsed(parse, data), context)
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
        raise InvalidRequest(
            "the message can not be parsed; is it of another version, or text that is not UTF-8?"
        ) from None


def _fail(context: Context, error: PagerError) -> str:
    """The call will end with the error's status; returns the name of its code."""
    wire = to_wire(error, request_id.get() or None)
    # Not `context.abort`: it raises, and every caller would have to let that through.
    context.set_code(wire.code)
    context.set_details(wire.message)
    context.set_trailing_metadata(wire.trailing_metadata)
    return wire.code.name
