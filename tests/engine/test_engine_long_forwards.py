"""A forward that takes long: it is left when nobody waits for it, holds up nobody's end, and shows its progress."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pager.cluster.cluster import WorkerSupervisor
from pager.cluster.placement import Health
from pager.engine.runner import ModelRunner
from pager.errors import Cancelled, DeadlineExceeded, NotReady, PagerError
from pager.store.reads import DataFile
from pager.types import Count, ExpertPool, Full, PoolPolicy
from tests.engine.conftest import Driver
from tests.support.waiting import until

pytestmark = pytest.mark.slow

EMO_TINY = Path(__file__).parents[2] / "models" / "emo-tiny"
EXACT, POOL = PoolPolicy(Full()), PoolPolicy(Count(4))
KINDS = [
    pytest.param(POOL, 60, id="pool"),
    pytest.param(EXACT, 60, id="exact"),
    pytest.param(EXACT, 6, id="waves"),
]


class Disk:
    """Reads come as they are asked for until `stop`; from then on each waits for `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_waiting = 0
        self.num_passing = 10**9
        self._gate = threading.Event()
        self._lock = threading.Lock()
        read_some = DataFile._read_some

        def gated(file: DataFile, buffers: Sequence[memoryview], offset: int) -> int:
            with self._lock:
                self.num_passing -= 1
                waits = self.num_passing < 0
                self.num_waiting += waits
            assert not waits or self._gate.wait(120), "nobody let the read go on"
            return read_some(file, buffers, offset)

        monkeypatch.setattr(DataFile, "_read_some", gated)

    def stop(self, after: int = 0) -> None:
        """After so many reads more."""
        self._gate.clear()
        self.num_waiting, self.num_passing = 0, after

    def go_on(self) -> None:
        self.num_passing = 10**9
        self._gate.set()

    @property
    def stands_still(self) -> bool:
        return self.num_waiting > 0 and not self._gate.is_set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.go_on()


def cancel(driver: Any, request: str) -> None:
    assert driver.engine.cancel(request, "t")


def run_out_of_time(driver: Any, request: str) -> None:
    (running,) = [each for each in driver.engine._inbox.live() if each.asked.id == request]
    running.deadline_s = driver.engine._soonest_deadline_s = time.monotonic()


def shut_down(driver: Any, _: str) -> None:
    driver.engine.stop()


@pytest.mark.parametrize(("policy", "num_slots"), KINDS)
@pytest.mark.parametrize(
    ("end", "error"), [(cancel, Cancelled), (run_out_of_time, DeadlineExceeded), (shut_down, NotReady)]
)
def test_a_prefill_that_waits_for_reads_is_left_when_nobody_waits_for_it(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    disk: Disk,
    policy: PoolPolicy,
    num_slots: int,
    end: Callable[[Any, str], None],
    error: type[PagerError],
) -> None:
    driver, again = make_driver(num_slots), make_driver(num_slots)
    expected = again.submit(random_prompt(1, 40), policy, max_tokens=4)
    again.finish()
    disk.stop(after=7)
    doomed = driver.submit(random_prompt(1, 40), policy, max_tokens=4)
    driver.engine.start()
    until(lambda: disk.stands_still, what="it reads")
    end(driver, doomed)
    until(lambda: driver.failures, what="it ends")
    assert disk.stands_still
    assert isinstance(driver.failures[doomed], error)
    assert driver.engine.status().kv_blocks_used == 0
    driver.paged.pager.check_integrity()
    disk.go_on()
    driver.assert_nothing_held()
    driver.engine.stop()
    if error is not NotReady:
        driver.engine._inbox.is_halted, driver.engine._inbox._is_open = False, True
        second = driver.submit(random_prompt(1, 40), policy, max_tokens=4)
        driver.finish()
        assert driver.tokens(second) == again.tokens(expected), "what was left behind did no harm"
        driver.assert_nothing_held()


@pytest.mark.parametrize(("policy", "num_slots"), KINDS)
def test_a_prefill_is_left_within_one_layer(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    policy: PoolPolicy,
    num_slots: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver, begin = make_driver(num_slots), ModelRunner._begin_layer
    first = driver.submit(random_prompt(1, 40), policy, max_tokens=1)
    driver.finish()
    layers: list[int] = []

    def begin_layer(runner: ModelRunner) -> None:
        layers.append(runner.num_layers_run)
        if len(layers) == 2:
            cancel(driver, doomed)
        begin(runner)

    monkeypatch.setattr(ModelRunner, "_begin_layer", begin_layer)
    doomed = driver.submit(random_prompt(1, 40), policy, max_tokens=4)
    driver.engine.step()
    assert isinstance(driver.failures[doomed], Cancelled)
    assert len(layers) == 2
    driver.assert_nothing_held()
    third = driver.submit(random_prompt(1, 40), policy, max_tokens=1)
    driver.finish()
    assert driver.tokens(third) == driver.tokens(first)
    driver.assert_nothing_held()


def test_an_exact_step_is_left_when_none_of_its_sequences_goes_on(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, begin = make_driver(60), ModelRunner._begin_layer
    alone = driver.submit(random_prompt(3, 12), EXACT, max_tokens=8)
    driver.finish()
    doomed = [driver.submit(random_prompt(seed, 12), EXACT, max_tokens=40) for seed in (1, 2)]
    kept = driver.submit(random_prompt(3, 12), EXACT, max_tokens=8)
    while not driver.tokens(kept):
        driver.engine.step()
    layers: list[int] = []
    ends_at: dict[int, list[str]] = {2: doomed}

    def begin_layer(runner: ModelRunner) -> None:
        layers.append(runner.num_layers_run)
        for request in ends_at.get(len(layers), []):
            cancel(driver, request)
        begin(runner)

    monkeypatch.setattr(ModelRunner, "_begin_layer", begin_layer)
    driver.engine.step()
    assert len(layers) == 4, "somebody goes on"
    assert sorted(driver.failures) == sorted(doomed)
    assert len(driver.tokens(kept)) == 2
    ends_at = {6: [kept]}
    others = [driver.tokens(request) for request in doomed]
    driver.engine.step()
    assert len(layers) == 6
    assert isinstance(driver.failures[kept], Cancelled)
    assert driver.tokens(kept) == driver.tokens(alone)[:2]
    assert [driver.tokens(request) for request in doomed] == others
    driver.assert_nothing_held()


def test_others_end_while_a_prefill_waits_for_reads(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    random_pool: Callable[..., ExpertPool],
    disk: Disk,
) -> None:
    driver = make_driver(60)
    stream = driver.submit(random_prompt(1, 12), PoolPolicy(fixed=random_pool(3, 3)), max_tokens=240)
    while len(driver.tokens(stream)) < 2:
        driver.engine.step()
    waiting = driver.submit(random_prompt(4, 12), PoolPolicy(Count(15)), max_tokens=2)
    disk.stop()
    prompt = driver.submit(random_prompt(2, 40), POOL, max_tokens=4)
    driver.engine.start()
    until(lambda: disk.stands_still, what="it reads")
    driver.engine.cancel(stream, "t")  # unless it has come to its end
    late = driver.submit(random_prompt(5, 12), POOL, max_tokens=4)
    for request in (waiting, late):
        cancel(driver, request)
    until(lambda: {waiting, late} <= set(driver.failures), what="they never begin")
    until(lambda: driver.engine.status().running == 1, what="one ends, one goes on")
    assert disk.stands_still
    disk.go_on()
    until(lambda: driver.tokens(prompt), what="the prefill itself goes on")
    until(lambda: driver.engine.status().running == 0, what="to its end")
    driver.engine.stop()
    assert driver.usage(prompt).completion_tokens == 4
    driver.assert_nothing_held()


class NeverLaunched:
    """A worker whose process is never there; its health is that of an engine here."""

    def __init__(self, health: Callable[[], Health]) -> None:
        self._health = health

    async def names(self) -> list[str]:
        return ["w"]

    async def launch(self, name: str) -> Any:
        await asyncio.Event().wait()

    async def load(self, process: Any) -> Any:
        raise AssertionError("nothing was launched")

    async def health(self, process: Any) -> Health:
        return self._health()

    async def retire(self, process: Any) -> None:
        """There is none."""

    async def drain(self, process: Any, timeout_s: float) -> None:
        """There is none."""

    async def end_worker(self, process: Any, *, gracefully: bool) -> None:
        """There is none."""


@pytest.mark.slow
@pytest.mark.parametrize("policy", [PoolPolicy(Count(100)), EXACT], ids=["pool", "exact"])
def test_a_prefill_from_a_slow_disk_is_no_hanging_step(
    make_driver: Callable[..., Driver],
    random_prompt: Callable[[int, int], list[int]],
    policy: PoolPolicy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small model at 8 MB/s takes as long as one five times as large at 40: longer than a step may stand still."""
    step_timeout_s, bytes_per_s = 1.5, 8e6
    fast, slow = (make_driver(num_slots, path=EMO_TINY) for num_slots in (1200, 1200))
    expected = fast.submit(random_prompt(1, 200), policy, max_tokens=4)
    fast.finish()

    read_some, lock, free_s = DataFile._read_some, threading.Lock(), 0.0

    def throttled(file: DataFile, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal free_s
        count = read_some(file, buffers, offset)
        with lock:
            free_s = max(free_s, time.monotonic()) + count / bytes_per_s
            ready_s = free_s
        time.sleep(max(0.0, ready_s - time.monotonic()))
        return count

    monkeypatch.setattr(DataFile, "_read_some", throttled)
    answer = slow.submit(random_prompt(1, 200), policy, max_tokens=4)

    def health() -> Health:
        status = slow.engine.status()
        return Health(status.progress if status.is_stepping else None)

    async def watch() -> float:
        supervisor = WorkerSupervisor(
            "w", NeverLaunched(health), longest_pause_s=60.0, step_timeout_s=step_timeout_s, buffer_chunks=8,
            on_change=lambda: None,
        )  # fmt: skip
        started_s = time.monotonic()
        slow.engine.start()
        while not slow.tokens(answer):
            await supervisor._check(None, 60.0)
            assert time.monotonic() < started_s + 120
            await asyncio.sleep(0.05)
        took_s = time.monotonic() - started_s
        await supervisor.close()
        return took_s

    assert asyncio.run(watch()) > step_timeout_s
    until(lambda: slow.engine.status().running == 0, what="it ends")
    slow.engine.stop()
    assert slow.tokens(answer) == fast.tokens(expected)
    slow.assert_nothing_held()


def test_a_step_shows_progress_while_bytes_arrive_and_none_while_nothing_does(
    make_driver: Callable[..., Driver], random_prompt: Callable[[int, int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, read_some = make_driver(60), DataFile._read_some
    turns, begun = threading.Semaphore(0), threading.Event()

    def trickle(file: DataFile, buffers: Sequence[memoryview], offset: int) -> int:
        begun.set()
        assert turns.acquire(timeout=120)
        return read_some(file, [buffers[0][:1000]], offset)

    monkeypatch.setattr(DataFile, "_read_some", trickle)
    request = driver.submit(random_prompt(1, 40), POOL, max_tokens=1)
    driver.engine.start()
    assert begun.wait(60)

    def grows(progress: int) -> bool:
        return driver.engine.status().progress > progress

    for _ in range(12):  # of 24576 bytes of an expert
        before = driver.engine.status()
        assert before.is_stepping
        turns.release()
        until(partial(grows, before.progress), what="1000 bytes are progress")
    still = driver.engine.status().progress
    time.sleep(0.2)
    assert driver.engine.status().progress == still, "nothing is none"
    turns.release(10**6)
    until(lambda: driver.tokens(request), what="it ends")
    driver.engine.stop()
    assert not driver.engine.status().is_stepping
    driver.assert_nothing_held()
