"""Page-in is measured from disk, past the page cache and from the host tier; no figure is looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import traffic
from benchmarks.checkpoints import synthetic
from benchmarks.engine_run import load_engine
from benchmarks.page_cache import cached_bytes, drop
from benchmarks.shapes import SHAPES, Shape

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache is looked at through Linux calls")
def test_every_way_has_its_row(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.page_in", "--quick", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("emo-micro")]
    ways = [(row[0], row[1]) for row in rows]
    plain, packed = "emo-micro-2-layers", "emo-micro-2-layers-packed"
    assert ways[:4] == [(plain, "empty"), (plain, "full"), (packed, "empty"), (packed, "full")]
    assert (packed, "left") in ways or f"{packed} was not read past the page cache" in done.stdout
    assert ways[-1][1] in ("torch", "threads")
    assert f"{plain} was not read past the page cache" in done.stdout.replace("\n", " ")


def test_the_host_tier_is_measured_beside_the_page_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.host_tier", "--quick", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("emo-")]
    tiers = ["none", "40%", "100%"]
    names = ["emo-tiny", "emo-micro-2-layers", "emo-micro-2-layers-packed"]
    found = [(row[0], row[1]) for row in rows if row[1] in tiers]
    assert found == [(name, tier) for name in names for tier in tiers]


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache is looked at through Linux calls")
def test_traffic_at_the_released_size_begins_with_its_file_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "WORK", tmp_path)
    monkeypatch.setitem(SHAPES, traffic.SIZE_SHAPE, Shape(64, 32, 4, 4, 2, 128, 8, 256, 512))
    (file,) = synthetic(tmp_path, traffic.SIZE_SHAPE, traffic.SIZE_LAYERS).glob("*.safetensors")
    left_out: list[int] = []

    def loaded(*arguments: Any, **options: Any) -> Any:
        left_out.append(max(0, file.stat().st_size - cached_bytes(file)))
        return load_engine(*arguments, **options)

    monkeypatch.setattr(traffic, "load_engine", loaded)
    drop([file])
    table = traffic.expert_size(ROOT / "models" / "emo-tiny", 2, 2)
    assert left_out == [0, 0, 0]
    assert [row[0] for row in table.rows] == list(traffic.WAYS_TO_SERVE)
    assert "2 rounds" in table.notes[0]
