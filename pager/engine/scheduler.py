"""Who is admitted next. Knows no tensors, devices, memory or clocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class WaitingLine(Generic[T]):
    """First in, first out, with bounded overtaking.

    A later item that fits may pass earlier ones that don't, but nobody is passed more than `max_overtakes` times:
    once the first in line has been, everybody waits for it. So none starves, provided that what is admitted ends
    and each item fits into an empty engine.
    """

    def __init__(self, max_overtakes: int) -> None:
        self._max_overtakes = max_overtakes
        self._times_passed: dict[T, int] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._times_passed)

    def __iter__(self) -> Iterator[T]:
        return iter(self._times_passed)

    def __contains__(self, item: object) -> bool:
        return item in self._times_passed

    def add(self, item: T) -> None:
        self._times_passed[item] = 0

    def remove(self, item: T) -> None:
        """`item` leaves without having been admitted; nobody is passed by that."""
        del self._times_passed[item]

    def candidates(self) -> Iterator[T]:
        """Who may be admitted now, in the order to try. Takes account of what is admitted while iterating.

        Whoever passes somebody passes the first in line too, so that one has always been passed most.
        """
        for item in tuple(self._times_passed):
            first, times_passed = next(iter(self._times_passed.items()))
            if item != first and times_passed >= self._max_overtakes:
                return
            yield item

    def admit(self, item: T) -> None:
        """`item` leaves the line and thereby passes everybody before it."""
        for earlier in self._times_passed:
            if earlier == item:
                break
            assert self._times_passed[earlier] < self._max_overtakes, "passed too often"
            self._times_passed[earlier] += 1
        del self._times_passed[item]
