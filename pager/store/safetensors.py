"""Safetensors files: where each tensor lies, and values that no trained weights have."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pager.errors import CheckpointError
from pager.reading import A_POINTER, LFS_POINTER, parse_json, shown
from pager.store.reads import DataFile

# --- the header -------------------------------------------------------------------------------------------------------
#
# The header of a safetensors file: where each tensor's bytes lie.
#
# The project parses it itself, because positional reads need the offsets.
#
# Format: 8 bytes little-endian header length, that much JSON `{name: {dtype, shape, data_offsets}}`, then the data,
# which the tensors cover without gap or overlap.


MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own implementation
MAX_TENSORS = 1 << 18
"""Of one file: several times what the largest models have in all their files, and a second to read."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PLAIN_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Whose values stand for themselves: those of eight bits and less have scales beside them."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor. `offset` counts from the start of the file; `checksum` is xxh3_128 of its bytes, where
    recorded. With `blocks`, the name of a kind of GGUF's, its bytes are blocks of that kind, and `shape` counts bytes.
    """

    name: str
    file: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    checksum: str | None = None
    blocks: str = ""


def read_header(file: DataFile) -> dict[str, TensorSpec]:
    """Reads the specs of all tensors of the file, in the order of their bytes.

    Raises CheckpointError if the header is malformed, names an unsupported dtype or describes another length of file.
    """
    try:
        length = int.from_bytes(file.read(min(8, file.size), 0), "little")
        if file.read(min(len(LFS_POINTER), file.size), 0) == LFS_POINTER:
            raise CheckpointError(f"{file.path} is {A_POINTER}")
        if file.size < 8 or length > MAX_HEADER_BYTES or 8 + length > file.size:
            raise _damaged(file, f"its {file.size} bytes cannot hold the header that it announces ({length} bytes)")
        encoded = file.read(length, 8)
        if encoded.count(b'"data_offsets"') > MAX_TENSORS:
            raise _damaged(file, f"its header has more than {MAX_TENSORS} tensors")
        entries = parse_json(encoded)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {file.path}: {error}") from error
    except ValueError as error:
        raise _damaged(file, f"its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(file, "its header is not a JSON object")
    specs = [_spec(file, name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"]
    specs.sort(key=lambda spec: (spec.offset, spec.nbytes))
    _check_cover(file, specs, 8 + length)
    return {spec.name: spec for spec in specs}


def _spec(file: DataFile, name: str, entry: object, data_start: int) -> TensorSpec:
    if not isinstance(entry, dict):
        raise _damaged(file, f"the entry of tensor {shown(name)} is not a JSON object")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    dtype_name: Any = entry.get("dtype")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"tensor {shown(name)} has shape {shown(shape)} and data_offsets {shown(offsets)}")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        stored = shown(dtype_name).strip("'")
        raise CheckpointError(
            f"tensor {shown(name)} in {file.path} is stored as {stored}, which is not supported; "
            f"convert the checkpoint to one of {', '.join(DTYPES)}"
        )
    nbytes = offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * dtype.itemsize:
        raise _damaged(
            file, f"tensor {shown(name)} has {nbytes} bytes, and shape {shown(shape)} in {dtype_name} needs others"
        )
    return TensorSpec(name, file.path.name, data_start + offsets[0], nbytes, tuple(shape), dtype)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(file: DataFile, specs: list[TensorSpec], data_start: int) -> None:
    end = data_start
    for spec in specs:
        if spec.offset != end:
            raise _damaged(
                file, f"tensor {shown(spec.name)} begins at byte {spec.offset}, and the one before it ends at {end}"
            )
        end += spec.nbytes
    if file.size < end:
        raise CheckpointError(
            f"{file.path} is truncated: its header describes {end} bytes and the file has {file.size}; fetch it again"
        )
    if file.size > end:
        raise _damaged(file, f"its header describes {end} bytes and the file has {file.size}")


def _damaged(file: DataFile, why: str) -> CheckpointError:
    return CheckpointError(f"{file.path} is not a sound safetensors file: {why}; fetch it again")


def layout(
    file: str, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]
) -> tuple[bytes, tuple[TensorSpec, ...]]:
    """Returns the header of a file to be written and the offset of each tensor's bytes, in file order.

    Larger items come first, so that every tensor is aligned to its own.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor[2].itemsize, tensor[0]))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in ordered:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    header = len(encoded).to_bytes(8, "little") + encoded
    specs, offset = [], len(header)
    for name, shape, dtype in ordered:
        nbytes = math.prod(shape) * dtype.itemsize
        specs.append(TensorSpec(name, file, offset, nbytes, shape, dtype))
        offset += nbytes
    return header, tuple(specs)


# --- values -----------------------------------------------------------------------------------------------------------


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
        if self.least == -math.inf or (self.greatest == math.inf and self.least <= self.greatest):
            return "it holds infinite values"
        if self.least == self.greatest and num_dimensions > 1:
            return f"all its values are {self.least:g}"
        return None


def odd_tensor(spec: TensorSpec, values: ValueRange) -> Iterator[OddItem]:
    """Yields what is odd about a tensor, if anything."""
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
