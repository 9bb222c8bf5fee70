"""Released checkpoints by their public names and shapes, in sparse files: all of a header and none of the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pager.engine.attention import check_served
from pager.models.open_model import OpenModel
from pager.types import ExpertKey

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""By name, its dtype as safetensors calls it and its shape."""

ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}


@dataclass(frozen=True)
class Released:
    """A checkpoint as it was published: its config, and the rule of its tensors' names."""

    config: dict[str, Any]
    tensors: Tensors
    experts: tuple[int, ...]  # by layer
    top_k: int
    stored_expert_bytes: int
    unused: str | None = None  # what the names of tensors start with that no model of transformers has
    windows: frozenset[int | None] = field(default=frozenset({None}))


class Names:
    """Collects tensors. With `block`, linear layers are in FP8 with a scale for each block of so many by so many."""

    def __init__(self, dtype: str = "BF16", block: int = 0) -> None:
        self.tensors: Tensors = {}
        self._dtype, self._block = dtype, block

    def add(self, name: str, *shape: int, dtype: str | None = None) -> None:
        self.tensors[name] = (dtype or self._dtype, shape)

    def linear(self, name: str, out: int, into: int, *, bias: bool = False) -> None:
        if self._block:
            self.add(f"{name}.weight", out, into, dtype="F8_E4M3")
            blocks = math.ceil(out / self._block), math.ceil(into / self._block)
            self.add(f"{name}.weight_scale_inv", *blocks, dtype="F32")
        else:
            self.add(f"{name}.weight", out, into)
        if bias:
            self.add(f"{name}.bias", out)

    def swiglu(self, name: str, hidden: int, inner: int, parts: tuple[str, str, str]) -> None:
        gate, up, down = parts
        self.linear(f"{name}.{gate}", inner, hidden)
        self.linear(f"{name}.{up}", inner, hidden)
        self.linear(f"{name}.{down}", hidden, inner)

    def ends(self, hidden: int, vocabulary: int) -> None:
        for name in ("model.embed_tokens", "lm_head"):
            self.add(f"{name}.weight", vocabulary, hidden)
        self.add("model.norm.weight", hidden)

    def norms(self, layer: str, hidden: int, *names: str) -> None:
        for name in names:
            self.add(f"{layer}.{name}.weight", hidden)

    def attention(self, layer: str, config: Mapping[str, Any], *, bias: bool = False, out_bias: bool = False) -> None:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        width = config.get("head_dim", hidden // heads)
        for part, count in (("q", heads), ("k", config["num_key_value_heads"]), ("v", config["num_key_value_heads"])):
            self.linear(f"{layer}.self_attn.{part}_proj", count * width, hidden, bias=bias)
        self.linear(f"{layer}.self_attn.o_proj", hidden, heads * width, bias=out_bias)


GATED = ("gate_proj", "up_proj", "down_proj")
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")


def _layers(config: Mapping[str, Any], more: int = 0) -> Iterator[tuple[int, str]]:
    return ((number, f"model.layers.{number}") for number in range(config["num_hidden_layers"] + more))


def _prediction_layer(names: Names, layer: str, hidden: int, vocabulary: int) -> None:
    """What a layer that predicts the token after the next one has beside those of any other."""
    names.norms(layer, hidden, "enorm", "hnorm", "shared_head.norm")
    names.add(f"{layer}.eh_proj.weight", hidden, 2 * hidden)
    names.add(f"{layer}.embed_tokens.weight", vocabulary, hidden)
    names.add(f"{layer}.shared_head.head.weight", vocabulary, hidden)


def deepseek_v3() -> Released:
    hidden, inner, vocabulary = 7168, 2048, 129280
    config = {
        "model_type": "deepseek_v3", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 18432,
        "moe_intermediate_size": inner, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
        "max_position_embeddings": 163840, "rope_theta": 10000, "num_nextn_predict_layers": 1,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        },
    }  # fmt: skip
    names = Names(block=128)
    names.ends(hidden, vocabulary)
    for number, layer in _layers(config, more=1):
        names.norms(layer, hidden, *LLAMA_NORMS)
        attention = f"{layer}.self_attn"
        names.linear(f"{attention}.q_a_proj", 1536, hidden)
        names.linear(f"{attention}.q_b_proj", 128 * 192, 1536)
        names.linear(f"{attention}.kv_a_proj_with_mqa", 512 + 64, hidden)
        names.linear(f"{attention}.kv_b_proj", 128 * 256, 512)
        names.linear(f"{attention}.o_proj", hidden, 128 * 128)
        names.add(f"{attention}.q_a_layernorm.weight", 1536)
        names.add(f"{attention}.kv_a_layernorm.weight", 512)
        if number < 3:
            names.swiglu(f"{layer}.mlp", hidden, 18432, GATED)
            continue
        names.add(f"{layer}.mlp.gate.weight", 256, hidden)
        names.add(f"{layer}.mlp.gate.e_score_correction_bias", 256, dtype="F32")
        for part in ("shared_experts", *(f"experts.{expert}" for expert in range(256))):
            names.swiglu(f"{layer}.mlp.{part}", hidden, inner, GATED)
    _prediction_layer(names, "model.layers.61", hidden, vocabulary)
    stored = 3 * (hidden * inner + hidden * inner // 128**2 * 4)
    return Released(config, names.tensors, (0,) * 3 + (256,) * 58, 8, stored, unused="model.layers.61.")


def qwen3_30b_a3b() -> Released:
    hidden, inner = 2048, 768
    config = {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": 6144,
        "moe_intermediate_size": inner, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "sliding_window": None, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    names = Names()
    names.ends(hidden, 151936)
    for _, layer in _layers(config):
        names.norms(layer, hidden, *LLAMA_NORMS)
        names.norms(f"{layer}.self_attn", 128, "q_norm", "k_norm")
        names.attention(layer, config)
        names.add(f"{layer}.mlp.gate.weight", 128, hidden)
        for expert in range(128):
            names.swiglu(f"{layer}.mlp.experts.{expert}", hidden, inner, GATED)
    return Released(config, names.tensors, (128,) * 48, 8, 3 * hidden * inner * 2)


def gpt_oss_20b() -> Released:
    hidden = 2880
    config = {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": hidden, "intermediate_size": hidden,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "rope_theta": 150000, "attention_bias": True, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        },
    }  # fmt: skip
    names = Names()
    names.ends(hidden, 201088)
    for _, layer in _layers(config):
        names.norms(layer, hidden, *LLAMA_NORMS)
        names.attention(layer, config, bias=True, out_bias=True)
        names.add(f"{layer}.self_attn.sinks", 64)
        names.linear(f"{layer}.mlp.router", 32, hidden, bias=True)
        for part, rows in (("gate_up_proj", 2 * hidden), ("down_proj", hidden)):
            names.add(f"{layer}.mlp.experts.{part}_blocks", 32, rows, hidden // 32, 16, dtype="U8")
            names.add(f"{layer}.mlp.experts.{part}_scales", 32, rows, hidden // 32, dtype="U8")
            names.add(f"{layer}.mlp.experts.{part}_bias", 32, rows)
    stored = 3 * (hidden * (hidden // 32) * 17 + hidden * 2)
    return Released(config, names.tensors, (32,) * 24, 4, stored, windows=frozenset({128, None}))


def glm_4_5_air() -> Released:
    hidden, inner, vocabulary = 4096, 1408, 151552
    config = {
        "model_type": "glm4_moe", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 10944,
        "moe_intermediate_size": inner, "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 0.5, "rope_theta": 1000000, "attention_bias": True, "use_qk_norm": False,
        "max_position_embeddings": 131072, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    names = Names()
    names.ends(hidden, vocabulary)
    for number, layer in _layers(config, more=1):
        names.norms(layer, hidden, *LLAMA_NORMS)
        names.attention(layer, config, bias=True)
        if number < 1:
            names.swiglu(f"{layer}.mlp", hidden, 10944, GATED)
            continue
        names.add(f"{layer}.mlp.gate.weight", 128, hidden)
        names.add(f"{layer}.mlp.gate.e_score_correction_bias", 128, dtype="F32")
        for part in ("shared_experts", *(f"experts.{expert}" for expert in range(128))):
            names.swiglu(f"{layer}.mlp.{part}", hidden, inner, GATED)
    _prediction_layer(names, "model.layers.46", hidden, vocabulary)
    return Released(config, names.tensors, (0, *(128,) * 45), 8, 3 * hidden * inner * 2, unused="model.layers.46.")


def mixtral_8x7b() -> Released:
    hidden, inner = 4096, 14336
    config = {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None,
    }  # fmt: skip
    names = Names()
    names.ends(hidden, 32000)
    for _, layer in _layers(config):
        names.norms(layer, hidden, *LLAMA_NORMS)
        names.attention(layer, config)
        names.add(f"{layer}.block_sparse_moe.gate.weight", 8, hidden)
        for expert in range(8):
            names.swiglu(f"{layer}.block_sparse_moe.experts.{expert}", hidden, inner, ("w1", "w3", "w2"))
    return Released(config, names.tensors, (8,) * 32, 2, 3 * hidden * inner * 2)


def olmoe_1b_7b() -> Released:
    hidden, inner = 2048, 1024
    config = {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    }  # fmt: skip
    names = Names()
    names.ends(hidden, 50304)
    for _, layer in _layers(config):
        names.norms(layer, hidden, *LLAMA_NORMS)
        names.norms(f"{layer}.self_attn", hidden, "q_norm", "k_norm")
        names.attention(layer, config)
        names.add(f"{layer}.mlp.gate.weight", 64, hidden)
        for expert in range(64):
            names.swiglu(f"{layer}.mlp.experts.{expert}", hidden, inner, GATED)
    return Released(config, names.tensors, (64,) * 16, 8, 3 * hidden * inner * 2)


def emo_1b14b_1t() -> Released:
    hidden, inner = 2048, 1024
    config = {
        "model_type": "emo", "vocab_size": 100352, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 128,
        "num_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": False, "max_position_embeddings": 4096,
        "rope_theta": 500000, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "output_router_logits": True,
    }  # fmt: skip
    names = Names(dtype="F32")
    names.ends(hidden, 100352)
    for _, layer in _layers(config):
        names.norms(layer, hidden, "pre_attention_layernorm", "pre_feedforward_layernorm")
        names.attention(layer, config)
        names.add(f"{layer}.mlp.gate.weight", 128, hidden)
        for expert in range(128):
            names.swiglu(f"{layer}.mlp.experts.{expert}", hidden, inner, GATED)
    return Released(config, names.tensors, (128,) * 16, 7, 3 * hidden * inner * 4)


RELEASED = {
    "DeepSeek-V3": deepseek_v3,
    "Qwen3-30B-A3B": qwen3_30b_a3b,
    "gpt-oss-20b": gpt_oss_20b,
    "GLM-4.5-Air": glm_4_5_air,
    "Mixtral-8x7B": mixtral_8x7b,
    "OLMoE-1B-7B": olmoe_1b_7b,
    "Emo_1b14b_1T": emo_1b14b_1t,
}


def write_header(folder: Path, released: Released) -> None:
    """The config, and one file with a header for all tensors, followed by a hole as large as they are."""
    (folder / "config.json").write_text(json.dumps(released.config))
    header, end = {}, 0
    for name, (dtype, shape) in released.tensors.items():
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_of_a_released_checkpoint_has_its_place(name: str, tmp_path: Path) -> None:
    released = RELEASED[name]()
    write_header(tmp_path, released)
    opened = OpenModel.open(tmp_path, "bfloat16")
    with opened.checkpoint:
        opened.check()
        layers = check_served(opened)
        unused = opened.layout.unused
        first = next(layer for layer, count in enumerate(released.experts) if count)
        pieces = opened.pieces(ExpertKey(first, 1))
    assert opened.facts.experts_per_layer == released.experts
    assert max(opened.facts.top_k_per_layer) == released.top_k
    assert {each.window for each in layers} == released.windows
    expected = {name for name in released.tensors if released.unused and name.startswith(released.unused)}
    assert set(unused) == expected
    assert sum(_stored_bytes(piece, released.tensors) for piece in pieces) == released.stored_expert_bytes


def _stored_bytes(pieces: Any, tensors: Tensors) -> int:
    """Of one parameter of one expert."""
    total = 0
    for piece in getattr(pieces, "pieces", pieces):
        dtype, shape = tensors[piece if isinstance(piece, str) else piece.name]
        total += math.prod(shape if isinstance(piece, str) else shape[1:]) * ITEM_BYTES[dtype]
    return total
