"""Every method at every size over the same documents: the cells of a measurement and how they are computed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from pager.errors import ConfigError, PoolTooSmall
from pager.lab.corpus import Text, digest_of
from pager.lab.forwards import PooledOutcome
from pager.lab.methods import FULL, choose, size_of
from pager.lab.recording import Layers
from pager.lab.subject import Subject
from pager.types import ExpertPool


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One method at one size over all documents. `inside_NE`: which experts each pool has; None with all experts."""

    nats_N: np.ndarray
    agreed_N: np.ndarray  # predictions that are the full model's too
    inside_NE: np.ndarray | None
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class FullCell(Cell):
    """The cell with all experts; `best_P` holds every document's predictions, one document after the other."""

    best_P: np.ndarray
    prompt_means_NE: np.ndarray
    whole_means_NE: np.ndarray


class CellStore:
    """A folder of cells made under the same conditions. Without a folder nothing is kept."""

    def __init__(self, folder: Path | None, conditions: str) -> None:
        """`conditions` names all that a cell depends on beside its method and size. Raises ConfigError."""
        self._folder = folder
        self._conditions = conditions
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{folder} cannot be made: {error.strerror}; choose another --out") from None

    def load(self, name: str) -> Cell | None:
        """Reads a cell; None where there is none, or where it was made under other conditions."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                if str(stored["conditions"]) != self._conditions:
                    return None
                return _one_cell({key: stored[key] for key in stored.files})
        except (OSError, ValueError, KeyError, EOFError):
            return None  # it is made again, and written over

    def save(self, name: str, cell: Cell) -> None:
        """Writes a cell, whole or not at all."""
        path = self._path(name)
        if path is None:
            return
        arrays = {"nats": cell.nats_N, "agreed": cell.agreed_N, "seconds": np.asarray(cell.seconds)}
        if cell.inside_NE is not None:
            arrays |= {
                "inside": np.packbits(cell.inside_NE, axis=1),
                "num_experts": np.asarray(cell.inside_NE.shape[1]),
            }
        if isinstance(cell, FullCell):
            arrays |= {"best": cell.best_P, "prompt_means": cell.prompt_means_NE, "whole_means": cell.whole_means_NE}
        partial = path.with_name(f"{path.stem}.partial.npz")
        np.savez_compressed(partial, conditions=np.asarray(self._conditions), **arrays)  # type: ignore[arg-type]
        partial.replace(path)

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}.npz"


def _one_cell(stored: dict[str, np.ndarray]) -> Cell:
    inside_NE = None
    if "inside" in stored:
        inside_NE = np.unpackbits(stored["inside"], axis=1, count=int(stored["num_experts"])).astype(bool)
    common = (stored["nats"], stored["agreed"], inside_NE, float(stored["seconds"]))
    if "best" not in stored:
        return Cell(*common)
    return FullCell(*common, stored["best"], stored["prompt_means"], stored["whole_means"])


def pack_pools(pools: list[ExpertPool], routed_per_layer: tuple[int, ...]) -> np.ndarray:
    """Pools as bits, one row each: bool [N, E]."""
    inside_NE = np.zeros((len(pools), sum(routed_per_layer)), bool)
    starts = np.cumsum([0, *routed_per_layer])
    for row, pool in enumerate(pools):
        for start, layer in zip(starts, pool.experts, strict=False):
            inside_NE[row, start + np.asarray(layer, dtype=int)] = True
    return inside_NE


def unpack_pools(inside_NE: np.ndarray, routed_per_layer: tuple[int, ...]) -> list[ExpertPool]:
    starts = np.cumsum([0, *routed_per_layer])
    return [
        ExpertPool(tuple(tuple(np.flatnonzero(row[start:end]).tolist()) for start, end in pairwise(starts)))
        for row in inside_NE
    ]


@dataclass(frozen=True, slots=True)
class Grid:
    """The measured cells by (method, percent of the experts), and those that could not be measured, with the reason."""

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
    """Measures every cell that `store` does not have. `done` is called with each cell's name.

    Raises InvalidRequest, ExpertUnavailable.
    """
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
    """A digest of all that a cell depends on beside its method and size."""
    router = "none" if subject.predictor_file is None else _digest_of_weights(subject.predictor_file.weights)
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
    """The number of tokens of each document that are predicted: [N]."""
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


def _agreed(outcomes: Sequence[PooledOutcome], best_P: np.ndarray) -> np.ndarray:
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
