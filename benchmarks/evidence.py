"""Measures both reference models and writes docs/evidence.md with its pictures and figures.

    python -m benchmarks.evidence --corpus DIR

CORPUS holds `<domain>.train.jsonl.gz` and `<domain>.valid.jsonl.gz`. Two processes measure at a
time, a thread each; what is in `--work` from an earlier run under the same conditions is not measured again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.evidence_claims import all_claims
from benchmarks.evidence_codebook import codebook_claims, codebook_section, measure_held_out
from benchmarks.evidence_drift import drift_claims, drift_section, measure_drift
from benchmarks.evidence_facts import Scale
from benchmarks.evidence_formats import format_claims, format_section, measure_formats
from benchmarks.evidence_measure import Measured, measure, measure_main, measure_side
from benchmarks.evidence_page import page
from pager.lab.report import plot_domains, plot_paging, plot_rises, to_dict

CONTROL_METHODS = ("prefill", "trunk", "lexical", "fitted", "codebook", "calibrated", "random", "future")
SPECIAL = {"emo-drift": measure_drift, "emo-codebook": measure_held_out}
"""What is measured beside the grids, with the model that was trained with pools alone."""

console = Console(soft_wrap=True, highlight=False)


def main(
    corpus: Annotated[Path, typer.Option(help="Folder with <domain>.train.jsonl.gz and <domain>.valid.jsonl.gz.")],
    emo: Annotated[Path, typer.Option(help="The model trained with document pools.")] = Path("models/emo-tiny"),
    std: Annotated[Path, typer.Option(help="Its control.")] = Path("models/stdmoe-tiny"),
    docs: Annotated[Path, typer.Option(help="Where evidence.md and evidence/ go.")] = Path("docs"),
    work: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("build/evidence"),
    max_documents: Annotated[int | None, typer.Option(help="Of each domain. Default: all.")] = None,
    side_documents: Annotated[int, typer.Option(help="Of each domain, for the other sizes.")] = 16,
    calibration_documents: Annotated[int, typer.Option(help="Of each domain.")] = 160,
    part: Annotated[str | None, typer.Option(help="Measure a part, emo-main for one, and write no page.")] = None,
) -> None:
    """Measure, then write the page."""
    scale = Scale(max_documents, side_documents, calibration_documents)
    models: dict[str, tuple[Path, Sequence[str] | None]] = {"emo": (emo, None), "std": (std, CONTROL_METHODS)}
    if part is not None:
        model, methods = models[part.partition("-")[0]]
        if part in SPECIAL:
            SPECIAL[part](emo, corpus, work / emo.name, scale)
            return
        if part.endswith("-formats"):
            measure_formats(model, corpus, work / model.name, scale)
            return
        parts = {"main": measure_main, "side": measure_side}
        parts[part.partition("-")[2]](model, corpus, work / model.name, scale, methods)
        return
    kinds = ("main", "side", "formats")
    _measure_parts([*(f"{name}-{kind}" for kind in kinds for name in models), *SPECIAL])
    found = [measure(model, corpus, work / model.name, scale, methods) for model, methods in models.values()]
    pictures = docs / "evidence"
    pictures.mkdir(parents=True, exist_ok=True)
    _draw(found[0], found[1], pictures)
    _store(found, pictures)
    drift = measure_drift(emo, corpus, work / emo.name, scale)
    _write(pictures / "drift.json", {key: value for key, value in drift.items() if key != "conditions"})
    held_out = measure_held_out(emo, corpus, work / emo.name, scale)
    _write(pictures / "held-out.json", held_out)
    formats = {model.name: measure_formats(model, corpus, work / model.name, scale) for model in (emo, std)}
    stored = {
        name: {key: value for key, value in facts.items() if key != "conditions"} for name, facts in formats.items()
    }
    _write(pictures / "formats.json", stored)
    of_codebook = codebook_claims(found[0].main, held_out)
    claims = all_claims(found[0], found[1], [*drift_claims(drift), *of_codebook, *format_claims(formats)])
    others = {
        **({"Domains that no codeword was fitted to": codebook_section(held_out)} if held_out else {}),
        "Drift": drift_section(drift),
        "Quantised experts": format_section(formats),
    }
    text = page(found[0], found[1], claims, others, "make evidence")
    (docs / "evidence.md").write_text(text, encoding="utf-8")
    for claim in claims:
        console.print(f"{claim.at}: {claim.says}: {claim.figure}: {claim.verdict}", markup=False)
    console.print(f"wrote {docs / 'evidence.md'}")


def _measure_parts(parts: Sequence[str]) -> None:
    """Two at a time, a process with one thread each. Raises SystemExit when one fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(part: str) -> int:
        command = [sys.executable, "-m", "benchmarks.evidence", *sys.argv[1:], "--part", part]
        return subprocess.run(command, env=environment, check=False).returncode

    with ThreadPoolExecutor(max_workers=2) as workers:
        failed = [part for part, status in zip(parts, workers.map(run, parts), strict=True) if status]
    if failed:
        raise SystemExit(f"measuring {', '.join(failed)} failed; what was measured is kept")


def _draw(emo: Measured, std: Measured, folder: Path) -> None:
    every_size = [(each.main.name, [*each.main.figures, *each.side.figures]) for each in (emo, std)]
    plot_rises(every_size, folder / "rise.png")
    plot_paging(*every_size[0], folder / "paging.png")
    for measured in (emo, std):
        plot_domains(measured.main, folder / f"domains-{measured.main.name}.png")


def _store(models: Sequence[Measured], folder: Path) -> None:
    for measured in models:
        name = measured.main.name
        for part, evaluation in (("", measured.main), ("-other-sizes", measured.side), ("-layers", measured.layered)):
            _write(folder / f"{name}{part}.json", to_dict(evaluation))
        _write(folder / f"{name}-facts.json", {k: v for k, v in measured.facts.items() if k != "conditions"})


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
