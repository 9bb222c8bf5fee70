"""Repeats that alternate, so that a machine that changes its speed changes it for all that is compared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")


def alternate(runs: Mapping[Name, Callable[[], Value]], num_rounds: int) -> dict[Name, list[Value]]:
    """A B C, A B C, ...: what each run returned in each round."""
    values: dict[Name, list[Value]] = {name: [] for name in runs}
    for _ in range(num_rounds):
        for name, run in runs.items():
            values[name].append(run())
    return values
