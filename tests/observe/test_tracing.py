"""Traces are asked for by the standard variables alone; without them nothing is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pager.errors import ConfigError
from pager.observe import tracing
from tests.support.values import some

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.start("test", "1.2.3", {}, exporter)
    yield exporter
    tracing.stop()


@pytest.mark.slow
def test_nothing_is_imported_when_nobody_asks() -> None:
    code = """
import sys
import router_service.service, pager.engine.engine
from pager.observe import tracing
tracing.start("test", "1.2.3", {})
with tracing.call("a/b", ()), tracing.span("score"):
    tracing.note(number=1)
    assert tracing.traceparent() is tracing.tracestate() is None
    tracing.end_call("OK")
tracing.record("00-" + "1" * 32 + "-" + "2" * 16 + "-01", [])
tracing.stop()
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


@pytest.mark.parametrize(
    ("env", "asked"),
    [
        ({}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "TRUE"}, False),
    ],
)
def test_who_asks_for_traces(env: dict[str, str], asked: bool) -> None:
    assert tracing.is_asked_for(env) is asked


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER 'zipkin' is not known; use otlp or none"),
        (
            {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
            "OTEL_EXPORTER_OTLP_PROTOCOL 'http/json' is not known; use grpc or http/protobuf",
        ),
    ],
)
def test_what_can_not_be_had_keeps_it_from_starting(env: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tracing.start("test", "1.2.3", env)
    assert tracing.traceparent() is None


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(
        ConfigError, match=r"asks for traces and .* is not installed; pip install 'expert-pager\[otel\]'"
    ):
        tracing.start("test", "1.2.3", ENDPOINT)


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_both_protocols_are_there(protocol: str) -> None:
    tracing.start("test", "1.2.3", {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol})
    with tracing.call("a/b", ()):
        assert tracing.traceparent() is not None
        tracing.stop()  # before the call ends: nothing is to be sent to nobody
    assert tracing.traceparent() is None


def test_spans_nest_and_parts_come_later(exporter: InMemorySpanExporter) -> None:
    state = ("tracestate", "vendor=one,other=two")
    metadata = (("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"), state, ("key-bin", b"\0"))
    with tracing.call("package.Service/Method", metadata):
        with tracing.span("place", worker="w0"):
            tracing.note(missing_bytes=7)
        going_on, with_state = tracing.traceparent(), tracing.tracestate()
        tracing.end_call("UNAVAILABLE")
    tracing.record(going_on, [tracing.Part("decode", 10.5, 11.0, {"num_tokens": 3})], with_state)
    tracing.record(None, [tracing.Part("decode", 10.5, 11.0)])
    tracing.stop()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert list(spans) == ["place", "package.Service/Method", "decode"]
    call, place, decode = (spans[name] for name in ("package.Service/Method", "place", "decode"))
    assert {span.context.trace_id for span in spans.values()} == {int("a" * 32, 16)}
    assert {span.context.trace_state.to_header() for span in spans.values()} == {state[1]}
    assert some(call.parent).span_id == int("b" * 16, 16)
    assert some(place.parent).span_id == some(decode.parent).span_id == call.context.span_id
    assert place.attributes == {"expert_pager.worker": "w0", "expert_pager.missing_bytes": 7}
    assert dict(some(call.attributes)) == {
        "rpc.system": "grpc",
        "rpc.service": "package.Service",
        "rpc.method": "Method",
        "rpc.grpc.status": "UNAVAILABLE",
    }
    assert not call.status.is_ok
    assert (decode.start_time, decode.end_time) == (10_500_000_000, 11_000_000_000)
    assert decode.attributes == {"expert_pager.num_tokens": 3}


def test_the_standard_variables_say_which_share_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    exporter = InMemorySpanExporter()
    tracing.start("test", "1.2.3", {}, exporter)
    with tracing.call("by chance", ()):
        going_on = tracing.traceparent()
    tracing.record(going_on, [tracing.Part("decode", 10.5, 11.0)])
    with tracing.call("by the caller", (("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"),)):
        pass
    tracing.stop()
    assert [span.name for span in exporter.get_finished_spans()] == ["by the caller"]


def test_an_error_is_not_quoted(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match="secret"), tracing.call("a/b", None), tracing.span("score"):
        raise ValueError("secret")
    tracing.stop()
    assert ["secret" in span.to_json() for span in exporter.get_finished_spans()] == [False, False]
