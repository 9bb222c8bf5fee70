"""Logging of the service's processes: text, or one JSON object per line with the ids of request and trace.

No prompt and no answer is ever logged.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

TRACEPARENT = "traceparent"
OWN = ("pager", "expert_pager", "router_service")
"""The loggers of this project. Other libraries' are heard from warnings on: torch tells of its caches when it ends."""

GRPC = "grpc._cython.cygrpc"  # what gRPC's asyncio server logs by

_TEXT = "%(asctime)s %(levelname).1s %(source)s %(name)s: %(message)s"
_W3C = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<span>[0-9a-f]{16})-[0-9a-f]{2}")

# Of the call that is being answered, the latter as W3C writes it; empty outside of one.
request_id: ContextVar[str] = ContextVar("request_id", default="")
trace_context: ContextVar[str] = ContextVar("trace_context", default="")


def configure(kind: str, source: str) -> None:
    """Sends all that this process logs to stderr from here on, as `kind` ("json" or "text"); `source` names it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(source) if kind == "json" else _text_formatter(source))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(GRPC).addFilter(_is_news)
    for name in OWN:
        logging.getLogger(name).setLevel(logging.INFO)
    if kind == "json":
        logging.captureWarnings(True)  # otherwise it would be the only text on stderr that is not an object


def _is_news(record: logging.LogRecord) -> bool:
    """Returns False for what gRPC logs, with a traceback, when it has a status or a message for a call that has ended.

    Its caller has gone, or gRPC has refused the call itself. A failure of a method is another message.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not (type(error).__name__ == "ExecuteBatchError" and str(record.msg).startswith("ExecuteBatchError raised"))


def traceparent_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Returns the caller's W3C Trace Context, or a new one if it has none or an illegal one."""
    for key, value in metadata or ():
        if key == TRACEPARENT and isinstance(value, str) and _W3C.match(value):
            return value
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"


def trace_id_of(context: str | None) -> str:
    """Returns the trace id of a W3C Trace Context; empty without one."""
    found = _W3C.match(context or "")
    return found["trace"] if found else ""


def facts(**facts: str | int | float | None) -> dict[str, dict[str, Any]]:
    """Returns `extra=` for a log call: values that JSON logs as fields of their own."""
    return {"facts": {name: value for name, value in facts.items() if value is not None}}


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object on one line. Ids are those of the current call, or given as facts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "source": self._source,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
            "trace_id": trace_id_of(trace_context.get()),
        }
        entry |= getattr(record, "facts", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in entry.items() if value != ""}, default=str)


def _text_formatter(source: str) -> logging.Formatter:
    return logging.Formatter(_TEXT, defaults={"source": source})
