"""Prompts that run together, requests of one pool that are admitted together, tenants that are served by weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from pager.engine.decoding import Decoder
from pager.engine.interface import EngineObserver
from pager.engine.runner import DecodeBatch, ModelRunner, PromptPart
from pager.engine.turns import TenantCounters
from pager.errors import Cancelled, ExpertUnavailable, PoolTooLarge
from pager.store.expert_source import CheckpointExperts, Destination
from pager.types import Count, DriftAction, DriftPolicy, ExpertPool, Full, PoolPolicy
from tests.engine.conftest import EXPERT_BYTES, Driver

EXACT, CHOSEN = PoolPolicy(Full()), PoolPolicy(Count(3))
Prompts = Callable[[int, int], list[int]]
Drivers = Callable[..., Driver]
Pools = Callable[..., ExpertPool]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each prefill since, how many tokens of each prompt ran in it."""
    found: list[list[int]] = []
    prefill = ModelRunner.prefill

    def noted(runner: ModelRunner, parts: Sequence[PromptPart], rows: DecodeBatch | None = None) -> object:
        found.append([len(part.token_ids) for part in parts])
        return prefill(runner, parts, rows)

    monkeypatch.setattr(ModelRunner, "prefill", noted)
    return found


def one_by_one(driver: Driver, requests: Sequence[tuple[list[int], PoolPolicy]], max_tokens: int) -> list[str]:
    """The names of requests that were answered while nobody else was there."""
    names = []
    for prompt, policy in requests:
        names.append(driver.submit(prompt, policy, max_tokens=max_tokens))
        driver.finish()
    return names


def alone(driver: Driver, requests: Sequence[tuple[list[int], PoolPolicy]]) -> list[list[int]]:
    """The tokens of each answer when nobody else is there."""
    return [driver.tokens(name) for name in one_by_one(driver, requests, max_tokens=6)]


@pytest.mark.parametrize("kind", ["one pool", "pools of their own", "chosen by the prefill", "exact"])
@pytest.mark.parametrize("num_slots", [60, 40])
def test_prompts_that_run_together_are_answered_as_alone(
    make_driver: Drivers,
    random_prompt: Prompts,
    random_pool: Pools,
    forwards: list[list[int]],
    kind: str,
    num_slots: int,
) -> None:
    policies = {
        "one pool": [PoolPolicy(fixed=random_pool(1))] * 3,
        "pools of their own": [PoolPolicy(fixed=random_pool(seed)) for seed in (1, 2, 3)],
        "chosen by the prefill": [CHOSEN] * 3,
        "exact": [EXACT] * 3,
    }[kind]
    requests = [(random_prompt(n, length), policies[n]) for n, length in enumerate((20, 7, 33))]
    expected = alone(make_driver(num_slots), requests)

    driver = make_driver(num_slots)
    forwards.clear()
    names = [driver.submit(prompt, policy, max_tokens=6) for prompt, policy in requests]
    driver.finish()
    assert [driver.tokens(name) for name in names] == expected
    if kind != "pools of their own":  # the first of these runs as soon as its own experts are there
        assert forwards == [[20, 7, 33]]
    driver.assert_nothing_held()


def test_a_forward_takes_no_more_tokens_than_its_budget(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, forwards: list[list[int]]
) -> None:
    """A prompt longer than the budget runs in parts, and a short one beside the last of them."""
    policy = PoolPolicy(fixed=random_pool(1))
    requests = [(random_prompt(1, 40), policy), (random_prompt(2, 5), policy), (random_prompt(3, 20), policy)]
    expected = alone(make_driver(prefill_chunk_tokens=16), requests)
    driver = make_driver(prefill_chunk_tokens=16)
    forwards.clear()
    names = [driver.submit(prompt, policy, max_tokens=6) for prompt, policy in requests]
    driver.finish()
    assert [driver.tokens(name) for name in names] == expected
    assert forwards == [[16], [16], [8, 5, 3], [16], [1]]


def test_who_comes_while_others_decode_waits_for_that_forward_alone(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, driver = PoolPolicy(fixed=random_pool(1)), make_driver(60)
    came: list[str] = []
    first = driver.submit(random_prompt(1, 10), policy, max_tokens=20)
    while len(driver.tokens(first)) < 2:
        driver.engine.step()
    decode = Decoder.decode

    def decoding(decoder: Decoder, *args: Any) -> object:
        if not came:
            came.append(driver.submit(random_prompt(2, 10), policy, max_tokens=2))
        return decode(decoder, *args)

    monkeypatch.setattr(Decoder, "decode", decoding)
    driver.engine.step()
    assert len(driver.tokens(came[0])) == 1
    driver.finish()


def test_a_prompt_that_is_alone_runs_in_larger_parts(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, forwards: list[list[int]]
) -> None:
    policy = PoolPolicy(fixed=random_pool(1))
    requests = [(random_prompt(1, 70), policy), (random_prompt(2, 5), policy)]
    expected = alone(make_driver(prefill_chunk_tokens=16), requests)
    driver = make_driver(prefill_chunk_tokens=16, lone_chunk_tokens=32)
    forwards.clear()
    first = driver.submit(requests[0][0], policy, max_tokens=6)
    driver.engine.step()
    second = driver.submit(requests[1][0], policy, max_tokens=6)
    driver.finish()
    assert forwards == [[32], [16], [16], [6, 5]]
    assert [driver.tokens(first), driver.tokens(second)] == expected


def test_exact_prompts_do_not_run_with_those_that_hold_their_experts(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, forwards: list[list[int]]
) -> None:
    driver = make_driver(60)
    for seed, policy in enumerate((EXACT, CHOSEN, EXACT, CHOSEN)):
        driver.submit(random_prompt(seed, 10 + seed), policy, max_tokens=2)
    driver.finish()
    assert sorted(forwards) == [[10, 12], [11, 13]]


def test_the_log_probabilities_of_a_prompt_are_made_alone(
    make_driver: Drivers, random_prompt: Prompts, forwards: list[list[int]]
) -> None:
    driver = make_driver(60)
    driver.submit(random_prompt(1, 10), EXACT, max_tokens=2)
    driver.submit(random_prompt(2, 11), EXACT, max_tokens=2, prompt_logprobs=0)
    driver.submit(random_prompt(3, 12), EXACT, max_tokens=2)
    driver.finish()
    assert sorted(forwards) == [[10, 12], [11]]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each forward that runs prompts, how many tokens of them, and how many rows decode in it."""
    found: list[tuple[int, int]] = []
    prefill = ModelRunner.prefill

    def noted(runner: ModelRunner, parts: Sequence[PromptPart], rows: DecodeBatch | None = None) -> object:
        found.append((sum(len(part.token_ids) for part in parts), 0 if rows is None else len(rows.token_B1)))
        return prefill(runner, parts, rows)

    monkeypatch.setattr(ModelRunner, "prefill", noted)
    return found


def submit_while_decoding(
    driver: Driver, requests: Sequence[tuple[list[int], PoolPolicy]], **options: Any
) -> list[str]:
    """Submits each request when the one before has two tokens of its answer."""
    names: list[str] = []
    for prompt, policy in requests:
        names.append(driver.submit(prompt, policy, max_tokens=16, **options))
        while len(driver.tokens(names[-1])) < 2:
            driver.engine.step()
    return names


@pytest.mark.parametrize("kind", ["one pool", "pools of their own", "exact"])
def test_prompts_whose_experts_are_loaded_run_in_the_forward_of_the_rows(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, beside: list[tuple[int, int]], kind: str
) -> None:
    policies = {
        "one pool": [PoolPolicy(fixed=random_pool(1))] * 3,
        "pools of their own": [PoolPolicy(fixed=random_pool(seed)) for seed in (1, 2, 3)],
        "exact": [EXACT] * 3,
    }[kind]
    requests = [(random_prompt(n, length), policies[n]) for n, length in enumerate((20, 40, 9))]
    driver = make_driver(60, prefill_chunk_tokens=32, prefix_cache=False)
    load_every_expert(driver)
    expected = one_by_one(driver, requests, max_tokens=16)
    beside.clear()
    num_decoded = driver.engine.status().num_decode_forwards
    names = submit_while_decoding(driver, requests)
    driver.finish()
    assert beside == [(20, 0), (32, 1), (8, 1), (9, 2)]
    # Each answer decodes 15 tokens, and none of them waits for a prompt's forward.
    assert driver.engine.status().num_decode_forwards - num_decoded == 15 + 3 + 2
    for name, alone_name in zip(names, expected, strict=True):
        assert driver.tokens(name) == driver.tokens(alone_name)
        found, before = driver.usage(name), driver.usage(alone_name)
        assert (found.pool, found.mode, found.paging.bytes_paged) == (before.pool, before.mode, 0)
        assert found.out_of_pool_mass == pytest.approx(before.out_of_pool_mass, rel=1e-4)
    driver.assert_nothing_held()


def load_every_expert(driver: Driver) -> None:
    """Pages all experts in, a pool after the other."""
    for start in range(0, 15, 3):
        pool = ExpertPool(((start, start + 1, start + 2),) * 4)
        driver.submit([1, 2], PoolPolicy(fixed=pool), max_tokens=1)
        driver.finish()
    assert driver.paged.pager.is_nearly_full


@pytest.mark.parametrize(
    "kind", ["chosen by the prefill", "measured for drift", "another kind", "with log-probabilities"]
)
def test_prompts_and_rows_run_apart_where_one_of_them_asks_for_more(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, beside: list[tuple[int, int]], kind: str
) -> None:
    pool, options = PoolPolicy(fixed=random_pool(1)), {}
    first, second = {
        "chosen by the prefill": (pool, CHOSEN),
        "measured for drift": (replace(pool, drift=DriftPolicy(0.9)), pool),
        "another kind": (EXACT, pool),
        "with log-probabilities": (pool, pool),
    }[kind]
    if kind == "with log-probabilities":
        options = {"prompt_logprobs": 0}
    driver = make_driver(60)
    load_every_expert(driver)
    beside.clear()
    submit_while_decoding(driver, [(random_prompt(1, 20), first), (random_prompt(2, 21), second)], **options)
    driver.finish()
    assert beside == [(20, 0), (21, 0)]
    assert not driver.failures


def test_where_the_forward_of_prompts_and_rows_fails_each_is_run_apart(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = PoolPolicy(fixed=random_pool(1))
    requests = [(random_prompt(seed, 20), pool) for seed in (1, 2, 3)]
    driver = make_driver(60, prefix_cache=False)
    expected = one_by_one(driver, requests, max_tokens=16)
    prefill = ModelRunner.prefill
    num_failed = 0

    def failing(runner: ModelRunner, parts: Sequence[PromptPart], rows: DecodeBatch | None = None) -> object:
        nonlocal num_failed
        if rows is None:
            return prefill(runner, parts)
        num_failed += 1
        prefill(runner, parts, rows)  # what it wrote is there
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(ModelRunner, "prefill", failing)
    names = submit_while_decoding(driver, requests)
    driver.finish()
    assert num_failed == 2
    assert [driver.tokens(name) for name in names] == [driver.tokens(name) for name in expected]
    driver.assert_nothing_held()


def test_who_is_cancelled_while_prompts_and_rows_share_a_forward_leaves_it_to_the_others(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = PoolPolicy(fixed=random_pool(1))
    requests = [(random_prompt(seed, 20), pool) for seed in (1, 2, 3)]
    driver = make_driver(60, prefix_cache=False)
    expected = one_by_one(driver, requests, max_tokens=16)
    prefill = ModelRunner.prefill
    names: list[str] = []

    def cancelling(runner: ModelRunner, parts: Sequence[PromptPart], rows: DecodeBatch | None = None) -> object:
        if rows is not None and len(rows.token_B1) == 1:
            driver.engine.cancel(names[0], "t")
        return prefill(runner, parts, rows)

    monkeypatch.setattr(ModelRunner, "prefill", cancelling)
    names.append(driver.submit(*requests[0], max_tokens=16))
    driver.engine.step()
    driver.engine.step()
    names += [driver.submit(*request, max_tokens=16) for request in requests[1:]]
    driver.finish()
    assert isinstance(driver.failures[names[0]], Cancelled)
    assert [driver.tokens(name) for name in names[1:]] == [driver.tokens(name) for name in expected[1:]]
    driver.assert_nothing_held()


def test_an_expert_that_cannot_be_read_fails_only_its_request(
    make_driver: Drivers, random_prompt: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both pools are chosen in one forward, so that its failure is the failure of both at first."""
    requests = [(random_prompt(seed, 20), CHOSEN) for seed in (1, 2)]
    whole = make_driver(60)
    expected = alone(whole, requests)
    pools = [chunks[-1].usage.pool for chunks in whole.chunks.values() if chunks[-1].usage is not None]
    assert pools[0] is not None
    assert pools[1] is not None
    damaged = min(key for key in set(pools[0].keys()) - set(pools[1].keys()) if key.layer > 0)
    read_all = CheckpointExperts.read_all

    def read(source: CheckpointExperts, wanted: Sequence[Destination], *rest: Any) -> object:
        if any(destination.key == damaged for destination in wanted):
            raise OSError("this part of the disk is gone")
        return read_all(source, wanted, *rest)

    monkeypatch.setattr(CheckpointExperts, "read_all", read)
    driver = make_driver(60)
    broken, sound = (driver.submit(prompt, policy, max_tokens=6) for prompt, policy in requests)
    driver.finish()
    assert isinstance(driver.failures[broken], ExpertUnavailable)
    assert driver.tokens(sound) == expected[1]
    driver.assert_nothing_held()


def test_one_that_is_cancelled_leaves_the_forward_to_the_others(
    make_driver: Drivers, random_prompt: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(random_prompt(seed, 20), CHOSEN) for seed in (1, 2)]
    expected = alone(make_driver(60), requests)
    driver = make_driver(60)
    prefill = ModelRunner.prefill

    def cancelling(runner: ModelRunner, parts: Sequence[PromptPart], rows: DecodeBatch | None) -> object:
        driver.engine.cancel(gone, "t")
        return prefill(runner, parts, rows)

    monkeypatch.setattr(ModelRunner, "prefill", cancelling)
    gone, left = (driver.submit(prompt, policy, max_tokens=6) for prompt, policy in requests)
    driver.finish()
    assert isinstance(driver.failures[gone], Cancelled)
    assert driver.tokens(left) == expected[1]
    driver.assert_nothing_held()


def test_requests_of_one_pool_run_together_whatever_order_they_came_in(
    make_driver: Drivers, random_prompt: Prompts
) -> None:
    """There is room for one of three pools at a time: in order of arrival each would be paged four times."""
    pools = [ExpertPool(tuple(tuple(range(5 * n, 5 * n + 4)) for _ in range(4))) for n in range(3)]
    driver = make_driver(16)
    names = [driver.submit(random_prompt(n, 10), PoolPolicy(fixed=pools[n % 3]), max_tokens=8) for n in range(12)]
    driver.finish()
    assert driver.order_of_first_tokens == [names[n] for first in range(3) for n in range(first, 12, 3)]
    assert driver.paged.pager.stats().paging.bytes_paged == 3 * 16 * EXPERT_BYTES
    driver.assert_nothing_held()


def test_what_is_loaded_is_used_before_it_is_evicted(make_driver: Drivers, random_prompt: Prompts) -> None:
    one, other = (ExpertPool(tuple(tuple(range(5 * n, 5 * n + 4)) for _ in range(4))) for n in range(2))
    driver = make_driver(16)
    driver.submit(random_prompt(0, 10), PoolPolicy(fixed=one), max_tokens=4)
    driver.finish()
    first = driver.submit(random_prompt(1, 10), PoolPolicy(fixed=other), max_tokens=4)
    second = driver.submit(random_prompt(2, 10), PoolPolicy(fixed=one), max_tokens=4)
    driver.finish()
    assert driver.order_of_first_tokens[1:] == [second, first]
    assert driver.paged.pager.stats().paging.bytes_paged == 2 * 16 * EXPERT_BYTES


def test_the_next_pool_is_read_while_the_present_one_decodes(make_driver: Drivers, random_prompt: Prompts) -> None:
    """Its slots are not all free, so it cannot be admitted; what fits beside the one that runs is read already."""
    one, other = (ExpertPool(tuple(tuple(range(5 * n, 5 * n + 4)) for _ in range(4))) for n in range(2))
    driver = make_driver(22)
    running = driver.submit(random_prompt(1, 10), PoolPolicy(fixed=one), max_tokens=200)
    while not driver.tokens(running):
        driver.engine.step()
    waiting = driver.submit(random_prompt(2, 10), PoolPolicy(fixed=other), max_tokens=2)

    def num_there() -> int:
        loaded = driver.paged.pager.resident_experts()
        return sum(expert in loaded[layer] for layer, experts in enumerate(other.experts) for expert in experts)

    while len(driver.tokens(running)) < 199 and num_there() < 6:
        driver.engine.step()
    assert num_there() == 6
    assert not driver.tokens(waiting)
    driver.finish()
    driver.assert_nothing_held()


class Shares(EngineObserver):
    """What tenants were given while they had requests in line, and what they were entitled to."""

    def __init__(self) -> None:
        self.given: dict[str, float] = defaultdict(float)
        self.entitled: dict[str, float] = defaultdict(float)

    def shared_out(self, tenant: str, given: float, entitled: float) -> None:
        self.given[tenant] += given
        self.entitled[tenant] += entitled


def test_a_tenant_that_asks_little_is_served_before_one_that_floods(
    make_driver: Drivers, random_prompt: Prompts
) -> None:
    shares = Shares()
    driver = make_driver(60, observer=shares, max_running=2)
    policies = [PoolPolicy(fixed=ExpertPool(tuple(tuple(range(n, n + 6)) for _ in range(4)))) for n in range(8)]
    for n in range(24):
        driver.submit(random_prompt(n, 30), policies[n % 8], max_tokens=12, tenant="flood")
    while len(driver.order_of_first_tokens) < 14:
        driver.engine.step()
    small = driver.submit(random_prompt(99, 10), policies[7], max_tokens=4, tenant="small")
    driver.finish()
    place = driver.order_of_first_tokens.index(small)
    assert place <= 16, f"{place} answers began before it, of which 14 had when it came"
    assert shares.given["flood"] > 0
    assert shares.entitled["small"] > 0
    driver.assert_nothing_held()


def test_tenants_with_weights_are_served_by_them(
    make_driver: Drivers, random_prompt: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heavy one has twice the weight: of the first answers it has two in three."""
    monkeypatch.setattr(TenantCounters, "SLACK", 0.0)
    driver = make_driver(60, max_running=1, max_waiting=100)
    names = {}
    for number in range(16):
        for tenant, weight in (("light", 1.0), ("heavy", 2.0)):
            name = driver.submit(random_prompt(number, 40), EXACT, max_tokens=16, tenant=tenant, weight=weight)
            names[name] = tenant
    while len(driver.order_of_first_tokens) < 21:
        driver.engine.step()
    num_heavy = sum(names[name] == "heavy" for name in driver.order_of_first_tokens[:21])
    assert 13 <= num_heavy <= 15
    for name in names:
        driver.engine.cancel(name, names[name])
    driver.finish()
    driver.assert_nothing_held()


def test_a_higher_class_goes_first(make_driver: Drivers, random_prompt: Prompts) -> None:
    driver = make_driver(60, max_running=1)
    low = [driver.submit(random_prompt(n, 10), EXACT, max_tokens=4) for n in range(4)]
    high = driver.submit(random_prompt(9, 10), EXACT, max_tokens=4, priority=1)
    driver.finish()
    assert driver.order_of_first_tokens == [high, *low]


def test_strangers_leave_a_guaranteed_tenant_its_experts_and_are_answered_as_before(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools
) -> None:
    own = random_pool(0)
    strangers = [(random_prompt(n, 10), EXACT if n % 2 else PoolPolicy(fixed=random_pool(n))) for n in range(1, 7)]
    expected = alone(make_driver(60), strangers)
    driver = make_driver(2 * own.num_experts)
    gold: dict[str, Any] = {"tenant": "gold", "guaranteed_share": 0.5, "max_tokens": 4}
    driver.submit(random_prompt(20, 10), PoolPolicy(fixed=own), **gold)
    driver.finish()
    names = [
        driver.submit(prompt, policy, max_tokens=6, tenant=f"t{n}") for n, (prompt, policy) in enumerate(strangers)
    ]
    driver.finish()
    assert [driver.tokens(name) for name in names] == expected
    again = driver.submit(random_prompt(21, 10), PoolPolicy(fixed=own), **gold)
    driver.finish()
    paging = driver.usage(again).paging
    assert (paging.experts_hit, paging.experts_missed) == (own.num_experts, 0)
    with pytest.raises(PoolTooLarge, match="that other tenants are guaranteed"):
        driver.submit(random_prompt(22, 10), PoolPolicy(Count(5)), tenant="t9")
    driver.assert_nothing_held()


def test_a_guaranteed_tenants_prompt_waits_for_no_long_forward_of_strangers(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, forwards: list[list[int]]
) -> None:
    """Its prompt runs first and by itself; those of strangers take short forwards as long as the guarantee lasts."""
    own, strangers = random_pool(0), PoolPolicy(fixed=random_pool(1))
    requests = [(random_prompt(n, 90), strangers) for n in range(3)]
    expected = alone(make_driver(60), requests)
    driver = make_driver(2 * own.num_experts)
    gold: dict[str, Any] = {"tenant": "gold", "guaranteed_share": 0.5, "max_tokens": 4}
    driver.submit(random_prompt(20, 10), PoolPolicy(fixed=own), **gold)
    driver.finish()
    forwards.clear()
    names = [driver.submit(*each, max_tokens=6, tenant="t1") for each in requests]
    driver.submit(random_prompt(21, 10), PoolPolicy(fixed=own), **gold)
    driver.finish()
    assert forwards == [[10], [90, 90, 76], [14]]
    assert [driver.tokens(name) for name in names] == expected
    driver.submit(random_prompt(20, 10), PoolPolicy(fixed=own), **gold | {"guaranteed_share": 0.0})
    driver.finish()
    forwards.clear()
    for n in range(3, 6):
        driver.submit(random_prompt(n, 90), strangers, max_tokens=2, tenant="t1")
    driver.finish()
    assert forwards == [[90, 90, 76], [14]]
    driver.assert_nothing_held()


def test_a_guaranteed_tenants_prompt_runs_within_a_forward_of_strangers(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes before a layer of a prompt or of a decode step is computed, and has its first token by then."""
    own = random_pool(0)
    asked = [(random_prompt(seed, 12), PoolPolicy(fixed=random_pool(1))) for seed in (1, 2)]
    prompts = [random_prompt(20 + number, 10) for number in range(3)]
    expected = alone(make_driver(60), [*asked, *((prompt, PoolPolicy(fixed=own)) for prompt in prompts)])
    driver = make_driver(2 * own.num_experts)
    gold: dict[str, Any] = {"tenant": "gold", "guaranteed_share": 0.5, "max_tokens": 6}
    names = [driver.submit(prompts[0], PoolPolicy(fixed=own), **gold)]
    driver.finish()
    begin_layer, num_layers = ModelRunner._begin_layer, 0
    strangers: list[str] = []
    first_tokens: list[int] = []

    def coming(runner: ModelRunner) -> None:
        nonlocal num_layers
        num_layers += 1
        is_decoding = len(names) == 2 and all(len(driver.tokens(name)) >= 2 for name in strangers)
        if num_layers == 2 or is_decoding:  # the second layer of the strangers' prompts, or one of a decode step
            names.append(driver.submit(prompts[len(names)], PoolPolicy(fixed=own), **gold))
            begin_layer(runner)
            first_tokens.append(len(driver.tokens(names[-1])))  # by the end of the layer that it came in
        else:
            begin_layer(runner)

    monkeypatch.setattr(ModelRunner, "_begin_layer", coming)
    strangers += [driver.submit(*each, max_tokens=6, tenant="t1") for each in asked]
    driver.finish()
    assert first_tokens == [1, 1]
    assert len(names) == 3
    assert [driver.tokens(name) for name in (*strangers, *names)] == expected
    driver.assert_nothing_held()


def test_who_is_cancelled_within_a_forward_keeps_what_the_forward_reads(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guaranteed tenant's prompt is served in the midst of a decode step, one of whose requests was cancelled."""
    own = random_pool(0)
    driver = make_driver(2 * own.num_experts)
    gold: dict[str, Any] = {"tenant": "gold", "guaranteed_share": 0.5, "max_tokens": 2}
    driver.submit(random_prompt(20, 10), PoolPolicy(fixed=own), **gold)
    driver.finish()
    stranger = driver.submit(random_prompt(1, 10), PoolPolicy(fixed=random_pool(1)), max_tokens=60, tenant="t1")
    while len(driver.tokens(stranger)) < 2:
        driver.engine.step()
    begin_layer = ModelRunner._begin_layer
    names: list[str] = []
    found: list[tuple[int, bool]] = []

    def coming(runner: ModelRunner) -> None:
        if not names:
            driver.engine.cancel(stranger, "t1")
            names.append(driver.submit(random_prompt(21, 10), PoolPolicy(fixed=own), **gold))
            begin_layer(runner)
            found.append((driver.engine.status().running, stranger in driver.failures))
        else:
            begin_layer(runner)

    monkeypatch.setattr(ModelRunner, "_begin_layer", coming)
    driver.finish()
    assert found == [(2, False)], "both are held as long as the forward reads"
    assert isinstance(driver.failures[stranger], Cancelled)
    assert len(driver.tokens(names[0])) == 2
    driver.assert_nothing_held()


def test_exact_requests_of_a_guaranteed_tenant_page_in_its_own_slots(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools
) -> None:
    own = random_pool(0)
    driver = make_driver(2 * own.num_experts)
    options: list[dict[str, Any]] = [{"tenant": "gold", "guaranteed_share": 0.5}, {"tenant": "t1"}, {"tenant": "t2"}]
    prompts = [random_prompt(n, 12) for n in range(3)]
    expected = alone(make_driver(60), [(prompt, EXACT) for prompt in prompts])
    names = [driver.submit(prompt, EXACT, max_tokens=6, **each) for prompt, each in zip(prompts, options, strict=True)]
    driver.finish()
    assert [driver.tokens(name) for name in names] == expected
    driver.assert_nothing_held()


def test_a_pool_that_two_accounts_ask_for_is_given_to_the_one_that_has_room(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools
) -> None:
    held, wanted = PoolPolicy(fixed=random_pool(0)), PoolPolicy(fixed=random_pool(1))
    driver = make_driver(24)
    running = driver.submit(random_prompt(1, 10), held, tenant="t0", max_tokens=200)
    stranger = driver.submit(random_prompt(2, 10), wanted, tenant="t1", max_tokens=2)
    gold = driver.submit(random_prompt(3, 10), wanted, tenant="gold", guaranteed_share=0.5, max_tokens=2)
    while len(driver.tokens(gold)) < 2 and len(driver.tokens(running)) < 199:
        driver.engine.step()
    assert len(driver.tokens(gold)) == 2
    assert driver.tokens(stranger) == []
    driver.finish()
    assert len(driver.tokens(stranger)) == 2
    driver.assert_nothing_held()


def test_a_guaranteed_tenant_does_not_wait_for_a_stranger_that_does_not_fit(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools
) -> None:
    """However often it passes it: they do not wait for each other's slots."""
    driver = make_driver(24, max_overtakes=2)
    running = driver.submit(random_prompt(1, 10), PoolPolicy(fixed=random_pool(0)), tenant="t0", max_tokens=200)
    stranger = driver.submit(random_prompt(2, 10), PoolPolicy(fixed=random_pool(1)), tenant="t1", max_tokens=2)
    own: dict[str, Any] = {"tenant": "gold", "guaranteed_share": 0.5, "max_tokens": 2}
    for number in range(6):
        gold = driver.submit(random_prompt(3 + number, 10), PoolPolicy(fixed=random_pool(2)), **own)
        while len(driver.tokens(gold)) < 2 and len(driver.tokens(running)) < 199:
            driver.engine.step()
        assert len(driver.tokens(gold)) == 2, f"after {number} others"
        assert driver.tokens(stranger) == []
    driver.finish()
    assert len(driver.tokens(stranger)) == 2
    driver.assert_nothing_held()


@pytest.mark.parametrize("num_steps", [2, 6, 12])
def test_an_answer_that_drifts_ends_whenever_a_guarantee_comes_and_so_does_who_waits(
    make_driver: Drivers, random_prompt: Prompts, random_pool: Pools, num_steps: int
) -> None:
    """Its change may need slots that it can never have again: then it fails, and says so."""
    drifts = PoolPolicy(Count(4), drift=DriftPolicy(0.3, DriftAction.WIDEN, window=4))
    driver = make_driver(32)
    drifting = driver.submit(random_prompt(1, 24), drifts, tenant="t0", max_tokens=40)
    for _ in range(num_steps):
        driver.engine.step()
    own: dict[str, Any] = {"tenant": "gold", "guaranteed_share": 0.6, "max_tokens": 30}
    gold = driver.submit(random_prompt(2, 10), PoolPolicy(fixed=random_pool(0)), **own)
    waiting = driver.submit(random_prompt(3, 10), CHOSEN, tenant="t1", max_tokens=10)
    driver.finish()
    assert (len(driver.tokens(gold)), len(driver.tokens(waiting))) == (30, 10)
    assert len(driver.tokens(drifting)) == 40 or isinstance(driver.failures[drifting], PoolTooLarge)
    driver.assert_nothing_held()
