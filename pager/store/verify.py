"""Reads every byte of a checkpoint and compares it with its checksum, or records what it is now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import xxhash

from pager.errors import CheckpointError, ExpertUnavailable
from pager.store.datafile import raw_bytes
from pager.store.experts import PackedExperts
from pager.store.manifest import Manifest
from pager.store.pack import Progress
from pager.store.pack_format import PACK_NAME, PackHeader, all_keys
from pager.store.safetensors_header import TensorSpec
from pager.store.safetensors_index import Checkpoint


@dataclass(frozen=True, slots=True)
class BadItem:
    """A tensor or packed expert that can't be read or isn't what it was. `offset` is its first byte in the file."""

    name: str
    file: str
    offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    path: Path
    packed: bool
    num_checked: int
    nbytes_checked: int
    bad: tuple[BadItem, ...]

    @property
    def ok(self) -> bool:
        return not self.bad


def verify(path: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Checks every tensor and every packed expert against its checksum and reports all that are bad.

    Raises CheckpointError where the structure itself is broken (see `Checkpoint.open`), or nothing was recorded.
    """
    with Checkpoint.open(path) as checkpoint:
        if any(spec.checksum is None for spec in checkpoint.specs.values()):
            raise CheckpointError(
                f"{checkpoint.path} has no recorded checksums; on files that you trust, run "
                f"`expert-pager verify --record {checkpoint.path}` once"
            )
        specs = _in_file_order(checkpoint)
        total, num_checked = sum(spec.nbytes for spec in specs), len(specs)
        checks: Iterable[tuple[int, BadItem | None]] = _check_tensors(checkpoint, specs)
        if checkpoint.pack is not None:
            total += sum(extent.nbytes for extent in checkpoint.pack.extents.values())
            num_checked += len(checkpoint.pack.extents)
            checks = chain(checks, _check_extents(checkpoint.path / PACK_NAME, checkpoint.pack))
        bad, done = [], 0
        for nbytes, item in checks:
            done += nbytes
            if item is not None:
                bad.append(item)
            if progress is not None:
                progress(done, total)
        return VerifyReport(checkpoint.path, checkpoint.is_packed, num_checked, total, tuple(bad))


def record(path: str | Path, progress: Progress | None = None) -> Manifest:
    """Writes `checksums.json` into a plain checkpoint, atomically, and returns it. Raises CheckpointError."""
    with Checkpoint.open_unverified(path) as checkpoint:
        if checkpoint.is_packed:
            raise CheckpointError(f"{checkpoint.path} is packed and carries its checksums; run `expert-pager verify`")
        specs = _in_file_order(checkpoint)
        total, done = sum(spec.nbytes for spec in specs), 0
        checksums = {}
        for spec in specs:
            hasher = xxhash.xxh3_128()
            for piece in checkpoint.pieces(spec.name):
                hasher.update(raw_bytes(piece))
            checksums[spec.name] = hasher.hexdigest()
            done += spec.nbytes
            if progress is not None:
                progress(done, total)
        manifest = Manifest(checkpoint.file_nbytes, checksums)
        manifest.save(checkpoint.path)
        return manifest


def _in_file_order(checkpoint: Checkpoint) -> list[TensorSpec]:
    return sorted(checkpoint.specs.values(), key=lambda spec: (spec.file, spec.offset))


def _check_tensors(checkpoint: Checkpoint, specs: Iterable[TensorSpec]) -> Iterator[tuple[int, BadItem | None]]:
    for spec in specs:
        item = None
        try:
            for _ in checkpoint.pieces(spec.name):
                pass
        except CheckpointError as error:
            item = BadItem(spec.name, spec.file, spec.offset, error.message)
        yield spec.nbytes, item


def _check_extents(path: Path, header: PackHeader) -> Iterator[tuple[int, BadItem | None]]:
    experts = PackedExperts(path)
    hidden, intermediate = header.shape.hidden, header.shape.intermediate
    gate_up = torch.empty(2 * intermediate, hidden, dtype=header.dtype)
    down = torch.empty(hidden, intermediate, dtype=header.dtype)
    try:
        for key in all_keys(header.experts_per_layer):
            item = None
            try:
                experts.read(key, gate_up, down)
            except ExpertUnavailable as error:
                name = f"layer {key.layer} expert {key.expert}"
                item = BadItem(name, path.name, experts.offset_of(key), error.message)
            yield header.extents[key].nbytes, item
    finally:
        experts.close()
