"""The node's control actor, without Ray around it: who owns the segment, and the end of a worker."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pager.cache.host import HostState, HostTier, LocalHostIndex
from pager.cluster.node import NodeControl
from pager.errors import BudgetError, ConfigError
from pager.types import ExpertKey, ExpertShape

SHAPE = ExpertShape(hidden=8, intermediate=4)
RECORD_BYTES = 3 * 8 * 4 * 4
BUDGET = 3 * RECORD_BYTES + 100
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


@pytest.fixture
def start_worker(node: NodeControl) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """start_worker(owner): a process that the node watches as that worker."""
    started = []

    def start(owner: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "600"])
        started.append(process)
        node.watch(owner, process.pid)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


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


def test_all_experts_fit_into_their_own_bytes(node: NodeControl) -> None:
    answer = node.open_segment(100 * RECORD_BYTES, SHAPE, "float32")
    assert isinstance(answer, tuple)
    assert answer[1] == 100


def test_what_a_dead_worker_pinned_or_was_writing_can_be_had_again(
    node: NodeControl, start_worker: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    node.open_segment(BUDGET, SHAPE, "float32")
    dying = start_worker("dying")
    start_worker("alive")
    grants = node.lookup_or_claim(KEYS, "dying")
    assert [grant.state for grant in grants] == [HostState.CLAIMED] * 3
    node.publish(KEYS[:1], "dying")  # read-pinned still; the other two half written
    others = [ExpertKey(1, expert) for expert in range(3)]
    assert {grant.state for grant in node.lookup_or_claim(others, "alive")} == {HostState.FULL}
    assert node.lookup_or_claim(KEYS[1:2], "alive")[0].state is HostState.BUSY
    assert node.host_bytes() == (3 * RECORD_BYTES, 3 * RECORD_BYTES)

    dying.kill()  # nobody tells the node
    until(lambda: node.host_bytes() == (RECORD_BYTES, 0))
    assert node.lookup_or_claim(KEYS[:1], "alive")[0].state is HostState.HIT
    node.unpin(KEYS[:1], "alive")
    assert {grant.state for grant in node.lookup_or_claim(KEYS, "dying")} == {HostState.FULL}, "late words"
    assert {grant.state for grant in node.lookup_or_claim(others, "alive")} == {HostState.CLAIMED}
    node.publish(KEYS, "dying")
    node.unpin(others, "dying")
    assert node.host_bytes() == (3 * RECORD_BYTES, 3 * RECORD_BYTES)


def test_a_worker_that_hangs_is_ended_and_known_to_be_gone(
    node: NodeControl, start_worker: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    hung, other = start_worker("hung"), start_worker("other")
    hung.send_signal(signal.SIGSTOP)
    assert not node.end("hung")
    until(lambda: node.end("hung"))
    assert hung.wait(60) == -signal.SIGKILL
    assert other.poll() is None
    assert node.end("never heard of")


def test_a_worker_that_ended_before_it_was_watched_gets_nothing(node: NodeControl) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    node.watch("gone", gone.pid)
    node.open_segment(BUDGET, SHAPE, "float32")
    assert {grant.state for grant in node.lookup_or_claim(KEYS, "gone")} == {HostState.FULL}
    assert node.end("gone")


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
