"""An answer that leaves its pool: the pool grows, or all experts serve the rest. A random model's answers do."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from pager.errors import Cancelled, InvalidRequest
from pager.pools.step import OutsideMass
from pager.types import Count, DriftAction, DriftPolicy, DriftReport, ExpertPool, Full, PoolPolicy, PoolSource

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "ckpt_emo_tiny"
LAYERS, SHARED = 4, 15
POOL = 3  # experts a layer
WIDEN = DriftPolicy(0.3, DriftAction.WIDEN, window=4)
EXACT = DriftPolicy(0.3, DriftAction.EXACT, window=4)
NEVER = DriftPolicy(0.999, window=4)


def pooled(drift: DriftPolicy | None) -> PoolPolicy:
    return PoolPolicy(Count(POOL), drift=drift)


@pytest.fixture
def plain() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model.eval()


@contextmanager
def restricted(model: Any, pool: ExpertPool) -> Iterator[None]:
    """The plain model with all other routed experts masked out."""

    def mask(layer: int) -> Callable[[nn.Module, object, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        allowed_E = torch.zeros(SHARED + 1, dtype=torch.bool)
        allowed_E[[*pool.experts[layer], SHARED]] = True

        def hook(gate: Any, _: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (output[0], *gate.pick(output[0], allowed_E[None]))

        return hook

    hooks = [block.mlp.gate.register_forward_hook(mask(i)) for i, block in enumerate(model.model.layers)]
    yield
    for hook in hooks:
        hook.remove()


def test_an_exact_rest_is_what_the_plain_model_goes_on_with(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]], plain: PreTrainedModel
) -> None:
    driver, prompt = make_driver(), random_prompt(1, 24)
    request = driver.submit(prompt, pooled(EXACT), max_tokens=24)
    driver.finish()
    usage, tokens = driver.usage(request), driver.tokens(request)
    assert usage.mode == "pool"
    assert usage.pool is not None
    assert usage.pool.num_experts == LAYERS * POOL, "the pool that its beginning had"
    assert usage.drift is not None
    assert usage.drift.exact_from == 5, "a token of the prefill, four of a window"
    assert usage.drift.peak_mass > 0.3

    cache = DynamicCache(config=plain.config)
    expected: list[int] = []
    with torch.inference_mode():
        with restricted(plain, usage.pool):
            expected.append(int(plain(torch.tensor([prompt]), past_key_values=cache).logits[0, -1].argmax()))
            while len(expected) < usage.drift.exact_from:
                expected.append(_next(plain, expected[-1], cache))
        while len(expected) < len(tokens):
            expected.append(_next(plain, expected[-1], cache))
    assert tokens == expected
    driver.assert_nothing_held()


def test_a_widened_rest_is_what_the_plain_model_goes_on_with(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]], plain: PreTrainedModel
) -> None:
    """A window in the first pool, a trial of two windows with all experts, then the wider pool."""
    driver, prompt = make_driver(), random_prompt(1, 17)
    narrow = driver.submit(prompt, pooled(None), max_tokens=1)
    request = driver.submit(prompt, pooled(WIDEN), max_tokens=24)
    driver.finish()
    usage, tokens = driver.usage(request), driver.tokens(request)
    assert usage.drift is not None
    assert usage.drift.widenings == 1, "or the schedule below is another"
    first, final = driver.usage(narrow).pool, usage.pool
    assert first is not None
    assert final is not None

    cache = DynamicCache(config=plain.config)
    with torch.inference_mode():
        with restricted(plain, first):
            expected = [int(plain(torch.tensor([prompt]), past_key_values=cache).logits[0, -1].argmax())]
            for _ in range(4):
                expected.append(_next(plain, expected[-1], cache))
        for _ in range(8):
            expected.append(_next(plain, expected[-1], cache))
        with restricted(plain, final):
            while len(expected) < len(tokens):
                expected.append(_next(plain, expected[-1], cache))
    assert tokens == expected


def _next(model: PreTrainedModel, token: int, cache: DynamicCache) -> int:
    return int(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].argmax())


def test_a_pool_is_widened_and_says_so(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver, prompt = make_driver(), random_prompt(2, 24)
    narrow = driver.submit(prompt, pooled(None), max_tokens=24)
    wide = driver.submit(prompt, pooled(WIDEN), max_tokens=24)
    driver.finish()
    before, after = driver.usage(narrow).pool, driver.usage(wide)
    assert driver.usage(narrow).drift is None
    assert before is not None
    assert after.pool is not None
    assert after.drift is not None
    assert after.mode == "pool"
    assert after.drift.widenings > 0
    assert after.drift.exact_from is None
    assert after.pool.num_experts == before.num_experts + after.drift.experts_added
    assert all(set(old) <= set(new) for old, new in zip(before.experts, after.pool.experts, strict=True))
    assert driver.tokens(wide)[:5] == driver.tokens(narrow)[:5], "nothing changes before the first window is full"
    assert after.out_of_pool_mass < driver.usage(narrow).out_of_pool_mass
    driver.assert_nothing_held()


def test_a_prediction_is_measured_against_what_the_prompt_chose(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver, prompt = make_driver(), random_prompt(2, 24)
    first = driver.submit(prompt, pooled(None), max_tokens=2)
    driver.finish()
    predicted = driver.usage(first).pool
    second = driver.submit(prompt, pooled(WIDEN), max_tokens=16, predicted=predicted)
    driver.finish()
    assert driver.usage(second).drift.widenings > 0
    assert driver.usage(second).predicted_recall == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("num_slots", [60, 30, LAYERS * POOL + 8, LAYERS * POOL])
@pytest.mark.parametrize("seed", range(3))
def test_company_changes_nothing(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]], num_slots: int, seed: int
) -> None:
    """Random requests, most of them with drift, in slots for all their experts down to those of a single pool."""
    draw = random.Random(seed)
    asked: list[tuple[list[int], PoolPolicy, dict[str, Any]]] = []
    for number in range(8):
        action = draw.choice([DriftAction.WIDEN, DriftAction.WIDEN, DriftAction.EXACT])
        drift = DriftPolicy(draw.uniform(0.2, 0.9), action, window=draw.choice([4, 8]))
        policy = draw.choice([pooled(drift), pooled(drift), pooled(drift), pooled(None), PoolPolicy()])
        options = {"max_tokens": draw.randint(8, 40), **draw.choice([{}, {"temperature": 0.9, "seed": number}])}
        asked.append((random_prompt(10 * seed + number, draw.randint(8, 30)), policy, options))

    alone, together = make_driver(num_slots), make_driver(num_slots)
    ids = [together.submit(prompt, policy, **options) for prompt, policy, options in asked]
    together.finish()
    together.assert_nothing_held()
    for id_, (prompt, policy, options) in zip(ids, asked, strict=True):
        alone_id = alone.submit(prompt, policy, **options)
        alone.finish()
        assert together.tokens(id_) == alone.tokens(alone_id)
        assert together.usage(id_).pool == alone.usage(alone_id).pool
        assert _done(together.usage(id_).drift) == _done(alone.usage(alone_id).drift)


def _done(report: DriftReport | None) -> object:
    return report and replace(report, peak_mass=0.0)


def test_what_does_not_fit_is_left_out(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]]
) -> None:
    tight, prompt = make_driver(LAYERS * POOL), random_prompt(3, 20)
    narrow = tight.submit(prompt, pooled(None), max_tokens=20)
    tight.finish()
    wide = tight.submit(prompt, pooled(WIDEN), max_tokens=20)
    tight.finish()
    drift = tight.usage(wide).drift
    assert drift is not None
    assert (drift.widenings, drift.experts_added) == (0, 0)
    assert drift.experts_left_out > 0
    assert drift.peak_mass > WIDEN.threshold, "it was seen, and nothing could be done"
    assert tight.tokens(wide) == tight.tokens(narrow)
    tight.assert_nothing_held()

    roomier = make_driver(LAYERS * POOL + 5)
    some = roomier.submit(prompt, pooled(WIDEN), max_tokens=20)
    roomier.finish()
    drift = roomier.usage(some).drift
    assert drift is not None
    assert 0 < drift.experts_added <= 5
    assert drift.experts_left_out > 0
    roomier.assert_nothing_held()


def test_an_exact_rest_needs_no_more_slots_than_its_pool_had(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]]
) -> None:
    tight, roomy, prompt = make_driver(LAYERS * POOL), make_driver(60), random_prompt(4, 20)
    ids = [driver.submit(prompt, pooled(EXACT), max_tokens=20) for driver in (tight, roomy)]
    tight.finish()
    roomy.finish()
    assert tight.usage(ids[0]).drift.exact_from == 5
    assert tight.tokens(ids[0]) == roomy.tokens(ids[1])
    tight.assert_nothing_held()


def test_pools_that_share_all_slots_do_not_block_each_other(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]]
) -> None:
    """Neither can go exact while the other holds the same experts in every slot: one lets go, and both can."""
    driver = make_driver(LAYERS * POOL)
    first = driver.submit(random_prompt(5, 8), pooled(None), max_tokens=1)
    driver.finish()
    pool = driver.usage(first).pool
    fixed = PoolPolicy(source=PoolSource.FIXED, fixed=pool, drift=EXACT)
    short = driver.submit(random_prompt(6, 8), fixed, max_tokens=12)
    long = driver.submit(random_prompt(7, 8), fixed, max_tokens=40)
    driver.finish()
    assert driver.usage(short).drift.exact_from == 5
    assert driver.usage(long).drift.exact_from == 5
    driver.assert_nothing_held()


def test_two_answers_that_need_each_others_slots_both_get_them(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]]
) -> None:
    """Two pools fill the slots, and each wants to grow at the same step."""
    alone, driver = make_driver(2 * LAYERS * POOL), make_driver(2 * LAYERS * POOL)
    expected = []
    for seed in (2, 11):
        expected.append(alone.submit(random_prompt(seed, 24), pooled(WIDEN), max_tokens=30))
        alone.finish()
    ids = [driver.submit(random_prompt(seed, 24), pooled(WIDEN), max_tokens=30) for seed in (2, 11)]
    num_waits = 0
    while driver.engine.status().running + driver.engine.status().waiting:
        driver.engine.step()
        num_waits += any(each.awaits_slots for each in driver.engine._running)
    assert num_waits, "they would have fitted side by side, and this shows nothing"
    for id_, other in zip(ids, expected, strict=True):
        assert driver.usage(id_).drift.widenings > 0
        assert driver.tokens(id_) == alone.tokens(other)
        assert _done(driver.usage(id_).drift) == _done(alone.usage(other).drift)
    assert max(driver.usage(id_).stall_s for id_ in ids) > 0
    driver.assert_nothing_held()


def _wait_for_slots(driver: Any, request: str) -> None:
    while not any(each.asked.id == request and each.awaits_slots for each in driver.engine._running):
        assert request not in driver.chunks or driver.chunks[request][-1].usage is None, "it never had to wait"
        driver.engine.step()


def test_an_answer_that_waits_for_slots_holds_none_and_comes_before_new_ones(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]], random_pool: Callable[..., Any]
) -> None:
    driver = make_driver(2 * LAYERS * POOL)
    fixed = PoolPolicy(fixed=random_pool(3, POOL))
    driver.submit(random_prompt(1, 8), fixed, max_tokens=60)
    drifting = driver.submit(random_prompt(2, 24), pooled(WIDEN), max_tokens=30)
    _wait_for_slots(driver, drifting)
    (waiting,) = [each for each in driver.engine._running if each.awaits_slots]
    assert (waiting.lease.num_bound, waiting.lease.num_reserved) == (0, 0)
    given = len(driver.tokens(drifting))
    late = driver.submit(random_prompt(4, 8), fixed, max_tokens=2)  # whose pool is in slots
    while waiting.awaits_slots:
        assert not driver.tokens(late)
        assert len(driver.tokens(drifting)) == given
        driver.engine.step()
    driver.finish()
    assert len(driver.tokens(drifting)) == 30
    assert driver.usage(drifting).stall_s > 0
    assert len(driver.tokens(late)) == 2
    driver.assert_nothing_held()


def test_an_answer_that_waits_for_slots_can_be_cancelled(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]], random_pool: Callable[..., Any]
) -> None:
    driver = make_driver(2 * LAYERS * POOL)
    kept = driver.submit(random_prompt(1, 8), PoolPolicy(fixed=random_pool(3, POOL)), max_tokens=60)
    drifting = driver.submit(random_prompt(2, 24), pooled(WIDEN), max_tokens=30)
    _wait_for_slots(driver, drifting)
    assert driver.engine.cancel(drifting, "t")
    late = driver.submit(random_prompt(4, 8), pooled(None), max_tokens=2)
    driver.finish()
    assert isinstance(driver.failures[drifting], Cancelled)
    assert (len(driver.tokens(kept)), len(driver.tokens(late))) == (60, 2)
    driver.assert_nothing_held()


def test_slots_of_an_answer_that_went_exact_serve_others(
    make_driver: Callable[..., Any], random_prompt: Callable[[int, int], list[int]]
) -> None:
    driver = make_driver(2 * LAYERS * POOL - 4)
    long = driver.submit(random_prompt(8, 8), pooled(EXACT), max_tokens=60)
    waiting = driver.submit(random_prompt(9, 8), pooled(None), max_tokens=4)
    driver.finish()
    assert driver.order_of_first_tokens == [long, waiting]
    assert driver.chunks[waiting][-1].usage is not None
    assert driver.usage(waiting).finish_reason == "length"
    assert len(driver.tokens(long)) == 60
    driver.assert_nothing_held()


def _takes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often a sum of outside mass is fetched from the device."""
    calls: list[int] = []
    take = OutsideMass.take

    def counted(self: OutsideMass) -> object:
        calls.append(1)
        return take(self)

    monkeypatch.setattr(OutsideMass, "take", counted)
    return calls


def test_only_drift_looks_at_the_device_while_decoding(
    make_driver: Callable[..., Any],
    random_prompt: Callable[[int, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = _takes(monkeypatch)
    driver = make_driver()
    driver.submit(random_prompt(1, 8), pooled(None), max_tokens=40)
    driver.finish()
    assert len(calls) == 1, "for the account at the end"
    calls.clear()
    driver.submit(random_prompt(1, 8), pooled(DriftPolicy(0.999, window=16)), max_tokens=41)
    driver.finish()
    assert len(calls) == 40 // 4, "every fourth part of a window; the last time for the account"


@pytest.mark.parametrize(
    "policy",
    [
        PoolPolicy(Count(POOL), drift=DriftPolicy(1.5)),
        PoolPolicy(Count(POOL), drift=DriftPolicy(0.5, window=0)),
        PoolPolicy(Full(), drift=DriftPolicy(0.5)),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(make_driver: Callable[..., Any], policy: PoolPolicy) -> None:
    with pytest.raises(InvalidRequest):
        make_driver().submit([1, 2, 3], policy)
