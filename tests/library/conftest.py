"""Checkpoints on disk for load_model: the golden one, and small random ones of every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import pager
from pager.models import EmoConfig, EmoForCausalLM
from tests.support.checkpoints import lively, saved
from tests.support.files import Golden
from tests.support.files import golden as golden_of

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

ALIKE: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen2_moe": lambda **over: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **{
                **SMALL,
                "num_experts": 8,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "intermediate_size": 24,
                **over,
            }
        )
    ),
    "flex_olmo": lambda **over: FlexOlmoForCausalLM(FlexOlmoConfig(**{**SMALL, "num_experts": 8, **over})),
}
"""Further families, which pick as those do."""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Models this small only get slower with more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Golden:
    return golden_of("emo_tiny")


@pytest.fixture(scope="session")
def golden_pools() -> Golden:
    return golden_of("pool_emo_tiny")


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
        plain = lively({**MODELS, **ALIKE}[family](**config))
        return Small(plain, saved(plain, tmp_path / family, **(save or {})))

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


@dataclass(slots=True)
class Pools:
    """The pools that the masked gates chose: per sparse layer, per row."""

    chosen: list[list[set[int]]] = field(default_factory=list)


@pytest.fixture(scope="session")
def masked_gates() -> Callable[..., Any]:
    """`with masked_gates(plain, num_routed=4, num_rows=2) as pools:` a plain model under pools."""
    return mask_gates


@contextmanager
def mask_gates(plain: PreTrainedModel, *, num_routed: int, num_rows: int) -> Iterator[Pools]:
    """Pools derived by hand: the first forward sums each row's gate probabilities and keeps the largest; from then on
    all other experts' columns of the logits are -inf, and the gate's own rule is written out again.
    """
    pools = Pools()
    hooks = []
    for layer in plain.model.layers:
        if hasattr(layer.mlp, "experts"):
            pools.chosen.append([])
            hooks.append(layer.mlp.gate.register_forward_hook(gate_hook(pools.chosen[-1], num_routed, num_rows)))
    try:
        yield pools
    finally:
        for hook in hooks:
            hook.remove()


def gate_hook(chosen: list[set[int]], num_routed: int, num_rows: int) -> Callable[..., Any]:
    def hook(gate: Any, _: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = output[0]
        num_shared = getattr(gate, "num_shared", 0)
        routed = logits.shape[-1] - num_shared
        per_row = logits.view(num_rows, -1, logits.shape[-1])
        if not chosen:
            for row in per_row[..., :routed].float().softmax(-1).sum(1):
                chosen.append(set(row.sort(descending=True, stable=True).indices[:num_routed].tolist()))
        weights, index = [], []
        for row, pool in zip(per_row, chosen, strict=True):
            outside = [expert for expert in range(routed) if expert not in pool]
            probabilities = row[:, :routed].float().index_fill(1, torch.tensor(outside).long(), -torch.inf).softmax(-1)
            best = probabilities.sort(-1, descending=True)
            picked, ids = best.values[:, : gate.top_k - num_shared], best.indices[:, : gate.top_k - num_shared]
            if getattr(gate, "norm_topk_prob", True):  # Mixtral always does
                picked = picked / picked.sum(-1, keepdim=True)
            if num_shared:
                picked = torch.cat([picked, row[:, routed:].float().softmax(-1)], -1)
                ids = torch.cat([ids, torch.arange(routed, routed + num_shared).expand(len(ids), -1)], -1)
            weights.append(picked)
            index.append(ids)
        return logits, torch.cat(weights), torch.cat(index)

    return hook
