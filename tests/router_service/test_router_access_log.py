"""The line that every call leaves: what it says, that refusals do not fill the log, and that no prompt is in it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

from router_service.access_log import EVERY, FEW, MAX_KINDS, WINDOW_S, CallRecorder, Repeats
from router_service.metrics import RouterMetrics

SECRET = b"walrus"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """What was logged of calls, as JSON has it, beside the time that they took."""
    caplog.set_level(logging.INFO, "expert_pager.router")

    def lines() -> list[dict[str, Any]]:
        found = [dict(record.facts) for record in caplog.records if hasattr(record, "facts")]
        assert all(each.pop("took_ms") >= 0 for each in found)
        assert SECRET.decode() not in caplog.text
        return found

    return lines


def wire(**fields: Any) -> pb.GenerateRequest:
    fields.setdefault("text", SECRET)
    fields.setdefault("sampling", pb.SamplingParams(max_tokens=3))
    return pb.GenerateRequest(**fields)


async def ask(service: Any, tenant: str = "acme", **fields: Any) -> int:
    """How many messages came."""
    call = service.stub.Generate(wire(**fields), metadata=(("x-tenant-id", tenant),))
    return len([message async for message in call])


async def test_an_answer_and_its_cost(service: Any, lines: Any) -> None:
    assert await ask(service, pool=pb.PoolPolicy(count=3)) == 3
    (line,) = lines()
    assert line.pop("first_token_ms") > 0
    assert line == {
        "method": "Generate",
        "tenant": "acme",
        "code": "OK",
        "pool": "count:3",
        "prompt_tokens": 6,
        "worker": "w0",
        "completion_tokens": 3,
    }


async def test_a_named_pool_and_a_cancelled_answer(service: Any, lines: Any) -> None:
    examples = [pb.Example(text=SECRET)]
    made = pb.CalibrateRequest(name="law", examples=examples, pool=pb.PoolPolicy(count=4))
    await service.stub.Calibrate(made)
    service.cluster.hold[1] = asyncio.Event()
    call = service.stub.Generate(wire(pool=pb.PoolPolicy(name="law")))
    await call.read()
    call.cancel()
    async with asyncio.timeout(60):
        while len(lines()) < 2:  # noqa: ASYNC110 - the server hears of it in its own time
            await asyncio.sleep(0.005)
    calibrated, cancelled = lines()
    assert calibrated == {
        "method": "Calibrate",
        "tenant": "default",
        "code": "OK",
        "pool": "named:law",
        "prompt_tokens": 6,
    }
    assert (cancelled["code"], cancelled["pool"], cancelled["completion_tokens"]) == ("CANCELLED", "named:law", 1)


async def test_refusals_say_why_and_repeats_are_left_out(service: Any, lines: Any) -> None:
    num_refused = FEW + EVERY
    for _ in range(num_refused):
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(service, sampling=pb.SamplingParams(temperature=-1.0))
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(service, model="another")
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(service, "no such tenant!")
    *alike, last, unknown, nobody = lines()
    refused = {"method": "Generate", "tenant": "acme", "code": "INVALID_ARGUMENT", "reason": "INVALID_ARGUMENT"}
    assert alike == [refused] * FEW
    assert last == {**refused, "left_out": EVERY - 1}
    assert (unknown["reason"], nobody["tenant"]) == ("UNKNOWN_MODEL", "(invalid)")
    assert service.metric("requests_total", method="Generate", code="INVALID_ARGUMENT") == num_refused + 1


async def test_a_refusal_is_found_by_its_request(service: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "expert_pager.router")
    beyond_parsing, beyond_context = SECRET * 10_000, SECRET * 10
    for wrong in ({"text": beyond_parsing}, {"text": beyond_context}, {"model": "x"}, {"pool": pb.PoolPolicy(count=1)}):
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(service, request_id="mine", **wrong)
    messages = [record.message for record in caplog.records if hasattr(record, "facts")]
    assert len(messages) == 4
    assert all(" request_id=mine " in message for message in messages)


def test_what_was_left_out_is_told_in_the_next_minute() -> None:
    now_s = [0.0]
    repeats = Repeats(lambda: now_s[0])
    found = [repeats.left_out(("a",)) for _ in range(FEW + 5)]
    assert found == [0] * FEW + [None] * 5
    assert repeats.left_out(("b",)) == 0
    now_s[0] = WINDOW_S
    assert [repeats.left_out(("a",)) for _ in range(2)] == [5, 0]


def test_names_that_never_repeat_do_not_fill_the_log_nor_the_memory() -> None:
    now_s = [0.0]
    repeats = Repeats(lambda: now_s[0])
    logged = [number for number in range(10 * MAX_KINDS) if repeats.left_out((str(number),)) is not None]
    assert len(logged) < MAX_KINDS + FEW + 9 * MAX_KINDS // EVERY + 1
    assert len(repeats._seen) <= MAX_KINDS + 1
    now_s[0] = WINDOW_S
    assert repeats.left_out(("new",)) == 0


@pytest.mark.parametrize(
    ("lasted_s", "left_s", "code"),
    [
        (1.0, 0.0, "DEADLINE_EXCEEDED"),
        (2.0, 0.008, "DEADLINE_EXCEEDED"),  # 2.002 s are 2.01 on their way
        (60.0, 0.4, "DEADLINE_EXCEEDED"),
        (60.0, 5.0, "CANCELLED"),
        (60.0, None, "CANCELLED"),
    ],
)
def test_a_client_whose_deadline_has_passed_has_not_cancelled(lasted_s: float, left_s: float | None, code: str) -> None:
    now_s = 100.0
    recorder = CallRecorder(metrics := RouterMetrics(), clock=lambda: now_s)
    deadline_s = None if left_s is None else now_s + lasted_s + left_s
    with suppress(asyncio.CancelledError), recorder.call("Generate", "t", deadline_s):
        now_s += lasted_s
        raise asyncio.CancelledError
    labels = {"method": "Generate", "code": code}
    assert metrics.registry.get_sample_value("expert_pager_router_requests_total", labels) == 1
