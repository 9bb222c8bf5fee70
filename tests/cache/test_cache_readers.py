"""Whose turn it is to read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from pager.cache.tiers import Readers, Turn
from pager.memory import NUM_CHECKERS
from pager.store.reads import FileRange
from pager.types import ExpertKey


class Work:
    """Stays with every expert until it is told that it has read most of it, and then until it is done."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self._read: set[int] = set()
        self._done: set[int] = set()
        self._changed = threading.Condition()

    def do(self, keys: Sequence[ExpertKey], turn: Turn) -> None:
        [key] = keys
        with self._changed:
            self.begun.append(key.expert)
            self._changed.notify_all()
            self._changed.wait_for(lambda: key.expert in self._read | self._done)
            ends_early = key.expert in self._read
        if ends_early:
            turn.end()
            turn.end()  # counts once
        with self._changed:
            self._changed.wait_for(lambda: key.expert in self._done)

    def wait_until_begun(self, count: int) -> list[int]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, timeout=60)
            return list(self.begun)

    def have_read(self, *experts: int) -> None:
        with self._changed:
            self._read.update(experts)
            self._changed.notify_all()

    def be_done(self, *experts: int) -> None:
        with self._changed:
            self._done.update(experts)
            self._changed.notify_all()


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.be_done(*range(100))


def readers_of(work: Work, num_readers: int) -> Readers:
    return Readers(num_readers, work.do, lambda key: FileRange(0, 10_000 * key.expert, 10_000 * key.expert))


def push(readers: Readers, *experts: int, urgency: int = 0) -> None:
    readers.push((urgency, 0), [ExpertKey(0, expert) for expert in experts])


def stays_at(work: Work, begun: list[int]) -> bool:
    """Nobody begins another one, given time to."""
    threading.Event().wait(0.05)
    return work.begun == begun


def test_the_next_read_begins_when_most_of_one_is_read(work: Work) -> None:
    readers = readers_of(work, 1)
    push(readers, 0, 1, 2)
    assert work.wait_until_begun(1) == [0]
    assert stays_at(work, [0])
    work.have_read(0)
    assert work.wait_until_begun(2) == [0, 1], "while the first is still at work"
    assert stays_at(work, [0, 1])
    work.be_done(0)
    assert stays_at(work, [0, 1]), "the first has given its turn away already"
    work.be_done(1)
    assert work.wait_until_begun(3) == [0, 1, 2]
    work.be_done(2)
    readers.end()


def test_what_is_most_urgent_when_a_turn_is_free_comes_first(work: Work) -> None:
    readers = readers_of(work, 1)
    push(readers, 0)
    work.wait_until_begun(1)
    push(readers, 1, urgency=1)
    push(readers, 2)
    work.have_read(0)
    assert work.wait_until_begun(2) == [0, 2]
    work.be_done(0, 1, 2)
    readers.end()


def test_as_many_at_a_time_as_there_are_readers_and_no_more_threads_than_are_promised(work: Work) -> None:
    readers = readers_of(work, 2)
    push(readers, *range(8))
    assert sorted(work.wait_until_begun(2)) == [0, 1]
    assert stays_at(work, work.begun[:2])
    work.have_read(*range(8))
    assert sorted(work.wait_until_begun(2 + NUM_CHECKERS)) == [0, 1, 2, 3]
    assert stays_at(work, work.begun[: 2 + NUM_CHECKERS])
    work.be_done(*range(8))
    assert sorted(work.wait_until_begun(8)) == list(range(8))
    readers.end()
