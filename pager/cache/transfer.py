"""How an expert's bytes get into a slot, one small class a kind of device. D hidden, F expert intermediate.

The order that both keep: a slot's last reader is done before its map entry goes and its bytes are overwritten; a map
entry appears after the bytes it points to are complete.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pager.types import ExpertKey


class Transfer(Protocol):
    """Thread-safe. The caller sees to it that no slot is filled twice at a time or filled while it is in use."""

    def buffers(self, slot: int) -> tuple[Tensor, Tensor]:
        """CPU tensors [2F, D], [D, F] for the calling thread to fill; call `install` next, from the same thread."""

    def install(self, key: ExpertKey, slot: int) -> None:
        """What the calling thread's `buffers` hold is complete: moves it into the slot and enters it in the map."""

    def install_from(self, key: ExpertKey, slot: int, gate_up: Tensor, down: Tensor) -> None:
        """Copies CPU tensors into the slot and enters it in the map. The tensors are free for reuse on return."""

    def evict(self, key: ExpertKey, slot: int) -> None:
        """Takes the expert out of the map once the last reader of its slot is done."""

    def await_installed(self, slots: Sequence[int]) -> None:
        """Computations that are started from now on see the bytes of these slots."""

    def mark_released(self, slots: Sequence[int]) -> None:
        """Computations started so far are the last readers of these slots."""


class CpuTransfer:
    """Reads land in the slot itself. Computations are synchronous, so there is nothing to wait for."""

    def __init__(self, gate_up: Tensor, down: Tensor, slot_of_LE: Tensor) -> None:
        self._gate_up = gate_up
        self._down = down
        self._slot_of_LE: Any = slot_of_LE.numpy()  # the same memory; a scalar store is ten times as fast

    def buffers(self, slot: int) -> tuple[Tensor, Tensor]:
        return self._gate_up[slot], self._down[slot]

    def install(self, key: ExpertKey, slot: int) -> None:
        self._slot_of_LE[key.layer, key.expert] = slot

    def install_from(self, key: ExpertKey, slot: int, gate_up: Tensor, down: Tensor) -> None:
        self._gate_up[slot].copy_(gate_up)
        self._down[slot].copy_(down)
        self.install(key, slot)

    def evict(self, key: ExpertKey, slot: int) -> None:
        self._slot_of_LE[key.layer, key.expert] = -1

    def await_installed(self, slots: Sequence[int]) -> None:
        pass

    def mark_released(self, slots: Sequence[int]) -> None:
        pass


class CudaTransfer:
    """Reads land in page-locked staging buffers, two a reader thread; one copy stream takes them to the slots.

    Everything that changes slots or map is ordered by the copy stream. It waits for a slot's release event before it
    touches the slot, and the compute stream waits for an install event before it reads: the host waits for neither.
    """

    BUFFERS_PER_THREAD = 2

    def __init__(self, gate_up: Tensor, down: Tensor, slot_of_LE: Tensor) -> None:
        """The stream that is current now is the one that computes with the slots."""
        self._gate_up = gate_up
        self._down = down
        self._slot_of_LE = slot_of_LE
        self._compute = torch.cuda.current_stream(gate_up.device)
        self._copy = torch.cuda.Stream(gate_up.device)  # type: ignore[no-untyped-call]
        self._copy.wait_stream(self._compute)
        self._lock = threading.Lock()  # the order of tickets is the order in the copy stream
        self._ticket = 0
        self._awaited = 0
        self._installed: dict[int, tuple[int, torch.cuda.Event]] = {}
        self._released: dict[int, torch.cuda.Event] = {}
        self._staging = threading.local()

    def buffers(self, slot: int) -> tuple[Tensor, Tensor]:
        local = self._staging
        if not hasattr(local, "pairs"):
            local.pairs = [(self._pinned(self._gate_up), self._pinned(self._down)) for _ in range(2)]
            local.events = [_event() for _ in range(2)]
            local.turn = 0
        local.turn = 1 - local.turn
        local.events[local.turn].synchronize()  # the copy out of this pair, two experts ago
        pair: tuple[Tensor, Tensor] = local.pairs[local.turn]
        return pair

    def install(self, key: ExpertKey, slot: int) -> None:
        local = self._staging
        gate_up, down = local.pairs[local.turn]
        local.events[local.turn] = self._enqueue(key, slot, gate_up, down)

    def install_from(self, key: ExpertKey, slot: int, gate_up: Tensor, down: Tensor) -> None:
        self._enqueue(key, slot, gate_up, down).synchronize()

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
            if latest > self._awaited:  # one in-order stream: the latest install is behind all the others
                self._compute.wait_event(event)
                self._awaited = latest

    def mark_released(self, slots: Sequence[int]) -> None:
        event = _event()
        event.record(self._compute)
        with self._lock:
            self._released.update(dict.fromkeys(slots, event))

    def _enqueue(self, key: ExpertKey, slot: int, gate_up: Tensor, down: Tensor) -> torch.cuda.Event:
        event = _event()
        with self._lock, torch.cuda.stream(self._copy):
            self._wait_for_readers(slot)
            self._gate_up[slot].copy_(gate_up, non_blocking=True)
            self._down[slot].copy_(down, non_blocking=True)
            self._slot_of_LE[key.layer, key.expert].fill_(slot)
            event.record(self._copy)
            self._ticket += 1
            self._installed[slot] = (self._ticket, event)
        return event

    def _wait_for_readers(self, slot: int) -> None:
        if slot in self._released:
            self._copy.wait_event(self._released[slot])

    @staticmethod
    def _pinned(slab: Tensor) -> Tensor:
        return torch.empty(slab.shape[1:], dtype=slab.dtype, pin_memory=True)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
