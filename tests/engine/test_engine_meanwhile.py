"""A forward that waits for reads lets those decode whose experts are there."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pager.store.expert_source import CheckpointExperts, Destination
from pager.types import Count, ExpertPool, Full, PoolPolicy
from tests.engine.conftest import Driver

EXACT, POOL = PoolPolicy(Full()), PoolPolicy(Count(4))


class SlowDisk:
    """Every read waits until a stream has had so many more tokens, or its last. After a minute it goes on, noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_given_up = 0
        self.num_reads = 0
        self._tokens: Callable[[], float] | None = None
        self._more = 0.0
        self._read_all = CheckpointExperts.read_all
        self._lock = threading.Lock()
        monkeypatch.setattr(CheckpointExperts, "read_all", lambda source, wanted, *_: self._read(source, wanted))

    def wait_for(self, more: int, driver: Any, stream: str) -> None:
        def tokens() -> float:
            chunks = driver.chunks[stream]
            return len(chunks) if chunks[-1].usage is None else math.inf

        self._tokens, self._more = tokens, more

    def never_wait(self) -> None:
        self._tokens = None

    def _read(self, source: CheckpointExperts, wanted: Sequence[Destination]) -> list[Any]:
        tokens = self._tokens
        with self._lock:
            self.num_reads += 1
        if tokens is not None:
            before, given_up = tokens(), threading.Event()
            timer = threading.Timer(60, given_up.set)
            timer.start()
            while tokens() < before + self._more and not given_up.wait(0.001):
                pass
            timer.cancel()
            with self._lock:
                self.num_given_up += given_up.is_set()
        return self._read_all(source, wanted)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


@pytest.mark.parametrize("policy", [POOL, EXACT], ids=["pool", "exact"])
def test_streams_go_on_while_a_prompt_waits_for_its_experts(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
    disk: SlowDisk,
    policy: PoolPolicy,
) -> None:
    alone = make_driver(60)
    expected = []
    for pool, text in ((PoolPolicy(fixed=random_pool(3, 3)), random_prompt(1, 12)), (policy, random_prompt(2, 40))):
        expected.append(alone.submit(text, pool, max_tokens=150 if len(text) == 12 else 8))
        alone.finish()

    driver = make_driver(44)
    stream = driver.submit(random_prompt(1, 12), PoolPolicy(fixed=random_pool(3, 3)), max_tokens=150)
    while len(driver.tokens(stream)) < 2:
        driver.engine.step()
    disk.wait_for(2, driver, stream)
    prompt = driver.submit(random_prompt(2, 40), policy, max_tokens=8)
    before = driver.engine.status().num_decode_forwards
    while not driver.tokens(prompt):
        driver.engine.step()
    disk.never_wait()
    assert disk.num_given_up == 0
    assert driver.engine.status().num_decode_forwards >= before + 4
    driver.finish()
    assert [driver.tokens(stream), driver.tokens(prompt)] == [alone.tokens(each) for each in expected]
    assert driver.usage(prompt).stall_s > 0
    driver.assert_nothing_held()


def test_pools_decode_while_an_exact_answer_waits_for_its_experts(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
    disk: SlowDisk,
) -> None:
    driver = make_driver(24)
    alone = driver.submit(random_prompt(1, 12), EXACT, max_tokens=20)
    driver.finish()
    stream = driver.submit(random_prompt(3, 12), PoolPolicy(fixed=random_pool(3, 3)), max_tokens=240)
    while not driver.tokens(stream):
        driver.engine.step()
    exact = driver.submit(random_prompt(1, 12), EXACT, max_tokens=20)
    while not driver.tokens(exact):
        driver.engine.step()
    disk.wait_for(2, driver, stream)
    reads = disk.num_reads
    while disk.num_reads == reads and driver.engine.status().running == 2:
        tokens = len(driver.tokens(stream))
        driver.engine.step()
    assert disk.num_reads > reads, "an exact step that reads nothing shows nothing"
    assert len(driver.tokens(stream)) >= tokens + 3
    disk.never_wait()
    assert disk.num_given_up == 0
    driver.finish()
    assert driver.tokens(exact) == driver.tokens(alone)
    driver.assert_nothing_held()


def test_a_stream_that_ends_meanwhile_gives_its_slots_back(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
    disk: SlowDisk,
) -> None:
    driver = make_driver(60)
    stream = driver.submit(random_prompt(1, 12), PoolPolicy(fixed=random_pool(3, 3)), max_tokens=5)
    while len(driver.tokens(stream)) < 3:
        driver.engine.step()
    disk.wait_for(1, driver, stream)
    prompt = driver.submit(random_prompt(2, 40), POOL, max_tokens=1)
    driver.engine.step()
    assert driver.usage(stream).completion_tokens == 5
    assert driver.usage(prompt).completion_tokens == 1
    assert disk.num_given_up == 0
    driver.assert_nothing_held()


def test_a_prompt_that_fails_while_it_waits_leaves_the_streams_alone(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
    disk: SlowDisk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = make_driver(60)
    stream = driver.submit(random_prompt(1, 12), PoolPolicy(fixed=random_pool(3, 3)), max_tokens=60)
    while len(driver.tokens(stream)) < 3:
        driver.engine.step()
    disk.wait_for(2, driver, stream)

    def broken(source: CheckpointExperts, wanted: Sequence[Destination], on_most: object) -> list[Any]:
        disk._read(source, [])
        raise OSError("the disk has left")

    monkeypatch.setattr(CheckpointExperts, "read_all", broken)
    prompt = driver.submit(random_prompt(2, 40), POOL, max_tokens=4)
    driver.finish()
    assert "the disk has left" in str(driver.failures[prompt])
    assert len(driver.tokens(stream)) == 60
    driver.assert_nothing_held()
