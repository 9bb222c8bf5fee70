"""Reads every byte of a checkpoint and compares it with its checksum, or records what it is now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from pager.errors import CheckpointError, ExpertUnavailable
from pager.store.checkpoint import Manifest
from pager.store.expert_source import PackedExperts
from pager.store.pack import Progress
from pager.store.pack_format import PACK_NAME, PackHeader, all_keys
from pager.store.reads import raw_bytes
from pager.store.safetensors import Checkpoint
from pager.store.safetensors_header import TensorSpec
from pager.store.values import OddItem, ValueRange, holes_of, odd_tensor


@dataclass(frozen=True, slots=True)
class BadItem:
    """A tensor or packed expert that cannot be read or does not match its checksum.

    `offset` is its first byte in the file.
    """

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
    odd: tuple[OddItem, ...]  # sound as far as checksums tell

    @property
    def ok(self) -> bool:
        return not self.bad


@dataclass(frozen=True, slots=True)
class Recorded:
    """What `record` wrote, and which of the recorded values look damaged: zeros have a checksum, too."""

    manifest: Manifest
    odd: tuple[OddItem, ...]


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
        odd: list[OddItem] = [*holes_of(_files(checkpoint))]
        checks: Iterable[tuple[int, BadItem | None]] = _check_tensors(checkpoint, specs, odd)
        if checkpoint.pack is not None:
            total += sum(extent.nbytes for extent in checkpoint.pack.extents.values())
            num_checked += len(checkpoint.pack.extents)
            checks = chain(checks, _check_extents(checkpoint.path / PACK_NAME, checkpoint.pack, odd))
        bad, done = [], 0
        for nbytes, item in checks:
            done += nbytes
            if item is not None:
                bad.append(item)
            if progress is not None:
                progress(done, total)
        return VerifyReport(checkpoint.path, checkpoint.is_packed, num_checked, total, tuple(bad), tuple(odd))


def record(path: str | Path, progress: Progress | None = None) -> Recorded:
    """Writes `checksums.json` into a plain checkpoint, atomically. Raises CheckpointError."""
    with Checkpoint.open_unverified(path) as checkpoint:
        if checkpoint.is_packed:
            raise CheckpointError(f"{checkpoint.path} is packed and carries its checksums; run `expert-pager verify`")
        specs = _in_file_order(checkpoint)
        total, done = sum(spec.nbytes for spec in specs), 0
        checksums = {}
        odd = [*holes_of(_files(checkpoint))]
        for spec in specs:
            hasher, values = xxhash.xxh3_128(), ValueRange()
            for piece in checkpoint.pieces(spec.name):
                hasher.update(raw_bytes(piece))
                values.add(piece)
            checksums[spec.name] = hasher.hexdigest()
            odd += odd_tensor(spec, values)
            done += spec.nbytes
            if progress is not None:
                progress(done, total)
        manifest = Manifest(checkpoint.file_nbytes, checksums)
        manifest.save(checkpoint.path)
        return Recorded(manifest, tuple(odd))


def _in_file_order(checkpoint: Checkpoint) -> list[TensorSpec]:
    return sorted(checkpoint.specs.values(), key=lambda spec: (spec.file, spec.offset))


def _files(checkpoint: Checkpoint) -> list[Path]:
    names = [*checkpoint.file_nbytes, *([PACK_NAME] if checkpoint.is_packed else [])]
    return [checkpoint.path / name for name in names]


def _check_tensors(
    checkpoint: Checkpoint, specs: Iterable[TensorSpec], odd: list[OddItem]
) -> Iterator[tuple[int, BadItem | None]]:
    for spec in specs:
        item, values = None, ValueRange()
        try:
            for piece in checkpoint.pieces(spec.name):
                values.add(piece)
        except CheckpointError as error:
            item = BadItem(spec.name, spec.file, spec.offset, error.message)
        else:
            odd += odd_tensor(spec, values)
        yield spec.nbytes, item


def _check_extents(path: Path, header: PackHeader, odd: list[OddItem]) -> Iterator[tuple[int, BadItem | None]]:
    experts = PackedExperts(path)
    tensors = [torch.empty(part, dtype=header.dtype) for part in header.shape.shapes]
    matrices = [
        each for (part, _), tensor in zip(header.shape.named, tensors, strict=True) for each in _named(part, tensor)
    ]
    try:
        for key in all_keys(header.experts_per_layer):
            item, name = None, f"layer {key.layer} expert {key.expert}"
            try:
                experts.read(key, *tensors)
            except ExpertUnavailable as error:
                item = BadItem(name, path.name, experts.offset_of(key), error.message)
            else:
                for part, matrix in matrices:
                    values = ValueRange()
                    values.add(matrix)
                    if reason := values.oddity(matrix.ndim):
                        odd.append(OddItem(f"{name}, {part}", path.name, reason))
            yield header.extents[key].nbytes, item
    finally:
        experts.close()


def _named(parameter: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under the name that reports have for it; gates and ups are two."""
    if parameter == "gate_up_proj" and tensor.ndim == 2:
        yield from zip(("gate", "up"), tensor.chunk(2), strict=True)
    else:
        yield parameter.removesuffix("_proj"), tensor
