"""Spans of real requests, as a real OTLP receiver gets them from the router and from its worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

MARKER = "xylophone quagmire zephyr"
CALLER_TRACE, CALLER_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER_STATE = "vendor=one,other=two"
GENERATE = "expert_pager.v1.ExpertPager/Generate"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent: (the service's name, span)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[tuple[str, Any]] = []
        self.requests: list[bytes] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._lock:
            self.requests.append(request.SerializeToString())
            for resource in request.resource_spans:
                (name,) = (
                    each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
                )
                self._spans += [(name, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> dict[str, tuple[str, Any]]:
        with self._lock:
            return {span.name: (who, span) for who, span in self._spans if span.trace_id.hex() == trace_id}

    def calls(self) -> list[Any]:
        with self._lock:
            return [span for _, span in self._spans if span.name == GENERATE]


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[Receiver, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    receiver = Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield receiver, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(scope="module")
def traced(
    serve: Callable[..., Any], model: Path, receiver: tuple[Receiver, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Receiver]]:
    """A service that traces."""
    options = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver[1],
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "EXPERT_PAGER_WORKERS_HOST_MEMORY": "0",
    }
    folder = tmp_path_factory.mktemp("traces") / "service"
    with serve(folder, model, "--expert-memory", "25%", **options) as service:
        yield service, receiver[0]


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def send(service: Any, traceparent: str, max_tokens: int = 4) -> Any:
    request = pb.GenerateRequest(text=MARKER.encode(), request_id="traced", pool=pb.PoolPolicy(count=8))
    request.sampling.MergeFrom(pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    metadata = (("traceparent", traceparent), ("tracestate", CALLER_STATE), ("x-tenant-id", "acme"))
    return service.stub.Generate(request, timeout=120, metadata=metadata)


def test_a_request_is_one_trace_under_the_callers(traced: Any, until: Callable[..., None]) -> None:
    service, receiver = traced
    # For long enough that what was asked for ahead has come: what comes after the answer's account is in a span only.
    usage = list(send(service, f"00-{CALLER_TRACE}-{CALLER_SPAN}-01", max_tokens=100))[-1].usage
    names = {GENERATE, "score", "pick", "place", "queue", "prefill", "decode", "page disk"}
    until(lambda: set(receiver.trace(CALLER_TRACE)) == names, 60)
    trace = receiver.trace(CALLER_TRACE)
    spans = {name: span for name, (_, span) in trace.items()}
    call = spans.pop(GENERATE)
    assert call.parent_span_id.hex() == CALLER_SPAN
    assert {span.trace_state for _, span in trace.values()} == {CALLER_STATE}
    assert {span.parent_span_id for span in spans.values()} == {call.span_id}
    assert {name for name, (who, _) in trace.items() if who == "expert-pager-worker"} == {
        "queue",
        "prefill",
        "decode",
        "page disk",
    }
    assert all(who in ("expert-pager-worker", "expert-pager-router") for who, _ in trace.values())
    # In their order, inside of the call (two processes of one machine have one clock, adjusted now and then).
    order = [spans[name] for name in ("score", "pick", "place", "prefill", "decode")]
    assert [span.start_time_unix_nano for span in order] == sorted(span.start_time_unix_nano for span in order)
    assert spans["prefill"].end_time_unix_nano == spans["decode"].start_time_unix_nano
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in spans.values())
    # What they say is what the answer's usage says.
    assert attributes(call)["rpc.grpc.status"] == "OK"
    assert attributes(call)["expert_pager.request_id"] == "traced"
    assert attributes(spans["place"])["expert_pager.worker"] in service.residency()
    assert attributes(spans["prefill"])["expert_pager.num_tokens"] == usage.prompt_tokens - usage.cached_prompt_tokens
    assert attributes(spans["decode"])["expert_pager.num_tokens"] == usage.completion_tokens == 100
    assert attributes(spans["decode"])["expert_pager.outcome"] == "length"
    assert attributes(spans["page disk"])["expert_pager.num_bytes"] == usage.bytes_from_disk > 0
    assert all(word.encode() not in sent for sent in receiver.requests for word in MARKER.split())


def test_who_is_not_sampled_or_sends_nonsense(traced: Any, until: Callable[..., None]) -> None:
    """A caller that does not trace is not traced; what is no trace context starts a trace of its own."""
    service, receiver = traced
    before = len(receiver.calls())
    unsampled = "1" * 32
    list(send(service, f"00-{unsampled}-{CALLER_SPAN}-00"))
    list(send(service, f'{MARKER}" or 1=1'))
    until(lambda: len(receiver.calls()) > before, 60)
    (call,) = receiver.calls()[before:]
    assert not call.parent_span_id
    assert call.trace_id.hex() not in (unsampled, CALLER_TRACE)
    assert receiver.trace(unsampled) == {}


def test_an_error_is_marked_and_not_quoted(traced: Any, until: Callable[..., None]) -> None:
    service, receiver = traced
    trace_id = "2" * 32
    with pytest.raises(grpc.RpcError):
        list(send(service, f"00-{trace_id}-{CALLER_SPAN}-01", max_tokens=1 << 30))
    until(lambda: GENERATE in receiver.trace(trace_id), 60)
    _, span = receiver.trace(trace_id)[GENERATE]
    assert attributes(span)["rpc.grpc.status"] == "INVALID_ARGUMENT"
    assert (list(span.events), span.status.message) == ([], "")
