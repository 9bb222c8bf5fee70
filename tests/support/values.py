"""Values that a test takes for granted, and says so to the type checker."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")


def some(value: Value | None) -> Value:
    """The value, which has to be there: `with some(pager.reserve(4)) as lease:`."""
    assert value is not None
    return value
