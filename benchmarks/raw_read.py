"""The physical limit of paging in: the same bytes of the same files, read by as many threads and nothing else."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from pager.models.open_model import OpenModel
from pager.store.expert_source import PackedExperts, find_experts, pieces_of
from pager.store.pack_format import PACK_NAME
from pager.types import ExpertKey


@dataclass(frozen=True, slots=True)
class Extent:
    path: Path
    offset: int
    nbytes: int


def extents_of(checkpoint: Path, keys: Sequence[ExpertKey]) -> list[list[Extent]]:
    """Where each expert lies: three tensors in a plain checkpoint, one extent in a packed one."""
    opened = OpenModel.open(checkpoint)
    with opened.checkpoint as files:
        if files.pack is not None:
            path, pack = checkpoint / PACK_NAME, files.pack
            packed = PackedExperts(path)
            try:
                return [[Extent(path, packed.offset_of(key), pack.extents[key].nbytes)] for key in keys]
            finally:
                packed.close()
        shape = opened.family.shape
        stored = find_experts(files, opened.pieces, opened.facts.experts_per_layer, shape)
        return [
            [Extent(checkpoint / piece.spec.file, piece.offset, piece.nbytes) for piece in pieces_of(stored[key])]
            for key in keys
        ]


class RawReader:
    """Reads extents into one slab that was written to before, so that no page of it is new.

    `direct`: past the page cache; the extents have to be whole pages, and the file system has to allow it.
    """

    def __init__(self, experts: Sequence[Sequence[Extent]], num_threads: int, *, direct: bool = False) -> None:
        self.paths = sorted({extent.path for extents in experts for extent in extents})
        self.nbytes = sum(extent.nbytes for extents in experts for extent in extents)
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        self._is_direct = direct
        self._descriptors = {path: os.open(path, flags) for path in self.paths}
        for descriptor in self._descriptors.values():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read beside the extents
        memory = np.ones(self.nbytes + mmap.PAGESIZE, np.uint8)
        start = -memory.ctypes.data % mmap.PAGESIZE
        self._slab = memory[start : start + self.nbytes].data
        self._reads: list[list[tuple[Extent, memoryview]]] = []
        start = 0
        for extents in experts:
            reads = []
            for extent in extents:
                reads.append((extent, self._slab[start : start + extent.nbytes]))
                start += extent.nbytes
            self._reads.append(reads)
        self._threads = ThreadPoolExecutor(num_threads)
        list(self._threads.map(time.sleep, [0.01] * num_threads))  # they start with their first work

    def read(self) -> float:
        """Seconds for all of it."""
        started_s = time.perf_counter()
        list(self._threads.map(self._read_expert, self._reads))
        return time.perf_counter() - started_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _read_expert(self, reads: list[tuple[Extent, memoryview]]) -> None:
        for extent, _ in () if self._is_direct else reads:
            os.posix_fadvise(self._descriptors[extent.path], extent.offset, extent.nbytes, os.POSIX_FADV_WILLNEED)
        for extent, memory in reads:
            done = 0
            while done < extent.nbytes:
                count = os.preadv(self._descriptors[extent.path], [memory[done:]], extent.offset + done)
                if not count:
                    raise EOFError(f"{extent.path} ends before byte {extent.offset + extent.nbytes}")
                done += count
