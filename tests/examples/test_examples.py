"""Every example runs, as a reader would run it, on the model that a clone has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from demo.__main__ import service

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TIMEOUT_S = 300


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_listed_and_tested() -> None:
    programs = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    listed = set(re.findall(r"\]\(([a-z_]+\.(?:py|ipynb))\)", (EXAMPLES / "README.md").read_text()))
    tested = set(re.findall(r'EXAMPLES / "([a-z_]+\.(?:py|ipynb))"', Path(__file__).read_text()))
    assert programs == listed == tested


@pytest.mark.slow
def test_offline() -> None:
    shown = run(EXAMPLES / "offline.py")
    exact, pooled = (int(match) for match in re.findall(r"(\d+) misses", shown))
    assert pooled < exact, "a pool needs fewer experts than an exact answer"
    assert shown.count("SELECT TEAM FROM table WHERE") == 2


@pytest.fixture(scope="module")
def ready() -> Iterator[dict[str, Any]]:
    """A service that the examples call, as its line on standard output describes it."""
    with service(ROOT / "models" / "emo-tiny", "25%") as facts:
        yield facts


@pytest.mark.ray
def test_named_pool(ready: dict[str, Any]) -> None:
    shown = run(EXAMPLES / "named_pool.py", ready["address"], ready["metrics_url"])
    assert "kept: sql" in shown
    paged = [int(count) for count in re.findall(r"by the metrics, (\d+) bytes paged", shown)]
    assert len(paged) == 3
    assert paged[1:] == [0, 0], "the first request paged the pool in"


@pytest.mark.ray
def test_client(ready: dict[str, Any]) -> None:
    shown = run(EXAMPLES / "client.py", ready["address"])
    assert re.search(r"routed experts, [1-9]\d* slots", shown)
    assert re.search(r"[1-9]\d* experts were loaded, \d+ were paged in", shown)
    assert re.search(r"pool 'sql' of [1-9]\d* experts, from [1-9]\d* tokens", shown)
    for prompt in ("SELECT name FROM users WHERE", "SELECT MAX(points) FROM table WHERE", "SELECT"):
        assert prompt in shown


@pytest.mark.slow
def test_eviction_policy() -> None:
    shown = run(EXAMPLES / "eviction_policy.py")
    misses = {
        name: float(size) for name, size in re.findall(r"^  (\S+) .* waits for ([\d.]+) MiB$", shown, re.MULTILINE)
    }
    assert set(misses) > {"segmented-lru", "lru", "optimum"}
    assert misses["optimum"] == min(misses.values())
    assert re.search(r"[1-9]\d* evictions", shown), "the policy was not used by the cache"


@pytest.mark.slow
def test_slice_training(tmp_path: Path) -> None:
    shown = run(EXAMPLES / "slice_training.py", tmp_path, "--steps", "12")
    assert "slice: 48 of 768 experts" in shown
    found = re.search(r"loss of all experts ([\d.]+), of the slice ([\d.]+), of the trained slice ([\d.]+)", shown)
    assert found is not None, shown
    whole, before, after = map(float, found.groups())
    assert whole < before, "leaving out experts cost nothing, so there is nothing to win back"
    assert after < before - (before - whole) / 4
    assert "48 experts and 0 gates differ" in shown
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    original = load_file(ROOT / "models" / "emo-tiny" / "model.safetensors")
    kept = json.loads((tmp_path / "slice" / "config.json").read_text())["expert_slice"]["experts"]
    trained = tuple(f"model.layers.{layer}.mlp.experts.{each}." for layer, row in enumerate(kept) for each in row)
    changed = {name for name in original if not original[name].equal(merged[name])}
    assert changed
    assert all(name.startswith(trained) for name in changed)


@pytest.mark.slow
def test_notebook(tmp_path: Path) -> None:
    """Its code cells, run in order as one program; pictures are drawn without a display."""
    notebook = json.loads((EXAMPLES / "pools.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"), "clear its outputs"
    program = tmp_path / "notebook.py"
    program.write_text("\n".join(["import matplotlib", 'matplotlib.use("Agg")', *cells]))
    shown = run(program)
    assert re.search(r"sql: \d+ experts cover \d+% of the gates' probability", shown)
    assert re.search(r"[1-9]\d* experts were paged in", shown)
