"""The sources that experts are read from: the disk tier as the cache sees it. D hidden, F expert intermediate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pager.errors import CheckpointError, ChecksumMismatch, ExpertReadError, ExpertUnavailable
from pager.store.pack_format import PACK_NAME, all_keys, read_pack_header
from pager.store.reads import PAGE_BYTES, DataFile, FailedRead, FileRange, Stretch, fill
from pager.store.safetensors import Checkpoint
from pager.store.safetensors_header import TensorSpec
from pager.types import ExpertKey, ExpertShape

ExpertNames = Callable[[ExpertKey], tuple[str, str, str]]
"""The names of an expert's gate, up and down tensors."""


class Destination(NamedTuple):
    """Where an expert's bytes go: gate_up [2F, D] (gate rows first) and down [D, F], CPU, contiguous, any float dtype.

    The bytes go straight into tensors of the stored dtype, and into others through a buffer of STAGING_BYTES.
    """

    key: ExpertKey
    gate_up: Tensor
    down: Tensor


class ExpertSource(Protocol):
    """The experts of one checkpoint, to be read by key. Knows no slots or budgets. Thread-safe."""

    shape: ExpertShape
    stored_dtype: torch.dtype

    @property
    def bytes_read(self) -> int:
        """About how many bytes were read so far; it grows in the middle of a read, too."""
        ...

    def read(self, key: ExpertKey, gate_up: Tensor, down: Tensor) -> int:
        """Fills one destination and returns the bytes read. Raises what `read_all` returns as an error."""
        ...

    def read_all(
        self, destinations: Sequence[Destination], on_most: Callable[[], None] | None = None
    ) -> list[int | ExpertUnavailable]:
        """Fills all destinations; returns for each the bytes read, or an error, and then its tensors are undefined.

        Neighbours in a file come in one read. `on_most` may be called when most is read. The error is an
        ExpertReadError, or a ChecksumMismatch where the bytes' checksum is known. A key that the model doesn't have is
        a KeyError, tensors of another shape a ValueError.
        """
        ...

    def place_of(self, key: ExpertKey) -> FileRange: ...

    def bypass_page_cache(self, dtype: torch.dtype) -> str:
        """Lets reads into whole pages of memory in `dtype` bypass the page cache from now on.

        Returns why they do not; an empty string when they do.
        """
        ...

    def keys_per_layer(self) -> tuple[int, ...]:
        """Returns the number of experts of each layer, shared ones included; 0 for a dense layer."""
        ...

    def close(self) -> None:
        """Closes the descriptors. To be called only when no read is running."""
        ...


def open_experts(
    checkpoint: Checkpoint, names: ExpertNames, experts_per_layer: Sequence[int], shape: ExpertShape
) -> ExpertSource:
    """Opens the experts of a plain or packed checkpoint, checked against what the model's config calls for.

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


class _StoredExperts:
    """The common part of plain and packed files: an expert is a few stretches of bytes."""

    shape: ExpertShape
    stored_dtype: torch.dtype
    _experts_per_layer: tuple[int, ...]

    def read(self, key: ExpertKey, gate_up: Tensor, down: Tensor) -> int:
        (result,) = self.read_all([Destination(key, gate_up, down)])
        if isinstance(result, ExpertUnavailable):
            raise result
        return result

    def read_all(
        self, destinations: Sequence[Destination], on_most: Callable[[], None] | None = None
    ) -> list[int | ExpertUnavailable]:
        stretches = [stretch for each in destinations for stretch in self._stretches(_checked(self.shape, each))]
        errors: dict[ExpertKey, ExpertUnavailable] = {}
        for failure in fill(stretches, self.stored_dtype, on_most):
            errors.setdefault(failure.stretch.key, _error(failure))
        nbytes = self.shape.num_elements * self.stored_dtype.itemsize
        return [errors.get(each.key, nbytes) for each in destinations]

    def keys_per_layer(self) -> tuple[int, ...]:
        return self._experts_per_layer

    @abstractmethod
    def _stretches(self, destination: Destination) -> Iterable[Stretch]: ...


class CheckpointExperts(_StoredExperts):
    """The experts of a plain checkpoint: three tensors each. Checked at every read if checksums were recorded."""

    def __init__(
        self, checkpoint: Checkpoint, names: ExpertNames, experts_per_layer: Sequence[int], shape: ExpertShape
    ) -> None:
        """Opens descriptors of its own, so `checkpoint` may be closed. Raises CheckpointError."""
        self.shape = shape
        self._experts_per_layer = tuple(experts_per_layer)
        self._specs = find_experts(checkpoint, names, self._experts_per_layer, shape)
        self.stored_dtype = next(iter(self._specs.values()))[0].dtype
        used = sorted({spec.file for specs in self._specs.values() for spec in specs})
        self._files = {name: checkpoint.duplicate_file(name) for name in used}
        for file in self._files.values():
            file.expect_scattered_reads()
        self._file_numbers = {name: number for number, name in enumerate(used)}

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files.values())

    def place_of(self, key: ExpertKey) -> FileRange:
        """Returns the range of the expert's tensors in the file of the first one."""
        specs = sorted(self._specs[key], key=lambda spec: (spec.file, spec.offset))
        last = max(spec.offset + spec.nbytes for spec in specs if spec.file == specs[0].file)
        return FileRange(self._file_numbers[specs[0].file], specs[0].offset, last)

    def bypass_page_cache(self, dtype: torch.dtype) -> str:
        return "tensors of a safetensors file begin anywhere in a page; pack the model"

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _stretches(self, destination: Destination) -> Iterable[Stretch]:
        key, gate_up, down = destination
        rows = self.shape.intermediate
        for spec, out in zip(self._specs[key], (gate_up[:rows], gate_up[rows:], down), strict=True):
            yield Stretch(key, self._files[spec.file], spec.offset, spec.nbytes, spec.checksum, (out,))


class PackedExperts(_StoredExperts):
    """The experts of a pack: one extent each, its checksum verified every time."""

    def __init__(self, pack_path: str | Path) -> None:
        """Opens the pack. Raises CheckpointError."""
        path = Path(pack_path)
        try:
            self._file = DataFile(path)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror or error}; pack the model again") from error
        self._file.expect_scattered_reads()
        try:
            header, self._data_start = read_pack_header(self._file)
        except BaseException:
            self._file.close()
            raise
        self.shape = header.shape
        self.stored_dtype = header.dtype
        self._experts_per_layer = header.experts_per_layer
        self._extents = header.extents

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def place_of(self, key: ExpertKey) -> FileRange:
        start = self.offset_of(key)
        return FileRange(0, start, start + self._extents[key].nbytes)

    def bypass_page_cache(self, dtype: torch.dtype) -> str:
        if dtype != self.stored_dtype:
            return f"experts stored as {self.stored_dtype} and served as {dtype} are converted; pack them as {dtype}"
        if self.shape.hidden * self.shape.intermediate * dtype.itemsize % PAGE_BYTES:
            return f"the matrices of these experts are not whole pages of {PAGE_BYTES} bytes"
        try:
            self._file.bypass_page_cache()
        except OSError as error:
            return f"its file system refuses it ({error.strerror or error})"
        return ""

    def offset_of(self, key: ExpertKey) -> int:
        """Returns the byte of the file at which the expert begins."""
        return self._data_start + self._extents[key].offset

    def close(self) -> None:
        self._file.close()

    def _stretches(self, destination: Destination) -> Iterable[Stretch]:
        key, extent = destination.key, self._extents[destination.key]
        both = (destination.gate_up, destination.down)
        return [Stretch(key, self._file, self.offset_of(key), extent.nbytes, extent.checksum, both)]


def find_experts(
    checkpoint: Checkpoint, names: ExpertNames, experts_per_layer: Sequence[int], shape: ExpertShape
) -> Mapping[ExpertKey, tuple[TensorSpec, TensorSpec, TensorSpec]]:
    """Finds each expert's gate, up and down tensors, in layer order.

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


def _checked(shape: ExpertShape, destination: Destination) -> Destination:
    expected = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    found = (tuple(destination.gate_up.shape), tuple(destination.down.shape))
    if found != expected:
        raise ValueError(f"gate_up and down must have shapes {expected}, not {found}")
    return destination


def _error(failure: FailedRead) -> ExpertUnavailable:
    (layer, expert), stretch = failure.stretch.key, failure.stretch
    where = f"byte {stretch.offset} of {stretch.file.path}"
    if failure.error is None:
        return ChecksumMismatch(
            f"expert {expert} of layer {layer} does not match its checksum; see what else is damaged with "
            "`expert-pager verify`",
            stretch.key,
            where,
        )
    reason = failure.error.strerror or type(failure.error).__name__
    error = ExpertReadError(f"cannot read expert {expert} of layer {layer}: {reason}", stretch.key, where)
    error.__cause__ = failure.error
    return error
