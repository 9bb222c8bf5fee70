"""Opening and reading plain checkpoints: what is refused, and that every bit arrives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pager.errors import CheckpointError
from pager.store import reads
from pager.store.checkpoint import Checkpoint
from tests.store.conftest import Model, Save
from tests.support.files import flip, open_files

INDEX = "model.safetensors.index.json"
FIRST_SHARD = "model-00001-of-00003.safetensors"


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The weight file of an otherwise sound checkpoint, to be written by the test."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path / "model.safetensors"


def test_every_tensor_is_read_bit_for_bit(plain: Path, model: Model) -> None:
    with Checkpoint.open(plain) as checkpoint:
        assert checkpoint.specs.keys() == model.tensors.keys()
        assert checkpoint.config["model_type"] == "emo"
        assert not checkpoint.is_packed
        for name, expected in model.tensors.items():
            assert torch.equal(checkpoint.read_tensor(name), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_reading_into_another_dtype_equals_a_cast(
    model: Model, save: Save, stored: torch.dtype, wanted: torch.dtype
) -> None:
    model.tensors = {name: tensor.to(stored) for name, tensor in model.tensors.items()}
    with Checkpoint.open(save(model, 1)) as checkpoint:
        for name, tensor in model.tensors.items():
            out = torch.zeros(tensor.shape, dtype=wanted)
            assert checkpoint.read_into(name, out) == tensor.nbytes
            assert torch.equal(out, tensor.to(wanted))
            assert torch.equal(checkpoint.read_tensor(name, wanted), tensor.to(wanted))


def test_a_cast_goes_through_a_bounded_buffer(sharded: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "STAGING_BYTES", 64)
    monkeypatch.setattr(reads, "_CAST_ELEMENTS", 5)
    name = "model.embed_tokens.weight"
    with Checkpoint.open(sharded) as checkpoint:
        assert max(piece.nbytes for piece in checkpoint.pieces(name)) == 64
        assert torch.equal(checkpoint.read_tensor(name, torch.bfloat16), model.tensors[name].bfloat16())


def test_reading_into_part_of_a_larger_tensor_touches_only_that_part(sharded: Path, model: Model) -> None:
    slots = torch.full((3, 64, 48), 7.0)
    with Checkpoint.open(sharded) as checkpoint:
        checkpoint.read_into("model.embed_tokens.weight", slots[1])
    assert torch.equal(slots[1], model.tensors["model.embed_tokens.weight"])
    assert (slots[0] == 7).all()
    assert (slots[2] == 7).all()


def test_a_destination_that_is_not_contiguous_is_misuse(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint, pytest.raises(ValueError, match="contiguous"):
        checkpoint.read_into("model.embed_tokens.weight", torch.zeros(48, 64).T)


def test_no_weight_file_is_mapped(plain: Path, model: Model) -> None:
    with Checkpoint.open(plain) as checkpoint:
        kept = [checkpoint.read_tensor(name, torch.bfloat16) for name in model.tensors]
        assert str(plain) not in Path("/proc/self/maps").read_text()
    assert kept


def test_a_large_tensor_begins_at_a_page(tmp_path: Path, save: Save, model: Model) -> None:
    """Where it can lie in large pages; what malloc returns begins behind its own header."""
    name = "model.embed_tokens.weight"
    model.tensors[name] = torch.randn(reads.LARGE_PAGE_BYTES // 256, 64)
    with Checkpoint.open(save(model, 1)) as checkpoint:
        tensor = checkpoint.read_tensor(name)
        assert torch.equal(tensor, model.tensors[name])
        assert tensor.data_ptr() % reads.PAGE_BYTES == 0


def test_a_short_kernel_read_is_continued(sharded: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:1000]], offset))
    with Checkpoint.open(sharded) as checkpoint:
        for name, expected in model.tensors.items():
            assert torch.equal(checkpoint.read_tensor(name), expected)


def test_closing_frees_every_descriptor(plain: Path, model: Model) -> None:
    with Checkpoint.open(plain) as checkpoint:
        assert open_files(plain)
    assert open_files(plain) == []
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read_tensor("model.norm.weight")


def test_a_refused_checkpoint_leaves_no_descriptor_open(sharded: Path) -> None:
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(sharded)
    assert open_files(sharded) == []
    assert caught.tb is not None  # held until here: nothing was left to the garbage collector


# What is refused


def test_a_truncated_file_is_named_with_both_sizes(plain: Path) -> None:
    file = max(plain.glob("*.safetensors"))
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(CheckpointError, match=rf"{file.name} is truncated.* {size} bytes .* {size - 1}"):
        Checkpoint.open(plain)


def test_a_file_cut_off_while_open_is_a_short_read_not_zeros(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        spec = checkpoint.specs["model.embed_tokens.weight"]
        os.truncate(sharded / spec.file, spec.offset + 100)
        with pytest.raises(CheckpointError, match=rf"model\.embed_tokens\.weight.* ends at byte {spec.offset + 100}"):
            checkpoint.read_tensor(spec.name)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / FIRST_SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"{FIRST_SHARD}: No such file"):
        Checkpoint.open(sharded)


def test_an_index_names_files_and_what_is_in_them_counts(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    with Checkpoint.open(sharded) as checkpoint:
        expected = checkpoint.specs
    places, (first, *_, last) = index["weight_map"], sorted(index["weight_map"])
    places["model.extra.weight"] = FIRST_SHARD
    del places[first]
    places[last] = next(shard for shard in places.values() if shard != places[last])
    (sharded / INDEX).write_text(json.dumps(index))
    with Checkpoint.open(sharded) as checkpoint:
        assert checkpoint.specs == expected
        with pytest.raises(CheckpointError, match=r"'model\.extra\.weight'"):
            checkpoint.require("model.extra.weight", (1,))


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd", "a/b", 3])
def test_an_index_reaches_no_other_directory(sharded: Path, shard: str | int) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(CheckpointError, match="same directory"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("shard", ["", "..", "a\0b", "\ud800"])
def test_an_impossible_shard_name_is_refused(sharded: Path, shard: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(CheckpointError, match="cannot"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": 3}', "not json", "[]"])
def test_a_malformed_index_is_refused(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("config", ["not json", "[1]", "[" * 100_000])
def test_a_malformed_config_is_refused(sharded: Path, config: str) -> None:
    (sharded / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(sharded)


def test_missing_directory_config_and_weights_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="other weight formats are not read"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds pickled weights"):
        Checkpoint.open(tmp_path)


def test_require_names_tensor_expected_and_found(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        assert checkpoint.require("model.norm.weight", (48,)).nbytes == 192
        with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' .*\(48,\); .*\(64,\)"):
            checkpoint.require("model.norm.weight", (64,))
        with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
            checkpoint.require("lm_head.weight", (64, 48))
        with pytest.raises(CheckpointError, match=r"'model\.norm\.weight'"):
            checkpoint.read_into("model.norm.weight", torch.zeros(64))


def test_an_unsupported_dtype_is_named(raw: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(8).to(torch.float8_e4m3fnuz)}, raw)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' .* F8_E4M3FNUZ, which is not supported"):
        Checkpoint.open(raw.parent)


def entry(start: int, end: int, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "'b' begins"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "'b' begins"),
        ({"a": entry(0, 12)}, "12 bytes"),
        ({"a": entry(8, 0)}, "data_offsets"),
        ({"a": entry(-8, 0)}, "data_offsets"),
        ({"a": entry(0, 8, [-2])}, "shape"),
        ({"a": entry(0, 8, [True, 2])}, "shape"),
        ({"a": entry(0, 8, "2")}, "shape"),
        ({"a": entry(0, 8, dtype=["F32"])}, "not supported"),
        ({"a": 3}, "not a JSON object"),
        ([1], "not a JSON object"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ({"a": entry(0, 8)}, "describes"),
    ],
)
def test_a_malformed_header_is_refused(
    raw: Path, header: dict[str, Any] | dict[str, int] | list[int] | bytes, why: str
) -> None:
    write_raw(raw, header, data=bytes(20))
    with pytest.raises(CheckpointError, match=why) as caught:
        Checkpoint.open(raw.parent)
    assert "model.safetensors" in str(caught.value) or "'a'" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"1234", (2**63).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"{}"]
)
def test_a_header_longer_than_the_file_is_refused_without_reading_it(raw: Path, content: bytes) -> None:
    raw.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot hold the header"):
        Checkpoint.open(raw.parent)


def test_no_damage_to_a_header_is_anything_but_a_checkpoint_error(raw: Path) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, raw)
    end = raw.stat().st_size - 32
    refused = 0
    for offset in range(end):
        flip(raw, offset)
        try:
            Checkpoint.open(raw.parent).close()
        except CheckpointError:
            refused += 1
        flip(raw, offset)
    assert refused == end  # an inverted ASCII byte is never UTF-8
    Checkpoint.open(raw.parent).close()


def test_a_hub_cache_of_links_is_read(sharded: Path, model: Model, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    sharded.rename(blobs)
    sharded.mkdir()
    for number, file in enumerate(sorted(blobs.iterdir())):
        blob = file.rename(blobs / f"{number:064x}")
        (sharded / file.name).symlink_to(blob)
    with Checkpoint.open(sharded) as checkpoint:
        for name, expected in model.tensors.items():
            assert torch.equal(checkpoint.read_tensor(name), expected)


# The fingerprint


def fingerprint(path: Path) -> str:
    with Checkpoint.open(path) as checkpoint:
        return checkpoint.fingerprint


def test_the_fingerprint_is_the_same_for_a_copy_and_differs_for_another_model(model: Model, save: Save) -> None:
    first = fingerprint(save(model, 3))
    assert len(bytes.fromhex(first)) == 16
    assert fingerprint(save(model, 3)) == first
    model.tensors["model.norm.weight"][24] += 1
    assert fingerprint(save(model, 3)) != first


def test_the_fingerprint_covers_the_config(sharded: Path) -> None:
    before = fingerprint(sharded)
    (sharded / "config.json").write_text('{"model_type": "emo", "rope_theta": 1}')
    assert fingerprint(sharded) != before
