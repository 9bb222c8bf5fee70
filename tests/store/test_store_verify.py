"""Recording and verifying: every damaged tensor or expert is listed, with its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import Tensor

from pager.errors import CheckpointError
from pager.store.checkpoint import Checkpoint
from pager.store.expert_source import PackedExperts
from pager.store.pack import pack, record, verify
from pager.types import ExpertKey
from tests.store.conftest import Model, Save
from tests.support.files import flip


def test_a_recorded_checkpoint_verifies(plain: Path, model: Model) -> None:
    manifest = record(plain).manifest
    name = "model.embed_tokens.weight"
    assert manifest.tensor_checksums[name] == xxhash.xxh3_128_hexdigest(model.tensors[name].numpy().tobytes())
    report = verify(plain)
    assert report.ok
    assert not report.packed
    assert report.num_checked == len(model.tensors)
    assert report.nbytes_checked == sum(tensor.nbytes for tensor in model.tensors.values())


def test_all_damaged_tensors_are_listed_with_their_place(sharded: Path, model: Model) -> None:
    record(sharded)
    with Checkpoint.open(sharded) as checkpoint:
        names = {"model.norm.weight", model.names(ExpertKey(2, 1))[0]}
        specs = [checkpoint.specs[name] for name in names]
    for spec in specs:
        flip(sharded / spec.file, spec.offset + spec.nbytes // 2)
    report = verify(sharded)
    assert not report.ok
    assert {(bad.name, bad.file, bad.offset) for bad in report.bad} == {(s.name, s.file, s.offset) for s in specs}
    assert all("checksum" in bad.reason for bad in report.bad)


def test_damaged_experts_and_trunk_of_a_pack_are_listed(packed: Path) -> None:
    experts = PackedExperts(packed / "experts.pack")
    offset = experts.offset_of(ExpertKey(0, 3))
    experts.close()
    flip(packed / "experts.pack", offset + 11_519)  # the last byte of the extent
    with Checkpoint.open(packed) as checkpoint:
        spec = checkpoint.specs["model.scale"]
    flip(packed / spec.file, spec.offset)
    report = verify(packed)
    assert report.packed
    assert [(bad.name, bad.file, bad.offset) for bad in report.bad] == [
        ("model.scale", "trunk.safetensors", spec.offset),
        ("layer 0 expert 3", "experts.pack", offset),
    ]


def test_progress_reaches_the_whole(packed: Path, sharded: Path) -> None:
    for action, path in ((record, sharded), (verify, sharded), (verify, packed)):
        calls: list[tuple[int, int]] = []
        action(path, lambda *done_and_total: calls.append(done_and_total))  # noqa: B023 - called before the next
        assert calls[-1][0] == calls[-1][1] > 0


def test_nothing_recorded_says_how_to_record(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=r"verify --record"):
        verify(sharded)


def test_a_pack_is_not_recorded(packed: Path) -> None:
    with pytest.raises(CheckpointError, match="carries its checksums"):
        record(packed)


def test_recorded_checksums_guard_ordinary_reads(sharded: Path) -> None:
    record(sharded)
    with Checkpoint.open(sharded) as checkpoint:
        spec = checkpoint.specs["model.norm.weight"]
        flip(sharded / spec.file, spec.offset)
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*does not match its checksum"):
                checkpoint.read_tensor("model.norm.weight", dtype)


def test_files_that_changed_since_are_refused_until_recorded_anew(model: Model, save: Save) -> None:
    path = save(model, 1)
    record(path)
    model.tensors["model.extra"] = torch.zeros(5)
    os.replace(save(model, 1) / "model.safetensors", path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes and was recorded with \d+"):
        Checkpoint.open(path)
    record(path)
    assert verify(path).ok


def test_recording_replaces_the_manifest_and_leaves_nothing_else(sharded: Path) -> None:
    before = {path.name for path in sharded.iterdir()}
    record(sharded)
    record(sharded)
    assert {path.name for path in sharded.iterdir()} == before | {"checksums.json"}


@pytest.mark.parametrize(
    "change",
    [
        lambda body: "not json",
        lambda body: [],
        lambda body: body | {"version": 2},
        lambda body: body | {"algorithm": "md5"},
        lambda body: body | {"tensors": {}},
        lambda body: body | {"tensors": dict.fromkeys(body["tensors"], 7)},
        lambda body: body | {"files": [1]},
        lambda body: {key: body[key] for key in ("version", "files", "tensors")},
    ],
)
def test_a_malformed_manifest_is_refused(sharded: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record(sharded)
    path = sharded / "checksums.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"checksums\.json"):
        Checkpoint.open(sharded)


# What has a checksum, and is hardly what it was


def change(path: Path, name: str, values: Tensor) -> None:
    with Checkpoint.open_unverified(path) as checkpoint:
        spec = checkpoint.specs[name]
    with (path / spec.file).open("r+b") as stream:
        stream.seek(spec.offset)
        stream.write(values.numpy().tobytes())


def test_zeros_and_values_that_are_no_numbers_are_told(sharded: Path, model: Model, tmp_path: Path) -> None:
    zeros, nan, infinite, constant = (model.names(key)[0] for key in model.keys[:4])
    for name, value in ((zeros, 0.0), (constant, 0.25)):
        change(sharded, name, torch.full_like(model.tensors[name], value))
    for name, value in ((nan, float("nan")), (infinite, float("-inf")), ("model.norm.weight", float("nan"))):
        change(sharded, name, torch.cat([torch.tensor([value]), model.tensors[name].flatten()[1:]]))
    reasons = {
        zeros: "all its values are 0",
        constant: "all its values are 0.25",
        nan: "it holds values that are not a number",
        "model.norm.weight": "it holds values that are not a number",
        infinite: "it holds infinite values",
    }
    assert {item.name: item.reason for item in record(sharded).odd} == reasons
    report = verify(sharded)
    assert report.ok, "the checksums are those of the bytes that are there"
    assert {item.name: item.reason for item in report.odd} == reasons
    odd = pack(
        sharded, tmp_path / "packed", pieces=model.pieces, experts_per_layer=model.experts_per_layer, shape=model.shape
    )
    assert {item.name: item.reason for item in odd} == reasons
    packed = {item.name: item.reason for item in verify(tmp_path / "packed").odd}
    assert packed == {f"layer 0 expert {e}, gate": reasons[model.names(model.keys[e])[0]] for e in range(4)} | {
        "model.norm.weight": "it holds values that are not a number"
    }


def test_vectors_and_numbers_may_be_constant(plain: Path, model: Model) -> None:
    change(plain, "model.norm.weight", torch.ones(48))
    assert record(plain).odd == ()


def test_a_file_of_the_right_size_that_was_never_written_whole_is_told(model: Model, save: Save) -> None:
    path = save(model, 1)
    file = path / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size // 4096 * 4096 - 8192)
    os.truncate(file, size)
    odd = record(path).odd
    assert odd[0].reason.startswith("nothing was ever written at byte")
    assert verify(path).odd == odd
