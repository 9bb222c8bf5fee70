"""The default eviction policy is the one that the committed table found best."""

from __future__ import annotations

import re
from pathlib import Path

from pager.cache.index import DEFAULT_POLICY
from pager.config import ServiceConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_default_policy_waits_for_the_fewest_bytes_on_mixed_traffic() -> None:
    newest = max(RESULTS.glob("policies_*.md"), key=lambda path: path.stem.rpartition("_")[2])
    verdict = newest.read_text().partition("## Which policy waits for least")[2]
    first = re.search(r"^\| (?!policy|---)([a-z-]+) \|", verdict, re.MULTILINE)
    assert first is not None, f"{newest} has no verdict"
    assert first[1] == DEFAULT_POLICY == ServiceConfig().workers.policy
