"""A small random checkpoint in the released format, on disk: plain (sharded or not) and packed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pager.store.checkpoint import Checkpoint
from pager.store.expert_source import ExpertSource, open_experts
from pager.store.pack import Progress, pack
from pager.types import ExpertKey, ExpertShape


@dataclass(slots=True)
class Model:
    """What is in the files, and how to ask for it as a model family would."""

    tensors: dict[str, Tensor]
    shape: ExpertShape = field(default_factory=lambda: ExpertShape(hidden=48, intermediate=20))
    experts_per_layer: tuple[int, ...] = (4, 0, 3)  # the middle layer is dense

    def names(self, key: ExpertKey) -> tuple[str, str, str]:
        prefix = f"model.layers.{key.layer}.mlp.experts.{key.expert}"
        return f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"

    def pieces(self, key: ExpertKey) -> tuple[tuple[str, str], tuple[str]]:
        gate, up, down = self.names(key)
        return (gate, up), (down,)

    @property
    def keys(self) -> list[ExpertKey]:
        return [ExpertKey(layer, e) for layer, count in enumerate(self.experts_per_layer) for e in range(count)]

    def expert(self, key: ExpertKey) -> tuple[Tensor, Tensor]:
        gate, up, down = (self.tensors[name] for name in self.names(key))
        return torch.cat([gate, up]), down

    def blank(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden, intermediate = self.shape.hidden, self.shape.intermediate
        return torch.zeros(2 * intermediate, hidden, dtype=dtype), torch.zeros(hidden, intermediate, dtype=dtype)

    def open_experts(self, path: Path) -> ExpertSource:
        with Checkpoint.open(path) as checkpoint:
            return open_experts(checkpoint, self.pieces, self.experts_per_layer, self.shape)

    def pack(self, source: Path, out: Path, dtype: torch.dtype | None = None, progress: Progress | None = None) -> Path:
        layout = (self.pieces, self.experts_per_layer, self.shape)
        pack(
            source, out, pieces=layout[0], experts_per_layer=layout[1], shape=layout[2], dtype=dtype, progress=progress
        )
        return out


@pytest.fixture
def model() -> Model:
    generator = torch.Generator().manual_seed(0)
    model = Model({})
    rows, down = (model.shape.intermediate, model.shape.hidden), (model.shape.hidden, model.shape.intermediate)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 48), "model.norm.weight": (48,)}
    for key in model.keys:
        shapes |= zip(model.names(key), (rows, rows, down), strict=True)
    model.tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model.tensors |= {"model.position": torch.arange(7), "model.scale": torch.tensor(0.5)}
    return model


Save = Callable[[Model, int], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    numbers = itertools.count()

    def save(model: Model, shards: int) -> Path:
        path = tmp_path / f"plain-{next(numbers)}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "emo", "torch_dtype": "float32"}))
        (path / "tokenizer.json").write_text("{}")
        (path / "generation_config.json").write_text("{}")
        if shards == 1:
            save_file(model.tensors, path / "model.safetensors")
            return path
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(model.tensors.items())[shard::shards])
            save_file(part, path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return path

    return save


@pytest.fixture(params=[1, 3], ids=["single", "sharded"])
def plain(request: pytest.FixtureRequest, model: Model, save: Save) -> Path:
    return save(model, request.param)


@pytest.fixture
def sharded(model: Model, save: Save) -> Path:
    return save(model, 3)


@pytest.fixture
def packed(model: Model, sharded: Path, tmp_path: Path) -> Path:
    return model.pack(sharded, tmp_path / "packed")
