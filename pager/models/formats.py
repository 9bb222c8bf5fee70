"""The formats that a checkpoint's weights can be in beside plain floats: which are decoded, and which are refused.

transformers reads each format by operations that its loader applies to whole layers: a quantised tensor and what it is
scaled by become the tensor that they stand for. Here the same operations decode one expert, or one tensor of the trunk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AutoHfQuantizer

from pager.errors import CheckpointError, UnsupportedModel
from pager.reading import one_line, shown
from pager.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer

DECODED = ("fp8", "mxfp4", "compressed-tensors")
"""The methods whose tensors are decoded, as a config's `quant_method` names them."""

_QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|absmax|quant_map|(weight|input)_scale(_inv)?|scales|weight_packed)$")
_PACKED = frozenset({torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2})
_PACKED_ENDS = ("weight", "_blocks", "_scales")


@dataclass(frozen=True, slots=True)
class Format:
    """A format whose tensors are decoded when they are read. `words` is its name with its sizes."""

    method: str
    words: str
    quantiser: HfQuantizer = field(repr=False, compare=False)


def format_of(checkpoint: Checkpoint) -> Format | None:
    """The format of a checkpoint's weights; None where they are plain floats, whatever its config says.

    Raises UnsupportedModel, which names the method and its bits, and CheckpointError for a config that is none.
    """
    config = quantisation_of(checkpoint)
    found = _quantised_name(checkpoint, config)
    if found is None:
        return None
    method = config.get("quant_method")
    if method not in DECODED:
        raise _refused(checkpoint, config, found)
    try:
        read = AutoHfQuantizer.from_config({**config, "dequantize": True}, pre_quantized=True)
        if method == "compressed-tensors":
            read.validate_environment()  # which chooses how it reads; those of others ask for more than reading takes
    except ImportError as error:
        raise UnsupportedModel(
            f"{checkpoint.path} is quantised by {shown(method)}, which takes a package that is not installed "
            f"({one_line(error)}); install expert-pager[formats]"
        ) from error
    except Exception as error:  # each method checks its own fields in its own way
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} is not valid: its quantization_config: {one_line(error)}"
        ) from error
    return Format(str(method), _words(config), read)


def conversions_of(model: PreTrainedModel, found: Format | None) -> list[Any]:
    """transformers' renamings and converters for checkpoints of `model`, which decode where `found` is a format."""
    conversions: list[Any] = get_model_conversion_mapping(model, None, found.quantiser if found else None)
    for each in conversions:
        if isinstance(each, WeightConverter):
            each.operations = [_for_partial_blocks(operation) for operation in each.operations]
    return conversions


def decodes(operation: Any) -> bool:
    """The operation makes plain tensors of quantised ones."""
    return hasattr(operation, "hf_quantizer")


class _Fp8Dequantize(Fp8Dequantize):  # type: ignore[misc]
    """transformers' own for weights that end within a block, as DeepSeek-V3's `kv_a_proj_with_mqa` do.

    It takes the sizes of blocks from the number of scales, and so would refuse those weights or share out their scales
    evenly.
    """

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        rows, columns = quantized.shape[-2:]
        asked = self.hf_quantizer.quantization_config.weight_block_size or (rows, columns)
        block = tuple(min(pair) for pair in zip(asked, (rows, columns), strict=True))
        grid = tuple(-(-size // of_block) for size, of_block in zip((rows, columns), block, strict=True))
        if tuple(scales.shape[-2:]) != grid or not (rows % block[0] or columns % block[1]):
            return super()._dequantize_one(quantized, scales, output_dtype)  # type: ignore[no-any-return]
        whole = quantized.new_zeros((*quantized.shape[:-2], grid[0] * block[0], grid[1] * block[1]))
        whole[..., :rows, :columns] = quantized
        decoded: Tensor = super()._dequantize_one(whole, scales, output_dtype)
        return decoded[..., :rows, :columns]


def _for_partial_blocks(operation: Any) -> Any:
    return _Fp8Dequantize(operation.hf_quantizer) if type(operation) is Fp8Dequantize else operation


def quantisation_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Returns what the config says of quantisation, also where a checkpoint has other models beside the language
    model.
    """
    text = checkpoint.config.get("text_config")
    holders = (checkpoint.config, text if isinstance(text, Mapping) else {})
    found = (holder.get("quantization_config") for holder in holders)
    return next((each for each in found if isinstance(each, Mapping)), {})


def _quantised_name(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """A tensor that stands for another one; None where there is none."""
    specs = checkpoint.specs.values()
    found = (spec.name for spec in specs if _QUANTISED.search(spec.name))
    packed = (spec.name for spec in specs if config and spec.dtype in _PACKED and spec.name.endswith(_PACKED_ENDS))
    return next(found, None) or next(packed, None)


def _bits(config: Mapping[str, Any]) -> Any:
    bits = next((config[name] for name in ("bits", "w_bit", "weight_bits", "num_bits") if name in config), None)
    return bits or (4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else None)


def _words(config: Mapping[str, Any]) -> str:
    match config.get("quant_method"):
        case "fp8":
            block = config.get("weight_block_size", (128, 128))
            return f"fp8 in blocks of {block[0]} x {block[1]}" if block else "fp8"
        case "mxfp4":
            return "mxfp4 in blocks of 32"
        case method:
            return f"{method}, {shown(config.get('format', 'of no named format'))}"


def _refused(checkpoint: Checkpoint, config: Mapping[str, Any], tensor: str) -> UnsupportedModel:
    method, bits = config.get("quant_method", "a method that its config does not name"), _bits(config)
    return UnsupportedModel(
        f"{checkpoint.path} is quantised by {shown(method)}{f' to {shown(bits)} bits' if bits else ''} (tensor "
        f"{tensor!r}), which is not supported: experts are read as float32, bfloat16 or float16, or decoded from "
        f"{', '.join(DECODED)}. Fetch the checkpoint that it was made from, or load it with transformers, dequantize() "
        "it and save that, which `expert-pager pack --experts int8` makes small again"
    )
