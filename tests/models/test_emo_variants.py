"""Every configuration the ablations use, against a derivation from the rules: token by token, in fp64.

The derivation below shares no code with the model: it reads the saved checkpoint by tensor name and loops.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pager.errors import CheckpointError
from pager.models import EmoConfig, EmoForCausalLM

Array = npt.NDArray[np.float64]
BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "num_shared_experts": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "eos_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "one shared": {},
    "none shared": {"num_shared_experts": 0},
    "two shared": {"num_shared_experts": 2},
    "none shared, renormalised": {"num_shared_experts": 0, "norm_topk_prob": True},
    "always active": {"always_active_experts": [5, 2]},
    "always active in one layer": {"always_active_experts_per_layer": [None, [1]], "num_shared_experts": 2},
    "only shared picked": {"num_shared_experts": 4},
    "experts differ by layer": {"num_experts_per_layer": [8, 6]},
    "shared differ by layer": {"num_shared_experts_per_layer": [0, 3]},
    "dense first layer": {"num_experts_per_layer": [0, 8], "dense_intermediate_size": 24},
    "dense with bias": {
        "num_experts_per_layer": [8, 0],
        "dense_intermediate_size": 24,
        "dense_mlp_bias": True,
        "num_shared_experts": 2,
    },
    "attention bias": {"attention_bias": True},
    "other rope": {"rope_theta": 100.0},
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_follow_the_rules(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = EmoConfig(**{**BASE, **VARIANTS[name]})
    model = EmoForCausalLM(config)
    for parameter in model.parameters():  # biases and norms start at 0 and 1, where a mistake would not show
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    weights = {key: value.double().numpy() for key, value in load_file(tmp_path / "model.safetensors").items()}
    ids = torch.randint(0, 64, (1, 12))
    expected = derive_logits(weights, config.to_dict(), ids[0].tolist())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_allclose(loaded(ids).logits[0].numpy(), expected, atol=1e-4)


def test_dense_layers_have_no_router_logits() -> None:
    model = EmoForCausalLM(EmoConfig(**BASE, num_experts_per_layer=[0, 8], dense_intermediate_size=24))
    assert len(model(torch.ones(1, 3, dtype=torch.long), output_router_logits=True).router_logits) == 1


def test_router_logits_come_only_on_request() -> None:
    model = EmoForCausalLM(EmoConfig(**BASE, output_router_logits=True))
    assert model(torch.ones(1, 3, dtype=torch.long)).router_logits is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"norm_topk_prob": True, "num_shared_experts": 0, "always_active_experts": [1]}, "norm_topk_prob"),
        ({"num_shared_experts": 5}, "5 shared experts"),
        ({"always_active_experts": [8]}, "below 8"),
        ({"always_active_experts": [1, 1]}, "distinct"),
        ({"always_active_experts": [0, 1, 2, 3, 4]}, "more than top-4"),
        ({"num_experts_per_layer": [8]}, "1 entries for 2 layers"),
        ({"num_experts_per_layer": [0, 8]}, "dense_intermediate_size"),
        ({"hidden_size": 30}, "hidden_size 30"),
    ],
)
def test_contradictory_config_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        EmoConfig(**{**BASE, **fields})


# --- the derivation ---------------------------------------------------------------------------------------------------


def derive_logits(weights: dict[str, Array], config: dict[str, Any], ids: list[int]) -> Array:
    h = weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = {
            key.removeprefix(f"model.layers.{i}."): value
            for key, value in weights.items()
            if key.startswith(f"model.layers.{i}.")
        }
        h = h + derive_attention(layer, config, rms_norm(h, layer["pre_attention_layernorm.weight"]))
        x = rms_norm(h, layer["pre_feedforward_layernorm.weight"])
        per_layer = config["num_experts_per_layer"]
        dense = per_layer is not None and per_layer[i] == 0
        h = h + (swiglu(layer, "mlp", x) if dense else np.stack([derive_moe(layer, config, i, token) for token in x]))
    return rms_norm(h, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def derive_moe(layer: dict[str, Array], config: dict[str, Any], i: int, x: Array) -> Array:
    num_experts = (config["num_experts_per_layer"] or {i: config["num_experts"]})[i]
    shared = (config["num_shared_experts_per_layer"] or {i: min(config["num_shared_experts"], num_experts)})[i]
    always = (config["always_active_experts_per_layer"] or {i: config["always_active_experts"]})[i] or []
    logits, top_k = layer["mlp.gate.weight"] @ x, config["num_experts_per_tok"]
    weight_of: dict[int, float] = {}
    if always:
        probs = softmax(logits)
        others = [e for e in best(probs) if e not in always]
        weight_of = {e: probs[e] for e in [*always, *others[: top_k - len(always)]]}
    else:
        routed = num_experts - shared
        probs = softmax(logits[:routed])
        weight_of = {e: probs[e] for e in best(probs)[: top_k - shared]}
        if config["norm_topk_prob"]:
            total = sum(weight_of.values())
            weight_of = {e: w / total for e, w in weight_of.items()}
        if shared:
            weight_of |= {routed + j: w for j, w in enumerate(softmax(logits[routed:]))}
    assert len(weight_of) == top_k
    return sum((w * swiglu(layer, f"mlp.experts.{e}", x) for e, w in weight_of.items()), np.zeros_like(x))


def derive_attention(layer: dict[str, Array], config: dict[str, Any], x: Array) -> Array:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    q, k, v = (linear(layer, f"self_attn.{p}_proj", x).reshape(len(x), -1, dim) for p in "qkv")
    theta = config["rope_parameters"]["rope_theta"]
    out = np.zeros((len(x), heads, dim))
    for head in range(heads):
        kv = head // (heads // kv_heads)
        keys = np.stack([rotated(k[t, kv], t, theta) for t in range(len(x))])
        for t in range(len(x)):
            scores = keys[: t + 1] @ rotated(q[t, head], t, theta) / np.sqrt(dim)
            out[t, head] = softmax(scores) @ v[: t + 1, kv]
    return linear(layer, "self_attn.o_proj", out.reshape(len(x), -1))


def rotated(vector: Array, position: int, theta: float) -> Array:
    half = len(vector) // 2
    turned = np.empty_like(vector)
    for j in range(half):
        angle = position * theta ** (-2 * j / len(vector))
        a, b = vector[j], vector[j + half]
        turned[j] = a * np.cos(angle) - b * np.sin(angle)
        turned[j + half] = b * np.cos(angle) + a * np.sin(angle)
    return turned


def swiglu(layer: dict[str, Array], name: str, x: Array) -> Array:
    gate, up = linear(layer, f"{name}.gate_proj", x), linear(layer, f"{name}.up_proj", x)
    return linear(layer, f"{name}.down_proj", gate / (1 + np.exp(-gate)) * up)


def linear(layer: dict[str, Array], name: str, x: Array) -> Array:
    return x @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", np.zeros(1))


def rms_norm(x: Array, weight: Array) -> Array:
    scaled: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
    return scaled


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    shares: Array = e / e.sum()
    return shares


def best(probs: Array) -> list[int]:
    return list(map(int, np.argsort(-probs)))
