"""Keys and values that are taken over from requests that began alike: who may, when, and that answers stay the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from pager.engine.kv import BLOCK_TOKENS, PrefixKeys
from pager.engine.runner import ModelRunner
from pager.errors import Cancelled
from pager.types import Count, DriftAction, DriftPolicy, ExpertPool, Full, PoolPolicy, PoolSource
from tests.engine.conftest import Driver
from tests.support.checkpoints import lively, saved

pytestmark = pytest.mark.slow

Prompts = Callable[[int, int], list[int]]
Pools = Callable[..., ExpertPool]
Drivers = Callable[..., Driver]

EXACT = PoolPolicy(Full())
CHOSEN = PoolPolicy(Count(3))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A team of threads waits for its last one, which takes seconds a step on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fixed(pool: ExpertPool) -> PoolPolicy:
    return PoolPolicy(Count(3), PoolSource.FIXED, pool)


def cached(driver: Driver, request_id: str) -> int:
    return driver.usage(request_id).cached_prompt_tokens


def answer(driver: Driver, prompt: Sequence[int], pool: PoolPolicy, *, max_tokens: int = 8, tenant: str = "t") -> str:
    request_id = driver.submit(prompt, pool, max_tokens=max_tokens, tenant=tenant)
    driver.finish()
    return request_id


# --- keys ---------------------------------------------------------------------------------------------------------


def test_a_key_stands_for_all_tokens_before_the_pool_and_the_tenant() -> None:
    tokens = list(range(2 * BLOCK_TOKENS))
    pool = ExpertPool(((0, 1), (2,)))

    def last(tokens: list[int], pool: ExpertPool | None, tenant: str | None, is_long: bool = False) -> bytes:
        keys = PrefixKeys(pool, tenant, is_long=is_long)
        keys.extend(tokens)
        return keys.between(0, len(keys))[-1]

    keys = {
        last(tokens, pool, "t"),
        last(tokens, None, "t"),
        last(tokens, ExpertPool(((0,), (1, 2))), "t"),
        last(tokens, pool, "u"),
        last(tokens, pool, None),
        last(tokens, pool, "t", is_long=True),
        last([1, *tokens[1:]], pool, "t"),
        last(tokens[BLOCK_TOKENS:], pool, "t"),
    }
    assert len(keys) == 8
    assert last(tokens, ExpertPool(((1, 0), (2,)), 0.5), "t") == last(tokens, pool, "t")


def test_keys_that_grow_with_a_request_are_those_of_all_of_it() -> None:
    tokens = list(range(3 * BLOCK_TOKENS + 5))
    growing, whole = PrefixKeys(None, "t"), PrefixKeys(None, "t")
    growing.extend(tokens[: BLOCK_TOKENS + 3])
    growing.extend(tokens[BLOCK_TOKENS:])
    whole.extend(tokens)
    assert growing.between(0, 9) == whole.between(0, 9)
    assert len(growing) == len(whole) == 3


# --- who takes over what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "fixed"])
def test_a_conversation_runs_only_what_is_new(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, mode: str
) -> None:
    pool = EXACT if mode == "exact" else fixed(random_pool(1))
    driver, fresh = make_driver(), make_driver(prefix_cache=False)
    prompt = random_prompt(1, 50)
    for turn in range(4):
        request, alone = answer(driver, prompt, pool), answer(fresh, prompt, pool)
        assert driver.tokens(request) == fresh.tokens(alone)
        assert cached(fresh, alone) == 0
        # All full blocks of what was run before: the answer's last token was not.
        before = len(prompt) - 20 - 1 if turn else 0
        assert cached(driver, request) == before // BLOCK_TOKENS * BLOCK_TOKENS
        assert driver.usage(request).prompt_tokens == len(prompt)
        prompt = [*prompt, *driver.tokens(request), *random_prompt(10 + turn, 20)]
    driver.assert_nothing_held()
    assert driver.engine.status().kv_blocks_cached > 0
    assert fresh.engine.status().kv_blocks_cached == 0


def test_a_prompt_that_is_cached_whole_runs_its_last_block_for_the_logits(
    make_driver: Drivers, random_prompt: Prompts
) -> None:
    driver = make_driver()
    prompt = random_prompt(1, 4 * BLOCK_TOKENS)
    first, again = answer(driver, prompt, EXACT), answer(driver, prompt, EXACT)
    longer = answer(driver, [*prompt, 7], EXACT)
    assert driver.tokens(again) == driver.tokens(first)
    assert cached(driver, again) == 3 * BLOCK_TOKENS
    assert cached(driver, longer) == 4 * BLOCK_TOKENS


def test_only_the_same_experts_and_the_same_tenant_share(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools
) -> None:
    driver, prompt = make_driver(), random_prompt(1, 40)
    pool = random_pool(1)
    answer(driver, prompt, fixed(pool))
    others = [
        answer(driver, prompt, fixed(random_pool(2))),
        answer(driver, prompt, EXACT),
        answer(driver, prompt, CHOSEN),
        answer(driver, prompt, fixed(pool), tenant="another"),
        answer(driver, [1 + prompt[0] % 255, *prompt[1:]], fixed(pool)),
    ]
    assert [cached(driver, each) for each in others] == [0] * len(others)
    assert cached(driver, answer(driver, prompt, fixed(pool))) == 2 * BLOCK_TOKENS
    assert cached(driver, answer(driver, prompt, fixed(replace(pool, covered_mass=0.5)))) == 2 * BLOCK_TOKENS


def test_a_predicted_pool_shares_with_a_fixed_one(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools
) -> None:
    driver, prompt, pool = make_driver(), random_prompt(1, 40), random_pool(1)
    answer(driver, prompt, fixed(pool))
    again = driver.submit(prompt, PoolPolicy(Count(3), PoolSource.PREDICTION), predicted=pool, max_tokens=4)
    driver.finish()
    assert cached(driver, again) == 2 * BLOCK_TOKENS


def test_tenants_share_where_the_operator_says_so(make_driver: Drivers, random_prompt: Prompts) -> None:
    driver, prompt = make_driver(share_prefixes=True), random_prompt(1, 40)
    answer(driver, prompt, EXACT)
    assert cached(driver, answer(driver, prompt, EXACT, tenant="another")) == 2 * BLOCK_TOKENS


def test_a_pool_that_a_prefill_chose_is_shared_once_it_is_asked_for(
    make_driver: Drivers, random_prompt: Prompts
) -> None:
    driver, fresh, prompt = make_driver(), make_driver(prefix_cache=False), random_prompt(1, 40)
    chosen = answer(driver, prompt, CHOSEN)
    assert cached(driver, answer(driver, prompt, CHOSEN)) == 0, "the pool depends on the whole prompt"
    pool = driver.usage(chosen).pool
    assert pool is not None
    longer = [*prompt, *driver.tokens(chosen), *random_prompt(2, 9)]
    again = answer(driver, longer, fixed(pool))
    assert cached(driver, again) == (40 + 7) // BLOCK_TOKENS * BLOCK_TOKENS
    assert driver.tokens(again) == fresh.tokens(answer(fresh, longer, fixed(pool)))


def test_drift_that_changes_a_pool_ends_what_is_shared(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools
) -> None:
    driver, prompt, pool = make_driver(), random_prompt(1, 3 * BLOCK_TOKENS), random_pool(1)
    policy = replace(fixed(pool), drift=DriftPolicy(1e-6, DriftAction.EXACT, 8))
    drifted = answer(driver, prompt, policy, max_tokens=60)
    report = driver.usage(drifted).drift
    assert report is not None
    assert report.exact_from is not None
    assert report.exact_from < 2 * BLOCK_TOKENS
    longer = [*prompt, *driver.tokens(drifted), 7]
    under_the_pool = 3 * BLOCK_TOKENS + report.exact_from - 1  # tokens that ran before all experts were there
    assert cached(driver, answer(driver, longer, fixed(pool))) == under_the_pool // BLOCK_TOKENS * BLOCK_TOKENS
    assert cached(driver, answer(driver, longer, EXACT)) == 0


def test_log_probabilities_of_a_prompt_take_all_of_it(make_driver: Drivers, random_prompt: Prompts) -> None:
    driver, prompt = make_driver(), random_prompt(1, 40)
    answer(driver, prompt, EXACT)
    told = driver.submit(prompt, EXACT, max_tokens=2, prompt_logprobs=1)
    driver.finish()
    assert cached(driver, told) == 0
    assert sum(len(chunk.prompt_logprobs) for chunk in driver.chunks[told]) == len(prompt) - 1
    assert cached(driver, answer(driver, prompt, EXACT)) == 2 * BLOCK_TOKENS


def test_an_exact_prompt_that_pages_takes_over_what_leaves_a_rest_for_one_forward(
    make_driver: Drivers, random_prompt: Prompts
) -> None:
    driver = make_driver(20, prefill_chunk_tokens=32)  # a third of the experts
    prompt = random_prompt(1, 64)
    answer(driver, prompt, EXACT, max_tokens=1)
    assert cached(driver, answer(driver, [*prompt, *random_prompt(2, 33)], EXACT)) == 0
    forwards = driver.engine.status().progress
    short = answer(driver, [*prompt, *random_prompt(3, 32)], EXACT, max_tokens=1)
    assert cached(driver, short) == 64
    assert driver.engine.status().progress > forwards


# --- answers stay the same ----------------------------------------------------------------------------------------


def test_logits_after_a_prefix_that_was_taken_over_are_those_of_running_it_in_parts(
    make_driver: Drivers, random_prompt: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits: list[torch.Tensor] = []
    prefill = ModelRunner.prefill

    def kept(self: ModelRunner, *arguments: object, **options: object) -> torch.Tensor:
        logits.append(prefill(self, *arguments, **options))  # type: ignore[arg-type]
        return logits[-1]

    monkeypatch.setattr(ModelRunner, "prefill", kept)
    driver, parts = make_driver(), make_driver(prefix_cache=False, prefill_chunk_tokens=2 * BLOCK_TOKENS)
    whole = make_driver(prefix_cache=False)
    prompt = random_prompt(1, 3 * BLOCK_TOKENS)
    answer(driver, prompt[: 2 * BLOCK_TOKENS], EXACT, max_tokens=1)
    found = {}
    for name, each in {"taken over": driver, "in parts": parts, "whole": whole}.items():
        answer(each, prompt, EXACT, max_tokens=1)
        found[name] = logits[-1]
    assert torch.equal(found["taken over"], found["in parts"]), "the same kernels on the same shapes"
    torch.testing.assert_close(found["taken over"], found["whole"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_memory", ["4MiB", "320KiB"])
def test_requests_in_company_are_answered_as_without_the_cache(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, kv_memory: str
) -> None:
    """Conversations of two tenants in four pools with common beginnings; some are cancelled, some fail; in the smaller
    memory blocks are evicted all the time.
    """
    driver = make_driver(36, kv_memory=kv_memory, max_running=6)
    fresh = make_driver(36, kv_memory=kv_memory, max_running=1, prefix_cache=False)
    dice = random.Random(1)
    policies = [EXACT, CHOSEN, fixed(random_pool(1)), fixed(random_pool(2))]
    common = random_prompt(0, 40)
    talks = [(policies[number % 4], f"tenant {number % 2}", [*common, number]) for number in range(8)]
    for _ in range(3):
        asked, doomed = [], []
        for number, (pool, tenant, prompt) in enumerate(talks):
            asked.append(driver.submit(prompt, pool, max_tokens=12, tenant=tenant))
            if number % 3 == 0:
                doomed.append((driver.submit([*prompt, 1, 2, 3], pool, max_tokens=40, tenant=tenant), tenant))
        for request_id, tenant in doomed:
            for _ in range(dice.randrange(12)):
                driver.engine.step()
            driver.engine.cancel(request_id, tenant)
        driver.finish()
        driver.engine._blocks.check_integrity()
        for number, ((pool, tenant, prompt), request_id) in enumerate(zip(list(talks), asked, strict=True)):
            alone = answer(fresh, prompt, pool, max_tokens=12, tenant=tenant)
            assert driver.tokens(request_id) == fresh.tokens(alone)
            talks[number] = (pool, tenant, [*prompt, *driver.tokens(request_id), *random_prompt(number, 7)])
    assert all(isinstance(error, Cancelled) for error in driver.failures.values())
    assert any(cached(driver, request_id) for request_id in asked)
    driver.assert_nothing_held()


def test_a_prompt_whose_forward_failed_leaves_nothing(
    make_driver: Drivers, random_prompt: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, prompt = make_driver(prefill_chunk_tokens=16), random_prompt(1, 40)
    prefill = ModelRunner.prefill
    calls: list[int] = []

    def broken(self: ModelRunner, *arguments: object, **options: object) -> torch.Tensor:
        result = prefill(self, *arguments, **options)  # type: ignore[arg-type]
        calls.append(len(calls))
        return result * torch.nan if len(calls) == 3 else result

    monkeypatch.setattr(ModelRunner, "prefill", broken)
    failed = answer(driver, prompt, EXACT)
    assert failed in driver.failures
    assert driver.engine.status().kv_blocks_cached == 0
    good = answer(driver, prompt, EXACT)
    assert cached(driver, good) == 0
    assert len(driver.tokens(good)) == 8
    driver.assert_nothing_held()


def test_cached_blocks_that_nobody_holds_stand_in_no_one_s_way(make_driver: Drivers, random_prompt: Prompts) -> None:
    driver = make_driver(kv_memory="256KiB")
    assert driver.engine.status().kv_blocks_total == 16
    for seed in range(3):
        answer(driver, random_prompt(seed, 15 * BLOCK_TOKENS), EXACT, max_tokens=BLOCK_TOKENS)
        assert driver.engine.status().kv_blocks_used == 0
        assert driver.engine.status().kv_blocks_cached == 15, "the last token of an answer is not run"


def test_a_block_in_use_is_shared_at_once_and_outlives_its_first_holder(
    make_driver: Drivers, random_prompt: Prompts
) -> None:
    driver, prompt = make_driver(), random_prompt(1, 2 * BLOCK_TOKENS + 1)
    first = driver.submit(prompt, EXACT, max_tokens=30)
    while not driver.tokens(first):
        driver.engine.step()
    second = driver.submit(prompt, EXACT, max_tokens=30)
    used = driver.engine.status().kv_blocks_used
    while not driver.tokens(second):
        driver.engine.step()
    assert driver.engine.status().kv_blocks_used == 2 * used - 2
    assert driver.engine.cancel(first, "t")
    driver.finish()
    third = answer(driver, prompt, EXACT, max_tokens=30)
    assert cached(driver, second) == cached(driver, third) == 2 * BLOCK_TOKENS
    assert driver.tokens(second) == driver.tokens(third)
    driver.assert_nothing_held()


def test_a_prompt_of_longrope_s_other_table_takes_nothing_over(make_driver: Drivers, tmp_path: Path) -> None:
    """Prompts up to 24 tokens have other keys than longer ones that begin alike."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = OlmoeConfig(**sizes, **heads, max_position_embeddings=128, rope_parameters=rope | factors)
    torch.manual_seed(0)
    saved(lively(OlmoeForCausalLM(config)), tmp_path)
    driver, fresh = make_driver(path=tmp_path), make_driver(path=tmp_path, prefix_cache=False)
    prompt = [number % 60 for number in range(40)]
    found = []
    for length in (20, 24, 25, 40):
        request, alone = (answer(each, prompt[:length], EXACT, max_tokens=2) for each in (driver, fresh))
        assert driver.tokens(request) == fresh.tokens(alone)
        found.append(cached(driver, request))
    assert found == [0, BLOCK_TOKENS, 0, BLOCK_TOKENS]
