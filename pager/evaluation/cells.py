"""Results on disk, one file for each method and size, so that an interrupted evaluation goes on where it was.

Legend: N documents, P predicted tokens of all of them, E routed experts of all layers in a row, M mean probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pager.errors import ConfigError
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
    """With all experts; `best_P` holds every document's predictions, one document after the other."""

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
                raise ConfigError(f"{folder} can not be made: {error.strerror}; choose another --out") from None

    def load(self, name: str) -> Cell | None:
        """None where there is none, or where it was made under other conditions."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                if str(stored["conditions"]) != self._conditions:
                    return None
                return _cell({key: stored[key] for key in stored.files})
        except (OSError, ValueError, KeyError, EOFError):
            return None  # it is made again, and written over

    def save(self, name: str, cell: Cell) -> None:
        """Whole or not at all."""
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


def _cell(stored: dict[str, np.ndarray]) -> Cell:
    inside_NE = None
    if "inside" in stored:
        inside_NE = np.unpackbits(stored["inside"], axis=1, count=int(stored["num_experts"])).astype(bool)
    common = (stored["nats"], stored["agreed"], inside_NE, float(stored["seconds"]))
    if "best" not in stored:
        return Cell(*common)
    return FullCell(*common, stored["best"], stored["prompt_means"], stored["whole_means"])


def pack_pools(pools: list[ExpertPool], routed_per_layer: tuple[int, ...]) -> np.ndarray:
    """bool [N, E]."""
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
