"""The host tier: a shared-memory segment of expert records that every worker of a node maps.

A record is an expert's parameters one after the other, in the dtype they are served in. The segment consists of records
only, so that a budget for all experts holds all of them; the index, a file beside it, says which expert a record holds.
Bytes are checked once, when they come from the disk: a record is trusted from then on.
"""

from __future__ import annotations

import math
import mmap
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor

from pager.cache.host_index import SHM, HostGrant, HostIndex, HostSegment, HostState
from pager.errors import BudgetError, ConfigError
from pager.types import ExpertKey, ExpertShape

__all__ = ["HostGrant", "HostIndex", "HostState", "HostTier"]


class HostTier:
    """One process's view of the segment. `create` makes it (and owns the files), `attach` maps an existing one.

    Thread-safe: a record is written by its claimer and read by those that pinned it. Never larger than the budget it
    was created with.
    """

    def __init__(self, name: str, num_records: int, shape: ExpertShape, dtype: torch.dtype) -> None:
        """Not for callers; use `create` or `attach`."""
        self.path = SHM / name
        self.num_records = num_records
        self.nbytes = num_records * record_bytes(shape, dtype)
        self._segment: HostSegment | None = None
        file = self._open()
        try:
            self._mapping: mmap.mmap | None = mmap.mmap(file, self.nbytes)
        finally:
            os.close(file)
        records = torch.frombuffer(self._mapping, dtype=dtype).view(num_records, shape.num_elements)
        parts = records.split([math.prod(part) for part in shape.shapes], dim=1)
        self._tensors: tuple[Tensor, ...] | None = tuple(
            part.unflatten(1, of_one) for part, of_one in zip(parts, shape.shapes, strict=True)
        )
        self.index = HostIndex(name, num_records)
        self._unlock = _page_lock(records.view(-1))

    def _open(self) -> int:
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ConfigError(f"there is no host tier at {self.path}; is the node's control actor running?") from None
        found = os.fstat(file).st_size
        if found != self.nbytes:
            os.close(file)
            raise ConfigError(
                f"the host tier at {self.path} has {found} bytes instead of {self.nbytes}: it is another model's"
            )
        return file

    @classmethod
    def create(cls, budget_bytes: int, shape: ExpertShape, dtype: torch.dtype, *, name: str | None = None) -> Self:
        """Makes a new segment of as many records as `budget_bytes` hold, readable by this user alone.

        All its memory is taken now. Raises BudgetError when the budget holds no record or the machine has not enough
        shared memory, ConfigError when the name is taken.
        """
        name = name or f"expert-pager-{uuid.uuid4().hex[:12]}"
        segment = HostSegment.within(budget_bytes, name, record_bytes(shape, dtype))
        try:
            tier = cls(segment.name, segment.num_records, shape, dtype)
        except BaseException:
            segment.close()
            raise
        tier._segment = segment
        return tier

    @classmethod
    def attach(cls, name: str, num_records: int, shape: ExpertShape, dtype: torch.dtype) -> Self:
        """Maps the segment that another process created. Raises ConfigError when it is missing or of another size."""
        return cls(name, num_records, shape, dtype)

    def used_bytes(self) -> tuple[int, int]:
        """Returns the bytes of the records in use by any process, and how many of these are pinned."""
        record = self.nbytes // self.num_records
        return self.index.num_resident * record, self.index.num_pinned * record

    @property
    def name(self) -> str:
        return self.path.name

    def acquire(self, keys: Sequence[ExpertKey]) -> list[HostGrant]:
        """Looks the experts up, or claims a record for each. HIT and CLAIMED grants end with `unpin` or `abandon`."""
        return self.index.lookup_or_claim(keys)

    def tensors(self, record: int) -> tuple[Tensor, ...]:
        """Returns the parameters in a record, in place."""
        assert self._tensors is not None, "the host tier is closed"
        return tuple(part[record] for part in self._tensors)

    def publish(self, grants: Sequence[HostGrant]) -> None:
        """Lets others read the claimed records, which are filled."""
        if grants:
            self.index.publish(grants)

    def abandon(self, grants: Sequence[HostGrant]) -> None:
        if grants:
            self.index.abandon(grants)

    def unpin(self, grants: Sequence[HostGrant]) -> None:
        if grants:
            self.index.unpin(grants)

    def close(self) -> None:
        """Unmaps the segment; its creator removes it. Idempotent. No thread may be reading."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        self._unlock()
        self._tensors = None
        self.index.close()
        with suppress(BufferError):  # a view of it is still alive; the mapping goes with it
            mapping.close()
        if self._segment is not None:
            self._segment.close()


def record_bytes(shape: ExpertShape, dtype: torch.dtype) -> int:
    """The bytes of one expert in the segment."""
    return shape.num_elements * dtype.itemsize


def _page_lock(data: Tensor) -> Callable[[], None]:
    """Page-locks the memory where there is a GPU, so that copies from it are asynchronous; returns a function that
    undoes it.
    """
    if not torch.cuda.is_available():
        return lambda: None
    runtime: Any = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(data.data_ptr(), data.nbytes, 0))
    if status != 0:
        raise BudgetError(f"{data.nbytes} bytes cannot be page-locked (CUDA error {status}); lower host_memory")

    def unlock() -> None:
        runtime.cudaHostUnregister(data.data_ptr())

    return unlock
