"""Who is admitted next, and how long that takes. Knows no tensors, devices or memory, and reads no clock."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from pager.errors import DeadlineExceeded

T = TypeVar("T")
REMEMBERED_ADMISSIONS = 32


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


class LineClock:
    """How long one place in the line lasts, by those admitted from it lately: the wait of each, divided by the place
    at which it joined.

    Only the present line counts. What was measured before it was last empty says nothing about who is in it now.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=REMEMBERED_ADMISSIONS)
        self.place_s: float | None = None  # None until somebody was admitted from this line

    def forget(self) -> None:
        """A new line begins."""
        self._recent.clear()
        self.place_s = None

    def admitted(self, place: int, waited_s: float) -> None:
        """Whoever joined at `place`, the first being 1, waited for so long."""
        self._recent.append(waited_s / place)
        self.place_s = statistics.median(self._recent)

    def check(self, num_ahead: int, left_s: float) -> None:
        """Raises DeadlineExceeded for a request that would wait behind so many others for longer than `left_s`."""
        place_s = self.place_s
        if place_s is not None and num_ahead * place_s > left_s:
            raise DeadlineExceeded(
                f"{num_ahead} requests are in line, each place of which has lasted {place_s:.2f} s, and the deadline "
                f"leaves {left_s:.2f} s; allow more time or retry later",
                field="deadline",
            )
