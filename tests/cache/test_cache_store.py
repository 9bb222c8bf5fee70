"""The pager on real files: plain, packed, and packed with a flipped byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pager.cache.host import HostTier
from pager.cache.pager import ExpertPager
from pager.cache.slots import DeviceSlots
from pager.errors import ChecksumMismatch
from pager.store.experts import ExpertSource, PackedExperts, open_experts
from pager.store.pack import pack
from pager.store.pack_format import PACK_NAME
from pager.store.safetensors_index import Checkpoint
from pager.types import ExpertKey, ExpertShape

SHAPE = ExpertShape(hidden=48, intermediate=20)
EXPERTS_PER_LAYER = (6, 0, 6)
ALL_KEYS = [ExpertKey(layer, expert) for layer, count in enumerate(EXPERTS_PER_LAYER) for expert in range(count)]


def names(key: ExpertKey) -> tuple[str, str, str]:
    prefix = f"layers.{key.layer}.experts.{key.expert}"
    return f"{prefix}.gate", f"{prefix}.up", f"{prefix}.down"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, down = (SHAPE.intermediate, SHAPE.hidden), (SHAPE.hidden, SHAPE.intermediate)
    return {
        name: torch.randn(shape, generator=generator)
        for key in ALL_KEYS
        for name, shape in zip(names(key), (rows, rows, down), strict=True)
    }


@pytest.fixture
def plain(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "emo"}))
    save_file({**tensors, "embed": torch.zeros(4)}, path / "model.safetensors")
    return path


@pytest.fixture
def packed(plain: Path, tmp_path: Path) -> Path:
    out = tmp_path / "packed"
    pack(plain, out, names=names, experts_per_layer=EXPERTS_PER_LAYER, shape=SHAPE)
    return out


@pytest.fixture(params=["plain", "packed"])
def experts(request: pytest.FixtureRequest) -> Iterator[ExpertSource]:
    with Checkpoint.open(request.getfixturevalue(request.param)) as checkpoint:
        source = open_experts(checkpoint, names, EXPERTS_PER_LAYER, SHAPE)
    yield source
    source.close()


def make_slots(num_slots: int, dtype: torch.dtype) -> DeviceSlots:
    return DeviceSlots(num_slots, SHAPE, dtype, "cpu", num_layers=3, max_experts=6, num_pinned=2)


RESIDENT = (ExpertKey(0, 5), ExpertKey(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_host", [False, True])
def test_slots_hold_what_the_files_hold_however_often_they_change(experts, tensors, dtype, with_host):
    host = HostTier.create(1 << 17, SHAPE, dtype) if with_host else None
    slots = make_slots(3, dtype)
    pager = ExpertPager(experts, slots, resident=RESIDENT, host=host)
    try:
        for layer in (0, 2, 0, 2):
            for wave in pager.demand(layer, range(6)):
                for expert in wave:
                    gate, up, down = (tensors[name].to(dtype) for name in names(ExpertKey(layer, expert)))
                    slot = slots.slot_of_LE[layer, expert]
                    assert torch.equal(slots.gate_up[slot], torch.cat([gate, up]))
                    assert torch.equal(slots.down[slot], down)
        pager.check_integrity()
        stats = pager.stats()
        assert stats.misses == 20
        if host is None:
            assert stats.bytes_from_disk == 20 * SHAPE.num_elements * torch.float32.itemsize
        else:
            assert host.num_records >= 10
            assert stats.bytes_from_disk == 10 * SHAPE.num_elements * torch.float32.itemsize
            assert stats.bytes_from_host == 10 * slots.record_bytes
    finally:
        pager.close()
        if host is not None:
            host.close()


def test_a_flipped_byte_fails_the_request_that_needs_the_expert_and_no_other(packed):
    source = PackedExperts(packed / PACK_NAME)
    damaged = ExpertKey(2, 1)
    with open(packed / PACK_NAME, "r+b") as file:
        file.seek(source.offset_of(damaged))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x40]))
    pager = ExpertPager(source, make_slots(4, torch.float32), resident=RESIDENT)
    with (
        pager.reserve_pool([ExpertKey(2, 0), damaged]) as broken,
        pager.reserve_pool([ExpertKey(2, 0), ExpertKey(2, 2)]) as fine,
    ):
        with pytest.raises(ChecksumMismatch) as failure:
            broken.wait(2)
        assert failure.value.key == damaged
        fine.wait(2)
        pager.check_integrity()
    pager.close()
    source.close()
