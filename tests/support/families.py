"""Every family of transformers with experts behind its experts interface, small, from its own config.

The families are those of the installed transformers, whichever they are: nothing here has to name one, but for fields
that a family cannot do without.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

import pager.models  # noqa: F401 - EMO is one of them

NUM_LAYERS = 4

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

NOT_SERVED = {
    "axk2": "layer 0 is of the kind 'indexed_attention'",
    "deepseek_v32": "layer 0 is of the kind 'indexed_attention'",
    "deepseek_v4": "layer 0 is of the kind 'heavily_compressed_attention'",
    "dots3_note_text": "layer 0 is of the kind 'indexed_attention'",
    "glm_moe_dsa": "layer 0 is of the kind 'indexed_attention'",
    "hy_v4": "layer 0 is of the kind 'indexed_attention'",
    "inkling2_text": "layer 0 is of the kind 'hybrid_sliding'",
    "inkling_text": "layer 0 is of the kind 'hybrid_sliding'",
    "minimax": "layer 1 is of the kind 'linear_attention'",
    "qwen4_exp_text": "layer 0 is of the kind 'linear_attention'",
}
"""Families that only the library runs, and what they are told."""


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


def saved_family(name: str, path: Path) -> PreTrainedModel:
    """A random model of a family, as plain transformers loads what it saved at `path`."""
    config_class = FAMILIES[name]
    torch.manual_seed(0)
    made = model_class(config_class)(small_config(config_class)).eval()
    for parameter_name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in parameter_name else 0.0, std=0.15)
    made.save_pretrained(path)
    return model_class(config_class).from_pretrained(path, dtype=torch.float32).eval()
