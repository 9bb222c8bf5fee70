"""Where experts are read from: the seam between the disk tier and the cache. D hidden, F expert intermediate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from pager.errors import CheckpointError, ChecksumMismatch, ExpertReadError
from pager.store.datafile import DataFile, raw_bytes, read_tensor_at
from pager.store.pack_format import PACK_NAME, all_keys, read_pack_header
from pager.store.safetensors_header import TensorSpec
from pager.store.safetensors_index import Checkpoint
from pager.types import ExpertKey, ExpertShape

ExpertNames = Callable[[ExpertKey], tuple[str, str, str]]
"""The names of an expert's gate, up and down tensors."""


class ExpertSource(Protocol):
    """Knows no slots, budgets or devices."""

    shape: ExpertShape
    stored_dtype: torch.dtype

    def read(self, key: ExpertKey, gate_up: Tensor, down: Tensor) -> int:
        """Fills gate_up [2F, D] (gate rows first) and down [D, F]; returns the bytes read.

        Both are on the CPU, contiguous and of any float dtype. The bytes go straight into tensors of the stored
        dtype, and into others through a buffer of STAGING_BYTES. Thread-safe. Raises ExpertReadError, or
        ChecksumMismatch where the bytes' checksum is known; what the tensors hold then is undefined. A key that
        the model doesn't have is a KeyError, tensors of another shape a ValueError.
        """
        ...

    def keys_per_layer(self) -> tuple[int, ...]:
        """Experts of each layer, shared ones included; 0 for a dense layer."""
        ...

    def close(self) -> None:
        """Frees the descriptors. Only when no read is running."""
        ...


def open_experts(
    checkpoint: Checkpoint, names: ExpertNames, experts_per_layer: Sequence[int], shape: ExpertShape
) -> ExpertSource:
    """The experts of a plain or packed checkpoint, checked against what the model's config calls for.

    The source outlives `checkpoint`. Raises CheckpointError.
    """
    if checkpoint.pack is None:
        return CheckpointExperts(checkpoint, names, experts_per_layer, shape)
    found = (checkpoint.pack.experts_per_layer, checkpoint.pack.shape)
    expected = (tuple(experts_per_layer), shape)
    if found != expected:
        raise CheckpointError(
            f"{checkpoint.path / PACK_NAME} holds {found} and its config calls for {expected}; pack it again"
        )
    return PackedExperts(checkpoint.path / PACK_NAME)


class CheckpointExperts:
    """The experts of a plain checkpoint: three tensors each. Checked at every read if checksums were recorded."""

    def __init__(
        self, checkpoint: Checkpoint, names: ExpertNames, experts_per_layer: Sequence[int], shape: ExpertShape
    ) -> None:
        """Holds its own descriptors: `checkpoint` may be closed. Raises CheckpointError."""
        self.shape = shape
        self._experts_per_layer = tuple(experts_per_layer)
        self._specs = find_experts(checkpoint, names, self._experts_per_layer, shape)
        self.stored_dtype = next(iter(self._specs.values()))[0].dtype
        used = {spec.file for specs in self._specs.values() for spec in specs}
        self._files = {name: checkpoint.duplicate_file(name) for name in sorted(used)}

    def read(self, key: ExpertKey, gate_up: Tensor, down: Tensor) -> int:
        _check_destination(self.shape, gate_up, down)
        rows = self.shape.intermediate
        destinations = (gate_up[:rows], gate_up[rows:], down)
        return sum(self._read_one(key, *pair) for pair in zip(self._specs[key], destinations, strict=True))

    def keys_per_layer(self) -> tuple[int, ...]:
        return self._experts_per_layer

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _read_one(self, key: ExpertKey, spec: TensorSpec, out: Tensor) -> int:
        hasher = None if spec.checksum is None else xxhash.xxh3_128()
        file = self._files[spec.file]
        try:
            count = read_tensor_at(file, spec.offset, spec.dtype, out, hasher)
        except OSError as error:
            raise _unreadable(key, file, spec.offset, error) from error
        if hasher is not None and hasher.hexdigest() != spec.checksum:
            raise _mismatch(key, file, spec.offset)
        return count


class PackedExperts:
    """The experts of a pack: one extent and one read each, its checksum verified every time."""

    def __init__(self, pack_path: str | Path) -> None:
        """Raises CheckpointError."""
        path = Path(pack_path)
        try:
            self._file = DataFile(path)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror or error}; pack the model again") from error
        try:
            header, self._data_start = read_pack_header(self._file)
        except BaseException:
            self._file.close()
            raise
        self.shape = header.shape
        self.stored_dtype = header.dtype
        self._experts_per_layer = header.experts_per_layer
        self._extents = header.extents

    def read(self, key: ExpertKey, gate_up: Tensor, down: Tensor) -> int:
        _check_destination(self.shape, gate_up, down)
        extent, offset = self._extents[key], self.offset_of(key)
        hasher = xxhash.xxh3_128()
        try:
            if gate_up.dtype == down.dtype == self.stored_dtype:
                buffers = [raw_bytes(gate_up), raw_bytes(down)]
                self._file.read_into(buffers, offset)
                for buffer in buffers:
                    hasher.update(buffer)
            else:
                middle = offset + gate_up.numel() * self.stored_dtype.itemsize
                read_tensor_at(self._file, offset, self.stored_dtype, gate_up, hasher)
                read_tensor_at(self._file, middle, self.stored_dtype, down, hasher)
        except OSError as error:
            raise _unreadable(key, self._file, offset, error) from error
        if hasher.hexdigest() != extent.checksum:
            raise _mismatch(key, self._file, offset)
        return extent.nbytes

    def offset_of(self, key: ExpertKey) -> int:
        """The byte of the file at which the expert begins."""
        return self._data_start + self._extents[key].offset

    def keys_per_layer(self) -> tuple[int, ...]:
        return self._experts_per_layer

    def close(self) -> None:
        self._file.close()


def find_experts(
    checkpoint: Checkpoint, names: ExpertNames, experts_per_layer: Sequence[int], shape: ExpertShape
) -> Mapping[ExpertKey, tuple[TensorSpec, TensorSpec, TensorSpec]]:
    """Each expert's gate, up and down tensors, in layer order.

    Raises CheckpointError unless all are there, in the given shape and one floating-point dtype.
    """
    wanted = {key: names(key) for key in all_keys(experts_per_layer)}
    missing = [name for triple in wanted.values() for name in triple if name not in checkpoint.specs]
    if not wanted:
        raise CheckpointError(f"{checkpoint.path} has no layer with experts; there is nothing to page")
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of {3 * len(wanted)} expert tensors, first {missing[0]!r}; "
            "is the checkpoint complete, and of the family that its config names?"
        )
    row_shape, down_shape = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    found = {
        key: (
            checkpoint.require(gate, row_shape),
            checkpoint.require(up, row_shape),
            checkpoint.require(down, down_shape),
        )
        for key, (gate, up, down) in wanted.items()
    }
    first = next(iter(found.values()))[0]
    if not first.dtype.is_floating_point:
        raise CheckpointError(f"tensor {first.name!r} is stored as {first.dtype}; experts must be in floating point")
    for spec in (spec for specs in found.values() for spec in specs):
        if spec.dtype != first.dtype:
            raise CheckpointError(
                f"experts are stored in two dtypes: {first.name!r} as {first.dtype}, {spec.name!r} as {spec.dtype}; "
                "convert the checkpoint to one"
            )
    return found


def _check_destination(shape: ExpertShape, gate_up: Tensor, down: Tensor) -> None:
    expected = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    found = (tuple(gate_up.shape), tuple(down.shape))
    if found != expected:
        raise ValueError(f"gate_up and down must have shapes {expected}, not {found}")


def _unreadable(key: ExpertKey, file: DataFile, offset: int, error: OSError) -> ExpertReadError:
    reason = error.strerror or type(error).__name__
    return ExpertReadError(
        f"cannot read expert {key.expert} of layer {key.layer}: {reason}", key, f"byte {offset} of {file.path}"
    )


def _mismatch(key: ExpertKey, file: DataFile, offset: int) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"expert {key.expert} of layer {key.layer} does not match its checksum; see what else is damaged with "
        "`expert-pager verify`",
        key,
        f"byte {offset} of {file.path}",
    )
