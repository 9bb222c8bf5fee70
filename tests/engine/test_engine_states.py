"""Models whose layers hand a state from token to token: linear attention, convolutions and state spaces."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pager.engine.interface import EngineLimits
from pager.engine.kv import BlockPool, state_bytes
from pager.engine.paged_model import PagedModel, load_paged_model
from pager.engine.runner import ModelRunner
from pager.engine.sampler import Sampler
from pager.engine.states import Kept, StateShape, StateStep, StateStore
from pager.errors import Cancelled
from pager.memory import Budgets, describe
from pager.types import Count, Full, PoolPolicy
from tests.engine.conftest import Driver
from tests.support.checkpoints import letters_tokenizer
from tests.support.families import saved_family

EXACT, POOL = PoolPolicy(Full()), PoolPolicy(Count(4))
FAMILIES = ("qwen3_next", "granitemoehybrid", "lfm2_moe")  # a chunked recurrence, one in its place, a convolution alone
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("states") / request.param
    saved_family(request.param, made)
    return made


@pytest.fixture(scope="module")
def paged(path: Path) -> Iterator[PagedModel]:
    budgets = Budgets(expert_memory="100%", kv_memory="1MiB", max_running=5)
    loaded = load_paged_model(path, dtype=torch.float32, budgets=budgets)
    yield loaded
    loaded.close()


@pytest.fixture
def driver(paged: PagedModel) -> Driver:
    return Driver(paged, EngineLimits(max_running=5), tokenizer=letters_tokenizer())


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(driver: Driver, prompts: Sequence[Sequence[int]], pool: PoolPolicy, **options: Any) -> list[list[int]]:
    found = []
    for each in prompts:
        name = driver.submit(each, pool, **options)
        driver.finish()
        found.append(driver.tokens(name))
    return found


@pytest.mark.parametrize("fails", ["layer", "sampler"])
def test_a_step_that_runs_again_begins_where_it_began(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Each request runs by itself after a step that failed in its midst, or whose tokens could not be drawn."""
    prompts = [prompt(seed, 7 + 9 * seed) for seed in range(3)]
    expected = alone(driver, prompts, EXACT, max_tokens=8)
    left = {"layer": 3 * 4 + 4 * 4 + 3, "sampler": 3 + 4}[
        fails
    ]  # of calls, until one in the fifth step, after three prompts

    def failing(own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise RuntimeError("injected")
            return own(*args)

        return run

    of, name = (ModelRunner, "_begin_layer") if fails == "layer" else (Sampler, "sample")
    monkeypatch.setattr(of, name, failing(getattr(of, name)))
    asked = [driver.submit(each, EXACT, max_tokens=8) for each in prompts]
    driver.finish()
    assert left < 0, "nothing failed"
    assert not driver.failures
    assert [driver.tokens(each) for each in asked] == expected
    driver.assert_nothing_held()


@pytest.mark.parametrize("length", [1, 16, 21])
def test_answers_begin_with_the_state_of_the_prompt(driver: Driver, length: int) -> None:
    draw: dict[str, Any] = {"temperature": 1.0, "max_tokens": 9}
    together = driver.submit(prompt(1, length), POOL, n=4, seed=5, **draw)
    driver.finish()
    found = [
        [token for chunk in driver.chunks[together] if chunk.index == index for token in chunk.token_ids]
        for index in range(4)
    ]
    assert found == [alone(driver, [prompt(1, length)], POOL, seed=5 + index, **draw)[0] for index in range(4)]
    driver.assert_nothing_held()


def test_a_place_knows_nothing_of_who_had_it_before(driver: Driver) -> None:
    """More requests than places, some of them cancelled, in an order that is not that of their ends."""
    dice = random.Random(3)
    prompts = [prompt(seed, dice.randint(1, 40)) for seed in range(14)]
    expected = alone(driver, prompts, EXACT, max_tokens=6)
    for held in driver.engine._cache.states.tensors:
        held.fill_(torch.nan)
    asked = [driver.submit(each, EXACT, max_tokens=6) for each in prompts]
    cancelled = {asked[place] for place in (3, 6, 11)}
    for _ in range(4):
        driver.engine.step()
    for name in cancelled:
        driver.engine.cancel(name, "t")
    driver.finish()
    for name, tokens in zip(asked, expected, strict=True):
        if name in cancelled and name in driver.failures:
            assert isinstance(driver.failures[name], Cancelled)
        else:
            assert driver.tokens(name) == tokens
    driver.assert_nothing_held()


def test_the_plan_has_the_states_of_all_answers(paged: PagedModel, driver: Driver) -> None:
    plan, states = paged.plan, driver.engine._cache.states
    assert plan.state_bytes == states.nbytes == 5 * state_bytes(paged.layers) > 0
    assert any(line.startswith("states ") for line in describe(plan))
    assert plan.device_bytes > plan.state_bytes + plan.kv_bytes + plan.workspace_bytes + plan.slot_bytes


def test_a_state_is_read_and_written_by_the_length_of_the_text() -> None:
    shape = StateShape(Kept((2, 3), torch.float32), Kept((4,), torch.float64))
    store = StateStore({7: shape}, 3, CPU)
    places, lengths = torch.tensor([2, 0]), torch.tensor([4, 9])
    first = StateStep(store, places, None, lengths)
    assert not first.has_previous_state(7)
    assert first.get_conv_state(7) is first.get_recurrent_state(7) is None
    seen = first.update_conv_state(torch.ones(2, 2, 2), 7, conv_kernel_size=3)
    assert seen.tolist() == [[[0, 1, 1]] * 2] * 2, "a text that is shorter than the convolution"
    first.update_recurrent_state(torch.full((2, 4), 5.0), 7)
    first.finish()
    for _ in range(2):  # the same again: what it reads is still there
        second = StateStep(store, places, lengths, lengths + 1)
        held = second.layers[7].recurrent_states[0]
        assert held.tolist() == [[5.0] * 4] * 2
        held += 1  # in its place
        seen = second.update_conv_state(torch.full((2, 2, 1), 2.0), 7)
        assert seen.tolist() == [[[0, 1, 1, 2]] * 2] * 2
        second.finish()
    store.copy(2, 1)
    third = StateStep(store, torch.tensor([1]), torch.tensor([5]), torch.tensor([6]))
    assert third.get_recurrent_state(7).tolist() == [[6.0] * 4]  # type: ignore[union-attr]
    assert third.get_conv_state(7).tolist() == [[[1, 1, 2]] * 2]  # type: ignore[union-attr]


def test_places_are_given_back() -> None:
    pool = BlockPool(4, 2)
    taken = [pool.take_place(), pool.take_place()]
    assert sorted(taken) == [0, 1]
    assert pool.num_places_used == 2
    pool.free_place(taken[1])
    assert pool.take_place() == taken[1]
    pool.free_place(taken[0])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free_place(taken[0])
