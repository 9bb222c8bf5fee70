"""The node's control actor, without Ray around it: who owns the segment, and the end of a worker."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pager.cache.host_index import HostIndex, HostState
from pager.cluster.actors import NodeControl
from pager.errors import BudgetError, ConfigError
from pager.types import ExpertKey
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
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


def segments(namespace: str) -> list[Path]:
    return sorted(SHM.glob(f"expert-pager-{namespace}-*"))


def test_the_first_worker_sizes_the_segment_and_the_next_one_shares_it(node: NodeControl, namespace: str) -> None:
    answer = node.open_segment(BUDGET, RECORD_BYTES, "tiny")
    assert isinstance(answer, tuple)
    assert node.open_segment(BUDGET, RECORD_BYTES, "tiny") == answer
    for other in ((2 * BUDGET, RECORD_BYTES, "tiny"), (BUDGET, RECORD_BYTES, "other")):
        assert isinstance(node.open_segment(*other), ConfigError)
    name, num_records = answer
    assert num_records == 3
    assert segments(namespace) == [SHM / name, SHM / f"{name}.index"]
    assert [path.stat().st_mode & 0o777 for path in segments(namespace)] == [0o600, 0o600]
    HostIndex(name, num_records).close()
    node.close()
    assert segments(namespace) == []


def test_a_budget_for_no_record_is_an_answer(node: NodeControl, namespace: str) -> None:
    assert isinstance(node.open_segment(100, RECORD_BYTES, "tiny"), BudgetError)
    assert isinstance(node.open_segment(1 << 50, RECORD_BYTES, "tiny"), BudgetError)
    assert segments(namespace) == []


def test_all_experts_fit_into_their_own_bytes(node: NodeControl) -> None:
    answer = node.open_segment(100 * RECORD_BYTES, RECORD_BYTES, "tiny")
    assert isinstance(answer, tuple)
    assert answer[1] == 100


WORKER = """
import sys, time
from pager.cache.host_index import HostIndex
from pager.types import ExpertKey

index = HostIndex(sys.argv[1], 3)
read, *_ = index.lookup_or_claim([ExpertKey(0, expert) for expert in range(3)])
index.publish([read])  # pinned still; the other two half written
print("holds", flush=True)
time.sleep(600)
"""


def test_what_a_dead_worker_pinned_or_was_writing_can_be_had_again(node: NodeControl) -> None:
    answer = node.open_segment(BUDGET, RECORD_BYTES, "tiny")
    assert isinstance(answer, tuple)
    alive = HostIndex(*answer)
    with subprocess.Popen([sys.executable, "-c", WORKER, answer[0]], cwd=ROOT, stdout=subprocess.PIPE) as dying:
        node.watch("dying", dying.pid)
        assert dying.stdout is not None
        assert dying.stdout.readline() == b"holds\n"
        others = [ExpertKey(1, expert) for expert in range(3)]
        assert {grant.state for grant in alive.lookup_or_claim(others)} == {HostState.FULL}
        assert alive.lookup_or_claim(KEYS[1:2])[0].state is HostState.BUSY
        assert (alive.num_resident, alive.num_pinned) == (3, 3)
        dying.kill()  # nobody tells the node
        until(lambda: (alive.num_resident, alive.num_pinned) == (1, 0))
    assert node.end("dying")
    assert alive.lookup_or_claim(KEYS[:1])[0].state is HostState.HIT
    alive.check_integrity()
    alive.close()


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


def test_a_worker_that_ended_before_it_was_watched_is_known_to_be_gone(node: NodeControl) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    node.watch("gone", gone.pid)
    assert node.end("gone")


def test_the_control_actor_needs_no_torch() -> None:
    check = "import sys, pager.cluster.actors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_segments_of_a_crashed_service_are_removed_and_those_of_a_living_one_are_not(namespace: str) -> None:
    crashed, living = (SHM / f"expert-pager-{name}" for name in ("elsewhere-crashed", f"{namespace}-living"))
    for path in (crashed, living):
        path.write_bytes(b"x")
    try:
        with living.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_SH)
            node = NodeControl(namespace)
            assert not crashed.exists(), "whatever namespace it had"
            assert living.exists()
        node.close()
        assert living.exists()
        NodeControl(namespace).close()
        assert not living.exists()
    finally:
        for path in (crashed, living):
            path.unlink(missing_ok=True)
