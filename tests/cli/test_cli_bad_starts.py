"""What keeps a service from starting: one line that names it, exit status 1, no stack trace, and nothing left running.

Ports in use and unknown keys of a config file are in test_cli_serve.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pager.cluster.loading import load_engine
from pager.cluster.placement import LoadedModel
from pager.cluster.worker import WorkerObserver
from pager.config import load_config
from pager.errors import PagerError, PoolTooLarge, PoolTooSmall
from pager.types import Count, Counts, Full, RoutingFacts
from router_service.app import check_fits
from tests.cli.conftest import Run
from tests.support.files import CHECKPOINT

SECOND_SHARD = "model-00002-of-00003.safetensors"
SECRET = "never-to-be-shown"
PORTS = ("--port", 0, "--http-port", 0, "--metrics-port", 0)


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
# Budgets, and what the error has to name.
BUDGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "expert memory below one token": ("30KiB", ("30KiB", "one token needs 3", "36864")),
    "more than the machine has": ("900TiB", ("900TiB", "main memory")),
}


@pytest.mark.parametrize("name", [*DAMAGES, *BUDGETS])
def test_what_a_worker_can_not_load_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memory = CHECKPOINT, "100%"
    if name in DAMAGES:
        damage, named = DAMAGES[name]
        path = Path(shutil.copytree(CHECKPOINT, tmp_path / "damaged"))
        damage(path)
    else:
        memory, named = BUDGETS[name]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {"model.path": str(path), "workers.device": "cpu", "workers.expert_memory": memory}
    with pytest.raises(PagerError) as caught:
        load_engine(load_config(env={}, overrides=settings), lambda events: None, WorkerObserver(), None)
    assert not caught.value.retryable, "the start would go on"
    assert "\n" not in caught.value.message
    for words in named:
        assert words in caught.value.message


@pytest.mark.usefixtures("ray_runtime")
def test_what_a_worker_can_not_load_ends_the_service(process: Run, tmp_path: Path) -> None:
    truncate(Path(shutil.copytree(CHECKPOINT, tmp_path / "damaged")))
    done = process("serve", tmp_path / "damaged", *PORTS, "--device", "cpu")
    assert (done.returncode, done.stdout) == (1, "")
    error = done.stderr.splitlines()[-1]  # after what Ray says of itself and of the machine
    assert error.startswith("error: ")
    assert SECOND_SHARD in error
    assert done.stderr.count(SECOND_SHARD) == 1, "nothing else reports it"
    assert "Traceback" not in done.stderr


def test_a_redis_url_that_is_none_is_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", f"redis://:{SECRET}@127.0.0.1:port/0")
    done = run("serve", CHECKPOINT, *PORTS)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert "Redis URL" in done.stderr
    assert SECRET not in done.stderr


def test_a_default_pool_has_to_fit() -> None:
    facts = RoutingFacts((16,) * 4, (1,) * 4, (3,) * 4)
    model = LoadedModel("m", "f", 8, 8, 8, facts, "", "", "", num_slots=6)
    with pytest.raises(PoolTooLarge, match="needs 56 expert slots and this worker has 6") as caught:
        check_fits(Count(14), model)
    assert caught.value.field == "pools.default_size"
    with pytest.raises(PoolTooSmall, match="smaller than the 3"):
        check_fits(Count(1), model)
    for fits in (Full(), Counts((1, 1, 2, 2))):
        check_fits(fits, replace(model, facts=replace(facts, top_k_per_layer=(1, 1, 1, 1))))
