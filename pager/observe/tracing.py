"""Optional OpenTelemetry traces of how each call spent its time. Only `start` imports `opentelemetry`.

Nothing is imported, and nothing recorded, unless the standard OTEL_* variables ask for traces. No prompt and no answer
is ever in a span.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pager.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = {"grpc": "grpc", "http/protobuf": "http"}
TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

Attributes = Mapping[str, str | int | float | bool]

_provider: TracerProvider | None = None
_tracer: Tracer | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A finished part of a request; times are in unix seconds."""

    name: str
    start_unix_s: float
    end_unix_s: float
    attributes: Attributes = field(default_factory=dict)


def start(service: str, version: str, env: Mapping[str, str], exporter: SpanExporter | None = None) -> None:
    """Starts tracing if `env` names an OTLP endpoint; the exporter reads the other variables itself.

    A second call in the same process changes nothing. Raises ConfigError where traces are asked for and cannot be had.
    """
    global _provider, _tracer
    if _tracer is not None or (exporter is None and not is_asked_for(env)):
        return
    exporter = exporter or _exporter(env)
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    facts = {SERVICE_VERSION: version}
    if not env.get("OTEL_SERVICE_NAME") and "service.name=" not in env.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        facts[SERVICE_NAME] = service
    _provider = TracerProvider(resource=Resource.create(facts), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _provider.get_tracer("expert-pager", version)


def stop() -> None:
    """Sends what is recorded and stops tracing. Idempotent."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.shutdown()


def is_asked_for(env: Mapping[str, str]) -> bool:
    """Reports whether `env` asks for traces. Raises ConfigError for an exporter other than OTLP."""
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    kind = env.get("OTEL_TRACES_EXPORTER", "otlp")
    if kind not in ("otlp", "none"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER {kind!r} is not known; use otlp or none")
    return kind == "otlp" and any(env.get(name) for name in ENDPOINTS)


# --- spans of the router, as they happen ------------------------------------------------------------------------------


def call(name: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> AbstractContextManager[Any]:
    """Opens the span of a gRPC call, under the caller's trace context if its metadata has one."""
    if _tracer is None:
        return nullcontext()
    from opentelemetry.trace import SpanKind

    parent = _context({key: value for key, value in metadata or () if isinstance(value, str)})
    attributes = {"rpc.system": "grpc", "rpc.service": name.partition("/")[0], "rpc.method": name.partition("/")[2]}
    return _tracer.start_as_current_span(
        name, parent, SpanKind.SERVER, attributes, record_exception=False, set_status_on_exception=False
    )


def span(name: str, **attributes: str | int | float | bool) -> AbstractContextManager[Any]:
    """Opens a span within the current call. Errors are not recorded: their text can quote what the user wrote."""
    if _tracer is None:
        return nullcontext()
    return _tracer.start_as_current_span(
        name, attributes=_named(attributes), record_exception=False, set_status_on_exception=False
    )


def note(**attributes: str | int | float | bool) -> None:
    """Adds attributes to the current span."""
    if _tracer is not None:
        _current().set_attributes(_named(attributes))


def end_call(status: str) -> None:
    """Records how the current call ended, as a gRPC status code's name."""
    if _tracer is None:
        return
    from opentelemetry.trace import StatusCode

    span = _current()
    span.set_attribute("rpc.grpc.status", status)
    if status in ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"):
        span.set_status(StatusCode.ERROR)


def traceparent() -> str | None:
    """Returns the current span's W3C Trace Context, to be passed on with the request; `tracestate` belongs to it."""
    return _carried().get(TRACEPARENT)


def tracestate() -> str | None:
    """Returns the caller's tracestate, unchanged."""
    return _carried().get(TRACESTATE)


# --- spans of the worker, recorded when a request has ended -----------------------------------------------------------


def record(traceparent: str | None, parts: Iterable[Part], tracestate: str | None = None) -> None:
    """Records spans of finished parts under `traceparent`; nothing without one."""
    if _tracer is None or traceparent is None:
        return
    parent = _context({TRACEPARENT: traceparent} | ({TRACESTATE: tracestate} if tracestate else {}))
    for part in parts:
        span = _tracer.start_span(
            part.name, parent, attributes=_named(part.attributes), start_time=round(1e9 * part.start_unix_s)
        )
        span.end(round(1e9 * part.end_unix_s))


def _carried() -> dict[str, str]:
    carrier: dict[str, str] = {}
    if _tracer is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(carrier)
    return carrier


def _named(attributes: Attributes) -> Attributes:
    return {f"expert_pager.{name}": value for name, value in attributes.items()}


def _exporter(env: Mapping[str, str]) -> SpanExporter:
    protocol = env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    if protocol not in PROTOCOLS:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL {protocol!r} is not known; use {' or '.join(PROTOCOLS)}")
    try:
        module = importlib.import_module(f"opentelemetry.exporter.otlp.proto.{PROTOCOLS[protocol]}.trace_exporter")
    except ImportError as error:
        named = next(name for name in ENDPOINTS if env.get(name))
        raise ConfigError(
            f"{named} asks for traces and {error.name} is not installed; pip install 'expert-pager[otel]', or unset it"
        ) from None
    exporter: SpanExporter = module.OTLPSpanExporter()
    return exporter


def _context(carrier: Mapping[str, str]) -> Any:
    """Returns the remote parent's context; an empty one, which begins a new trace, if the header is illegal."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(carrier, context=Context())


def _current() -> Span:
    from opentelemetry.trace import get_current_span

    return get_current_span()
