"""The device tier: the slab of expert weights, the slot map, and the transfers that fill slots."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pager.errors import BudgetError
from pager.memory import STAGING_BUFFERS
from pager.store.reads import in_large_pages
from pager.types import ExpertKey, ExpertShape


class Transfer(Protocol):
    """Moves experts into slots. Thread-safe, if callers fill no slot twice at a time nor while it is in use."""

    is_in_place: bool
    """`buffers` are the slots themselves. Otherwise buffers are few: a holder of one must not wait for a second."""

    def buffers(self, slot: int) -> tuple[Tensor, ...]:
        """Returns CPU tensors, one per parameter, to fill for the slot; `install` or `discard` comes next."""

    def install(self, key: ExpertKey, slot: int) -> None:
        """Moves the slot's filled `buffers` into the slot and enters it in the map."""

    def discard(self, slot: int) -> None:
        """Gives back the slot's `buffers`, which could not be filled."""

    def install_from(self, key: ExpertKey, slot: int, tensors: Sequence[Tensor]) -> None:
        """Copies CPU tensors into the slot and enters it in the map. The tensors are free for reuse on return."""

    def evict(self, key: ExpertKey, slot: int) -> None:
        """Takes the expert out of the map once the last reader of its slot is done."""

    def await_installed(self, slots: Sequence[int]) -> None:
        """Makes computations that start from now on see the bytes of these slots."""

    def mark_released(self, slots: Sequence[int]) -> None:
        """Makes the computations started so far the last readers of these slots."""


class CpuTransfer:
    """A transfer whose reads land in the slot itself. Computations are synchronous, so nothing has to be waited for."""

    is_in_place = True

    def __init__(self, slabs: Sequence[Tensor], slot_of_LE: Tensor) -> None:
        self._slabs = tuple(slabs)
        # The same memory, and ten times as fast for small operations.
        self._slot_of_LE: Any = slot_of_LE.numpy()
        self._slabs_bytes = [_bytes(slab) for slab in slabs]

    def buffers(self, slot: int) -> tuple[Tensor, ...]:
        return tuple(slab[slot] for slab in self._slabs)

    def install(self, key: ExpertKey, slot: int) -> None:
        self._slot_of_LE[key.layer, key.expert] = slot

    def discard(self, slot: int) -> None:
        pass

    def install_from(self, key: ExpertKey, slot: int, tensors: Sequence[Tensor]) -> None:
        # torch would copy with as many threads as it computes with, for each of the readers.
        for slab_bytes, tensor in zip(self._slabs_bytes, tensors, strict=True):
            np.copyto(slab_bytes[slot], _bytes(tensor))
        self.install(key, slot)

    def evict(self, key: ExpertKey, slot: int) -> None:
        self._slot_of_LE[key.layer, key.expert] = -1

    def await_installed(self, slots: Sequence[int]) -> None:
        pass

    def mark_released(self, slots: Sequence[int]) -> None:
        pass


@dataclass(slots=True)
class _Staging:
    tensors: tuple[Tensor, ...]
    copied: torch.cuda.Event  # follows the last copy out of it


class CudaTransfer:
    """A transfer through page-locked staging buffers, one expert each; one copy stream takes them to the slots.

    Everything that changes slots or map is ordered by the copy stream. It waits for a slot's release event before it
    touches the slot, and the compute stream waits for an install event before it reads: the host waits for neither.
    It waits only to reuse a staging buffer.
    """

    is_in_place = False

    def __init__(self, slabs: Sequence[Tensor], slot_of_LE: Tensor) -> None:
        """Makes the transfer. The current stream is taken for the one that computes with the slots."""
        self._slabs = tuple(slabs)
        self._slot_of_LE = slot_of_LE
        self._compute = torch.cuda.current_stream(slot_of_LE.device)
        self._copy = torch.cuda.Stream(slot_of_LE.device)
        self._copy.wait_stream(self._compute)
        self._lock = threading.Lock()  # the order of tickets is the order in the copy stream
        self._ticket = 0
        self._awaited = 0
        self._installed: dict[int, tuple[int, torch.cuda.Event]] = {}
        self._released: dict[int, torch.cuda.Event] = {}
        self._free: SimpleQueue[_Staging] = SimpleQueue()
        for _ in range(STAGING_BUFFERS):
            self._free.put(_Staging(tuple(map(_pinned, self._slabs)), _event()))
        self._filling: dict[int, _Staging] = {}

    def buffers(self, slot: int) -> tuple[Tensor, ...]:
        staging = self._free.get()
        staging.copied.synchronize()
        self._filling[slot] = staging
        return staging.tensors

    def install(self, key: ExpertKey, slot: int) -> None:
        staging = self._filling.pop(slot)
        staging.copied = self._enqueue(key, slot, staging.tensors)
        self._free.put(staging)

    def discard(self, slot: int) -> None:
        self._free.put(self._filling.pop(slot))

    def install_from(self, key: ExpertKey, slot: int, tensors: Sequence[Tensor]) -> None:
        self._enqueue(key, slot, tensors).synchronize()

    def evict(self, key: ExpertKey, slot: int) -> None:
        with self._lock, torch.cuda.stream(self._copy):
            self._wait_for_readers(slot)
            self._slot_of_LE[key.layer, key.expert].fill_(-1)

    def await_installed(self, slots: Sequence[int]) -> None:
        with self._lock:
            tickets = [self._installed[slot] for slot in slots if slot in self._installed]
            if not tickets:
                return
            latest, event = max(tickets, key=lambda pair: pair[0])
            if latest > self._awaited:  # one in-order stream: the latest install follows all others
                self._compute.wait_event(event)
                self._awaited = latest

    def mark_released(self, slots: Sequence[int]) -> None:
        if not slots:
            return
        event = _event()
        event.record(self._compute)
        with self._lock:
            self._released.update(dict.fromkeys(slots, event))

    def _enqueue(self, key: ExpertKey, slot: int, tensors: Sequence[Tensor]) -> torch.cuda.Event:
        event = _event()
        with self._lock, torch.cuda.stream(self._copy):
            self._wait_for_readers(slot)
            for slab, tensor in zip(self._slabs, tensors, strict=True):
                slab[slot].copy_(tensor, non_blocking=True)
            self._slot_of_LE[key.layer, key.expert].fill_(slot)
            event.record(self._copy)
            self._ticket += 1
            self._installed[slot] = (self._ticket, event)
        return event

    def _wait_for_readers(self, slot: int) -> None:
        if slot in self._released:
            self._copy.wait_event(self._released[slot])


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()


def _pinned(slab: Tensor) -> Tensor:
    """Returns a page-locked tensor like one slot of `slab`."""
    return torch.empty(slab.shape[1:], dtype=slab.dtype, pin_memory=True)


class DeviceSlots:
    """One slab [S + P, ...] per parameter of an expert, and `slot_of_LE` (int32 [L, E], -1 where absent), on `device`.

    Allocated once, so memory never exceeds `nbytes`. Knows no policy: the pager decides what goes where, and `transfer`
    moves it.
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
        """Allocates the slabs. Raises BudgetError when the device has not enough memory."""
        self.num_slots = num_slots
        self.num_pinned = num_pinned
        self.shape = shape
        self.dtype = dtype
        self.device = torch.device(device)
        total = num_slots + num_pinned
        try:
            self.slabs = {name: self._allocate(total, *part) for name, part in shape.named}
        except (RuntimeError, OSError, OverflowError) as error:  # torch.OutOfMemoryError is a RuntimeError
            raise BudgetError(
                f"{self.device} has no room for {total} expert slots of {self.record_bytes} bytes; lower expert_memory"
            ) from error
        self.slot_of_LE = torch.full((num_layers, max_experts), -1, dtype=torch.int32, device=self.device)
        transfer = CudaTransfer if self.device.type == "cuda" else CpuTransfer
        self.transfer: Transfer = transfer(tuple(self.slabs.values()), self.slot_of_LE)

    @property
    def gate_up(self) -> Tensor:
        """The gates and ups of experts with a gate."""
        return self.slabs["gate_up_proj"]

    @property
    def down(self) -> Tensor:
        return self.slabs["down_proj"]

    @property
    def total_slots(self) -> int:
        """The length of each slab, the pinned slots included."""
        return self.num_slots + self.num_pinned

    @property
    def record_bytes(self) -> int:
        """The bytes of one expert in a slot."""
        return self.shape.num_elements * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The bytes of all slabs, the pinned slots included."""
        return self.total_slots * self.record_bytes

    def _allocate(self, *shape: int) -> Tensor:
        """Takes memory of the device. On a CPU it begins at a page, as reads past the page cache require."""
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return in_large_pages(shape, self.dtype)
