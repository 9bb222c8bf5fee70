"""The demo as a process, on the shipped model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("ray_runtime")

ROOT = Path(__file__).parents[2]


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "protos")])
    return subprocess.run(
        [sys.executable, "-m", "demo", *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_six_prompts_are_answered_and_the_service_stops() -> None:
    done = demo("--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    for domain in ("python", "law", "verse", "sql", "medicine", "rust"):
        assert done.stdout.count(f"\n{domain}") == 2  # its stream, and its row in the summary
    assert done.stdout.count("[pool ") == 6
    assert "the service stopped cleanly" in done.stdout


def test_a_service_that_does_not_start_fails_the_demo() -> None:
    done = demo("no-such-model")
    assert done.returncode == 1
    assert "demo failed: the service did not start" in done.stderr
    assert "no-such-model is not a directory" in done.stderr
    assert "Traceback" not in done.stderr
