"""Ends threads that run native code before the interpreter does.

An interpreter that ends unwinds its daemon threads where they stand; in the middle of a torch operation that aborts the
process ("terminate called without an active exception").
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

TIMEOUT_S = 10.0
"""How long a thread may take to come to an end when the process does: a read that hangs must not keep it."""

_T = TypeVar("_T")
_live: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()


def call(owner: _T, end: Callable[[_T], None]) -> None:
    """Has `end(owner)`, which must return in a bounded time, called when the process exits: the last registered first.

    `owner` is held weakly: its threads, while they run, should keep it alive.
    """
    _live[owner] = end


@atexit.register
def _end_all() -> None:
    for owner, end in reversed(list(_live.items())):
        end(owner)
