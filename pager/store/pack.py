"""Packed checkpoints: their writer, and the check of every byte of a checkpoint.

A packed checkpoint has its trunk in one safetensors file and each expert in one extent of a second file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from pager.errors import CheckpointError, ConfigError, ExpertUnavailable
from pager.store.appearing import appearing, check_absent, sync
from pager.store.checkpoint import Checkpoint, Manifest
from pager.store.expert_source import (
    CheckpointExperts,
    ExpertPieces,
    PackedExperts,
    StoredParameter,
    find_experts,
    pieces_of,
)
from pager.store.pack_format import PACK_NAME, TRUNK_NAME, PackHeader, RecordFormat, all_keys
from pager.store.reads import raw_bytes
from pager.store.safetensors import PLAIN_FLOATS, OddItem, TensorSpec, ValueRange, holes_of, layout, odd_tensor
from pager.types import ExpertKey, ExpertShape

# --- the writer -------------------------------------------------------------------------------------------------------


Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

_SIDE_FILES = (
    "generation_config.json", "*token*", "vocab*", "merges.txt", "chat_template*", "*.model", "LICENSE*", "README*",
)  # fmt: skip


def side_files(directory: Path) -> tuple[Path, ...]:
    """Returns the files of a checkpoint that are neither its config nor weights, nor made for this very copy of it."""
    return tuple(sorted({path for pattern in _SIDE_FILES for path in directory.glob(pattern) if path.is_file()}))


@dataclass(frozen=True, slots=True)
class _Job:
    checkpoint: Checkpoint
    source: CheckpointExperts
    experts: Mapping[ExpertKey, tuple[StoredParameter, ...]]
    header: PackHeader  # without checksums yet
    trunk_header: bytes
    trunk: tuple[TensorSpec, ...]  # as they will be stored
    side_files: tuple[Path, ...]
    recast: bool

    @property
    def data_start(self) -> int:
        return len(self.header.encode())

    @property
    def nbytes(self) -> int:
        trunk = len(self.trunk_header) + sum(spec.nbytes for spec in self.trunk)
        side = sum(path.stat().st_size for path in self.side_files)
        return self.data_start + self.header.extents_nbytes + trunk + side


def pack(
    source_dir: str | Path,
    out_dir: str | Path,
    *,
    pieces: ExpertPieces,
    experts_per_layer: Sequence[int],
    shape: ExpertShape,
    dtype: torch.dtype | RecordFormat | None = None,
    quantised: Collection[str] = (),
    progress: Progress | None = None,
) -> tuple[OddItem, ...]:
    """Writes a self-contained packed checkpoint in `dtype` (None: as stored). It appears whole or not at all.

    With a RecordFormat, experts are quantised to it, and the trunk is in the dtype of its scales. Of the tensors
    `quantised` those of experts are decoded, which takes a dtype, and those of the trunk stay as stored.

    Returns the tensors whose values no trained weights have. Holds a bounded buffer and at most one expert. Checksums
    recorded for the source are checked on the way. Raises CheckpointError for a bad source, ConfigError if `out_dir`
    exists or `dtype` can't be stored, UnsupportedModel for experts that have no such record, and InsufficientDisk
    before anything is written or when the disk runs full.
    """
    out = Path(out_dir)
    check_absent(out)
    if isinstance(dtype, torch.dtype) and dtype not in PLAIN_FLOATS:
        raise ConfigError(f"experts cannot be packed as {dtype}; use float32, bfloat16 or float16")
    with Checkpoint.open(source_dir) as checkpoint:
        job = _plan(checkpoint, pieces, tuple(experts_per_layer), shape, dtype, quantised)
        with closing(job.source), appearing(out, job.nbytes, "packing", or_else="pack as bfloat16") as partial:
            return _write(job, partial, progress or (lambda done, total: None))


def _plan(
    checkpoint: Checkpoint,
    pieces: ExpertPieces,
    experts_per_layer: tuple[int, ...],
    shape: ExpertShape,
    wanted: torch.dtype | RecordFormat | None,
    quantised: Collection[str],
) -> _Job:
    record = wanted if isinstance(wanted, RecordFormat) else None
    dtype = wanted.scales if isinstance(wanted, RecordFormat) else wanted
    if record:
        record.record(shape)  # refuses what has none before anything is opened
    checkpoint.require_folder("pack it")
    if checkpoint.is_packed:
        raise CheckpointError(f"{checkpoint.path} is packed already; pack the checkpoint that it was made from")
    experts = find_experts(checkpoint, pieces, experts_per_layer, shape)
    paged = {piece.spec.name for stored in experts.values() for piece in pieces_of(stored)}
    kept = {spec.name for spec in checkpoint.specs.values() if spec.dtype not in PLAIN_FLOATS}.union(quantised)
    trunk_header, trunk = layout(
        TRUNK_NAME,
        (
            (spec.name, spec.shape, dtype if dtype and spec.name not in kept else spec.dtype)
            for spec in checkpoint.specs.values()
            if spec.name not in paged
        ),
    )
    if dtype is None and any(each.decodes for stored in experts.values() for each in stored):
        stored_bytes = sum(piece.nbytes for piece in pieces_of(next(iter(experts.values()))))
        raise ConfigError(
            f"the experts of {checkpoint.path} are quantised ({stored_bytes} bytes each) and a pack would hold "
            "them decoded; give the dtype to decode them to (--dtype bfloat16), or run the checkpoint as it is"
        )
    source = CheckpointExperts(checkpoint, pieces, experts_per_layer, shape)
    expert_dtype = dtype or source.stored_dtype
    trunk_names = (spec.name for spec in trunk)
    header = PackHeader.plan(checkpoint.fingerprint, experts_per_layer, shape, record or expert_dtype, trunk_names)
    files = side_files(checkpoint.path)
    return _Job(checkpoint, source, experts, header, trunk_header, trunk, files, dtype is not None)


def _write(job: _Job, partial: Path, progress: Progress) -> tuple[OddItem, ...]:
    _copy_side_files(job, partial)
    total = sum(spec.nbytes for spec in job.trunk) + sum(extent.nbytes for extent in job.header.extents.values())
    done, odd = 0, list[OddItem]()

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    with (partial / TRUNK_NAME).open("wb") as stream:
        trunk_checksums = _write_trunk(job, stream, advance, odd)
        sync(stream)
    with (partial / PACK_NAME).open("wb") as stream:
        extent_checksums = _write_experts(job, stream, advance, odd)
        stream.truncate(job.data_start + job.header.extents_nbytes)
        header = job.header.with_checksums(extent_checksums, trunk_checksums).encode()
        assert len(header) == job.data_start, "the header's length depends on its checksums"
        stream.seek(0)
        stream.write(header)
        sync(stream)
    return tuple(odd)


def _write_trunk(job: _Job, stream: BinaryIO, advance: Callable[[int], None], odd: list[OddItem]) -> dict[str, str]:
    checksums = {}
    stream.write(job.trunk_header)
    for spec in job.trunk:
        hasher = xxhash.xxh3_128()
        odd += odd_tensor(spec, _write_pieces(job.checkpoint.pieces(spec.name), spec.dtype, stream, hasher))
        checksums[spec.name] = hasher.hexdigest()
        advance(spec.nbytes)
    return checksums


def _write_experts(
    job: _Job, stream: BinaryIO, advance: Callable[[int], None], odd: list[OddItem]
) -> dict[ExpertKey, str]:
    checksums = {}
    for key, stored in job.experts.items():
        extent = job.header.extents[key]
        hasher = xxhash.xxh3_128()
        stream.seek(job.data_start + extent.offset)
        if job.header.record or any(
            parameter.make or piece.row is not None for parameter in stored for piece in parameter.pieces
        ):
            odd += _write_record(job, key, stream, hasher)
        else:
            for piece in pieces_of(stored):
                written = _write_pieces(job.checkpoint.pieces(piece.spec.name), job.header.dtype, stream, hasher)
                odd += odd_tensor(piece.spec, written)
        checksums[key] = hasher.hexdigest()
        advance(extent.nbytes)
    return checksums


def _write_record(job: _Job, key: ExpertKey, stream: BinaryIO, hasher: xxhash.xxh3_128) -> Iterator[OddItem]:
    """An expert whose record is not whole tensors of the checkpoint, by way of memory. Yields what is odd."""
    shape, record = job.source.shape, job.header.record
    tensors = [torch.empty(part, dtype=torch.float32 if record else job.header.dtype) for part in shape.shapes]
    try:
        job.source.read(key, *tensors)
    except ExpertUnavailable as error:
        raise CheckpointError(error.message) from error
    for part in record.quantised(tensors) if record else ():
        _write_pieces(iter([part.view(-1)]), part.dtype, stream, hasher)
    for (name, _), tensor in zip(shape.named, tensors, strict=True):
        values = ValueRange()
        if record:
            values.add(tensor)
        else:
            values = _write_pieces(iter([tensor.view(-1)]), job.header.dtype, stream, hasher)
        if reason := values.oddity(tensor.ndim):
            yield OddItem(f"layer {key.layer} expert {key.expert}, {name}", PACK_NAME, reason)


def _write_pieces(
    pieces: Iterator[Tensor], dtype: torch.dtype, stream: BinaryIO, hasher: xxhash.xxh3_128
) -> ValueRange:
    values = ValueRange()
    for piece in pieces:
        cast = piece.to(dtype)
        memory = raw_bytes(cast)
        hasher.update(memory)
        stream.write(memory)
        values.add(cast)
    return values


def _copy_side_files(job: _Job, partial: Path) -> None:
    config = dict(job.checkpoint.config)
    if job.recast:
        config.pop("torch_dtype", None)  # the name of this key before transformers 5
        served = job.header.record.scales if job.header.record else job.header.dtype
        config["dtype"] = str(served).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in job.side_files:
        shutil.copyfile(path, partial / path.name)


# --- the check of every byte ------------------------------------------------------------------------------------------


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
    """The result of `record`, with the recorded values that look damaged: zeros have a checksum, too."""

    manifest: Manifest
    odd: tuple[OddItem, ...]


def verify(path: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Checks every tensor and every packed expert against its checksum and reports all that are bad.

    Raises CheckpointError where the structure itself is broken (see `Checkpoint.open`), or nothing was recorded.
    """
    with Checkpoint.open(path) as checkpoint:
        checkpoint.require_folder("check what is recorded of it")
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
            checks = chain(checks, _extent_checks(checkpoint.path / PACK_NAME, checkpoint.pack, odd))
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
        checkpoint.require_folder("record checksums of it")
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


def _extent_checks(path: Path, header: PackHeader, odd: list[OddItem]) -> Iterator[tuple[int, BadItem | None]]:
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
