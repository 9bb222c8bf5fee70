"""What is measured of an event loop that somebody holds."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

from pager.observe.metrics import INTERVAL_S, LoopLag, leave_out_of_collections


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the probe has no event
            await asyncio.sleep(0)


async def test_a_callback_that_holds_the_loop_is_seen_once() -> None:
    lags: list[float] = []
    lag = LoopLag(lags.append)
    await lag.start()
    await until(lambda: lags)
    lags.clear()
    time.sleep(0.5)  # noqa: ASYNC251 - what is measured
    await until(lambda: lags)
    await lag.stop()
    assert 0.5 - 2 * INTERVAL_S < lags[0] < 60
    assert sum(lags) == lags[0]


async def test_work_that_lets_others_run_is_no_lag() -> None:
    lags: list[float] = []
    lag = LoopLag(lags.append, time.thread_time)  # of this thread, so that other programs do not count
    await lag.start()
    ends_s = time.thread_time() + 0.3
    await until(lambda: time.thread_time() > ends_s)
    await lag.stop()
    assert len(lags) >= 3
    assert max(lags) < 0.05


def test_what_a_process_started_with_makes_no_collection_long() -> None:
    started_with: list[list[int]] = [[] for _ in range(500_000)]
    before_s = collection_s()
    leave_out_of_collections()
    try:
        assert collection_s() < before_s / 5
    finally:
        gc.unfreeze()
    assert len(started_with) == 500_000


def collection_s() -> float:
    began_s = time.thread_time()
    gc.collect()
    return time.thread_time() - began_s
