"""An evaluation from a checkpoint's path to its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from pager.engine.paged_model import load_paged_model
from pager.lab.bulk import experts_in_bulk
from pager.lab.corpus import Cut, Text, read_texts
from pager.lab.grid import CellStore, conditions_of, run_grid
from pager.lab.methods import methods_for
from pager.lab.report import Evaluation, to_dict, to_markdown
from pager.lab.subject import Subject
from pager.memory.plan import Budgets

PERCENTS = (50.0, 25.0, 12.5, 6.25)


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be evaluated on what. `methods` None: all that are to be had."""

    model: Path
    documents: tuple[str, ...]
    calibration: tuple[str, ...] = ()
    methods: tuple[str, ...] | None = None
    percents: tuple[float, ...] = PERCENTS
    cut: Cut = field(default_factory=Cut)
    max_documents: int | None = None
    calibration_documents: int = 160
    expert_memory: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    resamples: int = 1000


@contextmanager
def open_subject(ask: Ask, tokenizer: Tokenizer) -> Iterator[tuple[Subject, list[Text]]]:
    """The model with its texts, and the calibration texts. Experts that do not fit into memory are paged."""
    budgets = Budgets(expert_memory=ask.expert_memory)
    paged = load_paged_model(ask.model, device=ask.device, dtype=ask.dtype, budgets=budgets)
    try:
        cut = ask.cut.check(int(paged.config.max_position_embeddings))
        texts = read_texts(ask.documents, tokenizer, cut, max_documents=ask.max_documents, seed=ask.seed)
        calibration: list[Text] = []
        if ask.calibration:
            calibration = read_texts(
                ask.calibration, tokenizer, cut, max_documents=ask.calibration_documents, seed=ask.seed
            )
        with experts_in_bulk(paged):
            yield Subject(ask.model, paged, texts, cut, calibration=calibration, seed=ask.seed), calibration
    finally:
        paged.close()


def evaluate(
    ask: Ask, tokenizer: Tokenizer, cells: Path | None = None, *, done: Callable[[str, int], None] = lambda *_: None
) -> Evaluation:
    """`cells` keeps results for another try; `done` hears each cell's name, and how many there are.

    Raises InvalidRequest, CheckpointError, BudgetError, ExpertUnavailable.
    """
    with open_subject(ask, tokenizer) as (subject, calibration):
        return evaluate_subject(ask, subject, calibration, cells, done=done)


def evaluate_subject(
    ask: Ask,
    subject: Subject,
    calibration: Sequence[Text],
    cells: Path | None = None,
    *,
    done: Callable[[str, int], None] = lambda *_: None,
) -> Evaluation:
    """The same for a subject that is open, for those who have more to ask it."""
    methods = methods_for(subject, ask.methods)
    store = CellStore(cells, conditions_of(subject, calibration))
    total = 1 + len(methods) * sum(percent < 100 for percent in ask.percents)
    grid = run_grid(subject, methods, ask.percents, store, done=lambda name: done(name, total))
    return Evaluation(ask.model.resolve().name, subject, grid, resamples=ask.resamples, seed=ask.seed)


def write_report(evaluation: Evaluation, folder: Path) -> list[Path]:
    """`evaluation.json`, `evaluation.md` and plots; the folder is there."""
    from pager.lab.plots import write_plots

    written = [folder / "evaluation.json", folder / "evaluation.md"]
    written[0].write_text(json.dumps(to_dict(evaluation), indent=1) + "\n", encoding="utf-8")
    plots = write_plots(evaluation, folder)
    pictures = "\n".join(f"![{path.stem}]({path.name})" for path in plots)
    written[1].write_text(f"{to_markdown(evaluation)}\n{pictures}\n", encoding="utf-8")
    return [*written, *plots]
