from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from pager.errors import PagerError
from pager.types import Mass, ModelInfo, SamplingParams
from router_service.openai import CompletionRequest, checked
from tests.router_service.conftest import Running
from tests.support.calls import details, failure, rest, trailer


async def answer(stub: Any, request: pb.GenerateRequest, **call: Any) -> list[pb.GenerateResponse]:
    return [message async for message in stub.Generate(request, **call)]


def text_request(text: str = "abc", *, max_tokens: int = 4, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text.encode(), sampling=pb.SamplingParams(max_tokens=max_tokens), **fields)


async def test_an_answer_can_come_in_one_message(service: Running) -> None:
    wire = text_request(request_id="r1", pool=pb.PoolPolicy(count=3))
    whole = await service.stub.Complete(wire)
    assert (whole.request_id, whole.text, list(whole.token_ids)) == ("r1", "abca", [97, 98, 99, 97])
    assert whole.usage.completion_tokens == 4
    assert whole.usage.pool.num_experts == 6
    service.cluster.fail["w0"] = service.cluster.fail["w1"] = [(2, PagerError("broken"))]
    error = await failure(service.stub.Complete(wire))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert service.pipeline.admission.num_requests == 0


async def test_what_a_request_leaves_out_the_models_settings_say(serve: Callable[..., Any], model: ModelInfo) -> None:
    own = SamplingParams(temperature=0.6, top_k=20, repetition_penalty=1.1)
    async with serve(model=replace(model, sampling=own)) as service:
        await answer(service.stub, text_request())
        await answer(
            service.stub, pb.GenerateRequest(text=b"abc", sampling=pb.SamplingParams(temperature=0.0, max_tokens=2))
        )
    unsaid, said = (request.sampling for _, request in service.cluster.received)
    assert (unsaid.temperature, unsaid.top_k, unsaid.repetition_penalty, unsaid.max_tokens) == (0.6, 20, 1.1, 4)
    assert (said.temperature, said.top_k) == (0.0, 20)


def test_over_http_a_temperature_is_one_where_neither_says_any(model: ModelInfo) -> None:
    own = replace(model, sampling=SamplingParams(temperature=0.6, top_p=0.9))
    for fields, expected in (({}, (0.6, 0.9)), ({"temperature": 0.2, "top_p": 1.0}, (0.2, 1.0))):
        asked = CompletionRequest.read({"model": "m", "prompt": "a", **fields})
        found = checked(asked.sampling_of(8), own, asked)
        assert (found.temperature, found.top_p) == expected
    asked = CompletionRequest.read({"model": "m", "prompt": "a"})
    greedy = replace(model, sampling=SamplingParams(repetition_penalty=1.2))
    found = checked(asked.sampling_of(8), greedy, asked)
    assert (found.temperature, found.repetition_penalty) == (1.0, 1.2)


async def test_a_prompt_can_be_a_string(service: Running) -> None:
    sampling = pb.SamplingParams(max_tokens=3)
    assert (await service.stub.Complete(pb.GenerateRequest(prompt="aé", sampling=sampling))).text == "aÃ©"
    as_text = await service.stub.Route(pb.RouteRequest(text=b"abc", pool=pb.PoolPolicy(count=2)))
    assert await service.stub.Route(pb.RouteRequest(prompt="abc", pool=pb.PoolPolicy(count=2))) == as_text
    examples = [pb.Example(prompt="abc")]
    made = await service.stub.Calibrate(pb.CalibrateRequest(name="p", examples=examples, pool=pb.PoolPolicy(count=2)))
    assert made.pool.pool.digest == as_text.pool.digest
    for wire in (pb.GenerateRequest(prompt=""), pb.GenerateRequest(prompt="x" * 1000)):
        error = await failure(service.stub.Complete(wire))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_answer_streams_and_ends_with_its_usage(service: Running) -> None:
    messages = await answer(service.stub, text_request(request_id="r1", pool=pb.PoolPolicy(count=3)))
    assert "".join(message.text for message in messages) == "abca"
    assert [list(message.token_ids) for message in messages] == [[97], [98], [99], [97]]
    assert {message.request_id for message in messages} == {"r1"}
    assert [message.HasField("usage") for message in messages] == [False, False, False, True]
    usage = messages[-1].usage
    assert usage.mode == pb.ANSWER_MODE_POOL
    assert usage.finish_reason == pb.FINISH_REASON_LENGTH
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 4)
    assert (usage.bytes_from_disk, usage.bytes_from_host, usage.experts_hit, usage.experts_missed) == (5, 7, 11, 13)
    assert (usage.stall_seconds, usage.out_of_pool_mass) == (0.25, 0.125)
    assert (usage.queue_seconds, usage.time_to_first_token_seconds) == (0.5, 0.75)
    assert usage.model_fingerprint == service.pipeline.model.fingerprint
    assert usage.pool.num_experts == 6
    assert [len(layer.experts) for layer in usage.pool.layers] == [0, 3, 3]
    # Scores roll by one between the prediction and the prefill: two of three experts are the same.
    assert usage.predicted_recall == pytest.approx(2 / 3)


async def test_the_worker_gets_the_request_with_its_prediction(service: Running) -> None:
    messages = await answer(
        service.stub,
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[5, 6]),
            sampling=pb.SamplingParams(
                max_tokens=2, temperature=0.5, top_p=0.9, top_k=7, seed=3, stop=["x"], ignore_eos=True
            ),
            pool=pb.PoolPolicy(mass=pb.Mass(mass=0.5, cap=4), source=pb.POOL_SOURCE_PREDICTION),
        ),
        metadata=(("x-tenant-id", "acme"),),
        timeout=30,
    )
    [(_, request)] = service.cluster.received
    assert request.tenant == "acme"
    assert request.prompt_token_ids == (5, 6)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 7)
    assert (request.sampling.seed, request.sampling.stop, request.sampling.ignore_eos) == (3, ("x",), True)
    assert (request.pool.size, request.pool.source) == (Mass(0.5, 4), "prediction")
    assert request.predicted is not None
    assert request.deadline_s is not None
    assert messages[-1].usage.HasField("pool")
    assert not messages[-1].usage.HasField("predicted_recall")  # the prediction is the pool
    assert service.metric("recall_ratio_count", source="trunk") == 0
    assert service.metric("hint_lookups_total", result="miss") == 0


async def test_all_experts_need_no_prediction(service: Running) -> None:
    messages = await answer(service.stub, text_request())
    assert messages[-1].usage.mode == pb.ANSWER_MODE_EXACT
    assert not messages[-1].usage.HasField("pool")
    assert service.scorer.num_calls == 0
    assert service.cluster.received[0][1].deadline_s is None


async def test_an_observed_pool_replaces_the_pass(service: Running) -> None:
    first = await answer(service.stub, text_request(pool=pb.PoolPolicy(count=3)))
    second = await answer(service.stub, text_request(pool=pb.PoolPolicy(count=3)))
    assert service.scorer.num_calls == 1
    assert first[-1].usage.predicted_recall == pytest.approx(2 / 3)
    assert second[-1].usage.predicted_recall == 1
    assert service.metric("hint_lookups_total", result="hit") == 1
    assert service.metric("hint_lookups_total", result="miss") == 1
    # Another policy and another tenant see nothing of it.
    await answer(service.stub, text_request(pool=pb.PoolPolicy(count=4)))
    await answer(service.stub, text_request(pool=pb.PoolPolicy(count=3)), metadata=(("x-tenant-id", "other"),))
    assert service.scorer.num_calls == 3


async def test_a_pool_can_be_asked_for_again_by_its_digest(service: Running) -> None:
    first = await answer(service.stub, text_request(pool=pb.PoolPolicy(count=3)))
    pool = first[-1].usage.pool
    again = await answer(service.stub, text_request("xyz", pool=pb.PoolPolicy(digest=pool.digest)))
    assert again[-1].usage.pool.layers == pool.layers
    stranger = service.stub.Generate(
        text_request(pool=pb.PoolPolicy(digest=pool.digest)), metadata=(("x-tenant-id", "other"),)
    )
    error = await failure(stranger.read())
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert details(error)[ErrorInfo].reason == "UNKNOWN_POOL"


BAD_REQUESTS = {
    "no prompt": (pb.GenerateRequest(), "INVALID_ARGUMENT", "prompt"),
    "empty text": (pb.GenerateRequest(text=b""), "INVALID_ARGUMENT", "text"),
    "empty ids": (pb.GenerateRequest(token_ids=pb.TokenIds()), "INVALID_ARGUMENT", "token_ids"),
    "not UTF-8": (pb.GenerateRequest(text=b"abc\xff"), "INVALID_ARGUMENT", "text"),
    "half a character": (pb.GenerateRequest(text="é".encode()[:1]), "INVALID_ARGUMENT", "text"),
    "id out of vocabulary": (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 256])), "INVALID_ARGUMENT", "token_ids"),
    "ids too long": (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 48)), "PROMPT_TOO_LONG", "token_ids"),
    "text too long": (pb.GenerateRequest(text=b"a" * 48), "PROMPT_TOO_LONG", "text"),
    "answer too long": (text_request("a" * 40, max_tokens=9), "PROMPT_TOO_LONG", "sampling.max_tokens"),
    "unknown model": (text_request(model="gpt"), "UNKNOWN_MODEL", "model"),
    "bad id": (text_request(request_id="a b"), "INVALID_ARGUMENT", "request_id"),
    "long id": (text_request(request_id="a" * 129), "INVALID_ARGUMENT", "request_id"),
    "no tokens": (text_request(max_tokens=0), "INVALID_ARGUMENT", "sampling.max_tokens"),
    "negative tokens": (text_request(max_tokens=-1), "INVALID_ARGUMENT", "sampling.max_tokens"),
    "NaN temperature": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(temperature=float("nan"))),
        "INVALID_ARGUMENT",
        "sampling.temperature",
    ),
    "infinite temperature": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(temperature=float("inf"))),
        "INVALID_ARGUMENT",
        "sampling.temperature",
    ),
    "min_p above 1": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(min_p=1.5)),
        "INVALID_ARGUMENT",
        "sampling.min_p",
    ),
    "a bias for no token": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(logit_bias={10**6: 1.0})),
        "INVALID_ARGUMENT",
        "sampling.logit_bias",
    ),
    "too many alternatives": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(logprobs=21)),
        "INVALID_ARGUMENT",
        "sampling.logprobs",
    ),
    "a schema that is none": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(json_schema="{")),
        "INVALID_ARGUMENT",
        "sampling.json_schema",
    ),
    "no JSON object": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(json_object=False)),
        "INVALID_ARGUMENT",
        "sampling.json_object",
    ),
    "negative top_p": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(top_p=-0.1)),
        "INVALID_ARGUMENT",
        "sampling.top_p",
    ),
    "negative top_k": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(top_k=-1)),
        "INVALID_ARGUMENT",
        "sampling.top_k",
    ),
    "negative seed": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(seed=-1)),
        "INVALID_ARGUMENT",
        "sampling.seed",
    ),
    "empty stop": (
        pb.GenerateRequest(text=b"a", sampling=pb.SamplingParams(stop=[""])),
        "INVALID_ARGUMENT",
        "sampling.stop",
    ),
    "pool below top-k": (text_request(pool=pb.PoolPolicy(count=1)), "POOL_TOO_SMALL", "pool.size"),
    "pool of nothing": (text_request(pool=pb.PoolPolicy(count=0)), "INVALID_ARGUMENT", "pool.size.count"),
    "pool above all": (text_request(pool=pb.PoolPolicy(count=9)), "INVALID_ARGUMENT", "pool.size.count"),
    "share of NaN": (text_request(pool=pb.PoolPolicy(share=float("nan"))), "INVALID_ARGUMENT", "pool.size.share"),
    "share above 1": (text_request(pool=pb.PoolPolicy(share=1.5)), "INVALID_ARGUMENT", "pool.size.share"),
    "mass of 0": (text_request(pool=pb.PoolPolicy(mass=pb.Mass())), "INVALID_ARGUMENT", "pool.size.mass"),
    "cap of 0": (text_request(pool=pb.PoolPolicy(mass=pb.Mass(mass=0.5, cap=0))), "INVALID_ARGUMENT", "pool.size.cap"),
    "predict everything": (
        text_request(pool=pb.PoolPolicy(source=pb.POOL_SOURCE_PREDICTION)),
        "INVALID_ARGUMENT",
        "pool.source",
    ),
    "unknown source": (
        text_request(pool=pb.PoolPolicy(source=cast(pb.PoolSource, 9), count=3)),
        "INVALID_ARGUMENT",
        "pool.source",
    ),
    "fixed without a pool": (
        text_request(pool=pb.PoolPolicy(source=pb.POOL_SOURCE_FIXED)),
        "INVALID_ARGUMENT",
        "pool.fixed",
    ),
    "fixed with a size": (
        text_request(pool=pb.PoolPolicy(count=3, experts=pb.FixedPool())),
        "INVALID_ARGUMENT",
        "pool.size",
    ),
    "fixed but predicted": (
        text_request(pool=pb.PoolPolicy(source=pb.POOL_SOURCE_PREDICTION, experts=pb.FixedPool())),
        "INVALID_ARGUMENT",
        "pool.source",
    ),
    "too few layers": (text_request(pool=pb.PoolPolicy(experts=pb.FixedPool())), "INVALID_ARGUMENT", "pool.fixed"),
    "bad digest": (text_request(pool=pb.PoolPolicy(digest="../../etc")), "INVALID_ARGUMENT", "pool.digest"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bad_input_is_refused_with_its_field_and_the_next_request_works(service: Running, name: str) -> None:
    request, reason, field = BAD_REQUESTS[name]
    error = await failure(service.stub.Generate(request).read())
    expected = grpc.StatusCode.NOT_FOUND if reason == "UNKNOWN_MODEL" else grpc.StatusCode.INVALID_ARGUMENT
    assert error.code() is expected
    found = details(error)
    assert (found[ErrorInfo].reason, found[ErrorInfo].domain) == (reason, "expert-pager")
    assert [violation.field for violation in found[BadRequest].field_violations] == [field]
    assert RetryInfo not in found
    assert service.cluster.received == []
    assert len(await answer(service.stub, text_request())) == 4
    assert service.pipeline.admission.num_requests == 0


@pytest.mark.parametrize(
    "layers", [[[], [0, 1], [0, 1, 8]], [[], [0, 0, 1], [0, 1]], [[0], [0, 1], [0, 1]], [[], [3], [0, 1]], [[], [1, 2]]]
)
async def test_a_fixed_pool_has_to_fit_the_model(service: Running, layers: list[list[int]]) -> None:
    pool = pb.FixedPool(layers=[pb.LayerExperts(experts=layer) for layer in layers])
    error = await failure(service.stub.Generate(text_request(pool=pb.PoolPolicy(experts=pool))).read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)[BadRequest].field_violations[0].field == "pool.fixed"


async def test_bytes_that_are_no_message_are_the_callers_fault(service: Running) -> None:
    call = service.channel.unary_stream("/expert_pager.v1.ExpertPager/Generate", None, None)
    error = await failure(call(b"\xff\xff\xff").read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)[ErrorInfo].reason == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "metadata", [(("x-tenant-id", "a b"),), (("x-tenant-id", "a" * 65),), (("x-tenant-id", "a"),) * 2]
)
async def test_a_tenant_has_one_plain_name(service: Running, metadata: tuple[tuple[str, ...], ...]) -> None:
    error = await failure(service.stub.Generate(text_request(), metadata=metadata).read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)[BadRequest].field_violations[0].field == "x-tenant-id"


async def test_without_max_tokens_an_answer_takes_what_is_left(service: Running) -> None:
    messages = await answer(service.stub, pb.GenerateRequest(text=b"a" * 40))
    assert messages[-1].usage.completion_tokens == 8


async def test_an_id_in_use_is_refused_and_free_again_afterwards(service: Running) -> None:
    service.cluster.hold[1] = asyncio.Event()
    first = service.stub.Generate(text_request(request_id="same"))
    await first.read()
    error = await failure(service.stub.Generate(text_request(request_id="same")).read())
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    service.cluster.hold[1].set()
    assert len(await rest(first)) == 3
    assert len(await answer(service.stub, text_request(request_id="same"))) == 4


async def test_an_id_that_another_tenant_uses_tells_nothing_and_is_free(service: Running) -> None:
    service.cluster.hold[1] = asyncio.Event()
    victims = service.stub.Generate(text_request(request_id="same"), metadata=(("x-tenant-id", "victim"),))
    await victims.read()
    spies = service.stub.Generate(text_request(request_id="same"), metadata=(("x-tenant-id", "spy"),))
    assert (await spies.read()).request_id == "same"
    abort = pb.AbortRequest(request_id="same")
    assert (await service.stub.Abort(abort, metadata=(("x-tenant-id", "spy"),))).aborted
    assert not (await service.stub.Abort(abort, metadata=(("x-tenant-id", "stranger"),))).aborted
    assert service.cluster.aborted == {("same", "spy")}
    service.cluster.hold[1].set()
    assert len(await rest(victims)) == 3
    assert [request.tenant for _, request in service.cluster.received] == ["victim", "spy"]


async def test_the_unexpected_is_internal_and_tells_nothing(service: Running, caplog: pytest.LogCaptureFixture) -> None:
    service.cluster.fail = {"w0": [(0, ValueError("secret prompt"))], "w1": [(0, ValueError("secret prompt"))]}
    error = await failure(service.stub.Generate(text_request(request_id="r7")).read())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    assert details(error)[ErrorInfo].metadata["request_id"] == "r7"
    assert "r7" in caplog.text
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


async def test_who_is_placed_while_another_waits_for_a_store_sees_where_that_one_goes(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = list[str](), asyncio.Event()

    async def is_aborted(id_: str, tenant: str) -> bool:
        asked.append(id_)
        if len(asked) == 2:
            answered.set()
        await answered.wait()
        return False

    monkeypatch.setattr(service.pipeline.stores.claims, "is_aborted", is_aborted)
    await asyncio.gather(answer(service.stub, text_request()), answer(service.stub, text_request()))
    assert sorted(worker for worker, _ in service.cluster.received) == ["w0", "w1"]


async def test_a_worker_lost_before_the_first_chunk_is_replaced(
    service: Running, lost: Callable[[], PagerError]
) -> None:
    service.cluster.fail = {"w0": [(0, lost())]}
    assert len(await answer(service.stub, text_request())) == 4
    assert [worker for worker, _ in service.cluster.received] == ["w0", "w1"]
    assert service.metric("replacements_total") == 1


async def test_a_worker_lost_twice_is_unavailable(service: Running, lost: Callable[[], PagerError]) -> None:
    service.cluster.fail = {"w0": [(0, lost())], "w1": [(0, lost())]}
    error = await failure(service.stub.Generate(text_request()).read())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert len(service.cluster.received) == 2


async def test_a_worker_lost_mid_stream_is_unavailable_with_retry_info(
    service: Running, lost: Callable[[], PagerError]
) -> None:
    service.cluster.fail = {"w0": [(2, lost())]}
    call = service.stub.Generate(text_request())
    assert (await call.read()).text == "a"
    assert (await call.read()).text == "b"
    error = await failure(call.read())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details(error)[RetryInfo].retry_delay.ToMilliseconds() == 500
    assert trailer(error, "grpc-retry-pushback-ms") == "500"
    assert len(await answer(service.stub, text_request())) == 4


async def test_a_stream_that_just_stops_counts_as_a_lost_worker(service: Running) -> None:
    service.cluster.fail = {"w0": [(2, None)]}
    error = await failure(rest(service.stub.Generate(text_request())))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
