"""The engine's tokens are the right ones: against recorded generations, and batched against alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pager.engine.interface import EngineLimits
from pager.types import Count, DriftPolicy, ExpertPool, FinishReason, Mass, PoolPolicy, PoolSource
from tests.engine.conftest import Driver

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
RECORDED = load_file(GOLDEN / "emo_tiny.safetensors")
RECORDED_POOLS = load_file(GOLDEN / "pool_emo_tiny.safetensors")
PROMPTS = ("prompt0", "prompt1", "prompt2", "doc96")


@pytest.mark.parametrize("num_slots", [60, 15, 3])
def test_exact_prompts_batched_together_give_the_recorded_greedy_tokens(
    make_driver: Callable[..., Driver], num_slots: int
) -> None:
    driver = make_driver(num_slots)
    ids = {name: driver.submit(RECORDED[f"{name}.input_ids"][0].tolist(), max_tokens=32) for name in PROMPTS}
    driver.finish()
    for name, request_id in ids.items():
        assert driver.tokens(request_id) == RECORDED[f"{name}.gen32"][0].tolist(), name
        assert driver.usage(request_id).mode == "exact"
    driver.assert_nothing_held()


@pytest.mark.parametrize("count", [4, 8])
def test_a_pool_chosen_at_prefill_and_frozen_gives_the_recorded_tokens_among_others(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], count: int
) -> None:
    driver = make_driver(60)
    driver.submit(random_prompt(1, 30), PoolPolicy(Count(3)), max_tokens=40)
    prompt = RECORDED_POOLS["input_ids"][0, :64].tolist()
    pooled = driver.submit(prompt, PoolPolicy(Count(count)), max_tokens=32)
    driver.submit(random_prompt(2, 9), PoolPolicy(Count(3)), max_tokens=40)
    driver.finish()
    assert driver.tokens(pooled) == RECORDED_POOLS[f"pool{count}_prompt64.gen32"].flatten().tolist()
    usage = driver.usage(pooled)
    recorded = json.loads((GOLDEN / "pool_emo_tiny.json").read_text())[f"pool{count}_prompt64.pools_per_layer"]
    assert usage.pool is not None
    assert [list(layer) for layer in usage.pool.experts] == recorded
    assert (usage.mode, usage.prompt_tokens, usage.completion_tokens) == ("pool", 64, 32)
    assert usage.out_of_pool_mass > 0
    driver.assert_nothing_held()


def test_a_watched_request_tells_what_was_read_for_it_and_what_its_tokens_left_outside(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    """Beside others, one of which drifts, it has the tokens that it has unwatched."""
    policies = [PoolPolicy(Count(4)), PoolPolicy(Count(3), drift=DriftPolicy(0.2)), PoolPolicy()]

    def run(*, is_watched: bool) -> tuple[Driver, list[str]]:
        driver = make_driver(40)
        ids = [
            driver.submit(random_prompt(seed, 20), policy, max_tokens=24, is_watched=is_watched)
            for seed, policy in enumerate(policies)
        ]
        driver.finish()
        driver.assert_nothing_held()
        return driver, ids

    unwatched, _ = run(is_watched=False)
    driver, ids = run(is_watched=True)
    assert [driver.tokens(each) for each in ids] == [unwatched.tokens(each) for each in ids]
    assert not any(chunk.page_ins or chunk.outside_mass for each in ids for chunk in unwatched.chunks[each])
    pooled, drifting, exact = (driver.usage(each) for each in ids)
    assert drifting.drift == unwatched.usage(ids[1]).drift
    for request_id, usage in ((ids[0], pooled), (ids[2], exact)):
        page_ins = [page_in for chunk in driver.chunks[request_id] for page_in in chunk.page_ins]
        num_bytes = len(page_ins) * driver.paged.facts.expert_bytes  # of an exact one's, not what it shared with others
        assert 0 < num_bytes <= usage.paging.bytes_from_disk
        assert usage is exact or num_bytes == usage.paging.bytes_from_disk
        assert all(page_in.source == "disk" and page_in.at_s > 0 for page_in in page_ins)
    assert pooled.pool is not None
    of_pool = [page_in for chunk in driver.chunks[ids[0]] for page_in in chunk.page_ins]
    assert {page_in.key for page_in in of_pool} <= set(pooled.pool.keys())
    assert all(page_in.at_s <= pooled.time_to_first_token_s for page_in in of_pool)
    first = next(number for number, chunk in enumerate(driver.chunks[ids[0]]) if chunk.token_ids)
    assert any(chunk.page_ins for chunk in driver.chunks[ids[0]][:first]), "what a prefill reads is told meanwhile"
    masses = [chunk.outside_mass for chunk in driver.chunks[ids[0]] if chunk.token_ids]
    assert masses[0] is None  # its forward chose the pool
    measured = [mass for mass in masses[1:] if mass is not None]
    assert len(measured) == pooled.completion_tokens - 1
    assert sum(measured) / len(measured) == pytest.approx(pooled.out_of_pool_mass, rel=1e-5)
    assert len({round(mass, 6) for mass in measured}) > 1
    assert all(chunk.outside_mass is None for chunk in driver.chunks[ids[2]])


@pytest.mark.slow
def test_sixteen_pools_in_slots_for_four_give_each_the_tokens_it_gets_alone(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
) -> None:
    policies = [
        PoolPolicy(Count(3), PoolSource.FIXED, random_pool(seed)) if seed % 2 else PoolPolicy(Count(3))
        for seed in range(16)
    ]
    prompts = [random_prompt(seed, 5 + 3 * seed) for seed in range(16)]
    alone = make_driver(num_slots=48)
    expected = []
    for prompt, policy in zip(prompts, policies, strict=True):
        request_id = alone.submit(prompt, policy, max_tokens=24)
        alone.finish()
        expected.append((alone.tokens(request_id), alone.usage(request_id).pool))

    together = make_driver(num_slots=48)
    ids = [together.submit(prompt, policy, max_tokens=24) for prompt, policy in zip(prompts, policies, strict=True)]
    most_running = 0
    while len(together.order_of_first_tokens) < 16 or together.engine.status().running:
        together.engine.step()
        most_running = max(most_running, together.engine.status().running)
    assert [(together.tokens(each), together.usage(each).pool) for each in ids] == expected
    assert len({usage_pool.digest for _, usage_pool in expected if usage_pool}) == 16
    assert most_running >= 3, "they ran one after the other: the test shows nothing"
    together.assert_nothing_held()


def test_chunks_of_a_prompt_with_a_known_pool_give_the_same_tokens(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
) -> None:
    policy = PoolPolicy(Count(4), PoolSource.FIXED, random_pool(3, 4))
    prompt = random_prompt(7, 90)
    answers = []
    for chunk in (512, 16, 7):
        driver = make_driver(prefill_chunk_tokens=chunk)
        request_id = driver.submit(prompt, policy, max_tokens=20)
        driver.finish()
        answers.append(driver.tokens(request_id))
        assert driver.usage(request_id).prompt_tokens == 90
    assert answers[0] == answers[1] == answers[2]


def test_a_decode_step_is_exactly_one_forward_for_all_pools(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver(60)
    for seed in range(5):  # with all experts there no prefill waits, or others would decode meanwhile
        driver.submit(random_prompt(seed, 10), PoolPolicy(Count(3)), max_tokens=1)
    driver.finish()
    driver.order_of_first_tokens.clear()
    batch_sizes: list[int] = []
    driver.paged.model.register_forward_hook(
        lambda _module, _args, kwargs, _output: batch_sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    num_requests, max_tokens = 5, 12
    for seed in range(num_requests):
        driver.submit(random_prompt(seed, 10), PoolPolicy(Count(3)), max_tokens=max_tokens)
    while driver.engine.status().running + driver.engine.status().waiting:
        before = len(batch_sizes)
        prefills = len(driver.order_of_first_tokens)
        driver.engine.step()
        prefills = len(driver.order_of_first_tokens) - prefills
        assert len(batch_sizes) - before <= prefills + 1
    # All prompts run in one forward, as the tokens of a single row; then all decode together.
    assert batch_sizes == [1, *[num_requests] * (max_tokens - 1)]
    assert driver.engine.status().num_decode_forwards == max_tokens - 1


@pytest.mark.parametrize("restrict", [{}, {"top_p": 0.9}, {"top_k": 20}])
def test_a_seed_gives_the_same_answer_in_any_company(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], restrict: dict[str, float]
) -> None:
    options = {"temperature": 1.0, "seed": 1234, "max_tokens": 16, **restrict}
    driver = make_driver()
    alone = driver.submit(random_prompt(5, 12), PoolPolicy(Count(4)), **options)
    driver.finish()
    for seed in range(3):
        driver.submit(random_prompt(seed, 20), PoolPolicy(Count(3)), temperature=0.7, max_tokens=30, seed=seed)
    again = driver.submit(random_prompt(5, 12), PoolPolicy(Count(4)), **options)
    other = driver.submit(random_prompt(5, 12), PoolPolicy(Count(4)), **{**options, "seed": 4321})
    driver.finish()
    assert driver.tokens(again) == driver.tokens(alone)
    assert driver.tokens(other) != driver.tokens(alone)


def test_a_stop_string_across_tokens_ends_the_answer_before_it(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver()
    prompt = random_prompt(11, 20)
    whole = driver.submit(prompt, max_tokens=24)
    driver.finish()
    text = driver.text(whole)
    # From the middle of the 10th token to the middle of the 12th.
    stop = text[19:23]
    end = text.index(stop)
    stopped = driver.submit(prompt, max_tokens=24, stop=(stop, "never"))
    neighbour = driver.submit(prompt, max_tokens=24)
    driver.finish()
    assert driver.text(stopped) == text[:end]
    assert driver.usage(stopped).finish_reason is FinishReason.STOP
    assert driver.usage(stopped).completion_tokens == -(-(end + len(stop)) // 2)
    assert driver.text(neighbour) == text
    assert driver.usage(neighbour).finish_reason is FinishReason.LENGTH


def test_the_end_of_sequence_token_ends_an_answer_unless_it_is_ignored(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver()
    prompt = random_prompt(12, 20)
    free = driver.submit(prompt, max_tokens=10)
    driver.finish()
    tokens = driver.tokens(free)
    driver.paged.model.generation_config.eos_token_id = [tokens[4]]
    other = type(driver)(driver.paged, EngineLimits())
    ended = other.submit(prompt, max_tokens=10, ignore_eos=False)
    ignored = other.submit(prompt, max_tokens=10, ignore_eos=True)
    other.finish()
    first = tokens.index(tokens[4])
    assert other.tokens(ended) == tokens[: first + 1]
    assert other.usage(ended).finish_reason is FinishReason.STOP
    assert other.tokens(ignored) == tokens


def test_a_prediction_can_be_the_pool_and_is_judged_otherwise(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
) -> None:
    driver = make_driver()
    prompt = random_prompt(13, 30)
    predicted = random_pool(5, 4)
    followed = driver.submit(prompt, PoolPolicy(Count(4), PoolSource.PREDICTION), predicted=predicted, max_tokens=4)
    judged = driver.submit(prompt, PoolPolicy(Count(4)), predicted=predicted, max_tokens=4)
    driver.finish()
    assert driver.usage(followed).pool == predicted
    assert driver.usage(followed).predicted_recall is None
    actual = driver.usage(judged).pool
    assert actual is not None
    assert driver.usage(judged).predicted_recall == predicted.recall_of(actual)
    assert torch.isfinite(torch.tensor(driver.usage(judged).time_to_first_token_s))


def test_a_mass_that_the_cap_does_not_allow_is_called_degraded(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver()
    prompt = random_prompt(14, 30)
    capped = driver.submit(prompt, PoolPolicy(Mass(0.99, cap=4)), max_tokens=4)
    enough = driver.submit(prompt, PoolPolicy(Mass(0.3, cap=15)), max_tokens=4)
    driver.finish()
    assert driver.usage(capped).mode == "degraded"
    assert driver.usage(enough).mode == "pool"


@pytest.mark.parametrize("num_slots", [60, 30])
def test_exact_requests_go_on_while_pools_are_promised_all_the_other_slots(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], num_slots: int
) -> None:
    driver = make_driver(num_slots)
    prompts = [random_prompt(seed, 6) for seed in range(7)]
    pools = [PoolPolicy() if seed < 2 else PoolPolicy(Count(3)) for seed in range(7)]
    expected = []
    for prompt, pool in zip(prompts, pools, strict=True):
        request_id = driver.submit(prompt, pool, max_tokens=16)
        driver.finish()
        expected.append(driver.tokens(request_id))
    exact = [driver.submit(prompts[seed], pools[seed], max_tokens=16) for seed in range(2)]
    for _ in range(2):
        driver.engine.step()
    pooled = [driver.submit(prompts[seed], pools[seed], max_tokens=16) for seed in range(2, 7)]
    driver.finish()
    assert not driver.failures
    assert [driver.tokens(each) for each in (*exact, *pooled)] == expected
    driver.assert_nothing_held()
