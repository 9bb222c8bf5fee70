"""The programs about paging run from end to end on toy shapes. Nothing here looks at a figure that is a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="page cache and memory are looked at through Linux"),
]


def run(program: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-m", f"benchmarks.{program}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("paging") / "micro"
    run("synthetic", path, "--shape", "emo-micro", "--layers", "2")
    return path


def test_a_prefill_reads_each_expert_once_however_few_slots_there_are(micro: Path, tmp_path: Path) -> None:
    """Status 0 says so: the program ends with 1 where anything was read twice. Prompts are timed after that."""
    shown = run("prefill", micro, "--quick", "--work", tmp_path)
    assert shown.count("1.000-1.000") == 6
    assert "Prefill, emo-micro-2-layers-context-560" in shown


def test_policies_are_ranked(micro: Path) -> None:
    shown = run("policies", micro, "--quick")
    verdict = shown.partition("Which policy waits for least")[2]
    assert all(name in verdict for name in ("lru", "lfu", "lfru", "least-stale", "optimum"))


def test_engine_steps_has_all_its_tables(micro: Path) -> None:
    shown = run("engine_steps", micro, "--quick")
    for title in ("Decode steps, batch 8", "A cold prompt of 200 tokens", "Eight domains at once"):
        assert title in shown


def test_formats_puts_quantised_experts_beside_bfloat16(tmp_path: Path) -> None:
    shown = run("formats", "--quick", "--work", tmp_path)
    for title in ("Decode in a pool of 12.5 %", "Decode, exact, a quarter", "Hits in equal memory"):
        assert title in shown
    assert {path.name.rpartition("-")[2] for path in tmp_path.iterdir()} == {"layers", "packed", "int8", "int4", "fp8"}


@pytest.mark.parametrize(
    ("program", "title"),
    [
        ("memory", "Peak memory of a worker's process"),
        ("growth", "By concurrent pools"),
        ("scale", "Memory of the process"),
    ],
)
def test_a_program_leaves_no_checkpoint_behind(program: str, title: str, tmp_path: Path) -> None:
    assert title in run(program, "--quick", "--work", tmp_path)
    assert not list(tmp_path.iterdir())


def test_offload_measures_every_way_or_says_why_not(tmp_path: Path) -> None:
    shown = run("offload", "--quick", "--work", tmp_path)
    if "not measured: " not in shown:
        for way in ("pool of 12.5%", "exact, all experts", "accelerate", "memory-mapped"):
            assert way in shown
        assert "failed" not in shown
    assert not list(tmp_path.iterdir())
