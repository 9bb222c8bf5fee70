"""Packing: the same model in another layout, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from pager.errors import CheckpointError, ConfigError, InsufficientDisk
from pager.store import pack as pack_module
from pager.store.checkpoint import Checkpoint
from pager.store.expert_source import PackedExperts
from pager.store.pack import record, verify
from pager.store.reads import raw_bytes
from pager.types import ExpertKey
from tests.store.conftest import Model, Save
from tests.support.files import flip, open_files


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_a_pack_holds_the_source_cast(plain: Path, model: Model, tmp_path: Path, dtype: torch.dtype | None) -> None:
    packed = model.pack(plain, tmp_path / "packed", dtype)
    wanted = dtype or torch.float32
    source = model.open_experts(packed)
    assert source.stored_dtype == wanted
    for key in model.keys:
        gate_up, down = model.blank(wanted)
        source.read(key, gate_up, down)
        assert torch.equal(gate_up, model.expert(key)[0].to(wanted))
        assert torch.equal(down, model.expert(key)[1].to(wanted))
    source.close()
    trunk = {name: tensor for name, tensor in model.tensors.items() if ".experts." not in name}
    with Checkpoint.open(packed) as checkpoint:
        assert checkpoint.is_packed
        assert checkpoint.specs.keys() == trunk.keys()
        for name, tensor in trunk.items():
            expected = tensor.to(wanted) if tensor.is_floating_point() else tensor
            assert torch.equal(checkpoint.read_tensor(name), expected)
    assert verify(packed).ok


def test_the_trunk_is_a_safetensors_file_that_others_read(packed: Path, model: Model) -> None:
    loaded = load_file(packed / "trunk.safetensors")
    assert loaded.keys() == {name for name in model.tensors if ".experts." not in name}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, model.tensors[name])


def test_a_pack_is_self_contained(sharded: Path, model: Model, tmp_path: Path) -> None:
    (sharded / "notes.txt").write_text("stays behind")
    packed = model.pack(sharded, tmp_path / "deep" / "packed", torch.bfloat16)
    assert sorted(path.name for path in packed.iterdir()) == [
        "config.json", "experts.pack", "generation_config.json", "tokenizer.json", "trunk.safetensors",
    ]  # fmt: skip
    assert json.loads((packed / "config.json").read_text()) == {"model_type": "emo", "dtype": "bfloat16"}
    shutil.rmtree(sharded)
    assert verify(packed).ok


def test_progress_counts_bytes_up_to_the_whole(sharded: Path, model: Model, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    model.pack(sharded, tmp_path / "packed", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (sum(tensor.nbytes for tensor in model.tensors.values()),) * 2


def test_the_fingerprint_is_the_source_s_and_the_dtype(sharded: Path, model: Model, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        with Checkpoint.open(path) as checkpoint:
            return checkpoint.fingerprint

    as_stored = fingerprint(model.pack(sharded, tmp_path / "a"))
    assert fingerprint(model.pack(sharded, tmp_path / "b", torch.float32)) == as_stored
    assert fingerprint(model.pack(sharded, tmp_path / "c", torch.bfloat16)) not in (as_stored, fingerprint(sharded))


# What is refused, and what is left behind


def test_an_existing_directory_is_left_alone(sharded: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        model.pack(sharded, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_pack_left_is_removed_when_it_is_tried_again(sharded: Path, model: Model, tmp_path: Path) -> None:
    """Also by a process of the same number, as every job in a container has."""
    for name in (f"out.partial-{os.getpid()}", "out.partial-0123456789abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "experts.pack").write_bytes(b"half")
    (tmp_path / "out2.partial-1").mkdir()
    model.pack(sharded, tmp_path / "out")
    assert verify(tmp_path / "out").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out2.partial-1", sharded.name]


def test_a_directory_that_another_pack_fills_is_left_alone(sharded: Path, model: Model, tmp_path: Path) -> None:
    refusals: list[ConfigError] = []

    def pack_too(done: int, total: int) -> None:
        if not refusals:
            with pytest.raises(ConfigError, match="another process is packing into") as caught:
                model.pack(sharded, tmp_path / "out")
            refusals.append(caught.value)
            model.pack(sharded, tmp_path / "other")

    model.pack(sharded, tmp_path / "out", progress=pack_too)
    assert verify(tmp_path / "out").ok
    assert verify(tmp_path / "other").ok


@pytest.mark.parametrize("at", [0.0, 0.05, 0.5, 1.0, "the first sync", "the last sync", "its end"])
def test_a_pack_that_is_killed_is_tried_again_and_is_whole(
    sharded: Path, model: Model, tmp_path: Path, at: float | str
) -> None:
    """At a share of its bytes, at a sync of a file or directory, or when all is done but the last sync."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def advance(done: int, total: int) -> None:
        if isinstance(at, float) and done >= at * total:
            kill()

    def sync(descriptor: Any) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if (
            at == "the first sync"
            or (at == "the last sync" and path.is_dir())
            or (at == "its end" and path == tmp_path)
        ):
            kill()
        real(descriptor)

    pid = os.fork()
    if pid == 0:
        real = os.fsync
        os.fsync = sync  # type: ignore[assignment]
        try:
            model.pack(sharded, tmp_path / "out", progress=advance)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    if at == "its end":
        with pytest.raises(ConfigError, match="already exists"):
            model.pack(sharded, tmp_path / "out")
    else:
        assert not (tmp_path / "out").exists()
        assert list(tmp_path.glob("out.partial-*"))
        model.pack(sharded, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", sharded.name]
    assert verify(tmp_path / "out").ok


def test_a_link_that_leads_nowhere_is_refused_before_the_work(sharded: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere" / "out")
    with pytest.raises(ConfigError, match="already exists"):
        model.pack(sharded, tmp_path / "out", progress=lambda done, total: pytest.fail("it has begun"))
    with pytest.raises(ConfigError, match="already exists"):
        model.pack(sharded, tmp_path / "new" / ".." / sharded.name / "config.json")
    assert not list(tmp_path.glob("**/*.partial-*"))


def test_a_pack_is_not_packed_again(packed: Path, model: Model, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="packed already"):
        model.pack(packed, tmp_path / "again")


def test_an_unusable_dtype_is_refused(sharded: Path, model: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float8"):
        model.pack(sharded, tmp_path / "out", torch.float8_e4m3fn)


def test_too_little_space_is_told_before_anything_is_written(
    sharded: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1024, 1024))
    with pytest.raises(InsufficientDisk, match=r"needs \d+\.\d KiB and 1\.0 KiB are free"):
        model.pack(sharded, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [sharded.name]


def test_a_disk_that_runs_full_on_the_way_leaves_nothing(
    sharded: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InsufficientDisk, match="ran full"):
        model.pack(sharded, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [sharded.name]


@pytest.mark.parametrize("at", [0.05, 0.5, 1.0])
def test_an_interrupt_leaves_nothing(sharded: Path, model: Model, tmp_path: Path, at: float) -> None:
    def interrupt(done: int, total: int) -> None:
        if done >= at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.pack(sharded, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [sharded.name]
    model.pack(sharded, tmp_path / "out")
    assert verify(tmp_path / "out").ok


def test_a_damaged_source_is_not_packed(sharded: Path, model: Model, tmp_path: Path) -> None:
    record(sharded)
    with Checkpoint.open(sharded) as checkpoint:
        spec = checkpoint.specs[model.names(ExpertKey(2, 2))[0]]
    flip(sharded / spec.file, spec.offset)
    with pytest.raises(CheckpointError, match=rf"{spec.name}.*does not match its checksum"):
        model.pack(sharded, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [sharded.name]


def test_packing_does_not_grow_with_the_model(
    sharded: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def measured(tensor: Tensor) -> memoryview:
        sizes.append(tensor.nbytes)
        return raw_bytes(tensor)

    monkeypatch.setattr(pack_module, "raw_bytes", measured)
    monkeypatch.setattr("pager.store.reads.STAGING_BYTES", 512)
    model.pack(sharded, tmp_path / "out")
    assert max(sizes) == 512


# A damaged pack


def test_a_refused_pack_leaves_no_descriptor_open(packed: Path) -> None:
    flip(packed / "experts.pack", 100)
    with pytest.raises(CheckpointError) as caught:
        PackedExperts(packed / "experts.pack")
    assert open_files(packed) == []
    assert caught.tb is not None  # held until here: nothing was left to the garbage collector


@pytest.mark.parametrize(
    "change",
    [
        {"experts_per_layer": [10**9]},
        {"experts_per_layer": [4, 0, 3, 10**18]},
        {"experts_per_layer": 7},
        {"experts_per_layer": [4, 0, -1, 4]},
        {"hidden": 2**70},
        {"hidden": "48"},
        {"intermediate": None},
        {"dtype": ["F32"]},
        {"dtype": "F8"},
        {"extents": []},
        {"extents": [[0, 0]]},
        {"extents": {"a": 1}},
        {"trunk": ["a"]},
        {"trunk": {}},
    ],
)
def test_a_header_whose_checksum_is_right_and_whose_facts_are_not_is_refused_at_once(
    packed: Path,
    model: Model,
    change: dict[str, list[int]]
    | dict[str, int]
    | dict[str, str]
    | dict[str, None]
    | dict[str, list[str]]
    | dict[str, list[object]]
    | dict[str, list[list[int]]]
    | dict[str, dict[str, int]]
    | dict[str, dict[str, Any]],
) -> None:
    path = packed / "experts.pack"
    content = path.read_bytes()
    prefix = struct.Struct("<8sIQ16s")
    magic, version, length, _ = prefix.unpack(content[: prefix.size])
    header = json.dumps(json.loads(content[prefix.size : prefix.size + length]) | change).encode()
    content = prefix.pack(magic, version, len(header), xxhash.xxh3_128_digest(header)) + header + content[4096:]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"experts\.pack"):
        model.open_experts(packed)


def test_a_damaged_header_is_refused_wherever_it_is_hit(packed: Path) -> None:
    pack = packed / "experts.pack"
    for offset, why in [(0, "does not begin"), (8, "version"), (12, "header"), (20, "checksum"), (300, "checksum")]:
        flip(pack, offset)
        with pytest.raises(CheckpointError, match=why):
            PackedExperts(pack)
        with pytest.raises(CheckpointError, match=why):
            Checkpoint.open(packed)
        flip(pack, offset)
    Checkpoint.open(packed).close()


@pytest.mark.parametrize("keep", [0, 30, 1000, -4096])
def test_a_truncated_pack_is_refused(packed: Path, keep: int) -> None:
    pack = packed / "experts.pack"
    os.truncate(pack, keep if keep >= 0 else pack.stat().st_size + keep)
    with pytest.raises(CheckpointError, match=r"experts\.pack"):
        Checkpoint.open(packed)


@pytest.mark.parametrize("name", ["experts.pack", "trunk.safetensors", "config.json"])
def test_half_a_packed_directory_is_refused(packed: Path, name: str) -> None:
    (packed / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.*No such file"):
        Checkpoint.open(packed)


def test_a_trunk_of_another_model_is_refused(
    packed: Path, sharded: Path, model: Model, save: Save, tmp_path: Path
) -> None:
    model.tensors["model.extra"] = torch.zeros(3)
    other = model.pack(save(model, 1), tmp_path / "other")
    shutil.copy(other / "trunk.safetensors", packed / "trunk.safetensors")
    with pytest.raises(CheckpointError, match="not of the same model"):
        Checkpoint.open(packed)


def test_a_flipped_byte_in_the_trunk_is_found_on_reading(packed: Path) -> None:
    with Checkpoint.open(packed) as checkpoint:
        spec = checkpoint.specs["model.embed_tokens.weight"]
        flip(packed / spec.file, spec.offset + 17)
        with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight.*checksum"):
            checkpoint.read_tensor(spec.name, torch.bfloat16)
        checkpoint.read_tensor("model.norm.weight")
