"""Positional reads from files into memory that the caller owns; neighbours in a file come in one read."""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import xxhash
from torch import Tensor

from pager.reading import open_regular
from pager.types import ExpertKey

log = logging.getLogger(__name__)

PAGE_BYTES = 4096
"""A read past the page cache starts at a multiple of this, in the file and in memory, and is as long as one."""

STAGING_BYTES = 1 << 20
"""What a thread that reads keeps besides its destinations, once it has converted between dtypes."""

HOT_BYTES = 1 << 18
"""So much is hashed at a time: the processor's own cache still holds it from the copy out of the page cache."""

MOST_BYTES_A_CALL = 1 << 25
"""So much is asked of the system at a time, so that a slow disk is seen to make progress."""

_MOST_BUFFERS = min(1024, os.sysconf("SC_IOV_MAX"))

# Below torch's grain size a copy stays on the calling thread: readers are parallel already, and an OpenMP team for each
# of them would cost more than it saves.
_CAST_ELEMENTS = 32_767

_staging = threading.local()

_mincore = getattr(ctypes.CDLL(None), "mincore", None)


class DataFile:
    """A file open for reading, and its size then. Reads are thread-safe; `close` only when none is running.

    `bytes_read` grows while a read is under way. Threads that read at once may lose some of each other's.
    """

    bytes_read = 0

    _fd: int | None = None
    _direct_fd: int | None = None  # the same file, past the page cache
    _mapped: Tensor | None = None  # all its bytes, once they were looked for in the page cache
    _sees_page_cache: bool | None = None

    def __init__(self, path: Path) -> None:
        """Opens the file. Raises OSError, also if it is not a regular file."""
        self.path = path
        self.is_direct = False
        self._fd = open_regular(path)
        self.size = os.fstat(self._fd).st_size

    def bypass_page_cache(self) -> None:
        """Reads whole pages straight from the disk into memory from now on. Raises OSError where the system cannot."""
        if self._direct_fd is not None:
            return
        if not hasattr(os, "O_DIRECT"):
            raise OSError(errno.ENOTSUP, "this system has no O_DIRECT", str(self.path))
        self._direct_fd = self._open_again(os.O_DIRECT)
        self.is_direct = True

    def expect_scattered_reads(self) -> None:
        """Tells the page cache to read ahead nothing from now on. A hint, which some systems ignore."""
        self._advise("POSIX_FADV_RANDOM", 0, 0)

    def will_need(self, offset: int, nbytes: int) -> None:
        """Tells the page cache, if it is used, to begin reading the whole range at once. A hint as well."""
        if not self.is_direct:
            self._advise("POSIX_FADV_WILLNEED", offset, nbytes)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills the byte buffers in turn from `offset` on; returns how many bytes. Raises OSError, also if short."""
        pending = [buffer for buffer in buffers if buffer.nbytes]
        done = 0
        while pending:
            count = self._read_some(_first_bytes(pending[:_MOST_BUFFERS]), offset + done)
            if count == 0:
                missing = sum(buffer.nbytes for buffer in pending)
                message = f"the file ends at byte {offset + done}, {missing} bytes short of this read"
                raise OSError(errno.EIO, message, str(self.path))
            done += count
            self.bytes_read += count
            while pending and count >= pending[0].nbytes:
                count -= pending.pop(0).nbytes
            if count:
                pending[0] = pending[0][count:]
        return done

    def read(self, nbytes: int, offset: int) -> bytes:
        """Reads bytes. Raises OSError, also on a short read."""
        buffer = bytearray(nbytes)
        self.read_into([memoryview(buffer)], offset)
        return bytes(buffer)

    def cached_pages(self, start: int, end: int) -> bytes | None:
        """Returns a byte for each page from that of `start` to that of `end`, 0 where the page cache lacks it; None
        where it cannot be asked.

        Raises OSError where the file is shorter than it was.
        """
        if self._fd is None or self.is_direct or not self._can_see_page_cache():
            return None
        self.check_length()
        first = start - start % mmap.PAGESIZE
        pages = (ctypes.c_ubyte * -(-(end - first) // mmap.PAGESIZE))()
        address = ctypes.c_void_p(self._mapping().data_ptr() + first)
        assert _mincore is not None, "it was looked for"
        return None if _mincore(address, ctypes.c_size_t(end - first), pages) else bytes(pages)

    def check_length(self) -> None:
        """Checks that the file is as long as it was. Raises OSError where it is shorter."""
        if self._fd is not None and os.fstat(self._fd).st_size < self.size:
            raise OSError(errno.EIO, f"the file had {self.size} bytes and is shorter now", str(self.path))

    def mapped(self, offset: int, nbytes: int) -> Tensor:
        """Returns bytes of the file as they are in memory, or come there when they are touched; for reading only.

        They are valid as long as the tensor, and while nobody shortens the file: a processor that touches what is gone
        ends the process. Raises OSError.
        """
        return self._mapping()[offset : offset + nbytes]

    def _mapping(self) -> Tensor:
        if self._mapped is None:
            assert self._fd is not None, "the file is closed"
            self._mapped = _map(self._fd, self.size)
        return self._mapped

    def _can_see_page_cache(self) -> bool:
        """Tells whether the system says what is in the page cache. To others than a file's owners it says that all
        is.
        """
        if self._sees_page_cache is None:
            owner, user = os.fstat(self._fd).st_uid if self._fd is not None else -1, os.geteuid()
            self._sees_page_cache = _mincore is not None and (user in (0, owner) or os.access(self.path, os.W_OK))
        return self._sees_page_cache

    def duplicate(self) -> DataFile:
        """Opens the same file again; closing it and its hints are independent of this one."""
        if self._fd is None:
            raise OSError(errno.EBADF, "the file is closed", str(self.path))
        twin = DataFile.__new__(DataFile)
        twin.path, twin.size, twin.is_direct = self.path, self.size, False
        try:
            twin._fd = self._open_again()
        except OSError:  # a system without /proc
            twin._fd = os.dup(self._fd)
        return twin

    def close(self) -> None:
        self.is_direct = False
        self._mapped = None
        for descriptor in (self._fd, self._direct_fd):
            if descriptor is not None:
                os.close(descriptor)
        self._fd = self._direct_fd = None

    __del__ = close

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open file cannot be copied or pickled: two of them would close one descriptor")

    def _advise(self, hint: str, offset: int, nbytes: int) -> None:
        if self._fd is not None and hasattr(os, hint):
            with suppress(OSError):
                os.posix_fadvise(self._fd, offset, nbytes, getattr(os, hint))

    def _open_again(self, flags: int = 0) -> int:
        """Opens a file by its descriptor, not its path, which may name another file by now."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC | flags)

    def _read_some(self, buffers: Sequence[memoryview], offset: int) -> int:
        if self._fd is None:
            raise OSError(errno.EBADF, "the file is closed", str(self.path))
        if self.is_direct and _is_in_pages(buffers, offset):
            assert self._direct_fd is not None
            try:
                return os.preadv(self._direct_fd, buffers, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.is_direct = False
                log.warning("%s is read through the page cache: its file system refused a direct read", self.path)
        return os.preadv(self._fd, buffers, offset)


LARGE_PAGE_BYTES = 2**21


def in_large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Takes memory of the system that begins at a page and, where the kernel has them, lies in large pages.

    Matrices are read from it faster by a tenth, and a disk writes to few large pieces in fewer requests.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _map(descriptor: int, size: int) -> Tensor:
    """Maps a file. Raises OSError."""
    mapping = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)


def _first_bytes(buffers: Sequence[memoryview]) -> list[memoryview]:
    """Returns the first MOST_BYTES_A_CALL of `buffers`."""
    some, left = [], MOST_BYTES_A_CALL
    for buffer in buffers:
        some.append(buffer[:left])
        left -= some[-1].nbytes
        if not left:
            break
    return some


def _is_in_pages(buffers: Sequence[memoryview], offset: int) -> bool:
    return offset % PAGE_BYTES == 0 and all(
        buffer.nbytes % PAGE_BYTES == 0 and np.frombuffer(buffer, np.uint8).ctypes.data % PAGE_BYTES == 0
        for buffer in buffers
    )


def read_hashed(file: DataFile, buffers: Sequence[memoryview], offset: int, hasher: xxhash.xxh3_128) -> int:
    """Reads as `DataFile.read_into`, in pieces of HOT_BYTES, each fed to `hasher` as soon as it is there.

    Raises OSError.
    """
    done = 0
    for buffer in buffers:
        for start in range(0, buffer.nbytes, HOT_BYTES):
            piece = buffer[start : start + HOT_BYTES]
            done += file.read_into([piece], offset + done)
            hasher.update(piece)
    return done


def raw_bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor, writable. Raises ValueError for any other."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"the destination must be a contiguous CPU tensor, not {tensor.device}, strides {tensor.stride()}"
        )
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def read_pieces(
    file: DataFile,
    offset: int,
    nbytes: int,
    dtype: torch.dtype,
    hasher: xxhash.xxh3_128 | None = None,
    staging: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yields the `nbytes` at `offset` as consecutive 1-D tensors of `dtype`.

    They share a bounded buffer, `staging` where it is given: each is valid until the next. The stored bytes are fed to
    `hasher`. Raises OSError.
    """
    staging = torch.empty(min(nbytes, STAGING_BYTES), dtype=torch.uint8) if staging is None else staging
    memory = raw_bytes(staging)
    for start in range(0, nbytes, STAGING_BYTES):
        count = min(STAGING_BYTES, nbytes - start)
        file.read_into([memory[:count]], offset + start)
        if hasher is not None:
            hasher.update(memory[:count])
        yield staging[:count].view(dtype)


def read_tensor_at(
    file: DataFile, offset: int, stored: torch.dtype, out: Tensor, hasher: xxhash.xxh3_128 | None = None
) -> int:
    """Fills `out` (CPU, contiguous) with as many elements of dtype `stored`; returns the bytes read.

    Straight into `out` where the dtypes agree, else through a buffer that its thread keeps. The stored bytes are fed to
    `hasher`. Raises OSError; what `out` holds then is undefined.
    """
    if out.dtype == stored:
        memory = raw_bytes(out)
        return file.read_into([memory], offset) if hasher is None else read_hashed(file, [memory], offset, hasher)
    flat = out.view(-1)
    nbytes = flat.numel() * stored.itemsize
    filled = 0
    for piece in read_pieces(file, offset, nbytes, stored, hasher, _own_staging()):
        cast_into(piece, flat[filled : filled + piece.numel()])
        filled += piece.numel()
    return nbytes


def _own_staging() -> Tensor:
    """Returns this thread's buffer of STAGING_BYTES, made when first needed: readers convert all the time."""
    staging: Tensor | None = getattr(_staging, "buffer", None)
    if staging is None or len(staging) < STAGING_BYTES:
        staging = _staging.buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8)
    return staging


def cast_into(piece: Tensor, out: Tensor) -> None:
    """Runs `out.copy_(piece)` of two equally long 1-D tensors, on this thread alone."""
    for start in range(0, piece.numel(), _CAST_ELEMENTS):
        out[start : start + _CAST_ELEMENTS].copy_(piece[start : start + _CAST_ELEMENTS])


MOST_BYTES = 1 << 25
"""Of one read, unless a single stretch is longer."""

LARGE_BYTES = 1 << 22
"""From here on it takes longer to read something than to get ready for it."""

_gap = memoryview(bytearray(PAGE_BYTES))  # takes the padding between two stretches; nobody looks at it


class FileRange(NamedTuple):
    """The place of an expert on disk. Ranges compare in the order of the bytes; `file` only tells files apart."""

    file: int
    start: int
    end: int

    def is_followed_by(self, other: FileRange) -> bool:
        """Returns whether `other` begins where this ends, padding aside."""
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
class FailedRead:
    """A stretch whose bytes can't be read, or (`error` is None) don't match their checksum."""

    stretch: Stretch
    error: OSError | None


def fill(
    stretches: Iterable[Stretch], stored: torch.dtype, on_most: Callable[[], None] | None = None
) -> list[FailedRead]:
    """Reads all, checks those with a checksum, and returns what failed; its tensors are undefined then.

    Neighbours come in one read where tensors and file agree on `stored`, the dtype in the file. `on_most` is called
    when most of a last read of LARGE_BYTES is there: time for whoever reads next to get ready. Thread-safe.
    """
    failures: list[FailedRead] = []
    batches = list(_batches(stretches, stored))
    for batch in batches:
        try:
            bad = _read(batch, stored, on_most if batch is batches[-1] else None)
            failures += [FailedRead(stretch, None) for stretch in bad]
        except OSError as error:
            if len(batch) == 1:
                failures.append(FailedRead(batch[0], error))
            else:  # only those that can't be read shall fail
                for stretch in batch:
                    failures += fill([stretch], stored)
    return failures


def _batches(stretches: Iterable[Stretch], stored: torch.dtype) -> Iterator[list[Stretch]]:
    """Groups stretches in the order of the files; each batch is one read where no dtype has to be converted."""
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
    """Reads a batch and returns the stretches that do not match their checksum. Raises OSError."""
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
    """Splits off the last quarter, in whole pages."""
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
    """Reads one stretch; returns whether its bytes match their checksum. Raises OSError."""
    hasher = None if stretch.checksum is None else xxhash.xxh3_128()
    offset = stretch.offset
    for tensor in stretch.tensors:
        offset += read_tensor_at(stretch.file, offset, stored, tensor, hasher)
    return hasher is None or hasher.hexdigest() == stretch.checksum
