"""Writes a synthetic checkpoint as others read it: by compressed-tensors for vLLM, with a tokenizer for fastllm.

Legend: N output and K input features of a matrix, G groups of inputs that share a scale.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pager.store.pack_format import quantise_int8

GROUP = 32
WEIGHTS: dict[str, dict[str, object]] = {
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int4": {"num_bits": 4, "strategy": "group", "group_size": GROUP},
}
ACTIVATIONS: dict[str, object] = {"num_bits": 8, "strategy": "token", "dynamic": True}


class Tensors:
    """The tensors of a checkpoint's shards, by name."""

    def __init__(self, checkpoint: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            file: Any = safe_open(path, "pt")
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                self._files[name] = file
                self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def write_compressed(checkpoint: Path, out: Path, kind: str) -> None:
    """Writes the checkpoint with its experts in int8 or int4 as compressed-tensors stores them, a file a layer.

    In 8 bits activations are quantised too, by whoever reads it: vLLM has no other product for a CPU.
    """
    tensors, config = Tensors(checkpoint), json.loads((checkpoint / "config.json").read_text())
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files: dict[str, list[str]] = {}
    for name in tensors.shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "trunk"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    weight_map: dict[str, str] = {}
    for file, names in files.items():
        parts: dict[str, torch.Tensor] = {}
        for name in names:
            tensor = tensors.read(name)
            parts |= _compressed(name, tensor.float(), kind) if ".mlp.experts." in name else {name: tensor}
        save_file(parts, partial / file)
        weight_map |= dict.fromkeys(parts, file)
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (partial / "config.json").write_text(json.dumps(config | {"quantization_config": _quantization(kind)}))
    partial.rename(out)


def _compressed(name: str, weight_NK: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    stem = name.removesuffix("weight")
    if kind == "int8":
        steps, scales_N = quantise_int8(weight_NK, torch.bfloat16)
        return {name: steps, f"{stem}weight_scale": scales_N[:, None]}
    groups_NGK = weight_NK.unflatten(1, (-1, GROUP))
    scales_NG = (groups_NGK.abs().amax(2) / 7.5).to(torch.bfloat16)
    steps_NGK = (groups_NGK / scales_NG.float()[..., None]).round().clamp(-8, 7).to(torch.int32) + 8
    shifts_8 = torch.arange(0, 32, 4, dtype=torch.int32)
    packed = (steps_NGK.flatten(1).unflatten(1, (-1, 8)) << shifts_8).sum(2, dtype=torch.int32)
    shape = torch.tensor(weight_NK.shape)
    return {f"{stem}weight_packed": packed, f"{stem}weight_scale": scales_NG, f"{stem}weight_shape": shape}


def _quantization(kind: str) -> dict[str, object]:
    shared: dict[str, object] = {"type": "int", "symmetric": True, "dynamic": False}
    activations = shared | ACTIVATIONS if kind == "int8" else None
    group = {"targets": ["Linear"], "weights": shared | WEIGHTS[kind], "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    }


def with_tokenizer(plain: Path) -> Path:
    """Returns the checkpoint with the tokenizer that fastllm asks for: a token for each id."""
    out = plain.with_name(f"{plain.name}-tokenizer")
    if not out.exists():
        out.mkdir()
        for path in plain.iterdir():
            (out / path.name).symlink_to(path.resolve())
        size = json.loads((plain / "config.json").read_text())["vocab_size"]
        model = {"type": "BPE", "vocab": {f"<{number}>": number for number in range(size)}, "merges": []}
        (out / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (out / "generation_config.json").write_text("{}")
    return out
