"""A source of experts that tests can hold up and make fail, and pagers on top of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pager.cache.device import DeviceSlots
from pager.cache.pager import CacheOptions, ExpertPager
from pager.cache.tiers import HostTier
from pager.errors import ChecksumMismatch, ExpertUnavailable
from pager.store.expert_source import Destination, InPlace
from pager.store.reads import FileRange
from pager.types import ExpertKey, ExpertShape

NUM_LAYERS, NUM_EXPERTS = 4, 8


def weights_of(key: ExpertKey) -> float:
    """What every element of an expert is."""
    return 1.0 + key.layer * NUM_EXPERTS + key.expert


class GatedSource:
    """Experts in memory. A read waits until its key is let through; keys in `bad` fail their checksum."""

    shape = ExpertShape(hidden=4, intermediate=2)
    stored_dtype = torch.float32
    stored_bytes = shape.num_elements * stored_dtype.itemsize

    def __init__(self) -> None:
        self.side_by_side = False  # then a reader takes several experts of a layer at once
        self.bad: set[ExpertKey] = set()
        self.crash: set[ExpertKey] = set()
        self.cached: dict[ExpertKey, InPlace] = {}  # by the system
        self.started: list[ExpertKey] = []  # in the order in which reads began
        self._held: set[ExpertKey] = set()
        self._changed = threading.Condition()

    def hold(self, *keys: ExpertKey) -> None:
        """Reads of these keys begin and do not end before `let_through`."""
        with self._changed:
            self._held.update(keys)

    def let_through(self, *keys: ExpertKey) -> None:
        """Without keys: all."""
        with self._changed:
            self._held.difference_update(keys or set(self._held))
            self._changed.notify_all()

    def wait_until_started(self, key: ExpertKey) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.started, timeout=60)

    def reads_of(self, key: ExpertKey) -> int:
        return self.started.count(key)

    def read(self, key: ExpertKey, *tensors: Tensor) -> int:
        gate_up, down = tensors
        with self._changed:
            self.started.append(key)
            self._changed.notify_all()
            self._changed.wait_for(lambda: key not in self._held)
        if key in self.crash:
            raise RuntimeError("the reader itself is broken")
        if key in self.bad:
            raise ChecksumMismatch(f"{key} does not match its checksum", key)
        gate_up.fill_(weights_of(key))
        down.fill_(-weights_of(key))
        return gate_up.nbytes + down.nbytes

    def read_all(self, destinations: Sequence[Destination], on_most: object = None) -> list[int | ExpertUnavailable]:
        results: list[int | ExpertUnavailable] = []
        for destination in destinations:
            try:
                results.append(self.read(destination.key, *destination.tensors))
            except ExpertUnavailable as error:
                results.append(error)
        return results

    bytes_read = 0

    def in_place(self, keys: Sequence[ExpertKey]) -> dict[ExpertKey, InPlace]:
        return {key: self.cached[key] for key in keys if key in self.cached}

    def in_page_cache(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        return [key for key in keys if key in self.cached]

    def layer_in_place(self, layer: int) -> None:
        """They lie anywhere."""

    def place_of(self, key: ExpertKey) -> FileRange:
        """Nobody's neighbour, unless `side_by_side` says so."""
        distance = 100 if self.side_by_side else 1 << 20
        start = (key.layer * NUM_EXPERTS + key.expert) * distance
        return FileRange(0, start, start + 100)

    def bypass_page_cache(self, dtype: torch.dtype) -> str:
        return "there is no file"

    def keys_per_layer(self) -> tuple[int, ...]:
        return (NUM_EXPERTS,) * NUM_LAYERS

    def close(self) -> None:
        pass


@pytest.fixture
def source() -> GatedSource:
    return GatedSource()


MakePager = Callable[..., ExpertPager]
CheckWeights = Callable[[ExpertPager, list[ExpertKey]], None]


@pytest.fixture
def make_pager(source: GatedSource) -> Iterator[MakePager]:
    """make_pager(num_slots, resident=(), host=None, **options of CacheOptions): checked and closed at the end."""
    pagers: list[ExpertPager] = []

    def make(
        num_slots: int, *, resident: Sequence[ExpertKey] = (), host: HostTier | None = None, **options: Any
    ) -> ExpertPager:
        slots = DeviceSlots(
            num_slots,
            source.shape,
            torch.float32,
            "cpu",
            num_layers=NUM_LAYERS,
            max_experts=NUM_EXPERTS,
            num_pinned=len(resident),
        )
        pagers.append(ExpertPager(source, slots, resident=resident, host=host, options=CacheOptions(**options)))
        return pagers[-1]

    yield make
    source.let_through()
    for pager in pagers:
        pager.check_integrity()
        pager.close()
        pager.check_integrity()


def _check_weights(pager: ExpertPager, keys: list[ExpertKey]) -> None:
    for key in keys:
        slot = int(pager.slots.slot_of_LE[key.layer, key.expert])
        assert slot >= 0, f"{key} is in no slot"
        assert (pager.slots.gate_up[slot] == weights_of(key)).all(), f"{key} has another's weights"
        assert (pager.slots.down[slot] == -weights_of(key)).all(), f"{key} has another's weights"


@pytest.fixture
def check_weights() -> CheckWeights:
    """Asserts that these experts' weights are where the map says."""
    return _check_weights
