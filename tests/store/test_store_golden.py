"""The small released-format checkpoint: all of it is read as safetensors' own reader reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from pager.store.checkpoint import Checkpoint
from pager.store.pack import pack, verify
from pager.types import ExpertShape
from tests.store.conftest import Model

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "ckpt_emo_tiny"


def test_the_golden_checkpoint_survives_packing(model: Model, tmp_path: Path) -> None:
    with Checkpoint.open(GOLDEN) as checkpoint:
        config = checkpoint.config
    shape = ExpertShape(config["hidden_size"], config["intermediate_size"])
    layers = (config["num_experts"],) * config["num_hidden_layers"]
    pack(GOLDEN, tmp_path / "packed", pieces=model.pieces, experts_per_layer=layers, shape=shape)
    assert verify(tmp_path / "packed").ok
    model.shape, model.experts_per_layer = shape, layers
    plain, packed = model.open_experts(GOLDEN), model.open_experts(tmp_path / "packed")
    for shard in sorted(GOLDEN.glob("*.safetensors")):
        with safe_open(shard, "pt") as reference:
            model.tensors |= {name: reference.get_tensor(name) for name in reference.keys()}  # noqa: SIM118
    for key in model.keys:
        expected = model.expert(key)
        for source in (plain, packed):
            found = model.blank(torch.float32)
            source.read(key, *found)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    plain.close()
    packed.close()
