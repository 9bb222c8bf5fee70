"""Repeats that alternate, so that a machine that changes its speed changes it for all that is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def alternate(runs: Mapping[str, Callable[[], Value]], num_rounds: int) -> dict[str, list[Value]]:
    """A B C, A B C, ...: what each run returned in each round."""
    values: dict[str, list[Value]] = {name: [] for name in runs}
    for _ in range(num_rounds):
        for name, run in runs.items():
            values[name].append(run())
    return values
