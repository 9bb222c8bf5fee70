"""Eviction orders, literally; and traces, recorded, read back and replayed."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pager.cache.index import CacheIndex
from pager.cache.policy import LFRU, LFU, POLICIES, EvictionPolicy, LeastStale, make_policy
from pager.cache.replay import OPTIMUM, replay, replay_all
from pager.cache.trace import Access, Trace, TraceHeader, TraceRecorder, read_trace
from pager.cache.usage import Cause
from pager.errors import ConfigError
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


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_trace_reads_back_as_it_was_recorded(tmp_path: Path, name: str) -> None:
    recorder = TraceRecorder(tmp_path / name, HEADER)
    recorder.held(Cause.LEASE, [key(0), key(5)])
    recorder.held(Cause.DEMAND, [])
    recorder.let_go([key(5)])
    recorder.close()
    recorder.close()
    assert read_trace(tmp_path / name) == Trace(
        HEADER, (Access(Cause.LEASE, (key(0), key(5))), Access(None, (key(5),)))
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "first line"),
        (b'{"format": "another"}\n', "first line"),
        (b'{"format": "expert-pager-trace", "version": 9}\n', "version 9"),
        (b'{"format": "expert-pager-trace", "version": 1, "fingerprint": "f"}\n', "lacks a field"),
        (b'["lease", 0, 1]\n', "first line"),
        (b"\xff\xfe", "can not be read"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "trace.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_trace(tmp_path / "trace.jsonl")


@pytest.mark.parametrize("line", ["[]", "{}", '["lease", 0]', '["lease", 0, "1"]', '["stolen", 0, 1]', "not json"])
def test_a_damaged_event_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    TraceRecorder(path, HEADER).close()
    path.write_text(path.read_text() + '["lease", 0, 1]\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 3 of"):
        read_trace(path)


def test_a_cut_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(ConfigError, match="can not be read"):
        read_trace(path)
