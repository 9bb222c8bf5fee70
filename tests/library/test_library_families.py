"""load_model against plain transformers, family by family, on small random models that transformers itself saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

pytestmark = pytest.mark.slow

Load = Callable[..., PreTrainedModel]
MakeSmall = Callable[..., Any]
MaskedGates = Callable[..., Any]

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {"norm_topk_prob": False}),
    "olmoe-renormalised": ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4}),
    "olmoe-tied": ("olmoe", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", {}),
    "mixtral-top3": ("mixtral", {"num_experts_per_tok": 3, "num_key_value_heads": 1}),
    "qwen3": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3-renormalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3-some-dense": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "qwen3-every-second": ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "emo": ("emo", {}),
    "emo-no-shared": ("emo", {"num_shared_experts": 0}),
    "emo-no-shared-renormalised": ("emo", {"num_shared_experts": 0, "norm_topk_prob": True}),
    "emo-two-shared": ("emo", {"num_shared_experts": 2, "num_experts_per_tok": 4}),
    "emo-per-layer": ("emo", {"num_experts_per_layer": [9, 6, 12], "num_shared_experts_per_layer": [1, 0, 2]}),
    "emo-some-dense": (
        "emo",
        {"num_experts_per_layer": [0, 9, 7], "dense_intermediate_size": 24, "dense_mlp_bias": True},
    ),
    "emo-biased-attention": ("emo", {"attention_bias": True, "tie_word_embeddings": True}),
}
ALWAYS_ACTIVE: dict[str, dict[str, Any]] = {
    "everywhere": {"always_active_experts": [4, 0]},
    "per-layer": {"always_active_experts_per_layer": [[8], None, [2, 3, 1]]},
    "beside-dense": {
        "always_active_experts": [1],
        "num_experts_per_layer": [9, 0, 9],
        "dense_intermediate_size": 24,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", ["100%", "50%", "smallest"])
def test_exact_equals_plain_transformers(small: MakeSmall, load: Load, variant: str, budget: str) -> None:
    family, config = VARIANTS[variant]
    made = small(family, **config)
    assert_exact(made, load(made.path, expert_memory=smallest(made) if budget == "smallest" else budget))


@pytest.mark.parametrize("variant", ALWAYS_ACTIVE)
@pytest.mark.parametrize("budget", ["100%", "smallest"])
def test_always_active_experts_are_paged_like_any_other(
    small: MakeSmall, load: Load, variant: str, budget: str
) -> None:
    made = small("emo", **ALWAYS_ACTIVE[variant])
    assert_exact(made, load(made.path, expert_memory=smallest(made) if budget == "smallest" else budget))


def assert_exact(made: Any, model: PreTrainedModel) -> None:
    """Logits and greedy tokens of the paged model equal those of the model that was saved."""
    prompt = made.prompt()
    expected = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(prompt).logits
    torch.testing.assert_close(model(prompt).logits, expected, **TOLERANCE)
    torch.testing.assert_close(model(prompt).logits, made.plain(prompt).logits, **TOLERANCE)
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert model.generate(prompt, **options).equal(made.plain.generate(prompt, **options))
    model.expert_paging.pager.check_integrity()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", ["100%", "smallest"])
def test_pooled_equals_a_masked_plain_model(
    small: MakeSmall, load: Load, masked_gates: MaskedGates, variant: str, budget: str
) -> None:
    family, config = VARIANTS[variant]
    made = small(family, **config)
    model = load(made.path, expert_memory=smallest(made) if budget == "smallest" else budget, pool_size=4)
    prompt, rest = made.prompt(num_tokens=20), made.prompt(num_tokens=8, seed=2)
    cache, plain_cache = DynamicCache(config=model.config), DynamicCache(config=made.plain.config)
    with masked_gates(made.plain, num_routed=4, num_rows=2) as pools:
        for part in (prompt, rest[:, :1], rest[:, 1:]):
            logits = model(part, past_key_values=cache, use_cache=True).logits
            expected = made.plain(part, past_key_values=plain_cache, use_cache=True).logits
            torch.testing.assert_close(logits, expected, **TOLERANCE)
    for row, document in enumerate(cache.documents):
        assert [set(layer) for layer in document.pool.experts if layer] == [pool[row] for pool in pools.chosen]
    unrestricted = made.plain(prompt).logits
    assert (model(prompt).logits - unrestricted).abs().max() > 1e-2, "the pools made no difference"


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "emo"])
def test_pooled_generation_equals_a_masked_plain_model(
    small: MakeSmall, load: Load, masked_gates: MaskedGates, family: str
) -> None:
    made = small(family)
    model = load(made.path, expert_memory="40%", pool_size=4)
    prompt = made.prompt()
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with masked_gates(made.plain, num_routed=4, num_rows=2):
        expected = made.plain.generate(prompt, **options)
    assert model.generate(prompt, **options).equal(expected)


@pytest.mark.parametrize("edit", ["the output head alone", "names without the model's prefix"])
def test_tied_weights_and_bare_names_load_as_in_plain_transformers(small: MakeSmall, load: Load, edit: str) -> None:
    made = small("olmoe", tie_word_embeddings=True)
    file = made.path / "model.safetensors"
    weights = load_file(file)
    if edit == "the output head alone":
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    else:
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert_exact(made, load(made.path, expert_memory="50%"))


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "emo"])
def test_a_sharded_save_loads_the_same(small: MakeSmall, load: Load, family: str) -> None:
    made = small(family, save={"max_shard_size": "20KB"})
    assert len(list(made.path.glob("*.safetensors"))) > 3
    model = load(made.path, expert_memory="30%")
    torch.testing.assert_close(model(made.prompt()).logits, made.plain(made.prompt()).logits, **TOLERANCE)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "emo"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_float32_checkpoint_serves_in_bfloat16(
    small: MakeSmall, load: Load, family: str, dtype: torch.dtype | str
) -> None:
    made = small(family)
    model = load(made.path, dtype=dtype, expert_memory="30%")
    in_float32 = made.plain(made.prompt()).logits
    plain = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.bfloat16)
    expected_parameters = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.equal(expected_parameters[name]), name
    logits, expected = model(made.prompt()).logits, plain(made.prompt()).logits
    assert logits.dtype == torch.bfloat16
    # Sums are rounded in another order, and a rounding can tip a near-tie between two experts: the two may differ by as
    # much as either differs from float32.
    noise = (expected - in_float32).abs()
    assert (logits - expected).abs().median() < noise.median()
    assert (logits - expected).abs().mean() < noise.mean()


@pytest.mark.parametrize(
    ("stored", "asked", "served"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "auto", "float32"),
        ("float16", "auto", "float16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_the_dtype_is_the_checkpoints_when_asked_for(
    small: MakeSmall, load: Load, stored: str, asked: str, served: str
) -> None:
    made = small("olmoe")
    made.plain.to(getattr(torch, stored)).save_pretrained(made.path)
    model = load(made.path, dtype=asked, expert_memory="50%")
    assert model.dtype == getattr(torch, served)
    if served == "float32":
        expected = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(made.prompt()).logits
        torch.testing.assert_close(model(made.prompt()).logits, expected, **TOLERANCE)


def smallest(made: Any) -> int:
    """Bytes of one token's routed experts in the layer that wants most, in float32."""
    config = made.plain.config
    intermediate = getattr(config, "moe_intermediate_size", config.intermediate_size)
    return int(max(routed_per_token(block) for block in blocks(made.plain)) * 3 * config.hidden_size * intermediate * 4)


def blocks(plain: PreTrainedModel) -> list[nn.Module]:
    return [layer.mlp for layer in plain.model.layers if hasattr(layer.mlp, "experts")]


def routed_per_token(block: Any) -> int:
    return int(block.gate.top_k - getattr(block.gate, "num_shared", 0))
