"""Threads that read experts, most urgent first."""

from __future__ import annotations

import heapq
import threading
import weakref
from collections.abc import Callable, Sequence

from pager import at_exit
from pager.types import ExpertKey

Priority = tuple[int, int]
"""(how urgent, in which order): the lower is read first. Ties go by layer, then expert."""


class Readers:
    """A priority queue of keys and the threads that call `work(key)` on them.

    Knows no slots: a key may be queued twice or have become pointless, and `work` finds out. `work` must not raise.
    """

    def __init__(self, num_readers: int, work: Callable[[ExpertKey], None]) -> None:
        """`work` is a bound method and held weakly: threads don't keep a forgotten pager's memory alive."""
        self._work = weakref.WeakMethod(work)
        self._queue: list[tuple[Priority, ExpertKey]] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{number}", daemon=True)
            for number in range(num_readers)
        ]
        for thread in self._threads:
            thread.start()
        at_exit.call(self, Readers.end)

    def push(self, priority: Priority, keys: Sequence[ExpertKey]) -> None:
        """Queues `keys` at once, so that no thread takes the last before it sees the first."""
        with self._changed:
            for key in keys:
                heapq.heappush(self._queue, (priority, key))
            self._changed.notify(len(keys))

    def stop(self) -> None:
        """Drops what is queued; threads end after the read they are in. Idempotent, safe in a finalizer."""
        with self._changed:
            self._stopped = True
            self._queue.clear()
            self._changed.notify_all()

    def join(self, timeout_s: float | None = None) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    def end(self) -> None:
        """Stops, and waits a bounded time."""
        self.stop()
        self.join(at_exit.TIMEOUT_S)

    def _run(self) -> None:
        while (key := self._next()) is not None:
            work = self._work()
            if work is None:
                return
            work(key)
            del work  # or this thread, waiting for its next key, would keep the pager alive

    def _next(self) -> ExpertKey | None:
        with self._changed:
            while not self._queue and not self._stopped:
                self._changed.wait()
            return None if self._stopped else heapq.heappop(self._queue)[1]
