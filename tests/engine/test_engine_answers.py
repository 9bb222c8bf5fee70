"""Several answers to a prompt, from one prefill and one lease, are those of as many requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pager.engine.interface import EngineObserver
from pager.engine.kv import BLOCK_TOKENS
from pager.errors import Cancelled, InvalidRequest, PagerError, PromptTooLong
from pager.types import (
    Account,
    Count,
    DriftPolicy,
    ExpertPool,
    FinishReason,
    Full,
    PagingCounts,
    PoolPolicy,
    PoolSource,
    TokenChunk,
    Usage,
)
from tests.engine.conftest import Driver

Draw = dict[str, Any]
SAMPLED: Draw = {"temperature": 1.0, "seed": 11, "max_tokens": 9}
POOLS = {
    "exact": PoolPolicy(Full()),
    "prefill": PoolPolicy(Count(3)),
    "fixed": PoolPolicy(source=PoolSource.FIXED, fixed=ExpertPool(tuple((0, 3, 7) for _ in range(4)))),
}


class Ends(EngineObserver):
    """Keeps what each request has used."""

    def __init__(self) -> None:
        self.accounts: list[Account] = []

    def ended(self, outcome: str, account: Account, usage: Usage | None, token_s: float | None) -> None:
        self.accounts.append(account)


def answers(driver: Driver, request_id: str) -> list[list[TokenChunk]]:
    """The chunks of a request, by answer."""
    found: dict[int, list[TokenChunk]] = {}
    for chunk in driver.chunks[request_id]:
        found.setdefault(chunk.index, []).append(chunk)
    return [found[index] for index in sorted(found)]


def ids(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


@pytest.fixture(scope="module")
def observed(make_lasting_driver: Callable[..., Driver]) -> tuple[Driver, Ends]:
    """A driver that tests share, and what its requests have used."""
    ends = Ends()
    return make_lasting_driver(observer=ends, prefix_cache=False), ends


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("length", "draw"),
    [
        (1, SAMPLED),
        (BLOCK_TOKENS, SAMPLED | {"max_tokens": 1}),
        (2 * BLOCK_TOKENS, SAMPLED),
        (
            2 * BLOCK_TOKENS + 3,
            SAMPLED
            | {"max_tokens": 2 * BLOCK_TOKENS, "top_p": 0.9, "frequency_penalty": 1.0, "repetition_penalty": 1.2},
        ),
        (BLOCK_TOKENS - 1, SAMPLED | {"stop": ("ab", "ca"), "ignore_eos": False, "logprobs": 2, "max_tokens": 20}),
    ],
)
def test_answers_are_those_of_as_many_requests(
    observed: tuple[Driver, Ends], random_prompt: Callable[[int, int], list[int]], pool: str, length: int, draw: Draw
) -> None:
    driver, ends = observed
    prompt = random_prompt(length, length)
    ends.accounts.clear()
    together = driver.submit(prompt, POOLS[pool], n=4, **draw)
    driver.finish()
    driver.assert_nothing_held()
    (account,) = ends.accounts
    found = answers(driver, together)
    assert len(found) == 4
    assert account.prompt_tokens == length, "the prompt ran once"
    assert account.completion_tokens == sum(len(ids(each)) for each in found)
    usages = [usage for each in found for chunk in each if (usage := chunk.usage) is not None]
    assert len(usages) == 4
    assert sum((usage.paging for usage in usages), PagingCounts()) == account.paging
    assert [chunk.is_last for chunk in driver.chunks[together]].count(True) == 1
    assert driver.chunks[together][-1].is_last
    for index, chunks in enumerate(found):
        alone = driver.submit(prompt, POOLS[pool], **draw | {"seed": draw["seed"] + index})
        driver.finish()
        assert ids(chunks) == driver.tokens(alone)
        assert "".join(chunk.text for chunk in chunks) == driver.text(alone)
        reported = [[each.logprob for chunk in of for each in chunk.logprobs] for of in (chunks, driver.chunks[alone])]
        assert reported[0] == pytest.approx(reported[1], abs=1e-4)
        usage, by_itself = chunks[-1].usage, driver.usage(alone)
        assert usage is not None
        assert usage.pool == by_itself.pool
        assert usage.finish_reason is by_itself.finish_reason
        assert usage.completion_tokens == by_itself.completion_tokens
        assert usage.out_of_pool_mass == pytest.approx(by_itself.out_of_pool_mass, abs=1e-5)
    driver.assert_nothing_held()


def test_answers_hold_one_pool_and_share_the_prompts_blocks(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver()
    prompt = random_prompt(1, 3 * BLOCK_TOKENS + 1)
    driver.submit(prompt, POOLS["fixed"], n=5, **SAMPLED)
    driver.engine.step()
    status, stats = driver.engine.status(), driver.paged.pager.stats()
    assert (status.running, status.waiting) == (1, 0)
    assert status.kv_blocks_used == 3 + 5
    assert stats.held_bytes // driver.paged.facts.expert_bytes == 4 * 3
    driver.finish()
    driver.assert_nothing_held()


def test_answers_are_alike_beside_others_and_after_the_prompt_was_cached(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver, prompt = make_driver(), random_prompt(2, 4 * BLOCK_TOKENS + 5)
    first = driver.submit(prompt, POOLS["fixed"], n=3, **SAMPLED)
    for seed in range(3):
        driver.submit(random_prompt(seed, 20), POOLS["prefill"], **SAMPLED)
    driver.finish()
    again = driver.submit(prompt, POOLS["fixed"], n=3, **SAMPLED)
    driver.finish()
    usage = driver.chunks[again][-1].usage
    assert usage is not None
    assert usage.cached_prompt_tokens == 4 * BLOCK_TOKENS
    assert [ids(each) for each in answers(driver, again)] == [ids(each) for each in answers(driver, first)]
    goes_on = [*prompt, *ids(answers(driver, first)[2])]
    driver.submit([*goes_on, *random_prompt(9, BLOCK_TOKENS)], POOLS["fixed"], max_tokens=1, id="next")
    driver.finish()
    assert driver.usage("next").cached_prompt_tokens == (len(goes_on) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    driver.assert_nothing_held()


def test_what_is_reported_of_the_prompt_comes_once(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver()
    asked = driver.submit(random_prompt(4, 12), n=3, prompt_logprobs=1, **SAMPLED)
    driver.finish()
    assert sum(len(chunk.prompt_logprobs) for chunk in driver.chunks[asked]) == 11


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_cancelling_ends_all_answers(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], num_steps: int
) -> None:
    ends = Ends()
    driver = make_driver(observer=ends)
    asked = driver.submit(random_prompt(5, 20), POOLS["prefill"], n=4, **SAMPLED)
    for _ in range(num_steps):
        driver.engine.step()
    assert driver.engine.cancel(asked, "t")
    driver.finish()
    assert isinstance(driver.failures[asked], Cancelled)
    assert [account.completion_tokens for account in ends.accounts] == [len(driver.tokens(asked))]
    driver.assert_nothing_held()


def test_an_answer_that_fails_ends_its_request_and_no_other(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], monkeypatch: Any
) -> None:
    driver = make_driver()
    asked = driver.submit(random_prompt(6, 20), POOLS["prefill"], n=3, **SAMPLED)
    other = driver.submit(random_prompt(7, 20), POOLS["prefill"], n=2, **SAMPLED)
    driver.engine.step()
    (broken,) = (row for row in driver.engine._running if row.asked.id == asked and row.index == 1)

    def fail(*_: object) -> None:
        raise PagerError("no text")

    monkeypatch.setattr(broken, "accept", fail)
    driver.finish()
    assert driver.failures[asked].message == "no text"
    assert [len(ids(each)) for each in answers(driver, other)] == [9, 9]
    driver.assert_nothing_held()


def test_answers_wait_until_all_of_them_can_run(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver(max_running=4)
    asked = [driver.submit(random_prompt(seed, 10), n=3, **SAMPLED) for seed in range(3)]
    most = 0
    for _ in range(200):
        driver.engine.step()
        most = max(most, len(driver.engine._running))
    assert most == 3
    assert all(len(answers(driver, each)) == 3 for each in asked)
    driver.assert_nothing_held()


def test_what_cannot_run_is_refused_by_its_name(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver(max_running=4)
    prompt = random_prompt(8, 10)
    with pytest.raises(InvalidRequest, match="at most 4 answers") as caught:
        driver.submit(prompt, n=5)
    assert caught.value.field == "sampling.n"
    with pytest.raises(InvalidRequest, match="share one pool") as caught:
        driver.submit(prompt, replace(POOLS["prefill"], drift=DriftPolicy(0.3)), n=2)
    assert caught.value.field == "sampling.n"
    with pytest.raises(InvalidRequest, match="between 1 and 32"):
        driver.submit(prompt, n=0)
    with pytest.raises(InvalidRequest, match="seed"):
        driver.submit(prompt, n=2, seed=2**64 - 1)
    small = make_driver(kv_memory="256KiB")
    limit = small.engine.status().kv_blocks_total * BLOCK_TOKENS
    with pytest.raises(PromptTooLong, match="ask for fewer or shorter answers") as too_long:
        small.submit(prompt, n=4, max_tokens=limit // 2)
    assert too_long.value.field == "sampling.n"


def test_an_answer_that_ends_early_gives_its_blocks_back(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver, prompt = make_driver(), random_prompt(10, BLOCK_TOKENS + 2)
    options = SAMPLED | {"max_tokens": 60, "stop_token_ids": tuple(range(20))}
    asked = driver.submit(prompt, POOLS["prefill"], n=6, **options)
    held = []
    for _ in range(1000):
        if not driver.engine.status().running + driver.engine.status().waiting:
            break
        driver.engine.step()
        held.append(driver.engine.status().kv_blocks_used)
    found = answers(driver, asked)
    for index in range(6):
        alone = driver.submit(prompt, POOLS["prefill"], **options | {"seed": SAMPLED["seed"] + index})
        driver.finish()
        assert ids(found[index]) == driver.tokens(alone)
    reasons = [usage.finish_reason for each in found for chunk in each if (usage := chunk.usage) is not None]
    assert reasons.count(FinishReason.STOP) >= 2
    assert len(set(held)) > 2, "blocks are given back answer by answer"
    driver.assert_nothing_held()
