"""The miss curve of a trace, as a collector reads it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pager.cli.lab import replay
from pager.errors import ConfigError

EXPERT_BYTES = 2**29  # half of what one more gibibyte is


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Four experts in turn, twice: with fewer slots than four LRU hits nothing."""
    header = {"format": "expert-pager-trace", "version": 1, "fingerprint": "f", "expert_bytes": EXPERT_BYTES}
    lines = [json.dumps(header | {"routed_per_layer": [4]})]
    for expert in (0, 1, 2, 3) * 2:
        lines += [json.dumps(["lease", 0, expert]), json.dumps(["let_go", 0, expert])]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "trace.jsonl"


def test_the_curve_says_what_a_gibibyte_more_buys(trace: Path, promtool: Path, tmp_path: Path) -> None:
    replay(trace, budgets="25%,50%", prometheus=tmp_path / "curve.prom", as_json=True)
    page = (tmp_path / "curve.prom").read_text()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    lru = {
        (sample.name.removeprefix("expert_pager_replay_"), sample.labels["budget"]): sample.value
        for sample in samples
        if sample.labels.get("policy", "lru") == "lru"
    }
    assert lru["capacity_bytes", "25%"] == EXPERT_BYTES
    assert lru["hits_ratio", "50%"] == 0
    assert lru["missed_bytes", "25%"] == lru["missed_bytes", "50%"] == 8 * EXPERT_BYTES
    assert lru["more_missed_bytes", "25%"] == 8 * EXPERT_BYTES, "three slots are one too few"
    assert lru["more_missed_bytes", "50%"] == 4 * EXPERT_BYTES, "four slots miss each once"
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_folder_that_is_not_there_is_said(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        replay(trace, budgets="25%", prometheus=tmp_path / "nowhere" / "curve.prom", as_json=True)
