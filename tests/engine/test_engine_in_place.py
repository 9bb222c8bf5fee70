"""Requests for which there are no slots: their experts are computed where the page cache has them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.page_cache import drop
from pager.errors import ExpertUnavailable
from pager.models.open_model import OpenModel
from pager.store.pack import pack
from pager.store.pack_format import PACK_NAME
from pager.types import Count, DriftPolicy, ExpertPool, PoolPolicy, PoolSource
from tests.engine.conftest import CHECKPOINT, EXPERT_BYTES, Driver

MakeDriver = Callable[..., Driver]
Prompt = Callable[[int, int], list[int]]
Pool = Callable[..., ExpertPool]

NUM_SLOTS = 14  # for one pool of 12 experts


def fixed(pool: ExpertPool) -> PoolPolicy:
    return PoolPolicy(Count(len(pool.experts[0])), PoolSource.FIXED, pool)


def requests_of(random_prompt: Prompt, random_pool: Pool, count: int = 5) -> list[tuple[list[int], PoolPolicy]]:
    return [(random_prompt(seed, 9 + 7 * seed), fixed(random_pool(seed))) for seed in range(count)]


def alone(make_driver: MakeDriver, requests: list[tuple[list[int], PoolPolicy]], num_tokens: int) -> list[list[int]]:
    """The tokens of each request by itself, with a slot for every expert."""
    driver, found = make_driver(), []
    for prompt, policy in requests:
        name = driver.submit(prompt, policy, max_tokens=num_tokens)
        driver.finish()
        found.append(driver.tokens(name))
    return found


def lose_pages(driver: Driver, path: Path) -> None:
    """Takes the checkpoint out of the page cache, between two steps."""
    source: Any = driver.paged.pager._source
    source._found_in_place.clear()
    source._layers.clear()
    for file in source._files.values():
        file._mapped = None  # mapped pages stay in the page cache
    drop(path.glob("*.safetensors"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One whose files nobody else has mapped."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def test_pools_without_slots_run_beside_those_with_slots_as_they_do_alone(
    make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool
) -> None:
    requests = requests_of(random_prompt, random_pool)
    expected = alone(make_driver, requests, 12)
    driver = make_driver(NUM_SLOTS, in_place=True)
    names = [driver.submit(prompt, policy, max_tokens=12) for prompt, policy in requests]
    for _ in range(4):
        driver.engine.step()
    assert driver.engine.status().running == len(requests)
    assert driver.paged.pager.stats().held_bytes == 12 * EXPERT_BYTES, "one of them has slots"
    driver.finish()
    assert [driver.tokens(name) for name in names] == expected
    usages = [driver.usage(name) for name in names]
    assert {usage.mode for usage in usages} == {"pool"}
    assert [usage.paging.bytes_paged for usage in usages].count(0) == len(requests) - 1
    assert all(usage.paging.num_lookups == 12 for usage in usages), "experts are counted once a request"
    driver.assert_nothing_held()


def test_a_prompt_without_slots_runs_in_the_forward_of_those_that_decode(
    make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool
) -> None:
    requests = requests_of(random_prompt, random_pool)
    expected = alone(make_driver, requests, 12)
    driver, num_forwards = make_driver(NUM_SLOTS, in_place=True), 0

    def count(*_: object) -> None:
        nonlocal num_forwards
        num_forwards += 1

    driver.paged.model.register_forward_hook(count)
    names = []
    for prompt, policy in requests:  # one more request in each step
        names.append(driver.submit(prompt, policy, max_tokens=12))
        driver.engine.step()
        while driver.engine._prefilling:  # the one that has slots may wait for its reads
            driver.engine.step()
    assert sum(request.is_in_place for request in driver.engine._running) == len(requests) - 1
    assert num_forwards <= driver.engine.status().num_decode_forwards + 1, "the first prompt's alone has no rows"
    driver.finish()
    assert [driver.tokens(name) for name in names] == expected
    driver.assert_nothing_held()


def test_slots_are_taken_from_others_only_for_what_the_page_cache_has_not(
    make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool, checkpoint: Path
) -> None:
    first, second = requests_of(random_prompt, random_pool, 2)
    driver = make_driver(NUM_SLOTS, in_place=True, path=checkpoint)

    def paged_for(request: tuple[list[int], PoolPolicy]) -> int:
        name = driver.submit(*request, max_tokens=4)
        driver.finish()
        return driver.usage(name).paging.bytes_paged

    assert paged_for(first) == 12 * EXPERT_BYTES, "the slots were free"
    assert paged_for(second) == 0
    assert paged_for(first) == 0, "its experts are still there"
    lose_pages(driver, checkpoint)
    assert paged_for(second) > 0
    driver.assert_nothing_held()


def test_slots_alone_run_one_pool_at_a_time(make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool) -> None:
    driver = make_driver(NUM_SLOTS, in_place=False)
    for prompt, policy in requests_of(random_prompt, random_pool):
        driver.submit(prompt, policy, max_tokens=12)
    for _ in range(4):
        driver.engine.step()
    assert driver.engine.status().running == 1
    driver.finish()


def test_exact_requests_need_no_slots_of_their_own(make_driver: MakeDriver, random_prompt: Prompt) -> None:
    requests = [(random_prompt(seed, 8 + seed), PoolPolicy()) for seed in range(9)]
    expected = alone(make_driver, requests, 6)
    driver = make_driver(NUM_SLOTS, in_place=True)
    names = [driver.submit(prompt, policy, max_tokens=6) for prompt, policy in requests]
    for _ in range(3):
        driver.engine.step()
    assert driver.engine.status().running == len(requests)
    driver.finish()
    assert [driver.tokens(name) for name in names] == expected
    driver.assert_nothing_held()


@pytest.mark.parametrize("is_exact", [False, True])
def test_what_the_page_cache_loses_makes_answers_wait_and_changes_none(
    make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool, checkpoint: Path, is_exact: bool
) -> None:
    requests = requests_of(random_prompt, random_pool)
    if is_exact:
        requests = [(prompt, PoolPolicy()) for prompt, _ in requests]
    expected = alone(make_driver, requests, 12)
    driver = make_driver(NUM_SLOTS, in_place=True, path=checkpoint)
    names = [driver.submit(prompt, policy, max_tokens=12) for prompt, policy in requests]
    num_waiting = 0
    for number in range(40):
        driver.engine.step()
        if number in (3, 6):
            lose_pages(driver, checkpoint)
        num_waiting += sum(request.awaits_slots for request in driver.engine._running)
    driver.finish()
    assert [driver.tokens(name) for name in names] == expected
    assert is_exact or num_waiting
    driver.assert_nothing_held()


def test_a_prompt_whose_experts_are_lost_waits_for_slots(
    make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool, checkpoint: Path
) -> None:
    requests = [
        (random_prompt(seed, 60), policy) for seed, (_, policy) in enumerate(requests_of(random_prompt, random_pool, 3))
    ]
    expected = alone(make_driver, requests, 4)
    driver = make_driver(NUM_SLOTS, in_place=True, path=checkpoint, prefill_chunk_tokens=16)
    names = [driver.submit(prompt, policy, max_tokens=4) for prompt, policy in requests]
    for _ in range(2):
        driver.engine.step()
    assert len(driver.engine._prefilling) > 1
    lose_pages(driver, checkpoint)
    driver.finish()
    assert [driver.tokens(name) for name in names] == expected
    driver.assert_nothing_held()


def test_several_answers_to_a_prompt_lose_and_get_their_experts_together(
    make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool, checkpoint: Path
) -> None:
    requests = requests_of(random_prompt, random_pool, 2)
    found = []
    for driver in (make_driver(), make_driver(NUM_SLOTS, in_place=True, path=checkpoint)):
        names = [driver.submit(*each, max_tokens=10, n=2, temperature=1.0, seed=3) for each in requests]
        for _ in range(5):
            driver.engine.step()
        if driver.paged.pager.num_slots == NUM_SLOTS:
            lose_pages(driver, checkpoint)
        driver.finish()
        found.append([sorted((chunk.index, chunk.token_ids) for chunk in driver.chunks[name]) for name in names])
        driver.assert_nothing_held()
    assert found[0] == found[1]


def test_a_file_that_was_shortened_fails_those_without_slots_alone(
    make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool, checkpoint: Path
) -> None:
    requests = requests_of(random_prompt, random_pool, 3)
    expected = alone(make_driver, requests, 12)
    driver = make_driver(NUM_SLOTS, in_place=True, path=checkpoint)
    names = [driver.submit(prompt, policy, max_tokens=12) for prompt, policy in requests]
    for _ in range(4):
        driver.engine.step()
    (leased,) = {request.asked.id for request in driver.engine._running if not request.is_in_place}
    for file in checkpoint.glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.truncate(4096)
    driver.finish()
    assert driver.tokens(leased) == expected[names.index(leased)]
    assert set(driver.failures) == {*names} - {leased}
    for error in driver.failures.values():
        assert isinstance(error, ExpertUnavailable)
        assert "verify" in error.message or "cannot read expert" in error.message
    driver.assert_nothing_held()


def test_a_damaged_expert_fails_its_request_alone(
    make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool, tmp_path: Path
) -> None:
    opened = OpenModel.open(CHECKPOINT, "float32")
    opened.checkpoint.close()
    counts, shape = opened.facts.experts_per_layer, opened.family.shape
    pack(
        CHECKPOINT,
        tmp_path / "packed",
        pieces=opened.pieces,
        experts_per_layer=counts,
        shape=shape,
        dtype=torch.float32,
    )
    requests = requests_of(random_prompt, random_pool, 3)
    pools = [{*policy.fixed.keys()} for _, policy in requests if policy.fixed is not None]
    driver = make_driver(NUM_SLOTS, in_place=True, path=tmp_path / "packed")
    names = [driver.submit(prompt, policy, max_tokens=8) for prompt, policy in requests]
    with (tmp_path / "packed" / PACK_NAME).open("r+b") as file:
        for key in pools[0] - pools[1] - pools[2]:
            place = driver.paged.pager._source.place_of(key)
            file.seek((place.start + place.end) // 2)
            file.write(b"damaged")
    driver.finish()
    assert {*driver.failures} == {names[0]}
    assert isinstance(driver.failures[names[0]], ExpertUnavailable)
    expected = alone(make_driver, requests, 8)
    assert [driver.tokens(name) for name in names[1:]] == expected[1:]
    driver.assert_nothing_held()


def test_what_drift_may_change_waits_for_slots(
    make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool
) -> None:
    driver = make_driver(NUM_SLOTS, in_place=True)
    for seed in range(3):
        pool = random_pool(seed)
        policy = PoolPolicy(Count(3), PoolSource.FIXED, pool, drift=DriftPolicy(0.3))
        driver.submit(random_prompt(seed, 20), policy, max_tokens=8)
    driver.engine.step()
    assert driver.engine.status().running == 1
    driver.finish()
    assert not driver.failures
    driver.assert_nothing_held()


def test_a_guarantee_holds_beside_strangers_in_place(
    make_driver: MakeDriver, random_prompt: Prompt, random_pool: Pool
) -> None:
    driver = make_driver(30, in_place=True)
    for seed in range(5):
        driver.submit(random_prompt(seed, 20), fixed(random_pool(seed)), max_tokens=30, tenant="stranger")
    own = driver.submit(random_prompt(7, 20), fixed(random_pool(7)), max_tokens=4, tenant="small", guaranteed_share=0.5)
    for _ in range(3):
        driver.engine.step()
    (request,) = [each for each in (*driver.engine._prefilling, *driver.engine._running) if each.asked.id == own]
    assert not request.is_in_place, "its slots are there for it"
    assert driver.engine.status().running == 6
    assert driver.paged.pager.stats().held_bytes <= 24 * EXPERT_BYTES
    driver.finish()
    driver.assert_nothing_held()
