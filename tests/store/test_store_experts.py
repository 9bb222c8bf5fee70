"""Reading experts, plain and packed: the same bits, the right error for the right expert."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pager.errors import CheckpointError, ChecksumMismatch, ExpertReadError
from pager.store import expert_source
from pager.store.checkpoint import Checkpoint
from pager.store.expert_source import PackedExperts
from pager.store.pack import record
from pager.store.reads import DataFile
from pager.types import ExpertKey, ExpertShape
from tests.store.conftest import Model, Save
from tests.support.files import flip, open_files


@pytest.fixture(params=["plain", "recorded", "packed"])
def stored(request: pytest.FixtureRequest, sharded: Path, model: Model, tmp_path: Path) -> Path:
    if request.param == "packed":
        return model.pack(sharded, tmp_path / "packed")
    if request.param == "recorded":
        record(sharded)
    return sharded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_expert_is_its_tensors_cast(stored: Path, model: Model, dtype: torch.dtype) -> None:
    source = model.open_experts(stored)
    assert source.keys_per_layer() == (4, 0, 3)
    assert source.stored_dtype == torch.float32
    assert source.shape == model.shape
    for key in model.keys:
        gate_up, down = model.blank(dtype)
        assert source.read(key, gate_up, down) == model.shape.num_elements * 4
        expected_gate_up, expected_down = model.expert(key)
        assert torch.equal(gate_up, expected_gate_up.to(dtype))
        assert torch.equal(down, expected_down.to(dtype))
    source.close()


def test_eight_threads_read_what_one_reads(stored: Path, model: Model) -> None:
    source = model.open_experts(stored)

    def read(index: int) -> bool:
        key = model.keys[index % len(model.keys)]
        gate_up, down = model.blank(torch.bfloat16 if index % 2 else torch.float32)
        source.read(key, gate_up, down)
        expected_gate_up, expected_down = model.expert(key)
        return torch.equal(gate_up, expected_gate_up.to(gate_up.dtype)) and torch.equal(
            down, expected_down.to(down.dtype)
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(400)))
    source.close()


def test_nothing_is_mapped_and_close_frees_the_descriptors(stored: Path, model: Model) -> None:
    source = model.open_experts(stored)
    assert open_files(stored)
    source.read(model.keys[0], *model.blank(torch.float32))
    assert str(stored) not in Path("/proc/self/maps").read_text()
    source.close()
    assert open_files(stored) == []
    with pytest.raises(ExpertReadError, match="closed"):
        source.read(model.keys[0], *model.blank(torch.float32))


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_layer_that_lies_evenly_in_its_file_is_a_tensor_for_each_parameter(
    model: Model, save: Save, tmp_path: Path, is_packed: bool
) -> None:
    path = save(model, 1)
    source = model.open_experts(model.pack(path, tmp_path / "packed") if is_packed else path)
    for key in model.keys:
        found = source.layer_in_place(key.layer)
        assert found is not None
        number = int(found.number_of_E[key.expert])
        assert all(
            torch.equal(of_all[number], expected)
            for of_all, expected in zip(found.parameters, model.expert(key), strict=True)
        )
    source.close()


def test_a_layer_that_is_spread_over_files_is_not_found_whole(sharded: Path, model: Model) -> None:
    source = model.open_experts(sharded)
    assert source.layer_in_place(0) is None
    assert len(source.in_place(model.keys[:4])) == 4
    source.close()


def test_a_layer_is_not_found_whole_where_an_expert_is_damaged(packed: Path, model: Model) -> None:
    source = PackedExperts(packed / "experts.pack")
    flip(packed / "experts.pack", source.offset_of(ExpertKey(2, 1)) + 5000)
    assert source.layer_in_place(2) is None
    assert source.layer_in_place(0) is not None
    with (packed / "experts.pack").open("r+b") as file:
        file.truncate(4096)
    assert source.layer_in_place(0) is None, "whoever touched it would end the process"
    source.close()


def test_the_page_cache_is_looked_at_again_after_a_while(
    packed: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PackedExperts(packed / "experts.pack")
    monkeypatch.setattr(expert_source, "SEEN_S", 3600.0)
    layer, real, looks = model.keys[:4], DataFile.cached_pages, list[int]()

    def looked(file: DataFile, start: int, end: int) -> bytes | None:
        looks.append(start)
        return real(file, start, end)

    monkeypatch.setattr(DataFile, "cached_pages", looked)
    for _ in range(3):
        assert source.in_page_cache(layer) == layer
        assert source.layer_in_place(0) is not None
    assert len(looks) == 1
    monkeypatch.setattr(expert_source, "SEEN_S", 0.0)
    source._layers.clear()
    for _ in range(3):
        source.in_page_cache(layer)
    assert len(looks) == 4
    source.close()


@pytest.mark.parametrize("asked_at_once", [0, 1 << 26])
def test_an_expert_that_lacks_a_few_pages_is_there_and_checked_again(
    model: Model, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_at_once: int
) -> None:
    large = replace(model, shape=ExpertShape(hidden=256, intermediate=256), experts_per_layer=(2,), tensors={})
    for key in large.keys:
        shapes = ((256, 256), (256, 256), (256, 256))
        large.tensors |= {name: torch.randn(shape) for name, shape in zip(large.names(key), shapes, strict=True)}
    source = PackedExperts(large.pack(save(large, 1), tmp_path / "large") / "experts.pack")
    monkeypatch.setattr(expert_source, "ASKED_AT_ONCE_BYTES", asked_at_once)
    monkeypatch.setattr(expert_source, "SEEN_S", 0.0)
    real, holes, read = DataFile.cached_pages, set[int](), list[int]()

    def with_holes(file: DataFile, start: int, end: int) -> bytes | None:
        pages = bytearray(real(file, start, end) or b"")
        for number in range(len(pages)):
            pages[number] &= start // 4096 + number not in holes
        return bytes(pages)

    def recorded(fd: int, buffers: Any, offset: int, preadv: Any = os.preadv) -> int:
        read.append(offset)
        return int(preadv(fd, buffers, offset))

    monkeypatch.setattr(DataFile, "cached_pages", with_holes)
    monkeypatch.setattr(os, "preadv", recorded)
    first, second = large.keys
    assert len(source.in_place(large.keys)) == 2
    assert read == []
    page = source.offset_of(first) // 4096 + 5
    holes |= {page}
    assert source.in_page_cache(large.keys) == large.keys
    assert read == [page * 4096], "it is brought back, where an error is one of a read"
    assert list(source._found_in_place) == [second]
    flip(tmp_path / "large" / "experts.pack", source.offset_of(first) + 20000)
    assert list(source.in_place(large.keys)) == [second], "it came back damaged"
    holes.clear()
    holes |= {source.offset_of(second) // 4096 + number for number in range(100)}
    assert source.in_page_cache(large.keys) == [], "too many are missing"
    source.close()


def test_destinations_of_another_shape_and_unknown_keys_are_misuse(stored: Path, model: Model) -> None:
    source = model.open_experts(stored)
    gate_up, down = model.blank(torch.float32)
    with pytest.raises(ValueError, match="shapes"):
        source.read(model.keys[0], down, gate_up)
    with pytest.raises(KeyError):
        source.read(ExpertKey(1, 0), gate_up, down)
    source.close()


def test_a_packed_expert_is_one_read(packed: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    source = PackedExperts(packed / "experts.pack")
    real, calls = os.preadv, list[int]()

    def recorded(fd: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", recorded)
    source.read(model.keys[2], *model.blank(torch.float32))
    assert calls == [source.offset_of(model.keys[2])]
    assert calls[0] % 4096 == 0
    source.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flipped_byte_fails_that_expert_alone(packed: Path, model: Model, dtype: torch.dtype) -> None:
    source = PackedExperts(packed / "experts.pack")
    flip(packed / "experts.pack", source.offset_of(ExpertKey(2, 1)) + 5000)
    with pytest.raises(ChecksumMismatch, match=r"expert 1 of layer 2 .*byte \d+ of .*experts\.pack") as caught:
        source.read(ExpertKey(2, 1), *model.blank(dtype))
    assert caught.value.key == ExpertKey(2, 1)
    assert "experts.pack" not in caught.value.message, "clients are told nothing of the server's files"
    for key in model.keys:
        if key != ExpertKey(2, 1):
            source.read(key, *model.blank(dtype))
    source.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flipped_byte_in_a_recorded_checkpoint_fails_that_expert(
    sharded: Path, model: Model, dtype: torch.dtype
) -> None:
    record(sharded)
    source = model.open_experts(sharded)
    with Checkpoint.open(sharded) as checkpoint:
        spec = checkpoint.specs[model.names(ExpertKey(0, 3))[2]]
    flip(sharded / spec.file, spec.offset + spec.nbytes - 1)
    with pytest.raises(ChecksumMismatch) as caught:
        source.read(ExpertKey(0, 3), *model.blank(dtype))
    assert caught.value.key == ExpertKey(0, 3)
    source.read(ExpertKey(0, 2), *model.blank(dtype))
    source.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_cut_off_while_serving_is_a_read_error_of_that_expert(
    stored: Path, model: Model, dtype: torch.dtype
) -> None:
    source = model.open_experts(stored)
    for file in [*stored.glob("*.safetensors"), *stored.glob("*.pack")]:
        os.truncate(file, 4000)
    with pytest.raises(ExpertReadError, match="expert 2 of layer 2") as caught:
        source.read(ExpertKey(2, 2), *model.blank(dtype))
    assert caught.value.key == ExpertKey(2, 2)
    source.close()


# What is refused when opening


def test_missing_expert_tensors_are_counted_and_the_first_is_named(model: Model, save: Save) -> None:
    gone = [*model.names(ExpertKey(0, 2)), *model.names(ExpertKey(2, 2))[1:]]
    for name in gone:
        del model.tensors[name]
    with pytest.raises(CheckpointError, match=rf"lacks 5 of 21 expert tensors, first '{gone[0]}'"):
        model.open_experts(save(model, 1))


def test_an_expert_of_another_shape_is_named(model: Model, save: Save) -> None:
    name = model.names(ExpertKey(2, 0))[1]
    model.tensors[name] = torch.zeros(20, 47)
    with pytest.raises(CheckpointError, match=rf"{name}.*\(20, 47\).*\(20, 48\)"):
        model.open_experts(save(model, 3))


def test_experts_in_several_floats_are_read_as_they_are(model: Model, save: Save) -> None:
    gate, up, down = model.names(ExpertKey(2, 0))
    model.tensors[gate], model.tensors[up] = model.tensors[gate].bfloat16(), model.tensors[up].half()
    with closing(model.open_experts(save(model, 3))) as source:
        assert source.stored_dtype == torch.float32
        gate_up, down_read = model.blank(torch.float32)
        source.read(ExpertKey(2, 0), gate_up, down_read)
    assert gate_up.equal(torch.cat([model.tensors[gate].float(), model.tensors[up].float()]))
    assert down_read.equal(model.tensors[down])


def test_integer_experts_are_refused(model: Model, save: Save) -> None:
    model.tensors = {name: tensor.to(torch.int8) for name, tensor in model.tensors.items()}
    with pytest.raises(CheckpointError, match="floating point"):
        model.open_experts(save(model, 1))


def test_a_model_without_experts_is_refused(model: Model, sharded: Path) -> None:
    model.experts_per_layer = (0, 0, 0)
    with pytest.raises(CheckpointError, match="nothing to page"):
        model.open_experts(sharded)


def test_a_pack_of_another_model_is_refused(packed: Path, model: Model) -> None:
    model.shape = ExpertShape(hidden=48, intermediate=24)
    with pytest.raises(CheckpointError, match=r"intermediate=20.*intermediate=24"):
        model.open_experts(packed)
