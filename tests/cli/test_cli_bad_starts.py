"""What keeps a service from starting: one line that names it, exit status 1, no stack trace, and nothing left running.

Ports in use and unknown keys of a config file are in test_cli_serve.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.support.files import CHECKPOINT

SECOND_SHARD = "model-00002-of-00003.safetensors"
SECRET = "never-to-be-shown"


def lose_shard(folder: Path) -> None:
    (folder / SECOND_SHARD).unlink()


def truncate(folder: Path) -> None:
    path = folder / SECOND_SHARD
    os.truncate(path, path.stat().st_size - 1000)


def lose_tensor(folder: Path) -> None:
    name, path = "model.layers.2.mlp.experts.3.up_proj.weight", folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = folder / index["weight_map"].pop(name)
    path.write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def change_dtype(ending: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / SECOND_SHARD)
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = tensors[name].to(torch.int32)
        save_file(tensors, folder / SECOND_SHARD, metadata={"format": "pt"})

    return change


# How a good checkpoint is damaged, and what the error has to name.
DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a shard is missing": (lose_shard, (SECOND_SHARD, "No such file")),
    "a shard is truncated": (truncate, (SECOND_SHARD, "truncated")),
    "a tensor is missing": (lose_tensor, ("model.layers.2.mlp.experts.3.up_proj.weight",)),
    "experts of another shape": (change_config(intermediate_size=48), ("gate_proj", "(32, 64)", "(48, 64)")),
    "trunk of another shape": (change_config(vocab_size=300), ("embed_tokens", "(256, 64)", "(300, 64)")),
    "an expert of another dtype": (change_dtype("down_proj.weight"), ("down_proj", "int32")),
}
# Options and environment, and what the error has to name.
SETTINGS: dict[str, tuple[dict[str, str], dict[str, str], tuple[str, ...]]] = {
    "expert memory below one token": ({"--expert-memory": "30KiB"}, {}, ("30KiB", "one token needs 3", "36864")),
    "more than the machine has": ({"--expert-memory": "900TiB"}, {}, ("900TiB", "main memory")),
    "a default pool beyond the slots": ({"--expert-memory": "10%", "--pool": "14"}, {}, ("56", "expert_memory")),
    "a Redis URL that is none": ({}, {"REDIS_URL": f"redis://:{SECRET}@127.0.0.1:port/0"}, ("Redis URL",)),
}


@pytest.mark.parametrize("name", [*DAMAGES, *SETTINGS])
def test_a_start_that_can_not_be_is_one_line(
    run: Run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = CHECKPOINT, list[str]()
    if name in DAMAGES:
        damage, named = DAMAGES[name]
        path = Path(shutil.copytree(CHECKPOINT, tmp_path / "damaged"))
        damage(path)
    else:
        pairs, env, named = SETTINGS[name]
        options = [word for pair in pairs.items() for word in pair]
        for key, value in env.items():
            monkeypatch.setenv(key, value)
    done = run("serve", path, "--port", 0, "--http-port", 0, "--metrics-port", 0, "--device", "cpu", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for words in named:
        assert words in done.stderr
    assert SECRET not in done.stderr
