"""Measures one model for docs/evidence.md: the grid of methods and sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.evidence_facts import MAIN_PERCENTS, Facts, Scale, console, measure_facts
from pager.lab.corpus import EvaluationAsk, Subject, open_subject
from pager.lab.methods import BY_LAYER, methods_for
from pager.lab.report import Evaluation, evaluate_subject

SIDE_PERCENTS = (50.0, 6.25)
LAYERED = ("prefill", "prefill+layers", "trunk", "trunk+layers", "fitted", "fitted+layers")


@dataclass(frozen=True, slots=True)
class Measured:
    """One model's evaluations. `side` has the sizes, `layered` the sizes per layer, measured on fewer documents."""

    main: Evaluation
    side: Evaluation
    layered: Evaluation
    facts: Facts


def measure(model: Path, corpus: Path, folder: Path, scale: Scale, methods: Sequence[str] | None = None) -> Measured:
    """Measures everything that `folder` does not have from an earlier run under the same conditions.

    `methods` None: all.
    """
    main, facts = measure_main(model, corpus, folder, scale, methods)
    side, layered = measure_side(model, corpus, folder, scale, methods)
    return Measured(main, side, layered, facts)


def measure_main(
    model: Path, corpus: Path, folder: Path, scale: Scale, methods: Sequence[str] | None
) -> tuple[Evaluation, Facts]:
    ask, tokenizer = _ask(model, corpus, scale), _tokenizer(model)
    with open_subject(ask, tokenizer) as (subject, calibration):
        ask = replace(ask, methods=_possible(methods, subject))
        main = evaluate_subject(ask, subject, calibration, folder / "main", done=_printer(model.name))
        return main, measure_facts(main, subject, calibration, corpus, tokenizer, folder / "facts.json", scale)


def measure_side(
    model: Path, corpus: Path, folder: Path, scale: Scale, methods: Sequence[str] | None
) -> tuple[Evaluation, Evaluation]:
    """Measures the other sizes, and sizes per layer, on fewer documents."""
    side = replace(_ask(model, corpus, scale), max_documents=scale.side_documents, percents=SIDE_PERCENTS)
    with open_subject(side, _tokenizer(model)) as (subject, calibration):
        side = replace(side, methods=_possible(methods, subject))
        layered = replace(side, methods=_possible(LAYERED, subject), percents=MAIN_PERCENTS)
        return (
            evaluate_subject(side, subject, calibration, folder / "side", done=_printer(f"{model.name}, other sizes")),
            evaluate_subject(layered, subject, calibration, folder / "side", done=_printer(f"{model.name}, layers")),
        )


def _ask(model: Path, corpus: Path, scale: Scale) -> EvaluationAsk:
    return EvaluationAsk(
        model,
        (str(corpus / "*.valid.jsonl*"),),
        (str(corpus / "*.train.jsonl*"),),
        percents=MAIN_PERCENTS,
        max_documents=scale.max_documents,
        calibration_documents=scale.calibration_documents,
    )


def _tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def _possible(methods: Sequence[str] | None, subject: Subject) -> tuple[str, ...]:
    """The methods without those that need a fitted router, where there is none."""
    possible = methods_for(subject, None)
    return tuple(name for name in methods or possible if name.removesuffix(BY_LAYER) in possible)


def _printer(name: str) -> Callable[[str, int], None]:
    started, finished = time.monotonic(), 0

    def done(cell: str, total: int) -> None:
        nonlocal finished
        finished += 1
        console.print(f"{name}: {finished}/{total} {cell}, {time.monotonic() - started:.0f} s")

    return done
