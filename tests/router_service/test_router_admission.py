from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from google.rpc.error_details_pb2 import QuotaFailure
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pager.errors import NotReady, Overloaded, PagerError, PromptTooLong, TenantOverloaded
from router_service.admission import Admission, AdmissionLimits, Ticket
from tests.support.calls import details, failure, reason, rest, trailer

LIMITS = AdmissionLimits(3, 100, max_requests_per_tenant=2, max_tokens_per_tenant=60, max_bytes=100)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_requests_are_bounded_in_all_and_per_tenant() -> None:
    admission = Admission(LIMITS)
    first, _second = admission.enter("a"), admission.enter("a")
    with pytest.raises(TenantOverloaded, match="'a'"):
        admission.enter("a")
    admission.enter("b")
    with pytest.raises(Overloaded, match="3 requests are in flight"):
        admission.enter("c")
    with first:
        pass
    admission.enter("c")


def test_tokens_are_bounded_in_all_and_per_tenant() -> None:
    admission = Admission(LIMITS)
    with admission.enter("a") as a, admission.enter("a") as another, admission.enter("b") as b:
        a.charge(60)
        with pytest.raises(TenantOverloaded, match="60 of its 60"):
            another.charge(1)
        with pytest.raises(Overloaded, match="60 of 100"):
            b.charge(41)
        b.charge(40)
    assert admission.num_tokens == 0


def test_bytes_are_bounded_in_all_and_per_tenant() -> None:
    admission = Admission(AdmissionLimits(max_bytes=110, max_bytes_per_tenant=60))
    with admission.enter("a", 45), admission.enter("b", 45):
        with pytest.raises(TenantOverloaded, match="45 of its 60 bytes"):
            admission.enter("a", 16)
        with pytest.raises(Overloaded, match="90 of 110"):
            admission.enter("c", 21)
        with pytest.raises(PromptTooLong, match="61 bytes"):
            admission.enter("c", 61)
        with admission.enter("b", 10):
            admission.check_integrity()
    assert (admission.num_requests, admission.num_bytes) == (0, 0)
    admission.check_integrity()


def test_what_never_fits_is_not_worth_a_retry() -> None:
    with Admission(LIMITS).enter("a") as ticket, pytest.raises(PromptTooLong) as caught:
        ticket.charge(61)
    assert not caught.value.retryable


def test_a_refused_charge_holds_nothing() -> None:
    admission = Admission(LIMITS)
    with pytest.raises(PromptTooLong), admission.enter("a") as ticket:
        ticket.charge(1000)
    assert (admission.num_requests, admission.num_tokens) == (0, 0)
    admission.check_integrity()


def test_the_retry_delay_follows_how_long_requests_last() -> None:
    clock = Clock()
    admission = Admission(LIMITS, clock)
    assert admission.retry_after_s() == 1.0
    with admission.enter("a"):
        clock.now_s += 8.0
    assert admission.retry_after_s() == 8.0
    admission.enter("a")
    admission.enter("b")
    assert admission.retry_after_s() == 4.0


def test_closed_admission_lets_go_but_not_in() -> None:
    admission = Admission(LIMITS)
    with admission.enter("a"):
        admission.close()
        with pytest.raises(NotReady):
            admission.enter("b")
    assert admission.num_requests == 0


class AnyOrder(RuleBasedStateMachine):
    """However requests come and go, the bounds hold and the counts are those of the tickets held."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(LIMITS)
        self.held: list[Ticket] = []

    @rule(tenant=st.sampled_from("abc"), tokens=st.integers(0, 80), num_bytes=st.integers(0, 80))
    def arrive(self, tenant: str, tokens: int, num_bytes: int) -> None:
        try:
            ticket = self.admission.enter(tenant, num_bytes)
        except PagerError:
            return
        try:
            ticket.charge(tokens)
        except PagerError:
            ticket.__exit__(None, None, None)
        else:
            self.held.append(ticket)

    @rule(index=st.integers(0, 10))
    def leave(self, index: int) -> None:
        if self.held:
            self.held.pop(index % len(self.held)).__exit__(None, None, None)

    @invariant()
    def counts_are_the_tickets(self) -> None:
        self.admission.check_integrity()
        assert self.admission.num_requests == len(self.held)
        assert self.admission.num_tokens == sum(ticket.tokens for ticket in self.held)
        assert self.admission.num_bytes == sum(ticket.num_bytes for ticket in self.held)


TestAnyOrder = AnyOrder.TestCase


# --- over the wire --------------------------------------------------------------------------------------------------


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=b"abc", sampling=pb.SamplingParams(max_tokens=4), **fields)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    return await failure(call.read())


async def test_beyond_the_bound_requests_are_refused_at_once_and_admitted_again(serve: Callable[..., Any]) -> None:
    async with serve(limits=AdmissionLimits(max_requests=3, max_requests_per_tenant=2)) as service:
        service.cluster.hold[1] = asyncio.Event()
        acme = (("x-tenant-id", "acme"),)
        running = [service.stub.Generate(request(), metadata=acme) for _ in range(2)]
        for call in running:
            await call.read()
        error = await refusal(service.stub.Generate(request(), metadata=acme))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(trailer(error, "grpc-retry-pushback-ms") or 0) > 0
        other = service.stub.Generate(request())
        await other.read()
        error = await refusal(service.stub.Generate(request()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(service.cluster.received) == 3
        assert service.metric("admission_rejections_total", reason="TENANT_OVERLOADED") == 1
        assert service.metric("admission_rejections_total", reason="OVERLOADED") == 1
        service.cluster.hold[1].set()
        for call in (*running, other):
            await rest(call)
        assert (await service.stub.Generate(request(), metadata=acme).read()).text == "a"


async def test_tokens_in_flight_are_bounded(serve: Callable[..., Any]) -> None:
    async with serve(limits=AdmissionLimits(max_tokens=10)) as service:
        service.cluster.hold[1] = asyncio.Event()
        running = service.stub.Generate(request())
        await running.read()
        error = await refusal(service.stub.Generate(request()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "7 of 10" in str(error.details())


async def test_a_tenants_bytes_in_flight_are_bounded_and_others_go_on(serve: Callable[..., Any]) -> None:
    async with serve(limits=AdmissionLimits(max_bytes=200, max_bytes_per_tenant=100)) as service:
        service.cluster.hold[1] = asyncio.Event()
        acme = (("x-tenant-id", "acme"),)
        wire = request(request_id="i" * 70)
        running = service.stub.Generate(wire, metadata=acme)
        await running.read()
        assert service.metric("in_flight_bytes") == wire.ByteSize()
        error = await refusal(service.stub.Generate(request(request_id="j" * 70), metadata=acme))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        quota = details(error)[QuotaFailure]
        assert reason(error) == "TENANT_OVERLOADED"
        assert quota.violations[0].subject == "tenant"
        assert "bytes" in quota.violations[0].description
        other = service.stub.Generate(request(request_id="j" * 70))
        await other.read()
        service.cluster.hold[1].set()
        for call in (running, other):
            await rest(call)
        assert service.metric("in_flight_bytes") == 0
