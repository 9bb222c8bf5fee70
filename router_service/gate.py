"""Who gets in: admission, with what it refuses counted, and the call's deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from pager.errors import DeadlineExceeded, NotReady, Overloaded
from router_service.admission import Admission, Ticket
from router_service.metrics import RouterMetrics

Context = grpc.aio.ServicerContext[Any, Any]


class Gate:
    """Admission as the methods use it."""

    def __init__(self, admission: Admission, metrics: RouterMetrics) -> None:
        self._admission = admission
        self._metrics = metrics

    def admit(self, tenant: str) -> Ticket:
        """Raises NotReady, Overloaded or TenantOverloaded."""
        with self.counting_rejections():
            return self._admission.enter(tenant)

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """Raises Overloaded, TenantOverloaded or PromptTooLong."""
        with self.counting_rejections():
            ticket.charge(tokens)

    @contextmanager
    def counting_rejections(self) -> Iterator[None]:
        try:
            yield
        except (Overloaded, NotReady, DeadlineExceeded) as error:
            self._metrics.rejections.labels(error.reason).inc()
            raise


def deadline_unix_s(context: Context) -> float | None:
    """When the call's deadline passes. Raises DeadlineExceeded if it has."""
    remaining_s = context.time_remaining()
    if remaining_s is None:
        return None
    if remaining_s <= 0:
        raise DeadlineExceeded("the deadline was past when the request arrived; allow more time")
    return time.time() + remaining_s


def remaining_s(deadline_unix_s: float | None) -> float | None:
    return None if deadline_unix_s is None else deadline_unix_s - time.time()
