"""The synthetic checkpoints that several programs measure: made once, kept in build/benchmarks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.report import ROOT
from benchmarks.shapes import SHAPES
from benchmarks.synthetic import check_checkpoint, write_checkpoint
from pager.cli.options import bytes_progress
from pager.models.open_model import OpenModel
from pager.store.pack import pack
from pager.store.pack_format import RecordFormat

WORK = ROOT / "build" / "benchmarks"


def checkpoints(work: Path, shape: str, num_layers: int) -> tuple[Path, Path]:
    """The synthetic checkpoint, as downloaded and packed; made once and kept. Raises PagerError."""
    packed = work / f"{shape}-{num_layers}-layers-packed"
    plain = synthetic(work, shape, num_layers)
    if not packed.exists():
        opened = OpenModel.open(plain)
        opened.checkpoint.close()
        with bytes_progress(f"packing {packed.name}") as progress:
            pack(
                plain,
                packed,
                pieces=opened.pieces,
                experts_per_layer=opened.facts.experts_per_layer,
                shape=opened.family.shape,
                progress=progress,
            )
    return plain, packed


def synthetic(work: Path, shape: str, num_layers: int) -> Path:
    """The checkpoint as downloaded. One that is written anew takes the packed one of an earlier shape with it."""
    chosen = SHAPES[shape].shortened(num_layers)
    plain = work / f"{shape}-{num_layers}-layers"
    if not plain.exists():
        shutil.rmtree(work / f"{plain.name}-packed", ignore_errors=True)
        with bytes_progress(f"writing {plain.name}") as progress:
            write_checkpoint(plain, chosen, progress=progress)
    check_checkpoint(plain, chosen)
    return plain


def plain_checkpoint(work: Path, shape: str, num_layers: int, context_tokens: int | None = None) -> Path:
    """The synthetic checkpoint as downloaded, with a context of its own length if that is given; made once and kept.
    Raises PagerError.
    """
    chosen, name = SHAPES[shape].shortened(num_layers), f"{shape}-{num_layers}-layers"
    if context_tokens is not None:
        chosen, name = replace(chosen, context=context_tokens), f"{name}-context-{context_tokens}"
    plain = work / name
    if not plain.exists():
        with bytes_progress(f"writing {plain.name}") as progress:
            write_checkpoint(plain, chosen, progress=progress)
    check_checkpoint(plain, chosen)
    return plain


def quantised(plain: Path, out: Path, kind: str, dtype: torch.dtype) -> Path:
    """The same checkpoint packed with its experts in `kind`; made once and kept. Raises PagerError."""
    if not out.exists():
        opened = OpenModel.open(plain)
        opened.checkpoint.close()
        with bytes_progress(f"packing {out.name}") as progress:
            pack(
                plain,
                out,
                pieces=opened.pieces,
                experts_per_layer=opened.facts.experts_per_layer,
                shape=opened.family.shape,
                dtype=RecordFormat.of(kind, dtype),
                progress=progress,
            )
    return out
