"""What a client can get wrong: a clear error, nothing lost, and the next request works."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

PROMPT = "def f(x):\n    return "
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


@dataclass(frozen=True)
class Bad:
    """A request, and what is said of it: `value` is what the message has to name."""

    value: str
    field: str
    reason: str = "INVALID_ARGUMENT"
    code: grpc.StatusCode = INVALID
    prompt: str | bytes | list[int] = PROMPT
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def sampling(name: str, value: Any, shown: str | None = None) -> Bad:
    return Bad(shown or repr(value), f"sampling.{name}", options={name: value})


def layers(*counts: int) -> pb.FixedPool:
    return pb.FixedPool(layers=[pb.LayerExperts(experts=range(count)) for count in counts])


BAD = {
    "empty text": Bad("empty", "text", prompt=""),
    "no token ids": Bad("empty", "token_ids", prompt=[]),
    "not UTF-8": Bad("byte 4", "text", prompt=b"good\xff\xfebad"),
    "id out of the vocabulary": Bad("4096", "token_ids", prompt=[1, 4096]),
    "prompt beyond the context": Bad("1030 tokens", "token_ids", "PROMPT_TOO_LONG", prompt=[5] * 1030),
    "answer beyond the context": Bad("1020", "sampling.max_tokens", "PROMPT_TOO_LONG", options={"max_tokens": 1020}),
    "unknown model": Bad("'gpt-9'", "model", "UNKNOWN_MODEL", NOT_FOUND, options={"model": "gpt-9"}),
    "unknown pool": Bad(
        "a" * 24, "pool.digest", "UNKNOWN_POOL", NOT_FOUND, options={"pool": pb.PoolPolicy(digest="a" * 24)}
    ),
    "pool below top-k": Bad("pool of 6", "pool.size", "POOL_TOO_SMALL", options={"pool": 6}),
    "pool beyond the layer": Bad("pool of 128", "pool.size.count", options={"pool": 128}),
    "pool beyond the slots": Bad("needs 600", "pool", "POOL_TOO_LARGE", options={"pool": 100}),
    "fixed pool beyond the slots": Bad(
        "needs 240", "pool", "POOL_TOO_LARGE", options={"pool": pb.PoolPolicy(experts=layers(*[40] * 6))}
    ),
    "fixed pool of other layers": Bad(
        "5 layers", "pool.fixed", options={"pool": pb.PoolPolicy(experts=layers(*[8] * 5))}
    ),
    "share of nothing": Bad("0.0", "pool.size.share", options={"pool": pb.PoolPolicy(share=0.0)}),
    "share not finite": Bad("nan", "pool.size.share", options={"pool": pb.PoolPolicy(share=math.nan)}),
    "mass above one": Bad("1.5", "pool.size.mass", options={"pool": pb.PoolPolicy(mass=pb.Mass(mass=1.5))}),
    "negative temperature": sampling("temperature", -1.0),
    "temperature not finite": sampling("temperature", math.inf),
    "top-p not a number": sampling("top_p", math.nan),
    "top-p above one": sampling("top_p", 1.5),
    "negative top-p": sampling("top_p", -0.5),
    "negative top-k": sampling("top_k", -3),
    "no tokens": sampling("max_tokens", 0),
    "negative max_tokens": sampling("max_tokens", -7),
    "negative seed": sampling("seed", -2),
    "too many stops": sampling("stop", ["x"] * 17, "17"),
    "bad request id": Bad("of 7", "request_id", options={"request_id": "no good"}),
    "bad tenant": Bad("x-tenant-id", "x-tenant-id", options={"tenant": "a b"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_the_next_request_works(idle_service: Any, name: str) -> None:
    bad = BAD[name]
    refused = idle_service.refusal(bad.prompt, **{"max_tokens": 4, **bad.options})
    assert (refused.code, refused.reason, refused.field) == (bad.code, bad.reason, bad.field), refused.message
    assert bad.value in refused.message
    assert refused.retry_s is None, "the same call would fail again"
    assert idle_service.generate(PROMPT, pool=8, max_tokens=2).usage.completion_tokens == 2


def test_a_deadline_that_is_past_ends_the_call_and_holds_nothing(idle_service: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        idle_service.generate(PROMPT, timeout=0.0)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert idle_service.generate(PROMPT, pool=8, max_tokens=2).usage.completion_tokens == 2


def test_a_deadline_ends_a_running_answer_on_the_worker_too(idle_service: Any) -> None:
    before = idle_service.worker_metrics()
    call = idle_service.open(PROMPT, pool=8, max_tokens=1000, timeout=1.0)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    idle_service.wait_until_idle()
    assert ended(idle_service, before)["length"] == 0


def test_a_client_that_goes_mid_stream_frees_kv_and_lease(idle_service: Any) -> None:
    before = idle_service.worker_metrics()
    with grpc.insecure_channel(idle_service.ready["address"]) as channel:
        calls = [idle_service.open(PROMPT, pool=8, max_tokens=1000, channel=channel) for _ in range(2)]
        for call in calls:
            next(call)
        held = idle_service.worker_metrics()
        assert held.total("expert_pager_kv_used_bytes") > 0
        assert held.total("expert_pager_pinned_bytes", tier="device") > 0
    idle_service.wait_until_idle()
    outcomes = ended(idle_service, before)
    assert outcomes["cancelled"] == 2
    assert outcomes["length"] == 0
    assert idle_service.generate(PROMPT, pool=8, max_tokens=2).usage.completion_tokens == 2


def test_a_client_that_reads_nothing_is_cut_off_and_the_others_go_on(
    idle_service: Any, until: Callable[..., None]
) -> None:
    before = idle_service.worker_metrics()
    # As small a window as a client can have, so that an answer of a thousand small messages does not fit into it.
    options = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))
    with grpc.insecure_channel(idle_service.ready["address"], options=options) as channel:
        call = idle_service.open(PROMPT, pool=8, max_tokens=1000, channel=channel)
        next(call)
        until(lambda: ended(idle_service, before)["cancelled"] == 1, 60)
        other = idle_service.generate(PROMPT, pool=8, max_tokens=4)
        assert other.usage.completion_tokens == 4
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    refused = idle_service.refusal_of(caught.value)
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER")
    assert refused.retry_s is None


def ended(service: Any, before: Any) -> dict[str, float]:
    """Requests that have ended on the workers since, by outcome."""
    after = service.worker_metrics()
    names = ("length", "stop", "cancelled", "deadline_exceeded")
    count = "expert_pager_requests_total"
    return {name: after.total(count, outcome=name) - before.total(count, outcome=name) for name in names}
