"""Threads beside the main one: an event loop in a thread of its own, and an orderly end when the process exits."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""How long a thread may take to come to an end when the process does: a read that hangs must not keep it."""
STOP_TIMEOUT_S = 5.0

_T = TypeVar("_T")
_live: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()


def call(owner: _T, end: Callable[[_T], None]) -> None:
    """Registers `end(owner)` to be called when the process exits; it must return in a bounded time. Last in, first out.

    `owner` is held weakly: its threads, while they run, should keep it alive.
    """
    _live[owner] = end


@atexit.register
def _end_all() -> None:
    for owner, end in reversed(list(_live.items())):
        end(owner)


class LoopThread:
    """An event loop and the thread that runs it. Its methods may be called from any other thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T], timeout_s: float | None = None) -> _T:
        """Runs the coroutine on the loop and waits for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Schedules the coroutine after those given before, and does not wait. What it raises is logged."""
        asyncio.run_coroutine_threadsafe(coroutine, self.loop).add_done_callback(_log_failure)

    def stop(self) -> None:
        """Stops the loop. One that is blocked is left behind after a while, since the process ends next."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("the loop %r does not end; it is left behind", self._thread.name)
        else:
            self.loop.close()


def _log_failure(done: Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.error("what was started on a loop failed", exc_info=error)
