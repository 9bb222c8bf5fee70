"""The host tier: a shared-memory segment of expert records that every worker of a node maps.

D hidden, F expert intermediate. A record is gate_up [2F, D], then down [D, F], in the dtype they are served in. The
segment is records and nothing else, so that a budget for all experts holds all of them; whose weights a record holds
is in the index. Bytes are checked when they come from the disk, once: a record is trusted from then on.
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pager.cache.host_index import HostGrant, HostIndex, HostState, LocalHostIndex
from pager.errors import BudgetError, ConfigError
from pager.types import ExpertKey, ExpertShape

__all__ = ["HostGrant", "HostIndex", "HostState", "HostTier", "LocalHostIndex"]

_SHM = Path("/dev/shm")


class HostTier:
    """One process's view of the segment. `create` makes it (and owns the file), `attach` maps one that is there.

    Thread-safe as far as its index is: a record is written by the one that claimed it and read by those that pinned it.
    Never larger than the budget it was created with.
    """

    def __init__(
        self,
        path: Path,
        file: int,
        num_records: int,
        shape: ExpertShape,
        dtype: torch.dtype,
        index: HostIndex,
        owner: str,
    ) -> None:
        """Takes over the descriptor `file`. Use `create` or `attach`."""
        self.path = path
        self.num_records = num_records
        self.index = index
        self.owner = owner
        self._is_creator = False
        self.nbytes = num_records * record_bytes(shape, dtype)
        try:
            self._mapping: mmap.mmap | None = mmap.mmap(file, self.nbytes)
        finally:
            os.close(file)
        records = torch.frombuffer(self._mapping, dtype=dtype).view(num_records, shape.num_elements)
        split = 2 * shape.intermediate * shape.hidden
        self._tensors: tuple[Tensor, Tensor] | None = (
            records[:, :split].unflatten(1, (2 * shape.intermediate, shape.hidden)),
            records[:, split:].unflatten(1, (shape.hidden, shape.intermediate)),
        )
        self._unlock = _page_lock(records.view(-1))

    @classmethod
    def create(
        cls,
        budget_bytes: int,
        shape: ExpertShape,
        dtype: torch.dtype,
        *,
        name: str | None = None,
        index: HostIndex | None = None,
        owner: str = "local",
    ) -> Self:
        """A new segment of as many records as `budget_bytes` hold, readable by this user alone.

        All its memory is taken now. Without an `index` it is this process's own. Raises BudgetError when the budget
        holds no record or the machine has not enough shared memory, ConfigError when the name is taken.
        """
        least = record_bytes(shape, dtype)
        num_records = budget_bytes // least
        if num_records == 0:
            raise BudgetError(f"host_memory of {budget_bytes} bytes holds no expert; the least is {least} bytes")
        path = _SHM / (name or f"expert-pager-{uuid.uuid4().hex[:12]}")
        total = num_records * least
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise ConfigError(f"{path} exists: another service uses the name, or left it behind; remove it") from None
        try:
            os.posix_fallocate(file, 0, total)  # a sparse file would kill the process where /dev/shm runs full
            tier = cls(path, file, num_records, shape, dtype, index or LocalHostIndex(num_records), owner)
        except OSError as error:
            with suppress(OSError):
                os.close(file)
            path.unlink()
            raise BudgetError(
                f"{total} bytes of shared memory for host_memory are not to be had ({error.strerror}); lower it, or "
                f"make {_SHM} larger"
            ) from error
        tier._is_creator = True
        return tier

    @classmethod
    def attach(
        cls, name: str, num_records: int, shape: ExpertShape, dtype: torch.dtype, *, index: HostIndex, owner: str
    ) -> Self:
        """Maps the segment that another process created. Raises ConfigError when it is not there or of another size."""
        path, expected = _SHM / name, num_records * record_bytes(shape, dtype)
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ConfigError(f"there is no host tier at {path}; is the node's control actor running?") from None
        found = os.fstat(file).st_size
        if found != expected:
            os.close(file)
            raise ConfigError(f"the host tier at {path} has {found} bytes and not {expected}: it is another model's")
        return cls(path, file, num_records, shape, dtype, index, owner)

    @property
    def name(self) -> str:
        return self.path.name

    def acquire(self, keys: Sequence[ExpertKey]) -> list[HostGrant]:
        """Looks the experts up, or claims a record for each. HIT and CLAIMED grants end with `unpin` or `abandon`."""
        return self.index.lookup_or_claim(keys, self.owner)

    def tensors(self, record: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of a record, in place."""
        assert self._tensors is not None, "the host tier is closed"
        gate_up, down = self._tensors
        return gate_up[record], down[record]

    def publish(self, grant: HostGrant) -> None:
        """The claimed record is filled: others may read it."""
        self.index.publish([grant.key], self.owner)

    def abandon(self, grant: HostGrant) -> None:
        self.index.abandon([grant.key], self.owner)

    def unpin(self, grant: HostGrant) -> None:
        self.index.unpin([grant.key], self.owner)

    def close(self) -> None:
        """Unmaps the segment; its creator removes it. Idempotent. Nobody may be reading."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        self._unlock()
        self._tensors = None
        with suppress(BufferError):  # a view of it is still alive somewhere; the mapping goes with it
            mapping.close()
        if self._is_creator:
            self.path.unlink(missing_ok=True)


def record_bytes(shape: ExpertShape, dtype: torch.dtype) -> int:
    """One expert's, and of a segment as many as it has records."""
    return shape.num_elements * dtype.itemsize


def _page_lock(data: Tensor) -> Callable[[], None]:
    """Page-locks the memory where there is a GPU, so that copies from it are asynchronous; returns what undoes it."""
    if not torch.cuda.is_available():
        return lambda: None
    runtime: Any = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(data.data_ptr(), data.nbytes, 0))
    if status != 0:
        raise BudgetError(f"{data.nbytes} bytes can not be page-locked (CUDA error {status}); lower host_memory")

    def unlock() -> None:
        runtime.cudaHostUnregister(data.data_ptr())

    return unlock
