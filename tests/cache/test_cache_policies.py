"""Eviction orders, literally; and traces, replayed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pager.cache.index import LFRU, LFU, POLICIES, CacheIndex, EvictionPolicy, LeastStale, make_policy
from pager.cache.stats import Cause
from pager.cache.trace import Access, Trace, TraceHeader
from pager.lab.replay import OPTIMUM, replay, replay_all
from pager.types import ExpertKey


def key(number: int) -> ExpertKey:
    """Four experts a layer."""
    return ExpertKey(number // 4, number % 4)


def touch(policy: EvictionPolicy, *numbers: int) -> None:
    """Used, and let go of at once."""
    for number in numbers:
        policy.use(key(number))
        if key(number) in set(policy.victims()):
            policy.remove(key(number))
        policy.add(key(number))


def order(policy: EvictionPolicy) -> list[int]:
    return [4 * layer + expert for layer, expert in policy.victims()]


def test_lfu_evicts_the_least_used_and_remembers_uses_of_the_evicted() -> None:
    policy = LFU()
    touch(policy, 0, 0, 0, 1, 2, 2, 3)
    assert order(policy) == [1, 3, 2, 0]
    policy.remove(key(1))
    touch(policy, 1)
    assert order(policy) == [3, 2, 1, 0]
    assert len(policy) == 4


def test_lfru_weighs_uses_against_the_time_since_the_last_one() -> None:
    policy = LFRU()
    touch(policy, *[0] * 8, 1)
    assert order(policy) == [1, 0], "eight uses outweigh one that was later"
    touch(policy, *[2] * 20)
    assert order(policy) == [1, 0, 2]
    touch(policy, 1, 1)
    assert order(policy) == [0, 1, 2], "in the end they do not"


def test_least_stale_evicts_what_no_recent_pass_used_and_then_what_is_needed_last() -> None:
    policy = LeastStale()
    touch(policy, 0, 1, 4, 5, 8, 9)  # one pass over three layers
    touch(policy, 0, 4)  # the next one, now in layer 1
    assert order(policy)[:2] == [5, 1], "not used by this pass, in layers that it has left"
    assert order(policy)[-2:] == [8, 9], "their turn comes next"


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(numbers=st.lists(st.integers(0, 23), max_size=200))
def test_every_policy_keeps_the_books_of_the_index(name: str, numbers: list[int]) -> None:
    index = CacheIndex(5, make_policy(name))
    held: list[ExpertKey] = []
    for number in numbers:
        plan = index.plan([key(number)])
        if plan is None or key(number) in held:
            if held:
                index.unpin(held.pop(number % len(held)))
        else:
            index.commit(plan)
            held.append(key(number))
            for load in plan.loads:
                index.installed(load.key)
        index.check_integrity()


HEADER = TraceHeader("f" * 32, expert_bytes=100, routed_per_layer=(4, 4, 4))


def scan(*numbers: int) -> Trace:
    """Each held and let go of by itself."""
    events = []
    for number in numbers:
        events += [Access(Cause.DEMAND, (key(number),)), Access(None, (key(number),))]
    return Trace(HEADER, tuple(events))


def test_the_optimum_keeps_what_comes_back_first() -> None:
    trace = scan(0, 1, 2, 0, 1, 2, 0, 1, 2)
    assert replay(trace, "lru", 2).hits == 0, "a circle is the worst for it"
    assert replay(trace, OPTIMUM, 2).hits == 3
    assert replay(trace, "lru", 3).hits == replay(trace, OPTIMUM, 3).hits == 6


def test_what_is_held_is_not_evicted_and_what_finds_no_room_is_read_again() -> None:
    events = (
        Access(Cause.LEASE, (key(0), key(1))),
        Access(Cause.DEMAND, (key(2),)),
        Access(None, (key(2),)),
        Access(Cause.DEMAND, (key(2), key(0))),
        Access(None, (key(0), key(1))),
        Access(None, (key(2), key(0))),
        Access(Cause.DEMAND, (key(2), key(0))),
    )
    result = replay(Trace(HEADER, events), "lru", 2)
    assert (result.hits, result.misses) == (2, 5)


@given(numbers=st.lists(st.integers(0, 11), min_size=1, max_size=60), num_slots=st.integers(1, 12))
def test_no_policy_beats_the_optimum_and_none_loses_an_access(numbers: list[int], num_slots: int) -> None:
    *results, best = replay_all(scan(*numbers), num_slots)
    assert best.policy == OPTIMUM
    assert [result.policy for result in results] == [
        result.policy for result in sorted(results, key=lambda result: result.misses)
    ]
    for result in results:
        assert result.misses >= best.misses >= len(set(numbers))
        assert result.hits + result.misses == len(numbers)
