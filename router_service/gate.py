"""Who gets in: admission, with what it refuses marked as refused, and the call's deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from pager.errors import DeadlineExceeded, NotReady, Overloaded
from router_service.admission import Admission, Ticket

Context = grpc.aio.ServicerContext[Any, Any]


class Gate:
    """Admission as the methods use it."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def admit(self, tenant: str, num_bytes: int) -> Ticket:
        """`num_bytes`: of the request's message. Raises NotReady, Overloaded, TenantOverloaded or PromptTooLong."""
        with refusing():
            return self._admission.enter(tenant, num_bytes)

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """Raises Overloaded, TenantOverloaded or PromptTooLong."""
        with refusing():
            ticket.charge(tokens)


@contextmanager
def refusing() -> Iterator[None]:
    """What is raised in here for want of room or time turns the call away before anything was done for it."""
    try:
        yield
    except (Overloaded, NotReady, DeadlineExceeded) as error:
        error.is_refusal = True
        raise


def deadline_of(context: Context) -> float | None:
    """When the call's deadline passes, on the monotonic clock. Raises DeadlineExceeded if it has."""
    remaining_s = context.time_remaining()
    if remaining_s is None:
        return None
    with refusing():
        if remaining_s > 0:
            return time.monotonic() + remaining_s
        raise DeadlineExceeded("the deadline was past when the request arrived; allow more time")


def remaining_s(deadline_s: float | None) -> float | None:
    return None if deadline_s is None else deadline_s - time.monotonic()
