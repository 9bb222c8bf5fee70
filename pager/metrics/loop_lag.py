"""How long an event loop is away from its work, and what keeps collections of garbage from holding it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

INTERVAL_S = 0.02


class LoopLag:
    """A task that wakes up every `INTERVAL_S` and reports by how much each wake-up was late.

    A wake-up is late while something else holds the loop: a callback, another thread that holds the GIL, or other
    programs that have the processor. Everybody whom the loop serves waited as long. Belongs to the loop that starts it.
    """

    def __init__(self, observe: Callable[[float], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._observe = observe
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Must be called on the loop that is watched."""
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _watch(self) -> None:
        while True:
            before_s = self._clock()
            await asyncio.sleep(INTERVAL_S)
            self._observe(max(0.0, self._clock() - before_s - INTERVAL_S))


def leave_out_of_collections() -> None:
    """Takes all objects that there are now out of what is searched for garbage. For a process that has started.

    Libraries and a model are half a million objects, which a full collection searches in a quarter of a second while
    all threads stand.
    """
    gc.collect()
    gc.freeze()
