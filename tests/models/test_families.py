"""What each family's entry says of a config, and that its picking rule is the router's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from pager.errors import UnsupportedModel
from pager.models import EmoConfig
from pager.models.emo import EmoTopKRouter
from pager.models.families import PICKS, Family, Pick, family_of, routed_probabilities, tried_pick
from pager.types import ExpertShape, RoutingFacts

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4}


def family(config: Any) -> Family:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return family_of(model)


def facts(config: Any) -> RoutingFacts:
    return family(config).facts


def test_a_model_without_experts_is_refused_by_name() -> None:
    for config in (LlamaConfig(**SIZES, num_hidden_layers=1), Qwen3MoeConfig(**SIZES, num_experts=0)):
        with pytest.raises(UnsupportedModel, match=f"model type '{config.model_type}' cannot be paged: no layer"):
            family(config)


def test_every_layer_of_olmoe_and_mixtral_is_sparse() -> None:
    expected = RoutingFacts((8, 8, 8), (0, 0, 0), (2, 2, 2))
    assert facts(OlmoeConfig(**SIZES, num_hidden_layers=3, num_experts=8, num_experts_per_tok=2)) == expected
    assert facts(MixtralConfig(**SIZES, num_hidden_layers=3, num_local_experts=8, num_experts_per_tok=2)) == expected


@pytest.mark.parametrize(
    ("config", "sparse"),
    [
        ({}, [1, 1, 1, 1]),
        ({"mlp_only_layers": [0, 2]}, [0, 1, 0, 1]),
        ({"decoder_sparse_step": 2}, [0, 1, 0, 1]),
        ({"decoder_sparse_step": 3}, [0, 0, 1, 0]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [0, 1, 0, 0]),
    ],
)
def test_the_dense_layers_of_qwen3(config: dict[str, Any], sparse: list[int]) -> None:
    made = Qwen3MoeConfig(**{**SIZES, "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, **config})
    assert facts(made) == RoutingFacts(tuple(8 * s for s in sparse), (0,) * 4, tuple(2 * s for s in sparse))


@pytest.mark.parametrize(
    ("config", "experts", "shared", "top_k"),
    [
        ({}, (16, 16), (1, 1), (3, 3)),
        ({"num_shared_experts": 0}, (16, 16), (0, 0), (4, 4)),
        ({"num_shared_experts": 2}, (16, 16), (2, 2), (2, 2)),
        ({"num_experts_per_layer": [0, 8], "dense_intermediate_size": 8}, (0, 8), (0, 1), (0, 3)),
        ({"num_experts_per_layer": [3, 16]}, (3, 16), (1, 1), (2, 3)),  # fewer experts than top-k: all of them
        ({"num_experts_per_layer": [1, 16]}, (1, 16), (1, 1), (0, 3)),  # the shared one and no other
        ({"num_shared_experts_per_layer": [2, 0]}, (16, 16), (2, 0), (2, 4)),
        ({"always_active_experts": [1, 5]}, (16, 16), (0, 0), (4, 4)),
        ({"always_active_experts_per_layer": [[2], None]}, (16, 16), (0, 1), (4, 3)),
    ],
)
def test_the_layers_of_emo(config: dict[str, Any], experts: Any, shared: Any, top_k: Any) -> None:
    made = EmoConfig(
        **{**SIZES, "pad_token_id": 0, "num_hidden_layers": 2, "num_experts": 16, "num_experts_per_tok": 4, **config}
    )
    assert facts(made) == RoutingFacts(experts, shared, top_k)


def test_only_always_active_experts_rule_out_pools() -> None:
    small = {**SIZES, "pad_token_id": 0, "num_hidden_layers": 2, "num_experts": 16}
    assert family(EmoConfig(**small)).unpoolable is None
    assert family(EmoConfig(**small, always_active_experts_per_layer=[None, []])).unpoolable is None
    for config in ({"always_active_experts": [0]}, {"always_active_experts_per_layer": [None, [3]]}):
        assert "always-active" in str(family(EmoConfig(**small, **config)).unpoolable)


def test_the_shape_of_an_expert() -> None:
    for kind in (EmoConfig, OlmoeConfig, MixtralConfig):
        assert family(kind(**SIZES, num_hidden_layers=1, pad_token_id=0)).shape == ExpertShape(32, 24)
    qwen3 = Qwen3MoeConfig(**SIZES, moe_intermediate_size=12, num_hidden_layers=1)
    assert family(qwen3).shape == ExpertShape(32, 12)


def test_an_expert_has_the_parameters_that_its_module_says() -> None:
    gpt_oss = GptOssConfig(**SIZES, num_hidden_layers=1, num_local_experts=4, head_dim=8)
    shape = family(gpt_oss).shape
    assert shape.named == (
        ("gate_up_proj", (32, 48)),
        ("gate_up_proj_bias", (48,)),
        ("down_proj", (24, 32)),
        ("down_proj_bias", (32,)),
    )
    assert (shape.hidden, shape.intermediate, shape.num_elements) == (32, 24, 32 * 48 + 48 + 24 * 32 + 32)


GATES: dict[str, Callable[[], torch.nn.Module]] = {
    "olmoe": lambda: OlmoeTopKRouter(OlmoeConfig(hidden_size=32, num_experts=10, num_experts_per_tok=3)),
    "olmoe-renormalised": lambda: OlmoeTopKRouter(
        OlmoeConfig(hidden_size=32, num_experts=10, num_experts_per_tok=3, norm_topk_prob=True)
    ),
    "mixtral": lambda: MixtralTopKRouter(MixtralConfig(hidden_size=32, num_local_experts=10, num_experts_per_tok=3)),
    "qwen3_moe": lambda: Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=32, num_experts=10, num_experts_per_tok=3, norm_topk_prob=True)
    ),
    "emo": lambda: EmoTopKRouter(
        EmoConfig(num_hidden_layers=1, hidden_size=32, num_experts=10, num_experts_per_tok=3), 0
    ),
    "emo-always-active": lambda: EmoTopKRouter(
        EmoConfig(
            num_hidden_layers=1, hidden_size=32, num_experts=10, num_experts_per_tok=3, always_active_experts=[6, 2]
        ),
        0,
    ),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unrestricted_pick_is_the_gates_own(name: str, dtype: torch.dtype) -> None:
    gate, pick, hidden = gate_and_hidden(name, dtype)
    logits, weights, index = gate(hidden)
    for allowed in (None, torch.ones(1, 10, dtype=torch.bool)):
        picked_weights, picked_index = pick(gate, logits, allowed)
        assert picked_weights.equal(weights)
        assert picked_index.equal(index)
        assert picked_weights.dtype == weights.dtype


@pytest.mark.parametrize("name", [name for name in GATES if name != "emo-always-active"])
def test_a_restricted_pick_is_that_of_a_gate_without_the_other_experts(name: str) -> None:
    """Pruning the outside experts' rows off the gate is the same as masking them (rule 17)."""
    gate, pick, hidden = gate_and_hidden(name, torch.float32)
    kept = [0, 3, 4, 6, 8] + ([9] if name == "emo" else [])  # the last is shared in EMO
    allowed = torch.zeros(len(hidden), 10, dtype=torch.bool)
    allowed[:, kept] = True
    weights, index = pick(gate, gate(hidden)[0], allowed)
    gate.weight.data = gate.weight.data[kept]
    gate.num_experts = len(kept)
    _, pruned_weights, pruned_index = gate(hidden)
    torch.testing.assert_close(weights, pruned_weights)
    assert index.equal(torch.tensor(kept)[pruned_index])


def test_router_probabilities_leave_shared_experts_out() -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    probabilities = routed_probabilities(logits, 2)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, logits[:, :6].float().softmax(-1))
    assert routed_probabilities(logits, 0).shape == (5, 8)


@pytest.mark.parametrize("name", GATES)
def test_how_a_gate_picks_is_found_by_trying(name: str) -> None:
    expected = {"olmoe": "_pick_softmax", "mixtral": "_pick_renormalised_fp32", "emo": "_pick_own"}
    found = gate_and_hidden(name, torch.float32)[1]
    assert found.__name__ == expected.get(name.removesuffix("-always-active"), "_pick_renormalised")
    assert found in PICKS


def test_a_gate_that_picks_in_a_way_of_its_own_is_not_taken_for_another() -> None:
    gate = OlmoeTopKRouter(OlmoeConfig(hidden_size=32, num_experts=10, num_experts_per_tok=3))
    own = gate.forward
    gate.forward = lambda hidden: (lambda logits, weights, index: (logits, weights * 2, index))(*own(hidden))
    assert tried_pick(gate, 3) is None
    assert tried_pick(torch.nn.Linear(32, 10, bias=False), 3) is None


def gate_and_hidden(name: str, dtype: torch.dtype) -> tuple[Any, Pick, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    gate: Any = GATES[name]().to(dtype)
    pick = tried_pick(gate, 3)
    assert pick is not None
    torch.nn.init.normal_(gate.weight, generator=generator)
    hidden = torch.randn(20, 32, generator=generator).to(dtype)
    return gate.requires_grad_(False), pick, hidden
