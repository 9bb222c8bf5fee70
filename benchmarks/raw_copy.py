"""The physical limit of paging in from memory: as many bytes copied, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import torch


class RawCopy:
    """Copies `num_records` of `record_bytes` each between two slabs that were written to before, in two ways."""

    def __init__(self, num_records: int, record_bytes: int, num_threads: int) -> None:
        self._from = np.ones((num_records, record_bytes), np.uint8)
        self._to = np.ones((num_records, record_bytes), np.uint8)
        self._threads = ThreadPoolExecutor(num_threads)
        self._by_readers()  # threads start with their first work

    @property
    def ways(self) -> Mapping[str, Callable[[], None]]:
        return {"torch": self._by_torch, "threads": self._by_readers}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()

    def _by_torch(self) -> None:
        torch.from_numpy(self._to).copy_(torch.from_numpy(self._from))

    def _by_readers(self) -> None:
        list(self._threads.map(np.copyto, self._to, self._from))
