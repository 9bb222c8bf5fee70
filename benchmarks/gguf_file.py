"""Writes a synthetic checkpoint as a GGUF file, as llama.cpp's own converter would: in bf16, q8_0 or q4_k_m.

Legend: E experts of a layer, N output and K input features of a matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from benchmarks.peer_files import Tensors

Quantise = Callable[[int, np.ndarray], np.ndarray]
"""`quantise(kind, rows_NK)`: the bytes of each row."""

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
FILE_TYPES["q4_k_m"] = gguf.LlamaFileType.MOSTLY_Q4_K_M
"""The formats that can be written."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: its parts in the checkpoint (one, or an expert each), and what they are stored as."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind

    def encoded(self, tensors: Tensors, quantise: Quantise) -> np.ndarray:
        return np.concatenate([_encoded(tensors.read(part), self.kind, quantise) for part in self.parts])


def write_gguf(checkpoint: Path, out: Path, file_type: str, quantise: Quantise, *, plain_trunk: bool = False) -> None:
    """The file appears whole or not at all. `plain_trunk` leaves all but the experts in bf16."""
    tensors, config = Tensors(checkpoint), json.loads((checkpoint / "config.json").read_text())
    partial = out.with_name(f"{out.name}.partial")
    writer = gguf.GGUFWriter(partial, {"olmoe": "olmoe", "qwen3_moe": "qwen3moe"}[config["model_type"]])
    _describe(writer, config, file_type)
    stored = list(_stored(tensors, config, file_type, plain_trunk=plain_trunk))
    for each in stored:
        num_bytes = int(np.prod(each.shape[:-1])) * _row_bytes(each.shape[-1], each.kind)
        writer.add_tensor_info(each.name, each.shape, np.dtype(np.float32), num_bytes, each.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in stored:
        writer.write_tensor_data(each.encoded(tensors, quantise))
    writer.close()
    partial.rename(out)


def _describe(writer: gguf.GGUFWriter, config: dict[str, object], file_type: str) -> None:
    number: dict[str, int] = {name: value for name, value in config.items() if isinstance(value, int)}
    writer.add_context_length(number["max_position_embeddings"])
    writer.add_embedding_length(number["hidden_size"])
    writer.add_block_count(number["num_hidden_layers"])
    writer.add_feed_forward_length(number["intermediate_size"])
    writer.add_head_count(number["num_attention_heads"])
    writer.add_head_count_kv(number["num_key_value_heads"])
    writer.add_rope_freq_base(float(str(config["rope_theta"])))
    writer.add_layer_norm_rms_eps(float(str(config["rms_norm_eps"])))
    writer.add_expert_count(number["num_experts"])
    writer.add_expert_used_count(number["num_experts_per_tok"])
    if "moe_intermediate_size" in number:
        writer.add_expert_feed_forward_length(number["moe_intermediate_size"])
    if "head_dim" in number:
        writer.add_key_length(number["head_dim"])
        writer.add_value_length(number["head_dim"])
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(number["vocab_size"])
    writer.add_tokenizer_model("none")


def _stored(tensors: Tensors, config: dict[str, int], file_type: str, *, plain_trunk: bool) -> Iterator[Stored]:
    num_layers = config["num_hidden_layers"]
    for name, shape in tensors.shapes.items():
        if ".mlp.experts." in name:
            continue
        stem, layer = name.removesuffix(".weight"), None
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            layer = int(number)
        own = NAMES[stem]
        is_exact = len(shape) == 1 or own == "ffn_gate_inp"
        kind = Kind.F32 if is_exact else _kind(own, layer, num_layers, "bf16" if plain_trunk else file_type)
        yield Stored(f"{own if layer is None else f'blk.{layer}.{own}'}.weight", (name,), shape, kind)
    for layer in range(num_layers):
        for part, own in EXPERTS.items():
            names = tuple(
                f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight" for expert in range(config["num_experts"])
            )
            shape = (len(names), *tensors.shapes[names[0]])
            yield Stored(f"blk.{layer}.{own}.weight", names, shape, _kind(own, layer, num_layers, file_type))


def _kind(own: str, layer: int | None, num_layers: int, file_type: str) -> Kind:
    """q4_k_m has 6 bits for the head, and in a part of the layers for values and what leads down."""
    if file_type != "q4_k_m":
        return {"bf16": Kind.BF16, "q8_0": Kind.Q8_0}[file_type]
    if own == "output":
        return Kind.Q6_K
    is_favoured = layer is not None and (
        layer < num_layers // 8 or layer >= 7 * num_layers // 8 or (layer - num_layers // 8) % 3 == 2
    )
    return Kind.Q6_K if is_favoured and own in ("attn_v", "ffn_down_exps") else Kind.Q4_K


def _encoded(tensor: torch.Tensor, kind: Kind, quantise: Quantise) -> np.ndarray:
    if kind == Kind.BF16:
        return tensor.to(torch.bfloat16).contiguous().flatten().view(torch.uint8).numpy()
    exact = tensor.float().contiguous().numpy()
    if kind == Kind.F32:
        return exact.view(np.uint8).reshape(-1)
    return quantise(kind.value, exact).reshape(-1)


def _row_bytes(num_elements: int, kind: Kind) -> int:
    sizes: tuple[int, int] = gguf.GGML_QUANT_SIZES[kind]
    block, num_bytes = sizes
    return num_elements // block * num_bytes
