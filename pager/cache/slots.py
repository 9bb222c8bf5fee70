"""The device tier's memory: one slab of expert weights and the map that finds an expert in it.

S budget slots, P pinned slots (always-resident experts, behind the budget ones), L layers, E experts of a layer,
D hidden, F expert intermediate.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from pager.cache.transfer import CpuTransfer, CudaTransfer, Transfer
from pager.errors import BudgetError
from pager.types import ExpertShape


class DeviceSlots:
    """`gate_up` [S + P, 2F, D], `down` [S + P, D, F] and `slot_of_LE` (int32 [L, E], -1 where absent) on `device`.

    Allocated once, so memory never exceeds `nbytes`. Knows no policy: the pager says what goes where, and
    `transfer` moves it.
    """

    def __init__(
        self,
        num_slots: int,
        shape: ExpertShape,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        num_layers: int,
        max_experts: int,
        num_pinned: int = 0,
    ) -> None:
        """Raises BudgetError when the device has not enough memory."""
        self.num_slots = num_slots
        self.num_pinned = num_pinned
        self.shape = shape
        self.dtype = dtype
        self.device = torch.device(device)
        total, hidden, intermediate = num_slots + num_pinned, shape.hidden, shape.intermediate
        try:
            self.gate_up = self._allocate(total, 2 * intermediate, hidden)
            self.down = self._allocate(total, hidden, intermediate)
        except (RuntimeError, OSError, OverflowError) as error:  # torch.OutOfMemoryError is a RuntimeError
            raise BudgetError(
                f"{self.device} has no room for {total} expert slots of {self.record_bytes} bytes; lower expert_memory"
            ) from error
        self.slot_of_LE = torch.full((num_layers, max_experts), -1, dtype=torch.int32, device=self.device)
        self.transfer: Transfer = (
            CudaTransfer(self.gate_up, self.down, self.slot_of_LE)
            if self.device.type == "cuda"
            else CpuTransfer(self.gate_up, self.down, self.slot_of_LE)
        )

    @property
    def record_bytes(self) -> int:
        """Bytes of one expert in a slot."""
        return self.shape.num_elements * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of both slabs, the pinned slots included."""
        return (self.num_slots + self.num_pinned) * self.record_bytes

    def _allocate(self, *shape: int) -> Tensor:
        """Memory of the device. On a CPU it begins with a page, as reads past the page cache want it."""
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        nbytes = math.prod(shape) * self.dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=self.dtype)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # a disk writes to few large pieces in fewer requests
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=self.dtype).view(shape)
