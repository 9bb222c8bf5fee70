"""Every method at every size over the same documents; what was computed before is not computed again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pager.errors import PoolTooSmall
from pager.evaluation.cells import Cell, CellStore, FullCell, pack_pools
from pager.evaluation.corpus import Text, digest_of
from pager.evaluation.forwards import Layers, Outcome
from pager.evaluation.methods import FULL, choose, size_of
from pager.evaluation.subject import Subject


@dataclass(frozen=True, slots=True)
class Grid:
    """What came out. `cells` by (method, percent of the experts); `left_out` says which were not to be had, and why."""

    full: FullCell
    cells: Mapping[tuple[str, float], Cell]
    left_out: Mapping[tuple[str, float], str] = field(default_factory=dict)


def run_grid(
    subject: Subject,
    methods: Sequence[str],
    percents: Sequence[float],
    store: CellStore,
    *,
    done: Callable[[str], None] = lambda _: None,
) -> Grid:
    """`done` hears of each cell, by name. Raises InvalidRequest, ExpertUnavailable."""
    full = store.load(FULL)
    if not isinstance(full, FullCell):
        full = _full_cell(subject)
        store.save(FULL, full)
    done(FULL)
    cells: dict[tuple[str, float], Cell] = {}
    left_out: dict[tuple[str, float], str] = {}
    for method in methods:
        for percent in percents:
            if percent >= 100:
                continue
            name = f"{method}-{percent:g}"
            try:
                cell = store.load(name) or _cell(subject, method, percent, full)
            except PoolTooSmall as error:
                left_out[method, percent] = error.message
            else:
                store.save(name, cell)
                cells[method, percent] = cell
            done(name)
    return Grid(full, cells, left_out)


def conditions_of(subject: Subject, calibration: Sequence[Text]) -> str:
    """Names all that a cell depends on beside its method and size."""
    router = "none" if subject.router_file is None else _digest_of_weights(subject.router_file.weights)
    parts = (
        "expert-pager cell 1",
        subject.paged.fingerprint,
        str(subject.paged.dtype),
        router,
        f"{subject.cut.prompt_tokens} {subject.cut.context_tokens} {subject.seed}",
        digest_of(subject.texts),
        digest_of(calibration),
    )
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def predicted_tokens(texts: Sequence[Text], prompt_tokens: int) -> np.ndarray:
    """[N]: how many tokens of each document are predicted."""
    return np.array([len(text.token_ids) - prompt_tokens for text in texts])


def _full_cell(subject: Subject) -> FullCell:
    started = time.monotonic()
    outcomes, means = subject.full
    best = np.concatenate([outcome.best_P for outcome in outcomes])
    return FullCell(
        np.array([outcome.nats for outcome in outcomes]),
        predicted_tokens(subject.texts, subject.cut.prompt_tokens),
        None,
        time.monotonic() - started,
        best,
        _stack([mean.prompt_LR for mean in means]),
        _stack([mean.whole_LR for mean in means]),
    )


def _cell(subject: Subject, method: str, percent: float, full: FullCell) -> Cell:
    started = time.monotonic()
    choice = choose(subject, method, size_of(percent))
    outcomes = subject.forwards.outcomes(subject.ids, choice.policies, voters=choice.voters)
    pools = [outcome.pool for outcome in outcomes if outcome.pool is not None]
    return Cell(
        np.array([outcome.nats for outcome in outcomes]),
        _agreed(outcomes, full.best_P),
        pack_pools(pools, subject.facts.routed_per_layer),
        time.monotonic() - started,
    )


def _agreed(outcomes: Sequence[Outcome], best_P: np.ndarray) -> np.ndarray:
    ends = np.cumsum([len(outcome.best_P) for outcome in outcomes])
    same_P = np.concatenate([outcome.best_P for outcome in outcomes]) == best_P
    return np.array([int(part.sum()) for part in np.split(same_P, ends[:-1])])


def _stack(layers_N: Sequence[Layers]) -> np.ndarray:
    return np.stack([np.concatenate(layers) for layers in layers_N]).astype(np.float32)


def _digest_of_weights(weights: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()
