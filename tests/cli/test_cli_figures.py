"""The figures that the lab's commands give for the shipped model: a change of their code changes none of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "emo-tiny"
DOCUMENTS = ROOT / "tests" / "data" / "documents"
PATTERN = str(DOCUMENTS / "*.jsonl")

Run = Callable[..., Any]

pytestmark = pytest.mark.slow

LOSS = 4.642979
"""Nats a token with all experts."""
RISES = {
    "prefill": 0.104079,
    "trunk": 0.105748,
    "lexical": 0.038737,
    "fitted": 0.063738,
    "codebook": 0.050987,
    "mean": 0.089969,
    "one-example": 0.032886,
    "named": 0.051405,
    "greedy": -0.025171,
    "easy-ep": 0.001126,
    "calibrated": -0.011776,
    "frequency": 0.137194,
    "random": 0.323572,
    "future": 0.015146,
}
"""Nats a token above that, with pools of 25 %."""
POOLS = {
    "prefill": "7d43139d2db286dcfeaf094b",
    "fitted": "e5bc45ae6691ce52f4ac18d9",
    "greedy": "563cca4201074b28f5b3a19a",
    "easy-ep": "27bdb670068440e6a48c7b0f",
    "frequency": "6f7d9793d7707b014887a4fb",
}
"""The digest of the pool that a method chooses from the examples of one domain."""
CLUSTERS = {
    "tokens": 576,
    "variance_kept": 0.8498,
    "tokens_in_main_domain_of_cluster": 0.6215,
    "tokens_in_ten_commonest_of_cluster": 0.4115,
}
OVERLAP = [(0.4444, 0.1123), (0.4389, 0.1346), (0.4778, 0.0864), (0.5611, 0.1198), (0.5056, 0.1469), (0.5611, 0.1617)]
"""Layer by layer, the share of two documents' pools that both hold: of one domain, and of two."""
UNSEEN_RECALL = {"trunk": 0.9382, "lexical": 0.5461, "fitted": 0.6056}


def test_eval_measures_the_same_losses(run: Run) -> None:
    cut = ("--prompt-tokens", 16, "--context-tokens", 48)
    draws = ("--max-documents", 2, "--calibration-documents", 3, "--resamples", 10)
    asked = ("--documents", PATTERN, "--calibration", PATTERN, "--sizes", "25", *cut, *draws)
    report = reported(run("eval", MODEL, *asked, "--device", "cpu", "--json"))
    found = {each["method"]: each["rise"]["mean"] for each in report["results"][1:]}
    assert report["results"][0]["loss"]["mean"] == pytest.approx(LOSS, abs=2e-4)
    assert found == pytest.approx(RISES, abs=2e-4)


@pytest.mark.parametrize("method", POOLS)
def test_calibrate_chooses_the_same_pools(run: Run, tmp_path: Path, method: str) -> None:
    sample = ("--sample", DOCUMENTS / "code.jsonl") if method == "frequency" else ()
    asked = ("--name", "law", "--examples", DOCUMENTS / "statute.jsonl", "--pool", "12.5%", "--pools", tmp_path)
    named = reported(
        run(
            "calibrate",
            *asked,
            "--method",
            method,
            *sample,
            "--model",
            MODEL,
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--json",
        )
    )
    assert named["pool"]["digest"] == POOLS[method]


def test_clusters_group_the_tokens_the_same_way(run: Run, tmp_path: Path) -> None:
    asked = ("--documents", PATTERN, "--clusters", 6, "--max-tokens", 48, "--out", tmp_path / "page.html")
    report = reported(run("clusters", MODEL, *asked, "--device", "cpu", "--dtype", "float32", "--json"))["models"][0]
    figures = {key: report[key] for key in CLUSTERS}
    assert figures == {key: pytest.approx(value, abs=0.02) for key, value in CLUSTERS.items()}
    overlap = [(layer["same_domain"], layer["other_domain"]) for layer in report["pool_overlap"]]
    assert overlap == [pytest.approx(layer, abs=2e-3) for layer in OVERLAP]


def test_fit_router_fits_the_same_passes(run: Run, tmp_path: Path) -> None:
    asked = ("--documents", PATTERN, "--max-tokens", 64, "--output", tmp_path / "router.safetensors")
    report = reported(run("fit-router", MODEL, *asked, "--device", "cpu", "--dtype", "float32", "--json"))
    assert report["unseen_recall"] == {
        source: pytest.approx(recall, abs=2e-3) for source, recall in UNSEEN_RECALL.items()
    }


def reported(result: Any) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
