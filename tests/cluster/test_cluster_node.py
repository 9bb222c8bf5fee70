"""The node's control actor, without Ray around it: who owns the segment, and what a dead worker leaves."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pager.cache.host import HostState, HostTier, LocalHostIndex
from pager.cluster.node import NodeControl
from pager.errors import BudgetError, ConfigError
from pager.types import ExpertKey, ExpertShape

SHAPE = ExpertShape(hidden=8, intermediate=4)
BUDGET = 4 * 4096
KEYS = [ExpertKey(0, expert) for expert in range(3)]
SHM = Path("/dev/shm")


@pytest.fixture
def namespace(tmp_path: Path) -> str:
    return f"test{os.getpid()}{tmp_path.name}"


@pytest.fixture
def node(namespace: str) -> Iterator[NodeControl]:
    node = NodeControl(namespace)
    yield node
    node.close()


def segments(namespace: str) -> list[Path]:
    return sorted(SHM.glob(f"expert-pager-{namespace}-*"))


def test_the_first_worker_sizes_the_segment_and_the_next_one_shares_it(node: NodeControl, namespace: str) -> None:
    answer = node.open_segment(BUDGET, SHAPE, "float32")
    assert isinstance(answer, tuple)
    assert node.open_segment(BUDGET, SHAPE, "float32") == answer
    other = node.open_segment(BUDGET, SHAPE, "bfloat16")
    assert isinstance(other, ConfigError)
    name, num_records = answer
    assert num_records == 3
    assert segments(namespace) == [SHM / name]
    assert (SHM / name).stat().st_mode & 0o777 == 0o600
    tier = HostTier.attach(name, num_records, SHAPE, torch.float32, index=LocalHostIndex(3), owner="w")
    tier.close()
    node.close()
    assert segments(namespace) == []


def test_a_budget_for_no_record_is_an_answer(node: NodeControl) -> None:
    assert isinstance(node.open_segment(100, SHAPE, "float32"), BudgetError)


def test_what_a_dead_worker_pinned_or_was_writing_can_be_had_again(node: NodeControl) -> None:
    node.open_segment(BUDGET, SHAPE, "float32")
    grants = node.lookup_or_claim(KEYS, "dead")
    assert [grant.state for grant in grants] == [HostState.CLAIMED] * 3
    node.publish(KEYS[:1], "dead")  # read-pinned by "dead" still; the other two half written
    others = [ExpertKey(1, expert) for expert in range(3)]
    assert {grant.state for grant in node.lookup_or_claim(others, "alive")} == {HostState.FULL}
    assert node.lookup_or_claim(KEYS[1:2], "alive")[0].state is HostState.BUSY
    node.drop_owner("dead")
    assert {grant.state for grant in node.lookup_or_claim(others, "alive")} == {HostState.CLAIMED}
    node.publish(KEYS, "dead")  # late words of the dead change nothing
    assert {grant.state for grant in node.lookup_or_claim(others, "third")} == {HostState.BUSY}


def test_segments_of_a_crashed_service_are_removed_and_those_of_a_living_one_are_not(namespace: str) -> None:
    crashed, living = (SHM / f"expert-pager-{namespace}-{name}" for name in ("crashed", "living"))
    for path in (crashed, living):
        path.write_bytes(b"x")
    try:
        with living.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_SH)
            node = NodeControl(namespace)
            assert segments(namespace) == [living]
        node.close()
        assert segments(namespace) == [living]
        NodeControl(namespace).close()
        assert segments(namespace) == []
    finally:
        for path in segments(namespace):
            path.unlink()
