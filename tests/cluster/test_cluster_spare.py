"""Processes that wait to become workers: what reaches them, what does not, and how they end. Without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pager.cluster.spare import TEMP_DIR, WORKER, Spares
from tests.support.waiting import WAIT_S, until

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "data" / "golden" / "ckpt_emo_tiny"

# Stands in Ray's place: it says where it runs, and with what.
PROGRAM = """
import json, os, sys
facts = {"pid": os.getpid(), "has_torch": "torch" in sys.modules, "argv": sys.argv[1:], "folder": os.getcwd()}
print(json.dumps(facts | {"environment": dict(os.environ), "input": sys.stdin.read()}), flush=True)
"""

# Says what a worker has imported before it serves, and whether that is enough for a model.
IMPORTS = """
import os, sys
import torch
def look(*_): raise AssertionError("which GPU is not known yet")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = torch.cuda._lazy_init = look
from pager.cluster.spare import import_for_worker
import_for_worker()
torch.cuda.is_available = lambda: False
from pager.cluster.loading import load_engine
from pager.cluster.worker import WorkerObserver
from pager.config import load_config
os.environ["OMP_NUM_THREADS"] = "1"
overrides = {"model.path": sys.argv[1], "workers.kv_memory": "1MiB", "workers.num_threads": 1}
loaded = load_engine(load_config(env={}, overrides=overrides), lambda events: None, WorkerObserver(), None)
loaded.close()
from transformers.masking_utils import TransformGetItemToIndex
assert torch.compiler.disable(len) is len, "a decorator of the compiler has no effect"
assert not isinstance(torch.ones(1), torch.distributed.tensor.DTensor)
whole = ("scipy", "accelerate", "torch._inductor", "torch._dynamo.eval_frame", "torch.distributed.tensor._api")
print([name for name in whole if name in sys.modules], loaded.model.name, TransformGetItemToIndex.__module__)
"""

# Starts a process that waits, prints which, and is killed.
OWNER = """
import sys, time
from pager.cluster.spare import Spares
spares = Spares(1)
print(*spares.pids, flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """The modules of a worker's process, of which those of Ray are not the real ones."""
    *folders, name = WORKER.split(".")
    program = tmp_path.joinpath("modules", *folders, f"{name}.py")
    program.parent.mkdir(parents=True)
    for folder in program.relative_to(tmp_path / "modules").parents[:-1]:
        (tmp_path / "modules" / folder / "__init__.py").touch()
    program.write_text(PROGRAM)
    return os.pathsep.join([str(tmp_path / "modules"), str(ROOT), str(ROOT / "protos")])


@pytest.fixture
def spares(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spares]:
    monkeypatch.setenv("PYTHONPATH", path)
    made = Spares(1, num_threads=1)
    yield made
    made.end()


@pytest.mark.slow
def test_the_first_start_becomes_the_process_that_waited_and_the_next_one_its_own(
    spares: Spares, path: str, tmp_path: Path
) -> None:
    [waiting] = spares.pids
    program = spares.offer(tmp_path / "ray")
    assert program is not None
    words = [f"{TEMP_DIR}{tmp_path / 'ray'}", "--flag=1"]

    def started() -> tuple[int, dict[str, object]]:
        """Starts a worker as Ray does. Returns the process that Ray knows, and what the worker says."""
        process = subprocess.Popen(
            [sys.executable, program, *words],
            cwd=tmp_path,
            env={"NAME": "value", "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said, _ = process.communicate("a line", timeout=WAIT_S)
        return process.pid, json.loads(said)

    known, said = started()
    assert (said["pid"], said["has_torch"]) == (waiting, True)
    assert said["pid"] != known
    next_known, next_said = started()
    assert (next_said["pid"], next_said["has_torch"]) == (next_known, False)
    for each in (said, next_said):
        environment = each["environment"]
        assert isinstance(environment, dict)
        assert environment["NAME"] == "value"
        assert "PATH" not in environment, "the environment is the one that Ray gives"
        assert (each["argv"], each["folder"]) == (words, str(tmp_path))
        assert each["input"] == "a line", "open files are those that Ray gives"


def test_ray_runs_its_own_program_where_no_process_waits(tmp_path: Path) -> None:
    assert Spares().offer(tmp_path / "ray") is None


@pytest.mark.slow
def test_a_worker_imports_no_more_than_it_needs() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos")])}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(CHECKPOINT)], env=environment, capture_output=True, text=True, check=False
    )
    masks = "torch._dynamo._trace_wrapped_higher_order_op"
    assert done.stdout.splitlines() == [f"[] {CHECKPOINT.name} {masks}"], done.stderr


def test_a_process_that_waits_ends_with_the_one_that_started_it() -> None:
    """At once, also in the middle of its imports."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos")])}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        waiting = psutil.Process(int(owner.stdout.readline()))
        until(lambda: len(waiting.threads()) > 1)
    finally:
        owner.kill()
        owner.communicate()
    until(lambda: not waiting.is_running() or waiting.status() == psutil.STATUS_ZOMBIE)
