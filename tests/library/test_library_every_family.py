"""load_model against plain transformers for every family with the experts interface, on small models of its own config.

The families are those of the installed transformers, whichever they are: nothing here has to name one, but for fields
that a family cannot do without.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from pager.errors import UnsupportedModel
from pager.models.families import expert_modules
from pager.models.open_model import OpenModel

pytestmark = pytest.mark.slow

Load = Callable[..., PreTrainedModel]

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}
NUM_LAYERS = 4
POOL = 4

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": NUM_LAYERS,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_heads": 4, "linear_head_dim": 8,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "top_k_experts": 2, "moe_topk": 2, "moe_k": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_expert_group": 2,
}  # fmt: skip
"""What makes a model small, in the fields that its config has."""

ALTERNATING = ["linear_attention", "full_attention"] * (NUM_LAYERS // 2)
NEEDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16, "head_dim": 8,
        "global_head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 96, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 4, "layer_types": ALTERNATING,
    },
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 4, "use_mamba_kernels": False,
    },
    "qwen4_exp_text": {
        "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "sliding_window": None},
}  # fmt: skip
"""What a family cannot do without, where that is not small already."""

LEFT_OUT = {"jamba": ("layer_types",), "nemotron_h": ("layer_types", "num_hidden_layers")}
"""Fields that a family works out by itself."""


NOT_POOLED = {
    "deepseek_v4": "picks from outside of a pool",  # some layers pick by a hash of the token
    "inkling_text": "have a matrix of its experts",
    "zaya": "have a matrix of its experts",
}
"""Families that run with all their experts only, and what they are told."""


def families() -> dict[str, type[Any]]:
    """The config class of each language model with experts behind the interface; of composite ones the text model's."""
    found = {}
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        if "text_config" in config_class.sub_configs:
            continue
        source = inspect.getsource(inspect.getmodule(model_class(config_class)))  # type: ignore[arg-type]
        if "@use_experts_implementation" in source:
            found[config_class.model_type] = config_class
    return found


def model_class(config_class: type[Any]) -> type[PreTrainedModel]:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def small_config(config_class: type[Any]) -> Any:
    """The family's own defaults, but small, with every kind of layer that they have."""
    default = config_class()
    fields = {name: value for name, value in SIZES.items() if has(default, name)}
    if "kv_lora_rank" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(kinds := getattr(default, name, None), list):
            kinds = list(dict.fromkeys(kinds))
            fields[name] = [kinds[layer % len(kinds)] for layer in range(NUM_LAYERS)]
    fields |= NEEDS.get(config_class.model_type, {})
    left_out = LEFT_OUT.get(config_class.model_type, ())
    return config_class(**{name: value for name, value in fields.items() if name not in left_out})


def has(config: Any, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except Exception:  # what transformers raises for sizes that layers have each for themselves
        return False


with warnings.catch_warnings():  # of a module of transformers when it is imported, and no fault of what is tested
    warnings.simplefilter("ignore")
    FAMILIES = families()
Plain = tuple[str, PreTrainedModel, Path]
PROMPT = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, PreTrainedModel, Path]:
    """A family's name, a random model of it, and where transformers saved it."""
    config_class = FAMILIES[request.param]
    torch.manual_seed(0)
    made = model_class(config_class)(small_config(config_class)).eval()
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    path = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(path)
    return request.param, model_class(config_class).from_pretrained(path, dtype=torch.float32).eval(), path


@torch.no_grad()
def test_exact_is_plain_transformers_at_every_budget(plain: Plain, load: Load) -> None:
    _, model, path = plain
    expected, tokens = model(PROMPT).logits, model.generate(PROMPT, **GREEDY)
    opened = OpenModel.open(path, "float32")
    opened.checkpoint.close()
    for budget in ("100%", "50%", max(opened.facts.top_k_per_layer) * opened.expert_bytes):
        paged = load(path, dtype="float32", expert_memory=budget)
        torch.testing.assert_close(paged(PROMPT).logits, expected, **TOLERANCE)
    assert paged.generate(PROMPT, **GREEDY).equal(tokens), "with the least budget"


@torch.no_grad()
def test_stacked_as_the_model_has_them_they_load_the_same(plain: Plain, load: Load, tmp_path: Path) -> None:
    _, model, _ = plain
    model.save_pretrained(tmp_path, save_original_format=False)
    paged = load(tmp_path, dtype="float32", expert_memory="50%")
    torch.testing.assert_close(paged(PROMPT).logits, model(PROMPT).logits, **TOLERANCE)


@torch.no_grad()
def test_pools_hold_the_picks_and_all_experts_are_no_pool(plain: Plain, load: Load) -> None:
    name, model, path = plain
    if name in NOT_POOLED:
        with pytest.raises(UnsupportedModel, match=f"runs with all its experts only: .*{NOT_POOLED[name]}"):
            load(path, dtype="float32", pool_size=POOL)
        return
    paged = load(path, dtype="float32", pool_size=POOL)
    facts, picked = paged.expert_paging.facts, list[tuple[int, Tensor]]()
    for _, experts in expert_modules(paged):
        experts.register_forward_pre_hook(lambda module, inputs: picked.append((module.paging.layer, inputs[1])))
    output = paged(PROMPT, use_cache=True)
    documents = output.past_key_values.documents
    paged(PROMPT[:, :1], past_key_values=output.past_key_values, use_cache=True)
    assert {len(experts) for each in documents for experts in each.pool.experts if experts} == {POOL}
    for layer, index_TK in picked:
        for row, picks in enumerate(index_TK.view(len(documents), -1)):
            shared = facts.experts_per_layer[layer] - facts.shared_per_layer[layer]
            inside = {*documents[row].pool.experts[layer], *range(shared, facts.experts_per_layer[layer])}
            assert set(picks.tolist()) <= inside, f"row {row} of layer {layer}"
    full = load(path, dtype="float32", pool_size=max(facts.routed_per_layer))
    torch.testing.assert_close(full(PROMPT).logits, model(PROMPT).logits, **TOLERANCE)
