"""Small random checkpoints in the formats that others publish experts in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from pager.models import EmoConfig, EmoForCausalLM
from pager.models.open_model import OpenModel
from pager.store.pack import pack
from pager.store.pack_format import RecordFormat
from tests.support.checkpoints import add_to_config, lively, saved

BLOCK = 128
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def qwen3_moe(moe_intermediate_size: int = 128) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=moe_intermediate_size))


def deepseek_v3() -> PreTrainedModel:
    """Whose kv_a_proj_with_mqa ends within a block, as that of the released ones does."""
    own = {"moe_intermediate_size": 128, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
    latent = {"q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 64}
    groups = {"n_group": 2, "topk_group": 1, "num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **own, **latent, **groups}))


def gpt_oss() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=8, layer_types=kinds, sliding_window=4))


def fp8_checkpoint(model: PreTrainedModel, path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The model with its linear layers in 8 bits, as DeepSeek publishes them; and the values that they stand for."""
    saved(lively(model, std=0.08), path)
    tensors, decoded = load_file(path / "model.safetensors"), {}
    for name in [each for each in tensors if each.endswith(("_proj.weight", "_mqa.weight"))]:
        stored, scales, decoded[name] = in_blocks(tensors[name])
        tensors |= {name: stored, f"{name}_scale_inv": scales}
    save_file(tensors, path / "model.safetensors")
    block = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    add_to_config(path, quantization_config=block)
    return path, decoded


def in_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` in 8 bits, a scale for each block of 128 x 128, and what the two stand for."""
    scales = torch.empty(-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
    stored, decoded = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    for row, column in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
        where = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
        scales[row, column] = weight[where].abs().max() / 448
        stored[where] = (weight[where] / scales[row, column]).to(torch.float8_e4m3fn)
        decoded[where] = stored[where].float() * scales[row, column]
    return stored, scales, decoded


def mxfp4_checkpoint(path: Path) -> Path:
    """gpt-oss with its experts' matrices in random blocks of 4 bits."""
    saved(lively(gpt_oss(), std=0.08), path)
    tensors, draws = load_file(path / "model.safetensors"), torch.Generator().manual_seed(2)
    for name in [each for each in tensors if each.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), generator=draws, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            121, 124, (experts, outputs, inputs // 32), generator=draws, dtype=torch.uint8
        )
    save_file(tensors, path / "model.safetensors")
    add_to_config(path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return path


def compressed_checkpoint(path: Path, num_bits: int) -> Path:
    """Qwen3-MoE with its linear layers packed by compressed-tensors: 4 bits in groups of 32, or 8 an output.

    With transformers that decode experts only, these alone.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    part = ".weight" if hasattr(CompressedTensorsHfQuantizer, "serialized_names") else ".experts."
    saved(lively(qwen3_moe(), std=0.08), path)
    tensors, group, most = load_file(path / "model.safetensors"), 32 if num_bits == 4 else None, 2 ** (num_bits - 1) - 1
    for name in [each for each in tensors if each.endswith("_proj.weight") and part in each]:
        weight = tensors.pop(name)
        groups = weight.unflatten(1, (-1, group or weight.shape[1]))
        scales = (groups.abs().amax(2) / most).bfloat16()
        steps = (groups / scales.float()[..., None]).round().clamp(-most - 1, most).to(torch.int8).flatten(1)
        tensors[f"{name}_packed"], tensors[f"{name}_scale"] = pack_to_int32(steps, num_bits), scales
        tensors[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(tensors, path / "model.safetensors")
    strategy = {"strategy": "group" if group else "channel", "group_size": group}
    groups_of = {"weights": {"num_bits": num_bits, "type": "int", "symmetric": True, **strategy}, "targets": ["Linear"]}
    packed: dict[str, Any] = {"format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    if part == ".experts.":
        packed["ignore"] = ["lm_head", "re:.*self_attn.*"]
    method = {"quant_method": "compressed-tensors", "config_groups": {"group_0": groups_of}}
    add_to_config(path, quantization_config=method | packed)
    return path


GROUP = 32


def in_groups(weight_OI: Tensor, num_bits: int, group_I: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps [I, O], and zeros and scales [G, O], of least and greatest weights of the groups that inputs are in."""
    most, num_groups = 2**num_bits - 1, int(group_I.max()) + 1
    parts = [weight_OI[:, group_I == group] for group in range(num_groups)]
    least = torch.stack([part.amin(1) for part in parts]).clamp(max=0)
    greatest = torch.stack([part.amax(1) for part in parts]).clamp(min=0)
    scales_GO = ((greatest - least) / most).half()
    zeros_GO = (-least / scales_GO.float()).round().clamp(0, most).long()
    steps_IO = (weight_OI.t() / scales_GO.float()[group_I] + zeros_GO[group_I]).round().clamp(0, most).long()
    return steps_IO, zeros_GO, scales_GO


def in_words(numbers: Tensor, num_bits: int, dim: int) -> Tensor:
    """Numbers that follow each other along `dim` in words of 32 bits, the first in the lowest."""
    each = numbers.movedim(dim, -1).unflatten(-1, (-1, 32 // num_bits))
    words = sum(each[..., place] << (num_bits * place) for place in range(each.shape[-1]))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()


def gptq_parts(weight_OI: Tensor, num_bits: int, kind: str, *, in_order: bool) -> tuple[dict[str, Tensor], Tensor]:
    """A weight as GPTQ stores it, and what that stands for; groups of any inputs unless they are `in_order`."""
    inputs = weight_OI.shape[1]
    order = torch.arange(inputs) if in_order else torch.randperm(inputs, generator=torch.Generator().manual_seed(4))
    group_I = order // GROUP
    steps_IO, zeros_GO, scales_GO = in_groups(weight_OI, num_bits, group_I)
    stored_zeros = (zeros_GO - 1) % 2**num_bits if kind == "gptq" else zeros_GO
    parts = {
        "qweight": in_words(steps_IO, num_bits, 0),
        "qzeros": in_words(stored_zeros, num_bits, 1),
        "scales": scales_GO,
        "g_idx": group_I.int(),
    }
    return parts, ((steps_IO - zeros_GO[group_I]) * scales_GO.float()[group_I]).t()


def awq_parts(weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A weight as AWQ stores it, and what that stands for."""
    group_I = torch.arange(weight_OI.shape[1]) // GROUP
    steps_IO, zeros_GO, scales_GO = in_groups(weight_OI, 4, group_I)

    def interleaved(numbers: Tensor) -> Tensor:
        eights = numbers.unflatten(1, (-1, 8))
        return in_words(eights[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4, 1)

    parts = {"qweight": interleaved(steps_IO), "qzeros": interleaved(zeros_GO), "scales": scales_GO}
    return parts, ((steps_IO - zeros_GO[group_I]) * scales_GO.float()[group_I]).t()


def checkpoint_in_parts(
    path: Path, parts_of: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]], **config: Any
) -> tuple[Path, Path]:
    """Qwen3-MoE whose linear layers are stored in parts, one layer's output projection apart; and beside it what
    these stand for, in float32.
    """
    plain = saved(lively(qwen3_moe(), std=0.08), path / "plain")
    saved(qwen3_moe(), path / "quantised")
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    kept = ("model.layers.1.self_attn.o_proj.weight",)
    for name in [each for each in tensors if each.endswith("_proj.weight") and each not in kept]:
        parts, decoded = parts_of(stored.pop(name))
        tensors[name] = decoded.contiguous()
        stored |= {name.replace("weight", end): part for end, part in parts.items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, path / "quantised" / "model.safetensors", metadata={"format": "pt"})
    add_to_config(path / "quantised", quantization_config=config)
    return path / "quantised", plain


def gptq_checkpoint(path: Path, num_bits: int = 4, kind: str = "gptq", *, in_order: bool = False) -> tuple[Path, Path]:
    config = {"quant_method": "gptq", "bits": num_bits, "group_size": GROUP, "checkpoint_format": kind}
    return checkpoint_in_parts(path, lambda weight: gptq_parts(weight, num_bits, kind, in_order=in_order), **config)


def awq_checkpoint(path: Path) -> tuple[Path, Path]:
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return checkpoint_in_parts(path, awq_parts, **config)


def nvfp4_parts(weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A weight as compressed-tensors stores it in NVFP4, and what its own decompressor makes of that."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import quant_scheme

    scheme = quant_scheme.QuantizationScheme(**quant_scheme.NVFP4, targets=["Linear"])
    groups = weight_OI.unflatten(1, (-1, 16)).abs().amax(2)
    whole = 448 * 6 / groups.max().reshape(1)
    scales = (groups / 6 * whole).to(torch.float8_e4m3fn)
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    plain = {"weight": weight_OI, "weight_scale": scales.float(), "weight_global_scale": whole}
    parts = compressor.compress(plain, scheme)
    return parts, compressor.decompress(parts, scheme)["weight"]


def nvfp4_checkpoint(path: Path) -> tuple[Path, Path]:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    group = {"weights": weights, "targets": ["Linear"]}
    kind = {"format": "nvfp4-pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **kind}
    return checkpoint_in_parts(path, nvfp4_parts, **config)


def number_parts(weight_OI: Tensor, kind: str, strategy: str) -> tuple[dict[str, Tensor], Tensor]:
    """A weight as compressed-tensors stores it in 8 bits, and what that stands for; `int` has its least weight as -128
    and its largest as 127, and so zeros.
    """
    rows, columns = weight_OI.shape
    size = {"tensor": (rows, columns), "channel": (1, columns), "group": (1, GROUP), "block": (40, 48)}[strategy]
    padded = torch.nn.functional.pad(weight_OI, (0, -columns % size[1], 0, -rows % size[0]))
    blocks = padded.unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0])).transpose(1, 2)
    if kind == "float":
        scales = (blocks.abs().amax((2, 3)) / 448).bfloat16()
        zeros = torch.zeros(scales.shape, dtype=torch.int8)
        numbers = (blocks / scales.float()[..., None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        least, most = blocks.amin((2, 3)).clamp(max=0), blocks.amax((2, 3)).clamp(min=0)
        scales = ((most - least) / 255).bfloat16()
        zeros = (-128 - least / scales.float()).round().clamp(-128, 127).to(torch.int8)
        steps = (blocks / scales.float()[..., None, None]).round() + zeros.float()[..., None, None]
        numbers = steps.clamp(-128, 127).to(torch.int8)
    decoded = (numbers.float() - zeros.float()[..., None, None]) * scales.float()[..., None, None]
    stored, expected = (
        each.transpose(1, 2).flatten(0, 1).flatten(1)[:rows, :columns].contiguous() for each in (numbers, decoded)
    )
    shape = (1,) if strategy == "tensor" else scales.shape
    parts = {"weight": stored, "weight_scale": scales.reshape(shape)}
    return parts | ({"weight_zero_point": zeros.reshape(shape)} if kind == "int" else {}), expected


def number_config(kind: str, strategy: str) -> dict[str, Any]:
    all_sizes: dict[str, dict[str, Any]] = {"group": {"group_size": GROUP}, "block": {"block_structure": [40, 48]}}
    sizes = all_sizes.get(strategy, {})
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": kind == "float", **sizes}
    activations = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True}
    group = {"weights": weights, "input_activations": activations, "targets": ["Linear"]}
    named = {"format": f"{kind}-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **named}


def number_checkpoint(path: Path, kind: str, strategy: str) -> tuple[Path, Path]:
    return checkpoint_in_parts(
        path, lambda weight: number_parts(weight, kind, strategy), **number_config(kind, strategy)
    )


def modelopt_fp8_checkpoint(path: Path) -> tuple[Path, Path]:
    """One scale a weight, without dimensions."""

    def parts_of(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, decoded = number_parts(weight, "float", "tensor")
        return parts | {"weight_scale": parts["weight_scale"].float().reshape(())}, decoded

    return checkpoint_in_parts(path, parts_of, quant_method="modelopt", quant_algo="FP8", ignore=["lm_head"])


def modelopt_parts(weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same as modelopt stores it, whose overall scale is the inverse."""
    parts, _ = nvfp4_parts(weight_OI)
    whole = 1 / parts["weight_global_scale"]
    stored = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"], "weight_scale_2": whole}
    return stored, nvfp4_decoded({**parts, "weight_global_scale": 1 / whole})


def nvfp4_decoded(parts: dict[str, Tensor]) -> Tensor:
    """What a table of the sixteen numbers and the scales of 16 inputs make of parts, in the order of the definition."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed, scales = parts["weight_packed"].long(), parts["weight_scale"].float() / parts["weight_global_scale"]
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    groups: Tensor = numbers[halves].unflatten(1, (-1, 16))
    return (groups * scales[..., None]).flatten(1).bfloat16()


def modelopt_checkpoint(path: Path) -> tuple[Path, Path]:
    config = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt"},
        "ignore": ["lm_head"],
    }
    return checkpoint_in_parts(path, modelopt_parts, **config)


def emo() -> PreTrainedModel:
    """Three layers of eight routed experts and a shared one."""
    own = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3, "num_experts": 9}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 3, "vocab_size": 96}
    tokens = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128}
    torch.manual_seed(0)
    return EmoForCausalLM(EmoConfig(**own, **heads, **tokens))


def quantised_pack(path: Path, out: Path, kind: str, dtype: torch.dtype) -> Path:
    """The checkpoint packed with its experts in `kind`."""
    opened = OpenModel.open(path)
    with opened.checkpoint:
        pack(
            path, out, pieces=opened.pieces, experts_per_layer=opened.facts.experts_per_layer,
            shape=opened.family.shape, dtype=RecordFormat.of(kind, dtype), quantised=opened.quantised_names,
        )  # fmt: skip
    return out
