"""Blocking work in a bounded number of threads, tenant by tenant in turn."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")


class FairThreads:
    """Threads that take work of one tenant after the other, however much any of them has waiting.

    With two threads or more no tenant has all of them, so that the long work of one never keeps all others waiting. One
    event loop owns the lines; what waits in them is bounded by admission, and a cancelled caller leaves its line.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._most_of_one = max(1, num_threads - 1)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._running: Counter[str] = Counter()
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}  # the tenant whose turn is next comes first

    async def run(self, tenant: str, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises, once it had its turn. Work that has begun goes on when the caller leaves."""
        loop = asyncio.get_running_loop()
        await self._turn(tenant, loop)
        job = self._threads.submit(work)

        def ended(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._leave, tenant)

        job.add_done_callback(ended)
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Waits for what runs; what has not begun is cancelled."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def _turn(self, tenant: str, loop: asyncio.AbstractEventLoop) -> None:
        if tenant not in self._lines and self._has_room(tenant):
            self._running[tenant] += 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._lines.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(tenant, turn)
            else:  # it had just been given its turn
                self._leave(tenant)
            raise

    def _has_room(self, tenant: str) -> bool:
        return self._running.total() < self._num_threads and self._running[tenant] < self._most_of_one

    def _leave(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        while (following := next(filter(self._has_room, self._lines), None)) is not None:
            turn = self._lines[following][0]
            self._forget(following, turn)
            if following in self._lines:
                self._lines[following] = self._lines.pop(following)  # behind all others
            if not turn.done():
                self._running[following] += 1
                turn.set_result(None)

    def _forget(self, tenant: str, turn: asyncio.Future[None]) -> None:
        line = self._lines.get(tenant, deque())
        with suppress(ValueError):  # passed over already
            line.remove(turn)
        if not line:
            self._lines.pop(tenant, None)
