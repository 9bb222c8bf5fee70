"""The record of every call, whichever front it arrives by: metrics, its trace, and one log line at its end.

The line says who called what, how it ended, and why it was refused. Its contents are collected while the call runs;
they include neither prompt nor answer. Refusals that repeat are sampled. The audit log records calls that concern
permissions.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pager.errors import ConfigError, PagerError, PermissionDenied, QuotaExceeded, Unauthenticated
from pager.observe import tracing
from pager.observe.logs import facts, request_id
from pager.types import PoolPolicy
from router_service.admission import present, tenant_or_invalid
from router_service.metrics import RouterMetrics
from router_service.requests import PoolByDigest, PoolByName
from router_service.status import code_of
from router_service.ui import size_label

log = logging.getLogger("expert_pager.router")

WINDOW_S = 60.0
FEW = 10  # the first FEW of a kind are logged in each window, and then one in EVERY
EVERY = 100
ON_THE_WAY_S, ROUNDED_UP = 0.02, 0.01  # how much earlier a client's deadline may pass than the router's
MAX_KINDS = 1024  # tenants choose their own names: beyond this number, all kinds count as one

_said: ContextVar[dict[str, Any]] = ContextVar("said")


def tell(**said: str | int | float) -> None:
    """Adds fields to the line of the present call, if there is one."""
    _said.get({}).update(said)


def pool_label(asked: PoolPolicy | PoolByDigest | PoolByName) -> str:
    match asked:
        case PoolByName(name=name):
            return f"named:{name}"
        case PoolByDigest(digest=digest):
            return f"fixed:{digest}"
    return f"fixed:{asked.fixed.digest}" if asked.fixed is not None else size_label(asked)


class AccessLog:
    """Writes the access log. Owns the record of which refusals have been logged lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._repeats = Repeats(clock)

    def begin(self) -> None:
        """Begins the record of a call in this context."""
        _said.set({})

    def end(self, method: str, tenant: str, code: str, error: PagerError | None, seconds: float) -> None:
        """Logs the call that began in this context, unless it is one of many similar refusals."""
        tenant = tenant_or_invalid(tenant)
        said = {"tenant": tenant, "code": code, "reason": error.reason if error else None, **_said.get({})}
        said["took_ms"] = round(1000 * seconds, 1)
        if error is not None and code != "INTERNAL" and "first_token_ms" not in said:
            left_out = self._repeats.left_out((method, tenant, error.reason))
            if left_out is None:
                return
            said["left_out"] = left_out or None
        text = " ".join(f"{name}={value}" for name, value in said.items() if value is not None)
        log.info("%s request_id=%s %s", method, request_id.get(), text, extra=facts(method=method, **said))


AUDIT_FILES = 8  # kept beside the current one
_REFUSALS = (Unauthenticated, PermissionDenied, QuotaExceeded)
_AUDITED = ("Calibrate", "DeletePool", "GetResidency", "Drain")


class _AuditFile(RotatingFileHandler):
    """The file of an audit log, readable by its owner only. When it cannot be written, that is logged now and then."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._complaints = Repeats()
        super().__init__(path, maxBytes=max_bytes, backupCount=AUDIT_FILES, encoding="utf-8")

    def _open(self) -> Any:
        return open(
            self.baseFilename, self.mode, encoding=self.encoding, opener=lambda path, flags: os.open(path, flags, 0o600)
        )

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if self._complaints.left_out(()) is not None:
            log.error("the audit log %s cannot be written: %s", self.baseFilename, getattr(error, "strerror", error))


class AuditLog:
    """Owns the audit file, which records who did what: refusals, changes of pools, and calls of operators.

    It has one JSON object a line, with no prompt and no key, and is rotated by its size. Refusals that repeat are
    sampled.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Opens the file. Raises ConfigError."""
        try:
            file = _AuditFile(path, max_bytes)
        except OSError as error:
            raise ConfigError(
                f"router.audit_log {path} cannot be written: {error.strerror or error}; name a file that can be written"
            ) from None
        queue: SimpleQueue[logging.LogRecord] = SimpleQueue()
        self._queue = QueueHandler(queue)
        self._writer = QueueListener(queue, file)  # in a thread, because disks can be slow
        self._file = file
        self._writer.start()
        self._repeats = Repeats()

    def record(self, method: str, code: str, error: PagerError | None, peer: str) -> None:
        """Writes a line about a call of this context that has ended, if it belongs in the audit log."""
        caller = present.get()
        left_out: int | None = 0
        if isinstance(error, _REFUSALS):
            left_out = self._repeats.left_out((method, caller.id if caller else "", error.reason))
        elif method not in _AUDITED and not (caller is not None and caller.acts_for_another):
            return
        if left_out is None:
            return
        line: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "what": method}
        line |= {"outcome": code, "reason": error.reason if error is not None else None, "peer": peer[:100]}
        if caller is not None:
            line |= {"key": caller.id, "tenant": caller.tenant}
        said = _said.get({})
        line |= {"pool": said.get("pool"), "request_id": request_id.get() or None, "left_out": left_out or None}
        text = json.dumps({name: value for name, value in line.items() if value is not None}, ensure_ascii=True)
        self._queue.handle(logging.LogRecord("audit", logging.INFO, "", 0, text, None, None))

    def close(self) -> None:
        """Writes what is still to be written, and closes the file."""
        self._writer.stop()
        with suppress(OSError):  # the failure was logged when the file could not be written
            self._file.close()


@dataclass(slots=True)
class Outcome:
    """The end of a call. `error` is for its front to turn into an answer; `code` is the name of a gRPC status code."""

    code: str = "OK"
    error: PagerError | None = None


class CallRecorder:
    """Records calls from arrival to end. What a block raises, except cancellation, becomes the call's outcome."""

    def __init__(
        self, metrics: RouterMetrics, audit: AuditLog | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._access_log = AccessLog(clock)
        self._audit = audit
        self._clock = clock

    @contextmanager
    def call(
        self, method: str, tenant: str, deadline_s: float | None = None, peer: Callable[[], str] = lambda: ""
    ) -> Iterator[Outcome]:
        """Records the call that this context is for.

        `tenant` is what the caller claims, until the caller is known; `deadline_s` is monotonic.
        """
        started_s = self._clock()
        request_id.set("")
        present.set(None)
        self._access_log.begin()
        self._metrics.began(method)
        outcome, failure = Outcome(), None
        try:
            yield outcome
        except asyncio.CancelledError:
            outcome.code = "DEADLINE_EXCEEDED" if is_late(self._clock(), started_s, deadline_s) else "CANCELLED"
            raise
        except PagerError as error:
            outcome.code, outcome.error = code_of(error).name, error
            failure = error
            if error.is_refusal:
                self._metrics.refused(error.reason)
        except Exception as error:
            # Not the message: it can quote the user's text.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s request_id=%s failed with %s\n%s", method, request_id.get(), type(error).__name__, frames)
            outcome.error = PagerError("internal error; see the service's log under the request id")
            outcome.code = code_of(outcome.error).name
        finally:
            tracing.end_call(outcome.code)
            caller = present.get()
            if caller is not None:
                tenant = caller.tenant
                if caller.id:
                    tell(key=caller.id)
            if self._audit is not None:
                self._audit.record(method, outcome.code, outcome.error, peer())
            self._metrics.ended(method, outcome.code, tenant)
            self._access_log.end(method, tenant, outcome.code, failure, self._clock() - started_s)


def is_late(now_s: float, arrived_s: float, deadline_s: float | None) -> bool:
    """Tells whether a call that its client has ended had reached its deadline, which passes slightly earlier at the
    client.

    gRPC rounds the time of a call up by at most a hundredth, and counts it from the call's arrival.
    """
    return deadline_s is not None and deadline_s - now_s <= ON_THE_WAY_S + ROUNDED_UP * (deadline_s - arrived_s)


class Repeats:
    """Decides which of many events of a kind are logged: the first few of a minute, then one in many."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[tuple[str, ...], _Seen] = {}

    def left_out(self, kind: tuple[str, ...]) -> int | None:
        """Returns how many events of a kind were omitted since the last logged one; None to omit this one, too."""
        now_s = self._clock()
        if kind not in self._seen and len(self._seen) >= MAX_KINDS:
            self._seen = {each: seen for each, seen in self._seen.items() if now_s - seen.started_s < WINDOW_S}
            kind = kind if len(self._seen) < MAX_KINDS else ()
        seen = self._seen.setdefault(kind, _Seen(now_s))
        if now_s - seen.started_s >= WINDOW_S:
            seen.started_s, seen.count = now_s, 0
        seen.count += 1
        if seen.count > FEW and (seen.count - FEW) % EVERY:
            seen.left_out += 1
            return None
        left_out, seen.left_out = seen.left_out, 0
        return left_out


class _Seen:
    """The count of events of one kind since `started_s`."""

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.count = 0
        self.left_out = 0
