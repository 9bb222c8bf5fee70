"""Which reads fill which memory: what lies side by side in a file comes in one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from pager.store.datafile import HOT_BYTES, PAGE_BYTES, DataFile, raw_bytes, read_hashed, read_tensor_at
from pager.types import ExpertKey

MOST_BYTES = 1 << 25
"""Of one read, unless a single stretch is longer."""

LARGE_BYTES = 1 << 22
"""From here on it takes longer to read something than to get ready for it."""

_gap = memoryview(bytearray(PAGE_BYTES))  # takes the padding between two stretches; nobody looks at it


class Place(NamedTuple):
    """Where an expert lies. Compares in the order of the bytes; `file` is a number that means nothing else."""

    file: int
    start: int
    end: int

    def is_followed_by(self, other: Place) -> bool:
        """`other` begins where this ends, padding aside."""
        return self.file == other.file and 0 <= other.start - self.end < PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a file that lie side by side and share a checksum (xxh3_128 in hex, None where none is known).

    They fill `tensors` (CPU, contiguous) in turn.
    """

    key: ExpertKey
    file: DataFile
    offset: int
    nbytes: int
    checksum: str | None
    tensors: tuple[Tensor, ...]

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def buffers(self) -> list[memoryview]:
        return [raw_bytes(tensor) for tensor in self.tensors]


@dataclass(frozen=True, slots=True)
class Failure:
    """A stretch whose bytes can't be read, or (`error` is None) don't match their checksum."""

    stretch: Stretch
    error: OSError | None


def fill(stretches: Iterable[Stretch], stored: torch.dtype, on_most: Callable[[], None] | None = None) -> list[Failure]:
    """Reads all, checks those with a checksum, and returns what failed; its tensors are undefined then.

    Neighbours come in one read where tensors and file agree on `stored`, the dtype in the file. `on_most` is called
    when most of a last read of LARGE_BYTES is there: time for whoever reads next to get ready. Thread-safe.
    """
    failures: list[Failure] = []
    batches = list(_batches(stretches, stored))
    for batch in batches:
        try:
            bad = _read(batch, stored, on_most if batch is batches[-1] else None)
            failures += [Failure(stretch, None) for stretch in bad]
        except OSError as error:
            if len(batch) == 1:
                failures.append(Failure(batch[0], error))
            else:  # only those that can't be read shall fail
                for stretch in batch:
                    failures += fill([stretch], stored)
    return failures


def _batches(stretches: Iterable[Stretch], stored: torch.dtype) -> Iterator[list[Stretch]]:
    """In the order of the files; one read each where no dtype has to be converted."""
    batch: list[Stretch] = []
    for stretch in sorted(stretches, key=lambda each: (each.file.path, each.offset)):
        if batch and not _belongs(stretch, batch, stored):
            yield batch
            batch = []
        batch.append(stretch)
    if batch:
        yield batch


def _belongs(stretch: Stretch, batch: Sequence[Stretch], stored: torch.dtype) -> bool:
    first, last = batch[0], batch[-1]
    if stretch.file is not first.file or not 0 <= stretch.offset - last.end < PAGE_BYTES:
        return False
    if any(tensor.dtype != stored for tensor in (*last.tensors, *stretch.tensors)):
        return False
    # Hashing is fastest on what a copy has just left in the processor's cache. A direct read leaves nothing there.
    through_cache = stretch.checksum is not None and not stretch.file.is_direct
    return stretch.end - first.offset <= (HOT_BYTES if through_cache else MOST_BYTES)


def _read(batch: Sequence[Stretch], stored: torch.dtype, on_most: Callable[[], None] | None) -> list[Stretch]:
    """Those that don't match their checksum. Raises OSError."""
    first = batch[0]
    first.file.will_need(first.offset, batch[-1].end - first.offset)
    if any(tensor.dtype != stored for tensor in first.tensors):
        return [] if _read_converting(first, stored) else [first]
    is_hashed_hot = (
        len(batch) == 1 and first.checksum is not None and first.nbytes > HOT_BYTES and not first.file.is_direct
    )
    hasher = xxhash.xxh3_128() if is_hashed_hot else None
    buffers, offset = _side_by_side(batch), first.offset
    if on_most is not None and batch[-1].end - first.offset >= LARGE_BYTES:
        most, buffers = _split(buffers)
        offset += _fill_buffers(first.file, most, offset, hasher)
        on_most()
    _fill_buffers(first.file, buffers, offset, hasher)
    if hasher is not None:
        return [] if hasher.hexdigest() == first.checksum else [first]
    return [stretch for stretch in batch if not _is_intact(stretch)]


def _side_by_side(batch: Sequence[Stretch]) -> list[memoryview]:
    buffers: list[memoryview] = []
    end = batch[0].offset
    for stretch in batch:
        buffers += [_gap[: stretch.offset - end], *stretch.buffers]
        end = stretch.end
    return buffers


def _split(buffers: Sequence[memoryview]) -> tuple[list[memoryview], list[memoryview]]:
    """The last quarter apart, in whole pages."""
    most = list(buffers)
    rest: list[memoryview] = []
    missing = sum(buffer.nbytes for buffer in buffers) // 4 // PAGE_BYTES * PAGE_BYTES
    while missing:
        last = most.pop()
        if last.nbytes > missing:
            most.append(last[:-missing])
            last = last[-missing:]
        rest.insert(0, last)
        missing -= last.nbytes
    return most, rest


def _fill_buffers(file: DataFile, buffers: Sequence[memoryview], offset: int, hasher: xxhash.xxh3_128 | None) -> int:
    if hasher is None:
        return file.read_into(buffers, offset)
    return read_hashed(file, buffers, offset, hasher)


def _is_intact(stretch: Stretch) -> bool:
    if stretch.checksum is None:
        return True
    hasher = xxhash.xxh3_128()
    for buffer in stretch.buffers:
        hasher.update(buffer)
    return hasher.hexdigest() == stretch.checksum


def _read_converting(stretch: Stretch, stored: torch.dtype) -> bool:
    """Whether the bytes match their checksum. Raises OSError."""
    hasher = None if stretch.checksum is None else xxhash.xxh3_128()
    offset = stretch.offset
    for tensor in stretch.tensors:
        offset += read_tensor_at(stretch.file, offset, stored, tensor, hasher)
    return hasher is None or hasher.hexdigest() == stretch.checksum
