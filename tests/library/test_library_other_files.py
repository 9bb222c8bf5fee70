"""Checkpoints that are not as they should be and that plain transformers loads: so does load_model, and to the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from tests.library.conftest import SMALL
from tests.support.checkpoints import lively

Tensors = dict[str, Tensor]
Places = dict[str, str]
Load = Callable[..., PreTrainedModel]

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


def unneeded_fp8(tensors: Tensors) -> None:
    tensors["mtp.scale"] = torch.ones(4, 4).to(torch.float8_e4m3fn)


def base_model(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def mixed_floats(tensors: Tensors) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to(kinds[number % len(kinds)])


def head_alone(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def base_model_without_head(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]
    base_model(tensors)


def names_the_wrong_file(places: Places) -> None:
    for name in ("model.norm.weight", EXPERT):
        places[name] = next(file for file in places.values() if file != places[name])


def names_a_tensor_that_no_file_has(places: Places) -> None:
    places["model.extra.weight"] = places["model.norm.weight"]


def leaves_out_a_tensor(places: Places) -> None:
    del places[EXPERT], places["model.norm.weight"]


def saved(path: Path, *, tied: bool, shards: bool) -> Path:
    torch.manual_seed(0)
    config = OlmoeConfig(**{**SMALL, "tie_word_embeddings": tied}, num_experts=8)
    model = lively(OlmoeForCausalLM(config))
    model.save_pretrained(path, **({"max_shard_size": "30KB"} if shards else {}))
    return path


def assert_loads_as_plain(path: Path, load: Load) -> None:
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(PROMPT).logits
    found = load(path, dtype="float32", expert_memory="50%")(PROMPT).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", [unneeded_fp8, base_model, mixed_floats])
@torch.no_grad()
def test_tensors_that_plain_transformers_takes(change: Callable[[Tensors], None], load: Load, tmp_path: Path) -> None:
    file = saved(tmp_path, tied=False, shards=False) / "model.safetensors"
    change(tensors := load_file(file))
    save_file(tensors, file, metadata={"format": "pt"})
    assert_loads_as_plain(tmp_path, load)


@pytest.mark.parametrize("change", [head_alone, base_model_without_head])
@torch.no_grad()
def test_tied_weights_that_are_stored_once(change: Callable[[Tensors], None], load: Load, tmp_path: Path) -> None:
    file = saved(tmp_path, tied=True, shards=False) / "model.safetensors"
    tensors = load_file(file)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    assert_loads_as_plain(tmp_path, load)


@pytest.mark.parametrize("change", [names_the_wrong_file, names_a_tensor_that_no_file_has, leaves_out_a_tensor])
@torch.no_grad()
def test_an_index_that_is_not_right(change: Callable[[Places], None], load: Load, tmp_path: Path) -> None:
    path = saved(tmp_path, tied=False, shards=True) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    assert_loads_as_plain(tmp_path, load)
