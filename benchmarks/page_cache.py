"""The operating system's cache of files: emptied for cold reads, and looked at, so that cold means cold. Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.report import console

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_MAP_FAILED = ctypes.c_void_p(-1).value

LEFT_OVER = 0.01  # the share of a file that may stay: pages that somebody is just using


def drop(paths: Iterable[Path]) -> None:
    """Takes the files out of the page cache. Raises OSError where that did not work, because a process maps them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not written yet can't be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        left, size = cached_bytes(path), path.stat().st_size
        if left > max(LEFT_OVER * size, 1 << 20):
            raise OSError(f"{left} of {size} bytes of {path} stay in the page cache; who else reads or maps the file?")


def read_through(paths: Iterable[Path]) -> None:
    """Fills the page cache with the files. What does not stay makes a table one of the disk, and is said."""
    for path in paths:
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass
        if (cached := cached_bytes(path)) < (size := path.stat().st_size):
            console.print(f"only {cached} of {size} bytes of {path.name} stay in the page cache")


def cached_bytes(path: Path) -> int:
    """How much of the file is in the page cache, a page at a time, without touching it."""
    size = path.stat().st_size
    if not size:
        return 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"cannot map {path}")
    try:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        if _libc.mincore(address, size, pages.ctypes.data):
            raise OSError(ctypes.get_errno(), f"cannot see what is cached of {path}")
        return int((pages & 1).sum()) * mmap.PAGESIZE
    finally:
        _libc.munmap(address, size)
