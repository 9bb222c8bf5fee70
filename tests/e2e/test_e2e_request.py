"""The life of a request, from a client's socket to the worker and back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tokenizers import Tokenizer

from pager import Count
from pager.models.open_model import OpenModel
from pager.pools.pick import parse_pool_size, pick_pool
from pager.predict.fitted import FittedPredictor, PredictorFile
from pager.predict.trunk import TrunkPredictor

CODE = "def mean(values):\n    total = 0\n    for value in values:\n"
LAW = "The court finds that the defendant, having been duly notified, "
VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and "
SERVING = 1
STORED_EXPERT_BYTES = 3 * 128 * 32 * 2  # the model is stored in bf16


@pytest.mark.parametrize("prompt", [CODE, LAW, VERSE], ids=["code", "law", "verse"])
@pytest.mark.parametrize("pool", [None, 16, "12.5%", "mass:0.5:24"])
def test_the_stream_is_what_generate_gives(
    idle_service: Any, reference: Callable[..., list[int]], tokenizer: Tokenizer, prompt: str, pool: Any
) -> None:
    policies = {
        16: pb.PoolPolicy(count=16),
        "12.5%": pb.PoolPolicy(share=0.125),
        "mass:0.5:24": pb.PoolPolicy(mass=pb.Mass(mass=0.5, cap=24)),
    }
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    started_s = time.monotonic()
    answer = idle_service.generate(prompt, pool=policies.get(pool), max_tokens=24)
    took_s = time.monotonic() - started_s
    assert answer.tokens == reference(prompt_ids, 24, pool)
    assert answer.text == tokenizer.decode(answer.tokens)

    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt_ids), 24)
    assert usage.finish_reason == pb.FINISH_REASON_LENGTH
    assert usage.model_fingerprint == idle_service.stub.GetModel(pb.GetModelRequest()).fingerprint
    assert 0 <= usage.queue_seconds <= usage.time_to_first_token_seconds <= took_s
    assert 0 <= usage.stall_seconds <= took_s
    assert usage.experts_hit + usage.experts_missed > 0
    assert usage.bytes_from_host == 0
    assert usage.bytes_from_disk % STORED_EXPERT_BYTES == 0
    if pool is None:
        assert usage.mode == pb.ANSWER_MODE_EXACT
        assert not usage.HasField("pool")
        assert not usage.HasField("predicted_recall")
        return
    assert usage.mode in (pb.ANSWER_MODE_POOL, pb.ANSWER_MODE_DEGRADED)
    assert usage.pool.num_experts == sum(len(layer.experts) for layer in usage.pool.layers)
    assert usage.experts_missed <= usage.pool.num_experts + 6 * 24, "a pool is paged once, not at every token"
    assert 0 < usage.pool.covered_mass <= 1
    assert 0 <= usage.predicted_recall <= 1
    assert 0 < usage.out_of_pool_mass < 1


def test_token_ids_are_a_prompt_too_and_tokens_come_one_by_one(idle_service: Any, tokenizer: Tokenizer) -> None:
    prompt_ids = tokenizer.encode(CODE, add_special_tokens=False).ids
    call = idle_service.open(prompt_ids, pool=16, max_tokens=400)
    messages = []
    for message in call:
        messages.append(message)
        if len(messages) == 1:
            assert idle_service.metrics("router").total("expert_pager_router_requests_in_flight") == 1
    assert [len(message.token_ids) for message in messages] == [1] * 400
    assert len({message.request_id for message in messages}) == 1
    assert [token for message in messages for token in message.token_ids] == idle_service.generate(
        CODE, pool=16, max_tokens=400
    ).tokens


def test_a_seed_repeats_an_answer_and_another_seed_does_not(idle_service: Any) -> None:
    def sampled(seed: int) -> list[int]:
        options = {"pool": 16, "max_tokens": 24, "temperature": 1.0, "top_p": 0.95, "top_k": 200}
        return list(idle_service.generate(VERSE, seed=seed, **options).tokens)

    assert sampled(1) == sampled(1) != sampled(2)


def test_an_answer_ends_before_its_stop_string(idle_service: Any) -> None:
    whole = idle_service.generate(LAW, pool=16, max_tokens=24).text
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    answer = idle_service.generate(LAW, pool=16, max_tokens=24, stop=[stop])
    assert answer.text == whole[: whole.index(stop)]
    assert answer.usage.finish_reason == pb.FINISH_REASON_STOP
    assert answer.usage.completion_tokens < 24


def test_log_probabilities_and_a_bias_travel_both_ways(idle_service: Any, tokenizer: Tokenizer) -> None:
    options = {"logprobs": 2, "prompt_logprobs": 0, "logit_bias": {5: 100.0}, "stop_token_ids": [6]}
    messages = list(idle_service.open(LAW, pool=16, max_tokens=4, **options))
    assert [token for message in messages for token in message.token_ids] == [5] * 4
    prompt = [token for message in messages for token in message.prompt_logprobs]
    assert [token.token_id for token in prompt] == tokenizer.encode(LAW, add_special_tokens=False).ids[1:]
    answer = [token for message in messages for token in message.logprobs]
    assert [(token.token_id, len(token.top_ids), len(token.top_logprobs)) for token in answer] == [(5, 2, 2)] * 4
    # The model's own distribution, which the bias has no part in.
    assert all(token.logprob < token.top_logprobs[0] < 0 for token in answer)


def test_an_answer_is_held_to_a_schema_and_a_grammar_that_is_none_fails_its_call(idle_service: Any) -> None:
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = json.dumps({"type": "object", "properties": {"n": number}, "required": ["n"]})
    answer = idle_service.generate(CODE, pool=16, max_tokens=40, ignore_eos=False, json_schema=schema)
    assert 0 <= json.loads(answer.text)["n"] <= 99
    assert answer.usage.finish_reason == pb.FINISH_REASON_STOP
    for bad in ({"regex": "a(b"}, {"json_schema": "{"}, {"ebnf": "root ::= ("}):
        with pytest.raises(grpc.RpcError, match=f"sampling.{next(iter(bad))}") as caught:
            idle_service.generate(CODE, pool=16, max_tokens=4, ignore_eos=False, **bad)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_route_predicts_a_pool_and_moves_nothing(idle_service: Any, model: Path, tokenizer: Tokenizer) -> None:
    names = ("expert_pager_transfer_bytes_total", "expert_pager_lookups_total", "expert_pager_step_tokens_total")
    before = idle_service.settled(*names)
    with idle_service.client("router") as client:
        route = client.route(LAW, Count(31))
    with OpenModel.open(model).checkpoint as checkpoint:
        file = PredictorFile.load(model, checkpoint.fingerprint)
    trunk = TrunkPredictor.load(model, dtype="float32", stand_ins=file.stand_ins)
    router = FittedPredictor(file, trunk)
    scores = router.scores(tokenizer.encode(LAW, add_special_tokens=False).ids)
    for mine, theirs in zip(scores.mean_LR, route.scores, strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-6)
    assert route.pool is not None
    assert route.pool.digest == pick_pool(scores, parse_pool_size(31), trunk.facts).digest
    assert route.worker == "worker-0"
    assert idle_service.settled(*names) == before

    for pool in (pb.PoolPolicy(count=31, source=pb.POOL_SOURCE_PREDICTION), pb.PoolPolicy(digest=route.pool.digest)):
        answer = idle_service.generate(LAW, pool=pool, max_tokens=4, tenant="router")
        assert answer.usage.pool.digest == route.pool.digest
    chosen = idle_service.generate(LAW, pool=31, max_tokens=4, tenant="router").usage.pool
    with idle_service.client("router") as client:
        again = client.route(LAW, Count(31))
    assert again.observed is not None
    assert again.observed.digest == chosen.digest
    assert idle_service.refusal(LAW, pool=pb.PoolPolicy(digest=chosen.digest), tenant="else").reason == "UNKNOWN_POOL"


def test_get_model_says_what_may_be_asked_for(idle_service: Any, model: Path) -> None:
    found = idle_service.stub.GetModel(pb.GetModelRequest(model=model.name))
    plan = idle_service.plan
    assert found.name == model.name
    assert (found.context_length, found.vocab_size, found.kv_token_limit) == (1024, 4096, plan["kv_tokens"])
    assert found.tokenizer.sha256
    assert (found.pool_sizes.min_routed, found.pool_sizes.max_routed) == (7, 127)
    assert found.pool_sizes.slots == plan["num_slots"]
    assert f"{plan['num_slots']} of {plan['num_routed']} routed experts" in found.plan
    idle_service.generate(CODE, pool=found.pool_sizes.min_routed, max_tokens=2)


def test_residency_shows_the_pool_that_was_just_used(idle_service: Any, until: Callable[..., None]) -> None:
    usage = idle_service.generate(VERSE, pool=16, max_tokens=2).usage

    def is_shown() -> bool:
        worker = idle_service.residency()["worker-0"]
        held = [{e for e in range(127) if bitmap[e // 8] >> e % 8 & 1} for bitmap in worker.resident]
        assert sum(map(len, held)) == worker.resident_experts <= worker.slots
        return all(set(layer.experts) <= experts for layer, experts in zip(usage.pool.layers, held, strict=True))

    until(is_shown, 30)
    worker = idle_service.residency()["worker-0"]
    assert (worker.state, worker.slots, worker.remote) == ("ready", idle_service.plan["num_slots"], False)

    def is_what_the_worker_says() -> bool:
        """In time: the router hears of it once a second, and experts asked for ahead come after their request."""
        worker = idle_service.residency()["worker-0"]
        resident = idle_service.worker_metrics().total("expert_pager_resident_bytes", tier="device")
        return bool(resident == worker.resident_experts * worker.expert_bytes)

    until(is_what_the_worker_says, 30)


def test_an_abort_ends_the_tenants_own_request_at_once_and_may_be_repeated(idle_service: Any) -> None:
    def abort(tenant: str) -> bool:
        with idle_service.client(tenant) as client:
            return bool(client.abort("mine"))

    call = idle_service.open(CODE, pool=16, max_tokens=900, request_id="mine", tenant="me")
    next(call)
    assert not abort("you")
    next(call)
    assert abort("me")
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    idle_service.wait_until_idle()
    assert not abort("me")
    assert idle_service.generate(CODE, max_tokens=2, request_id="mine", tenant="me").usage.completion_tokens == 2


def test_a_request_id_in_use_is_refused(idle_service: Any) -> None:
    call = idle_service.open(CODE, pool=16, max_tokens=900, request_id="twice", tenant="me")
    next(call)
    refused = idle_service.refusal(CODE, max_tokens=2, request_id="twice", tenant="me")
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
    assert (refused.field, "'twice'" in refused.message) == ("request_id", True)
    assert idle_service.generate(CODE, max_tokens=2, request_id="twice", tenant="you").usage.completion_tokens == 2
    next(call)
    call.cancel()
    idle_service.wait_until_idle()
    assert idle_service.generate(CODE, max_tokens=2, request_id="twice").usage.completion_tokens == 2


def test_health_and_reflection(idle_service: Any) -> None:
    assert idle_service.health("") == idle_service.health() == SERVING
    services = set(ProtoReflectionDescriptorDatabase(idle_service.channel).get_services())
    assert {"expert_pager.v1.ExpertPager", "grpc.health.v1.Health"} <= services
