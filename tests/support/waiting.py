"""Waiting for a condition, with a bound that a busy machine keeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

WAIT_S = 180.0
"""Long enough for a machine at a load of 15; a test whose condition comes true does not notice."""

POLL_S = 0.005


def until(
    condition: Callable[[], object],
    seconds: float = WAIT_S,
    *,
    what: str = "",
    absent: tuple[type[Exception], ...] = (),
) -> None:
    """Polls until `condition()` is true. An `absent` error means that what is asked for is not there yet."""
    end_s = time.monotonic() + seconds
    while not _holds(condition, absent):
        assert time.monotonic() < end_s, f"not within {seconds} s: {what or condition}"
        time.sleep(POLL_S)


async def eventually(
    condition: Callable[[], object],
    seconds: float = WAIT_S,
    *,
    what: str = "",
    absent: tuple[type[Exception], ...] = (),
) -> None:
    """Polls as `until` does, and lets the event loop go on meanwhile."""
    end_s = time.monotonic() + seconds
    while not _holds(condition, absent):
        assert time.monotonic() < end_s, f"not within {seconds} s: {what or condition}"
        await asyncio.sleep(POLL_S)


def _holds(condition: Callable[[], object], absent: tuple[type[Exception], ...]) -> bool:
    try:
        return bool(condition())
    except absent:
        return False
