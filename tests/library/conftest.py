"""Checkpoints on disk for load_model: the golden one, and small random ones of every family."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import pager
from pager.models import EmoConfig, EmoForCausalLM

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 62,
    "pad_token_id": 63,
    "tie_word_embeddings": False,
}

MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "emo": lambda **over: EmoForCausalLM(EmoConfig(**{**SMALL, "num_experts": 9, "num_experts_per_tok": 3, **over})),
    "olmoe": lambda **over: OlmoeForCausalLM(OlmoeConfig(**{**SMALL, "num_experts": 8, **over})),
    "mixtral": lambda **over: MixtralForCausalLM(MixtralConfig(**{**SMALL, "num_local_experts": 8, **over})),
    "qwen3_moe": lambda **over: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **{**SMALL, "num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "intermediate_size": 24, **over}
        )
    ),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Models this small only get slower with more."""
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class Golden:
    """Outputs that the authors' own code computed for a small random checkpoint (tests/data/golden)."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def checkpoint(self) -> Path:
        return self.path / "ckpt_emo_tiny"


@pytest.fixture(scope="session")
def golden() -> Golden:
    return _golden("emo_tiny")


@pytest.fixture(scope="session")
def golden_pools() -> Golden:
    return _golden("pool_emo_tiny")


def _golden(name: str) -> Golden:
    return Golden(GOLDEN, json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors"))


@dataclass(frozen=True, slots=True)
class Small:
    """A random model of some family: plain, in memory, and the directory it was saved to."""

    plain: PreTrainedModel
    path: Path

    def prompt(self, num_rows: int = 2, num_tokens: int = 24, seed: int = 1) -> Tensor:
        """Random ids, none of them special."""
        return torch.randint(0, 60, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Small]:
    """`small(family, save={...}, **config)`: a random fp32 model with lively routing, saved as transformers does."""

    def make(family: str, *, save: dict[str, Any] | None = None, **config: Any) -> Small:
        torch.manual_seed(0)
        plain = MODELS[family](**config).eval()
        for name, parameter in plain.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
        path = tmp_path / family
        plain.save_pretrained(path, **(save or {}))
        return Small(plain, path)

    return make


@pytest.fixture
def load() -> Iterator[Callable[..., PreTrainedModel]]:
    """`pager.load_model` in float32 unless told otherwise; whatever it opened is closed at the end."""
    loaded: list[PreTrainedModel] = []

    def load_model(path: Path, **options: Any) -> PreTrainedModel:
        model = pager.load_model(path, **{"dtype": "float32", **options})
        loaded.append(model)
        return model

    yield load_model
    for model in loaded:
        model.expert_paging.close()
