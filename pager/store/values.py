"""Finds values that no trained weights have: bytes that were never written are zeros, and have a checksum too."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pager.store.safetensors_header import PLAIN_FLOATS, TensorSpec


@dataclass(frozen=True, slots=True)
class OddItem:
    """A tensor, expert or file that is readable and matches its checksum, but whose values suggest damage."""

    name: str
    file: str
    reason: str


@dataclass(slots=True)
class ValueRange:
    """The minimum and maximum of values that come piece by piece, and whether all were numbers."""

    least: float = math.inf
    greatest: float = -math.inf
    has_nan: bool = False

    def add(self, piece: Tensor) -> None:
        if not piece.numel() or piece.dtype not in PLAIN_FLOATS:
            return
        least, greatest = (float(each) for each in torch.aminmax(piece))
        if math.isnan(least) or math.isnan(greatest):
            self.has_nan = True
        else:
            self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)

    def oddity(self, num_dimensions: int) -> str | None:
        """Says what is odd about the values, or None. A vector may be constant, as an untrained norm's weights are."""
        if self.has_nan:
            return "it holds values that are not a number"
        if self.least == -math.inf or (self.greatest == math.inf and self.least != math.inf):
            return "it holds infinite values"
        if self.least == self.greatest and num_dimensions > 1:
            return f"all its values are {self.least:g}"
        return None


def odd_tensor(spec: TensorSpec, values: ValueRange) -> Iterator[OddItem]:
    """Returns what is odd about a tensor, if anything."""
    num_dimensions = 0 if spec.nbytes == spec.dtype.itemsize else len(spec.shape)
    if reason := values.oddity(num_dimensions):
        yield OddItem(spec.name, spec.file, reason)


def holes_of(paths: Iterable[Path]) -> Iterator[OddItem]:
    """Finds files with holes, which an interrupted download leaves."""
    for path in paths:
        with suppress(OSError), path.open("rb") as file:  # a file system that does not know says that there is none
            hole = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
            if hole < path.stat().st_size:
                yield OddItem(path.name, path.name, f"nothing was ever written at byte {hole} of it")
