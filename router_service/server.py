"""The gRPC front: the methods, the boundary where errors become statuses, health, reflection and the pulse."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import grpc
from expert_pager.inference import open_inference_pb2 as inference_pb
from expert_pager.inference import open_inference_pb2_grpc as inference_pb_grpc
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc
from google.protobuf.message import DecodeError, Message
from grpc._cython import cygrpc  # type: ignore[attr-defined]
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from pager.cluster.placement import WorkerState
from pager.errors import ConfigError, DeadlineExceeded, InvalidRequest, PagerError, PortInUse, SlowReader, UnknownMethod
from pager.memory import format_address
from pager.observe import tracing
from pager.observe.logs import request_id, trace_context, traceparent_of
from pager.observe.metrics import LoopLag
from pager.types import TokenChunk
from pager.wire import encode_load, encode_model, encode_named_pool, encode_response, encode_route_answer, encode_worker
from router_service import open_inference, requests
from router_service.access_log import AuditLog, CallRecorder, is_late
from router_service.admission import Caller, present
from router_service.keys import Gate
from router_service.requests import (
    CORE_MESSAGE_BYTES,
    CORE_METADATA_BYTES,
    MAX_OTHER_BYTES,
    MessageBounds,
    check_metadata,
    malformed,
    unzipped,
)
from router_service.service import Call, Pipeline, Send
from router_service.status import code_of, to_wire
from router_service.tls import TlsFiles
from router_service.ui import Watch

log = logging.getLogger(__name__)


SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ExpertPager"].full_name
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
READ_TIMEOUT_S = 60.0  # for a whole message to arrive; the part that has arrived is held in memory

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Message, Context], Awaitable[Message | None]]
Parsed = TypeVar("Parsed", bound=Message)

# The paths of the methods that are requests of a tenant.
RECORDED = {
    **{f"/{SERVICE_NAME}/{each.name}": each.name for each in pb.DESCRIPTOR.services_by_name["ExpertPager"].methods},
    **{f"/{open_inference.SERVICE_NAME}/{name}": name for name in open_inference.RECORDED},
}
# The field of the request's id in a message that is not parsed yet.
ID_FIELDS = {
    **dict.fromkeys(("Generate", "Complete"), pb.GenerateRequest.REQUEST_ID_FIELD_NUMBER),
    **dict.fromkeys(open_inference.RECORDED, inference_pb.ModelInferRequest.ID_FIELD_NUMBER),
}


class ExpertPagerService(pb_grpc.ExpertPagerServicer):
    """The gRPC front: reads requests from protobuf, calls the pipeline and writes what it returns."""

    def __init__(self, pipeline: Pipeline, write_timeout_s: float, stop: Callable[[], None]) -> None:
        """`stop` has the router drain and end."""
        self._pipeline = pipeline
        self._write_timeout_s = write_timeout_s
        self._stop = stop

    # Writes go to the context, so that a client that reads nothing can be given up.
    async def Generate(self, wire: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override] # noqa: N802
        await self._generate(wire, context, lambda chunk: self._send(context, chunk))

    async def Complete(self, wire: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        whole = pb.GenerateResponse()
        if wire.sampling.n > 1:
            raise InvalidRequest("Complete returns one answer; call Generate for several", field="sampling.n")

        async def merge(chunk: TokenChunk) -> None:
            text = whole.text
            whole.MergeFrom(encode_response(chunk))  # appends repeated fields, and replaces the text
            whole.text = text + chunk.text

        await self._generate(wire, context, merge)
        return whole

    async def _generate(self, wire: pb.GenerateRequest, context: Context, send: Send) -> None:
        call = _call(context)
        id_ = requests.id_of(wire)  # before anything that can be refused, so that the id identifies a refusal
        request_id.set(id_)
        tracing.note(request_id=id_)
        ask = requests.ask(id_, wire, self._pipeline.model, self._pipeline.default_pool)
        await self._pipeline.generate(call, ask, send)

    async def _send(self, context: Context, chunk: TokenChunk) -> None:
        """Sends a message. Raises SlowReader when the client accepts nothing for as long as a write may take."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await context.write(encode_response(chunk))
        except TimeoutError:
            raise SlowReader(f"the client read nothing for {self._write_timeout_s:g} s; read faster") from None

    async def Route(self, wire: pb.RouteRequest, context: Context) -> pb.RouteResponse:  # noqa: N802
        call = _call(context)
        ask = requests.route_ask(wire, self._pipeline.model, self._pipeline.default_pool)
        return encode_route_answer(await self._pipeline.route(call, ask))

    async def Calibrate(self, wire: pb.CalibrateRequest, context: Context) -> pb.CalibrateResponse:  # noqa: N802
        call = _call(context)
        ask = requests.calibrate_ask(wire, self._pipeline.model, self._pipeline.default_pool.size)
        return pb.CalibrateResponse(pool=encode_named_pool(await self._pipeline.calibrate(call, ask)))

    async def ListPools(self, wire: pb.ListPoolsRequest, context: Context) -> pb.ListPoolsResponse:  # noqa: N802
        listing = await self._pipeline.list_pools(_tenant())
        response = pb.ListPoolsResponse(damaged=listing.damaged)
        for named in listing.pools:
            response.pools.append(encode_named_pool(named))
            await asyncio.sleep(0)  # hundreds of large pools take a while; others have their turns in between
        return response

    async def DeletePool(self, wire: pb.DeletePoolRequest, context: Context) -> pb.DeletePoolResponse:  # noqa: N802
        return pb.DeletePoolResponse(deleted=await self._pipeline.delete_pool(_tenant(), wire.name))

    async def Abort(self, wire: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        return pb.AbortResponse(aborted=await self._pipeline.abort(_tenant(), wire.request_id))

    async def GetModel(self, wire: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        return encode_model(self._pipeline.get_model(wire.model))

    async def GetResidency(  # noqa: N802
        self, wire: pb.GetResidencyRequest, context: Context
    ) -> pb.GetResidencyResponse:
        facts = self._pipeline.model.facts
        workers = [encode_worker(worker, facts) for worker in await self._pipeline.residency()]
        return pb.GetResidencyResponse(workers=workers, load=encode_load(self._pipeline.admission.load()))

    async def Drain(self, wire: pb.DrainRequest, context: Context) -> pb.DrainResponse:  # noqa: N802
        if wire.worker:
            await self._pipeline.drain_worker(wire.worker)
        elif wire.router:
            if not self._pipeline.admission.is_closed:  # a second signal would cut off what is in flight
                self._pipeline.admission.close()
                self._stop()
        else:
            raise InvalidRequest("say what is to be drained: a `worker` by its name, or the `router`", field="worker")
        return pb.DrainResponse()


def _caller() -> Caller:
    """Returns the caller that the boundary has checked."""
    caller = present.get()
    assert caller is not None
    return caller


_num_bytes: ContextVar[int] = ContextVar("num_bytes")
"""The size of the present call's message. To ask the message itself takes twice as long as to parse it."""


def _call(context: Context) -> Call:
    caller = _caller()
    return Call(caller.tenant, _num_bytes.get(), _deadline_s(context), caller=caller)


def _tenant() -> str:
    return _caller().tenant


def _deadline_s(context: Context) -> float | None:
    """Returns the time of the call's deadline, on the monotonic clock."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


class ErrorBoundary(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every method of a server. A PagerError reaches the client as the table says; anything else as INTERNAL,
    with its traceback in the log and no trace of it on the wire.

    Methods get their message once its bytes are known to be within bounds. gRPC sees methods that read a stream of one
    message: so the message is read here, and one that gRPC refuses to receive is noticed.
    """

    def __init__(
        self, pipeline: Pipeline, bounds: MessageBounds, gate: Gate | None = None, audit: AuditLog | None = None
    ) -> None:
        self._metrics = pipeline.metrics
        self._quotas = pipeline.stores.quotas
        self._gate = gate or Gate()
        self._audit = audit
        self._recorder = CallRecorder(pipeline.metrics, audit)
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
        if handler.request_streaming and name in RECORDED:
            stream = self._streams(handler.stream_stream)
            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        if handler.request_streaming:  # reflection, which answers an empty query with an error of its own
            parse = handler.request_deserializer
            return grpc.stream_stream_rpc_method_handler(
                self._checked_stream(name, handler.stream_stream),
                request_deserializer=lambda data: parse(_short(data)),
                response_serializer=handler.response_serializer,
            )
        method = handler.unary_stream if handler.response_streaming else handler.unary_unary
        wrap = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        # The request stays bytes until it is inside the boundary, so that the error for an unparsable one has
        # details too.
        guarded = self._guarded(name, method, handler.request_deserializer)
        return wrap(guarded, request_deserializer=None, response_serializer=handler.response_serializer)

    def _unknown(self, path: str) -> Any:
        async def call(messages: AsyncIterator[bytes], context: Context) -> None:
            self._metrics.dropped("unknown_method")
            _fail(
                context, UnknownMethod(f"there is no method {path[:200]!r} here; does the client have another version?")
            )

        return call

    async def _check(self, path: str, context: Context) -> None:
        """Checks that the caller may call the method. Raises Unauthenticated, PermissionDenied or QuotaExceeded."""
        check_metadata(context.invocation_metadata())
        caller = self._gate.check(path.rpartition("/")[2], context.invocation_metadata(), _tls_names(context))
        await self._quotas.request(caller)

    def _refuse(self, path: str, context: Context, error: PagerError) -> None:
        """Ends a call that nothing else records with the status of the error."""
        if self._audit is not None:
            self._audit.record(path.rpartition("/")[2], code_of(error).name, error, context.peer())
        _fail(context, error)

    def _checked_stream(self, path: str, method: Any) -> Any:
        if not self._gate.is_on:
            return method

        async def call(messages: AsyncIterator[Message], context: Context) -> AsyncIterator[Message]:
            try:
                await self._check(path, context)
            except PagerError as error:
                self._refuse(path, context, error)
                return
            async for answer in method(messages, context):
                yield answer

        return call

    async def _message(self, name: str, messages: AsyncIterator[bytes], context: Context) -> bytes:
        """Reads the call's one message, within its bounds. Raises InvalidRequest, PromptTooLong or DeadlineExceeded."""
        began_s, deadline_s = time.monotonic(), _deadline_s(context)
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                async for received in messages:
                    return self._checked(name, received)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the whole message of the call did not arrive within {READ_TIMEOUT_S:g} s; send less, or faster"
            ) from None
        if is_late(time.monotonic(), began_s, deadline_s):  # the call has ended, and the client knows why
            raise DeadlineExceeded("the deadline passed before the message of the call arrived; allow more time")
        # If gRPC has refused it, the client already has gRPC's own status, and not this one.
        self._metrics.dropped("no_message")
        raise InvalidRequest(
            f"the call ended without a message that the service can receive: one of at most {CORE_MESSAGE_BYTES} bytes"
        )

    def _checked(self, name: str, received: bytes) -> bytes:
        data = unzipped(received)
        _num_bytes.set(len(data))
        if name in ID_FIELDS:
            request_id.set(requests.id_in(data, ID_FIELDS[name]))
        self._bounds.check(name, data)
        return data

    def _streams(self, method: Callable[[AsyncIterator[bytes], Context], Awaitable[None]]) -> Any:
        """Wraps a stream of requests: their errors are answers, except those that end the stream."""

        async def call(messages: AsyncIterator[bytes], context: Context) -> None:
            try:
                check_metadata(context.invocation_metadata())
                self._gate.check("ModelStreamInfer", context.invocation_metadata(), _tls_names(context))
                await method(messages, context)
            except* PagerError as group:
                self._refuse("ModelStreamInfer", context, _first(group))

        return call

    async def one_of_stream(
        self, received: bytes, context: Context, run: Callable[[inference_pb.ModelInferRequest], Awaitable[None]]
    ) -> PagerError | None:
        """Runs one message of ModelStreamInfer as a call of its own; returns the error that it ended with."""
        metadata, name = context.invocation_metadata(), "ModelStreamInfer"
        with tracing.call(f"{open_inference.SERVICE_NAME}/{name}", metadata):
            trace_context.set(tracing.traceparent() or traceparent_of(metadata))
            tenant = self._gate.claimed_tenant(metadata)
            with self._recorder.call(name, tenant, _deadline_s(context), context.peer) as outcome:
                await self._check(name, context)
                await run(_parsed(inference_pb.ModelInferRequest.FromString, self._checked(name, received)))
        return outcome.error

    def _guarded(self, path: str, method: Method, parse: Callable[[bytes], Message]) -> Any:
        name = RECORDED.get(path, path)

        async def call(messages: AsyncIterator[bytes], context: Context) -> Message | None:
            if path not in RECORDED:
                return await bare(messages, context)
            with tracing.call(path[1:], context.invocation_metadata()):
                return await recorded(messages, context)

        async def bare(messages: AsyncIterator[bytes], context: Context) -> Message | None:
            try:
                check_metadata(context.invocation_metadata())
                if self._gate.is_on and not path.startswith(_OPEN):
                    await self._check(path, context)
                return await method(_parsed(parse, await self._message(name, messages, context)), context)
            except PagerError as error:
                self._refuse(path, context, error)
            return None

        async def recorded(messages: AsyncIterator[bytes], context: Context) -> Message | None:
            trace_context.set(tracing.traceparent() or traceparent_of(context.invocation_metadata()))
            tenant = self._gate.claimed_tenant(context.invocation_metadata())
            with self._recorder.call(name, tenant, _deadline_s(context), context.peer) as outcome:
                await self._check(path, context)
                return await method(_parsed(parse, await self._message(name, messages, context)), context)
            if outcome.error is not None:
                _fail(context, outcome.error)
            return None

        return call


# For probes, which have no key.
_OPEN = (
    f"/{health.SERVICE_NAME}/",
    f"/{open_inference.SERVICE_NAME}/ServerLive",
    f"/{open_inference.SERVICE_NAME}/ServerReady",
)


def _tls_names(context: Context) -> list[str]:
    """Returns the names in the client's certificate, which TLS has checked: alternative names, else the common one."""
    shown = context.auth_context()
    names = shown.get("x509_subject_alternative_name") or shown.get("x509_common_name") or ()
    return [bytes(name).decode("utf-8", "replace") for name in names]


def _short(data: bytes) -> bytes:
    """Returns a message of a stream, empty where it is too long or damaged."""
    try:
        message = unzipped(data)
    except InvalidRequest:
        return b""
    return message if len(message) <= MAX_OTHER_BYTES else b""


def _first(group: BaseExceptionGroup[Any]) -> PagerError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, PagerError)
    return found


def _parsed(parse: Callable[[bytes], Parsed], data: bytes) -> Parsed:
    try:
        return parse(data)
    except DecodeError:
        raise malformed() from None


def _fail(context: Context, error: PagerError) -> None:
    """Ends the call with the status of the error."""
    wire = to_wire(error, request_id.get() or None)
    # Not `context.abort`: it raises, and every caller would have to handle that.
    context.set_code(wire.code)
    context.set_details(wire.message)
    context.set_trailing_metadata(wire.trailing_metadata)


NUM_LOOKS = 40

# Added to watched servers: without it gRPC's core counts nothing.
WATCHED = ("grpc.enable_channelz", 1)


def watched_servers() -> set[int]:
    """Returns the ids of all watched servers of this process that have not ended."""
    found: set[int] = set()
    while True:
        page = json.loads(cygrpc.channelz_get_servers(max(found, default=0) + 1))
        found |= {int(server["ref"]["serverId"]) for server in page.get("server", ())}
        if page.get("end", True):
            return found


class UnseenCalls:
    """Counts the calls that a server's core has started and the service never saw.

    A call that still waits for the event loop is not counted: one counts when it was missing at `NUM_LOOKS` looks in a
    row. Calls that waited longer and were counted anyway are set off against later ones.
    """

    def __init__(self, server_id: int) -> None:
        self._server_id = server_id
        self._missing: deque[int] = deque(maxlen=NUM_LOOKS)
        self._num_counted = 0

    def look(self, num_seen: int) -> int:
        """Returns the number of new unseen calls. `num_seen` is how many calls the service has seen until now."""
        server = json.loads(cygrpc.channelz_get_server(self._server_id))["server"]
        self._missing.append(int(server["data"].get("callsStarted", 0)) - num_seen)
        if len(self._missing) < NUM_LOOKS:
            return 0
        num_new = max(0, min(self._missing) - self._num_counted)
        self._num_counted += num_new
        return num_new


PULSE_S = 0.25
HEARTBEAT_PULSES = 4
CUT_OFF_S = 2.0  # for the last status to reach clients that read
MAX_ANSWER_BYTES = 8 * 2**20
MAX_PENDING_CALLS = 16384
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # otherwise a second server on the port would start and take half of the calls
    ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
    # gRPC's own refusals have a bare status: its bounds lie beyond those that the service checks.
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


class HealthPort:
    """The answers to health checks, and the port for them alone: `""` is liveness, the service's name readiness.

    That port may listen before there is a service, which is then not ready. It never has TLS: the probes of a pod do
    not support it.
    """

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self.port = 0
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        """Listens; port 0 takes a free one, which `self.port` then has. Raises PortInUse, ConfigError."""
        await self.set_ready(False)
        self._server = grpc.aio.server(options=(*_OPTIONS, ("grpc.max_receive_message_length", MAX_OTHER_BYTES)))
        health_pb2_grpc.add_HealthServicer_to_server(self.servicer, self._server)
        self.port = await _bind(self._server, host, port, "router.health_port")
        await self._server.start()

    async def set_ready(self, is_ready: bool) -> None:
        await self.servicer.set(SERVICE_NAME, _SERVING if is_ready else _NOT_SERVING)

    async def stop(self, grace_s: float = 0.0) -> None:
        if self._server is not None:
            await self._server.stop(grace_s)


class RouterServer:
    """Owns the listening port and the pulse."""

    def __init__(
        self,
        pipeline: Pipeline,
        bounds: MessageBounds,
        watch: Watch,
        write_timeout_s: float = 30.0,
        max_connection_age_s: float = 300.0,
        *,
        gate: Gate | None = None,
        audit: AuditLog | None = None,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        """`stop` has the process drain this router and end, as on SIGTERM."""
        self._pipeline = pipeline
        self._watch = watch
        self._boundary = ErrorBoundary(pipeline, bounds, gate, audit)
        others = watched_servers()
        self._server = grpc.aio.server(
            interceptors=(self._boundary,),
            options=(
                *_OPTIONS,
                WATCHED,
                ("grpc.max_receive_message_length", CORE_MESSAGE_BYTES),
                ("grpc.per_message_decompression", 0),  # `unzipped` decompresses, within bounds
                # Clients then reconnect, and routers that have joined since get their share. Requests
                # in flight on a connection continue until they end.
                ("grpc.max_connection_age_ms", round(1000 * max_connection_age_s)),
            ),
        )
        (server_id,) = watched_servers() - others
        self._unseen = UnseenCalls(server_id)
        self._lag = LoopLag(pipeline.metrics.loop_lag)
        self._health = HealthPort()
        pb_grpc.add_ExpertPagerServicer_to_server(ExpertPagerService(pipeline, write_timeout_s, stop), self._server)
        inference = open_inference.InferenceService(pipeline, write_timeout_s, _call, self._boundary.one_of_stream)
        inference_pb_grpc.add_GRPCInferenceServiceServicer_to_server(inference, self._server)
        _add_reflection(self._server)
        self._pulse: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self, host: str, port: int, tls: TlsFiles | None = None, health: HealthPort | None = None) -> None:
        """Listens; port 0 takes a free one, which `self.port` then has. Health checks are answered here as at `health`,
        which its owner stops. Raises PortInUse, ConfigError.
        """
        self._health = health or self._health
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._server)
        self.port = await _bind(self._server, host, port, "router.port", tls)
        await self._set_readiness()
        await self._server.start()
        self._pulse = asyncio.create_task(self._beat())
        await self._lag.start()

    async def drain(self, timeout_s: float) -> bool:
        """Reports NOT_SERVING, refuses new requests and awaits those in flight. Returns True when all ended in time."""
        self._pipeline.admission.close()
        await self._health.servicer.enter_graceful_shutdown()
        return await self._ended_within(timeout_s)

    async def cut_off(self) -> None:
        """Ends everything in flight with a status that says to send it again."""
        self._pipeline.cluster.cut_off()
        await self._ended_within(CUT_OFF_S)

    async def _ended_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._pipeline.admission.num_requests:  # noqa: ASYNC110 - seconds, once in a process's life
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return False
        return True

    async def stop(self, grace_s: float = 0.5) -> None:
        """Cancels what is in flight after `grace_s`, and returns when those calls have released what they held."""
        if self._pulse is not None:
            self._pulse.cancel()
            await asyncio.gather(self._pulse, return_exceptions=True)
        await self._lag.stop()
        await self._server.stop(grace_s)
        await self._ended_within(CUT_OFF_S)  # gRPC does not wait for the cleanup of a cancelled call

    async def wait(self) -> None:
        await self._server.wait_for_termination()

    async def _beat(self) -> None:
        beat = 0
        while True:
            await _logged(self._set_readiness)
            self._pipeline.metrics.dropped("unseen", self._unseen.look(self._boundary.num_seen))
            if beat % HEARTBEAT_PULSES == 0:
                await _logged(self._heartbeat)
            beat += 1
            await asyncio.sleep(PULSE_S)

    async def _set_readiness(self) -> None:
        workers = self._pipeline.cluster.workers()
        is_ready = any(worker.state == WorkerState.READY for worker in workers)
        await self._health.set_ready(is_ready)
        self._pipeline.metrics.saw(self._pipeline.model.name, workers)

    async def _heartbeat(self) -> None:
        self._watch.beat()
        await self._pipeline.beat()


def _add_reflection(server: grpc.aio.Server) -> None:
    """Adds reflection under both of its names; their messages are the same."""
    names = (SERVICE_NAME, open_inference.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    servicer = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": handler})
    server.add_generic_rpc_handlers((generic,))


async def _logged(step: Callable[[], Awaitable[None]]) -> None:
    """Logs a failed beat, which must not end the pulse: readiness would never change again."""
    try:
        await step()
    except Exception:
        log.exception("one beat of the router's pulse failed; the pulse continues")


async def _bind(server: grpc.aio.Server, host: str, port: int, key: str, tls: TlsFiles | None = None) -> int:
    """Returns the port that the server will listen on, or stops the server and raises PortInUse or ConfigError."""
    try:
        if tls is None:
            return server.add_insecure_port(format_address(host, port))
        return server.add_secure_port(format_address(host, port), tls.credentials())
    except RuntimeError:
        await server.stop(None)
        raise _bind_error(host, port, key) from None


def _bind_error(host: str, port: int, key: str) -> ConfigError | PortInUse:
    """Finds the cause of a failed bind: gRPC reports only that it failed, and a socket tells why."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}")
    return PortInUse(f"port {port} on {host} is in use; choose another ({key})")
