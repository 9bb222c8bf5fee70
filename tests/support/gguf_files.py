"""Small random models in GGUF files, written by the gguf package as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.support.checkpoints import lively

SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")
SIZES: dict[str, Any] = {
    "vocab_size": 261, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "pad_token_id": 260, "bos_token_id": 258, "eos_token_id": 259, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
}  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ bos_token }}{{ message['content'] }}{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta", "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out", "mlp.router": "ffn_gate_inp",
}  # fmt: skip
"""The tensors' names as llama.cpp has them, of the last parts of a model's."""


def tokenizer() -> Tokenizer:
    """Bytes, two words of them, and the special tokens."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet | {"he": 256, "the": 257}, merges=[("h", "e"), ("t", "he")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(list(SPECIAL))
    return made


def qwen3_moe(**fields: Any) -> PreTrainedModel:
    config = {**SIZES, "num_experts": 8, "moe_intermediate_size": 256, "norm_topk_prob": True, **fields}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))


def qwen2_moe() -> PreTrainedModel:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    own = {"num_experts": 8, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **own))


def minimax_m2() -> PreTrainedModel:
    return MiniMaxM2ForCausalLM(MiniMaxM2Config(**SIZES, num_local_experts=8, rotary_dim=32))


def qwen3_5_moe() -> PreTrainedModel:
    """A layer of linear attention and one of the usual kind."""
    linear = {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
    }  # fmt: skip
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    experts = {"num_experts": 8, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**{**SIZES, **linear, **experts, "rope_parameters": rope}))


def gpt_oss() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    own = {"num_local_experts": 8, "layer_types": kinds, "sliding_window": 4, "rope_parameters": {**rope, **yarn}}
    return GptOssForCausalLM(GptOssConfig(**{**SIZES, **own}))


ARCHITECTURES = {
    "gpt_oss": "gpt-oss",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "minimax_m2": "minimax-m2",
}


def blocks(values: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """Values in blocks of a kind; random ones where the package reads a kind and does not write it."""
    number = GGMLQuantizationType[kind]
    try:
        made: np.ndarray[Any, Any] = gguf.quantize(values.float().numpy(), number)
        return made
    except NotImplementedError:
        elements, nbytes = gguf.GGML_QUANT_SIZES[number]
        draws = np.random.default_rng(values.numel())
        made = draws.integers(0, 256, (*values.shape[:-1], values.shape[-1] // elements, nbytes), np.uint8)
        scales = {"Q4_K": (0, 2), "Q6_K": (nbytes - 2,), "Q5_K": (0, 2)}[kind]
        for place in scales:  # in float16, small enough for the weights of a model
            made[..., place : place + 2] = np.array([2e-4], np.float16).view(np.uint8)
        return made.reshape(*values.shape[:-1], -1)


def gguf_file(
    model: PreTrainedModel, path: Path, *, experts: str = "Q8_0", down: str | None = None, trunk: str = "F32",
    metadata: Mapping[str, int | float | str] | None = None, tensors_a_file: int = 0,
) -> Path:  # fmt: skip
    """Writes the model, its experts in blocks of the kind `experts`, and `down` for the second matrix of each.

    Returns the first of its files, which are several where each has so many tensors.
    """
    config = model.config
    writer = GGUFWriter(path, ARCHITECTURES[config.model_type], split_max_tensors=tensors_a_file)
    _add_fields(writer, config, {} if metadata is None else metadata)
    torch.manual_seed(0)
    for name, parameter in lively(model, std=0.08).state_dict().items():
        layer = f"blk.{name.split('.')[2]}." if name.startswith("model.layers.") else ""
        stem, _, end = name.rpartition(".")
        if config.model_type == "gpt_oss" and _add_gpt_oss(writer, layer, end, parameter, experts):
            continue
        if end in ("gate_up_proj", "down_proj"):
            parts = {"gate": parameter.chunk(2, 1)[0], "up": parameter.chunk(2, 1)[1]}
            for part, values in (parts if end == "gate_up_proj" else {"down": parameter}).items():
                kind = experts if part != "down" or down is None else down
                _add(writer, f"{layer}ffn_{part}_exps.weight", values, kind)
        elif end in ("A_log", "dt_bias"):
            values = parameter[_tiled(config, 1)]
            name = "ssm_a" if end == "A_log" else "ssm_dt.bias"
            _add(writer, f"{layer}{name}", -values.exp() if end == "A_log" else values, "F32")
        elif end == "e_score_correction_bias":
            _add(writer, f"{layer}exp_probs_b.bias", parameter, "F32")
        else:
            known, values = next(to for part, to in NAMES.items() if stem.endswith(part)), parameter
            if config.model_type == "qwen3_5_moe_text":
                known, values = _of_qwen3_5(known, parameter, config)
            if config.model_type == "gpt_oss" and known == "ffn_norm":
                known = "post_attention_norm"
            kind = trunk if values.dim() == 2 and "ffn_gate_inp" not in known and "ssm" not in known else "F32"
            _add(writer, f"{layer}{known}.{end}", values.squeeze(0), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*"), default=path)


def _add_gpt_oss(writer: GGUFWriter, layer: str, end: str, values: Tensor, kind: str) -> bool:
    """Adds what gpt-oss has in a way of its own: gates and ups in turn, outputs last, biases, sinks."""
    if end == "sinks":
        _add(writer, f"{layer}attn_sinks.weight", values, "F32")
        return True
    if not end.startswith(("gate_up_proj", "down_proj")):
        return False
    parts = {"down": values} if end.startswith("down") else {"gate": values[..., ::2], "up": values[..., 1::2]}
    for part, each in parts.items():
        is_bias = end.endswith("bias")
        stored = each if is_bias else each.transpose(1, 2)
        _add(writer, f"{layer}ffn_{part}_exps.{'bias' if is_bias else 'weight'}", stored, "F32" if is_bias else kind)
    return True


def _tiled(config: Any, head_dim: int) -> Tensor:
    """Values' heads in the order of llama.cpp: the first of each group of a key's, then the second."""
    keys = config.linear_num_key_heads
    heads = torch.arange(config.linear_num_value_heads * head_dim).reshape(keys, -1, head_dim)
    return heads.transpose(0, 1).flatten()


def _of_qwen3_5(known: str, values: Tensor, config: Any) -> tuple[str, Tensor]:
    """A tensor's name and its values as llama.cpp changes them: norms by one, and the order of values' heads."""
    wide, few = _tiled(config, config.linear_value_head_dim), _tiled(config, 1)
    queries_and_keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    match known:
        case "attn_norm" | "output_norm" | "attn_q_norm" | "attn_k_norm":
            return known, values + 1
        case "ffn_norm":
            return "post_attention_norm", values + 1
        case "attn_qkv" | "ssm_conv1d":
            return known, torch.cat([values[:queries_and_keys], values[queries_and_keys:][wide]]).squeeze(1)
        case "attn_gate":
            return known, values[wide]
        case "ssm_alpha" | "ssm_beta":
            return known, values[few]
        case "ssm_out":
            return known, values[:, wide]
    return known, values


def _add(writer: GGUFWriter, name: str, values: Tensor, kind: str) -> None:
    if kind in ("F32", "F16"):
        dtype = np.float32 if kind == "F32" else np.float16
        writer.add_tensor(name, values.contiguous().numpy().astype(dtype))
    else:
        writer.add_tensor(name, blocks(values.contiguous(), kind), raw_dtype=GGMLQuantizationType[kind])


def _add_fields(writer: GGUFWriter, config: Any, metadata: Mapping[str, int | float | str]) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if hasattr(config, "head_dim"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_5_moe_text":
        value_heads, value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        for name, number in {
            "full_attention_interval": 2, "ssm.conv_kernel": 4, "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads, "ssm.time_step_rank": value_heads,
            "ssm.inner_size": value_heads * value_dim, "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        }.items():  # fmt: skip
            writer.add_uint32(f"qwen35moe.{name}", number)
        writer.add_rope_dimension_count(16)
        writer.add_rope_dimension_sections([3, 3, 2, 0])
    if config.model_type == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    if config.model_type == "minimax_m2":
        writer.add_rope_dimension_count(config.rotary_dim)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    tokens = [token for token, _ in sorted(tokenizer().get_vocab().items(), key=lambda each: each[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(["h e", "t he"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(260)
    writer.add_chat_template(TEMPLATE)
    for name, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name, value)


def decoded_state(path: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a model of the family, as the gguf package reads and decodes them."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(values, np.float32)).reshape(*reversed(tensor.shape.tolist()))
    state = {}
    for name, parameter in model.state_dict().items():
        layer = f"blk.{name.split('.')[2]}." if name.startswith("model.layers.") else ""
        stem, _, end = name.rpartition(".")
        if end == "gate_up_proj":
            state[name] = torch.cat([found[f"{layer}ffn_{part}_exps.weight"] for part in ("gate", "up")], 1)
        elif end == "down_proj":
            state[name] = found[f"{layer}ffn_down_exps.weight"]
        elif end == "e_score_correction_bias":
            state[name] = found[f"{layer}exp_probs_b.bias"]
        else:
            known = next(to for part, to in NAMES.items() if stem.endswith(part))
            state[name] = found[f"{layer}{known}.{end}"].reshape(parameter.shape)
    return state
