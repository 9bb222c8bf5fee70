"""Threads that read experts, most urgent first."""

from __future__ import annotations

import heapq
import threading
import weakref
from collections.abc import Callable, Sequence

from pager import at_exit
from pager.planner import NUM_CHECKERS
from pager.store.reads import MOST_BYTES, Place
from pager.types import ExpertKey

Priority = tuple[int, int]
"""(how urgent, in which order): the lower is read first. Ties go by layer, then by place in the files."""


class Turn:
    """Of a thread to read. Over when `end` is called, at the latest with the thread's work."""

    def __init__(self, pass_on: Callable[[], None]) -> None:
        self._pass_on = pass_on
        self.is_over = False

    def end(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._pass_on()


class Readers:
    """A priority queue of keys and the threads that call `work(keys, turn)` on them.

    `num_readers` of them have a turn at a time. There are NUM_CHECKERS threads more: `work` may end its turn when it
    has read most, and while it reads the rest and checks it another thread prepares the next read. So a disk has never
    to wait for a processor, and what is most urgent when a turn is free still comes first.

    A thread takes a run of keys at a time: neighbours in a file, of one layer and one priority, MOST_BYTES or a single
    expert, and not more than leaves as much for every other turn. Knows no slots: a key may be queued twice or have
    become pointless, and `work` finds out. `work` must not raise.
    """

    def __init__(
        self,
        num_readers: int,
        work: Callable[[Sequence[ExpertKey], Turn], None],
        place_of: Callable[[ExpertKey], Place],
    ) -> None:
        """`work` is a bound method and held weakly: threads don't keep a forgotten pager's memory alive."""
        self._num_readers = num_readers
        self._free_turns = num_readers
        self._work = weakref.WeakMethod(work)
        self._place_of = place_of
        self._queue: list[tuple[Priority, int, Place, ExpertKey]] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{number}", daemon=True)
            for number in range(num_readers + NUM_CHECKERS)
        ]
        for thread in self._threads:
            thread.start()
        at_exit.call(self, Readers.end)

    def push(self, priority: Priority, keys: Sequence[ExpertKey]) -> None:
        """Queues `keys` at once, so that no thread takes the last before it sees the first."""
        with self._changed:
            for key in keys:
                heapq.heappush(self._queue, (priority, key.layer, self._place_of(key), key))
            self._changed.notify(min(len(keys), self._free_turns))

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
        turn: Turn | None = None
        while run := self._next_run(turn):
            work = self._work()
            if work is None:
                return
            turn = Turn(self._pass_on_turn)
            work(run, turn)
            del work  # or this thread, waiting for its next run, would keep the pager alive

    def _pass_on_turn(self) -> None:
        with self._changed:
            self._free_turns += 1
            self._changed.notify()

    def _next_run(self, turn: Turn | None) -> list[ExpertKey]:
        """What to do with the next turn; `turn` was this thread's last. Empty when it is time to stop."""
        with self._changed:
            if turn is not None and not turn.is_over:
                self._free_turns += 1  # nobody is woken for it: this thread takes it, if anybody
            while not (self._queue and self._free_turns) and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return []
            self._free_turns -= 1
            share = -(-len(self._queue) // self._num_readers)
            priority, layer, first, key = heapq.heappop(self._queue)
            run, last = [key], first
            while self._queue and len(run) < share:
                next_priority, next_layer, place, key = self._queue[0]
                if (next_priority, next_layer) != (priority, layer) or not last.is_followed_by(place):
                    break
                if place.end - first.start > MOST_BYTES:
                    break
                heapq.heappop(self._queue)
                run.append(key)
                last = place
            return run
