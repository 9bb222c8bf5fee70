"""Page-in is measured from disk, past the page cache and from the host tier; no figure is looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
