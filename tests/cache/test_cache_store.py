"""The pager on real files: plain, packed, and packed with a flipped byte."""

from __future__ import annotations

import json
import logging
import mmap
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pager.cache.device import DeviceSlots
from pager.cache.pager import CacheOptions, ExpertPager
from pager.cache.tiers import HostTier, why_bypass
from pager.errors import ChecksumMismatch, ExpertUnavailable
from pager.store.checkpoint import Checkpoint
from pager.store.expert_source import ExpertSource, PackedExperts, open_experts
from pager.store.pack import pack
from pager.store.pack_format import PACK_NAME
from pager.types import ExpertKey, ExpertShape
from tests.support.values import some

SHAPE = ExpertShape(hidden=48, intermediate=20)
EXPERTS_PER_LAYER = (6, 0, 6)
ALL_KEYS = [ExpertKey(layer, expert) for layer, count in enumerate(EXPERTS_PER_LAYER) for expert in range(count)]


def names(key: ExpertKey) -> tuple[str, str, str]:
    prefix = f"layers.{key.layer}.experts.{key.expert}"
    return f"{prefix}.gate", f"{prefix}.up", f"{prefix}.down"


def pieces(key: ExpertKey) -> tuple[tuple[str, str], tuple[str]]:
    gate, up, down = names(key)
    return (gate, up), (down,)


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
    pack(plain, out, pieces=pieces, experts_per_layer=EXPERTS_PER_LAYER, shape=SHAPE)
    return out


@pytest.fixture(params=["plain", "packed"])
def experts(request: pytest.FixtureRequest) -> Iterator[ExpertSource]:
    with Checkpoint.open(request.getfixturevalue(request.param)) as checkpoint:
        source = open_experts(checkpoint, pieces, EXPERTS_PER_LAYER, SHAPE)
    yield source
    source.close()


def make_slots(num_slots: int, dtype: torch.dtype) -> DeviceSlots:
    return DeviceSlots(num_slots, SHAPE, dtype, "cpu", num_layers=3, max_experts=6, num_pinned=2)


RESIDENT = (ExpertKey(0, 5), ExpertKey(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_host", [False, True])
def test_slots_hold_what_the_files_hold_however_often_they_change(
    experts: ExpertSource, tensors: dict[str, Tensor], dtype: torch.dtype, with_host: bool
) -> None:
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
        assert stats.paging.experts_missed == 20
        if host is None:
            assert stats.paging.bytes_from_disk == 20 * SHAPE.num_elements * torch.float32.itemsize
        else:
            assert host.num_records >= 10
            assert stats.paging.bytes_from_disk == 10 * SHAPE.num_elements * torch.float32.itemsize
            assert stats.paging.bytes_from_host == 10 * slots.record_bytes
    finally:
        pager.close()
        if host is not None:
            host.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of every read, as they are issued."""
    real, issued = os.preadv, []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        issued.append(sum(buffer.nbytes for buffer in buffers))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return issued


@pytest.mark.parametrize("with_host", [False, True])
def test_neighbours_of_a_layer_are_read_together(
    experts: ExpertSource, tensors: dict[str, Tensor], reads: list[int], with_host: bool
) -> None:
    """Into slots that are anywhere, or into records: one read a layer for a single thread, and never across layers."""
    host = HostTier.create(1 << 17, SHAPE, torch.float32) if with_host else None
    slots = make_slots(10, torch.float32)
    pager = ExpertPager(experts, slots, resident=RESIDENT, host=host, options=CacheOptions(num_readers=1))
    reads.clear()
    with some(pager.reserve_pool([*ALL_KEYS[3:5], *ALL_KEYS[:2], *ALL_KEYS[6:9]])) as lease:
        for layer in (0, 2):
            lease.wait(layer)
        for key in (*ALL_KEYS[:2], *ALL_KEYS[3:5], *ALL_KEYS[6:9]):
            gate, up, down = (tensors[name] for name in names(key))
            slot = slots.slot_of_LE[key.layer, key.expert]
            assert torch.equal(slots.gate_up[slot], torch.cat([gate, up]))
            assert torch.equal(slots.down[slot], down)
    padding = experts.place_of(ALL_KEYS[1]).start - experts.place_of(ALL_KEYS[0]).end
    record = slots.record_bytes
    assert sorted(reads) == [2 * record + padding, 2 * record + padding, 3 * record + 2 * padding]
    pager.check_integrity()
    pager.close()
    if host is not None:
        assert host.index.num_pinned == 0
        host.close()


def test_threads_share_a_layer_out(experts: ExpertSource, reads: list[int]) -> None:
    pager = ExpertPager(experts, make_slots(10, torch.float32), resident=RESIDENT, options=CacheOptions(num_readers=4))
    reads.clear()
    with some(pager.reserve_pool(ALL_KEYS[:5])) as lease:
        lease.wait(0)
    assert len(reads) >= 3, "no thread takes more than its share of five"
    pager.close()


def test_of_a_run_through_the_host_tier_only_the_damaged_expert_fails(packed: Path) -> None:
    source = PackedExperts(packed / PACK_NAME)
    damage(packed, source, ExpertKey(2, 1))
    host = HostTier.create(1 << 17, SHAPE, torch.float32)
    pager = ExpertPager(
        source, make_slots(4, torch.float32), resident=RESIDENT, host=host, options=CacheOptions(num_readers=1)
    )
    wanted = [ExpertKey(2, expert) for expert in range(3)]
    with some(pager.reserve_pool(wanted)) as lease, pytest.raises(ChecksumMismatch):
        lease.wait(2)
    with some(pager.reserve_pool([wanted[0], wanted[2]])) as lease:
        lease.wait(2)
    assert (host.index.num_resident, host.index.num_pinned) == (2, 0)
    with some(pager.reserve_pool(wanted)) as lease, pytest.raises(ExpertUnavailable, match="not tried again"):
        lease.wait(2)
    host.index.check_integrity()
    pager.check_integrity()
    pager.close()
    host.close()
    source.close()


PAGES = ExpertShape(hidden=64, intermediate=32)  # in fp32 its matrices are whole pages


@pytest.mark.parametrize("with_host", [False, True])
def test_past_the_page_cache_into_slots_and_records(
    tmp_path: Path, with_host: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source, tensors = paged_by_pages(tmp_path)
    host = HostTier.create(16 * PAGES.num_elements * 4, PAGES, torch.float32) if with_host else None
    slots = DeviceSlots(3, PAGES, torch.float32, "cpu", num_layers=1, max_experts=6)
    with caplog.at_level(logging.INFO, logger="pager.cache.pager"):
        pager = ExpertPager(
            source, slots, host=host, options=CacheOptions(bypass_page_cache=None if with_host else True)
        )
    if "file system" in caplog.text:
        pytest.skip(caplog.text)
    assert "past the page cache" in caplog.text
    for _ in range(2):
        for wave in pager.demand(0, range(6)):
            for expert in wave:
                gate, up, down = (tensors[name] for name in names(ExpertKey(0, expert)))
                slot = slots.slot_of_LE[0, expert]
                assert torch.equal(slots.gate_up[slot], torch.cat([gate, up]))
                assert torch.equal(slots.down[slot], down)
    pager.close()
    source.close()
    if host is not None:
        host.close()


def paged_by_pages(tmp_path: Path) -> tuple[ExpertSource, dict[str, Tensor]]:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text(json.dumps({"model_type": "emo"}))
    rows, down = (PAGES.intermediate, PAGES.hidden), (PAGES.hidden, PAGES.intermediate)
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for expert in range(6)
        for name, shape in zip(names(ExpertKey(0, expert)), (rows, rows, down), strict=True)
    }
    save_file(tensors, tmp_path / "whole" / "model.safetensors")
    pack(tmp_path / "whole", tmp_path / "packed", pieces=pieces, experts_per_layer=(6,), shape=PAGES)
    return PackedExperts(tmp_path / "packed" / PACK_NAME), tensors


@pytest.mark.parametrize("asked", [None, False])
def test_experts_that_fit_into_free_memory_come_through_the_page_cache(
    experts: ExpertSource, asked: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pager.cache.pager"):
        ExpertPager(
            experts, make_slots(3, torch.float32), resident=RESIDENT, options=CacheOptions(bypass_page_cache=asked)
        ).close()
    assert "through the page cache" in caplog.text


def test_when_the_page_cache_is_of_no_use() -> None:
    fits = partial(why_bypass, experts_bytes=30, slots_bytes=10, has_host_tier=False)
    assert fits(free_bytes=40) == ""
    assert "30 B of experts and 10 B of slots do not fit" in fits(free_bytes=39)
    assert "host tier" in fits(has_host_tier=True, free_bytes=1000)


def test_slots_are_pages_of_their_own() -> None:
    slots = make_slots(3, torch.bfloat16)
    assert slots.gate_up.data_ptr() % 4096 == slots.down.data_ptr() % 4096 == 0
    assert slots.gate_up.nbytes + slots.down.nbytes == slots.nbytes


def damage(packed: Path, source: PackedExperts, key: ExpertKey) -> None:
    """Flips a bit of its first byte."""
    with open(packed / PACK_NAME, "r+b") as file:
        file.seek(source.offset_of(key))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x40]))


def test_a_flipped_byte_fails_the_request_that_needs_the_expert_and_no_other(packed: Path) -> None:
    source = PackedExperts(packed / PACK_NAME)
    damaged = ExpertKey(2, 1)
    damage(packed, source, damaged)
    pager = ExpertPager(source, make_slots(4, torch.float32), resident=RESIDENT)
    with (
        some(pager.reserve_pool([ExpertKey(2, 0), damaged])) as broken,
        some(pager.reserve_pool([ExpertKey(2, 0), ExpertKey(2, 2)])) as fine,
    ):
        with pytest.raises(ChecksumMismatch) as failure:
            broken.wait(2)
        assert failure.value.key == damaged
        fine.wait(2)
        pager.check_integrity()
    pager.close()
    source.close()


def test_a_kernel_without_large_pages_has_slots_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)
    slots = make_slots(2, torch.float32)
    assert slots.gate_up.fill_(1.0).sum() == slots.gate_up.numel()
