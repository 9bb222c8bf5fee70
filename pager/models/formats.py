"""The formats that a checkpoint's weights can be in beside plain floats: which are decoded, and which are refused.

transformers reads some formats by operations that its loader applies to whole layers: a quantised tensor and its scales
become the tensor that they stand for. Here the same operations decode one expert, or one tensor of the trunk. Formats
that transformers leaves to packages for GPUs (GPTQ, AWQ, NVFP4) or decodes for linear layers alone (compressed-tensors
in 8 bits a weight) get an operation of the same kind here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AutoHfQuantizer

from pager.errors import CheckpointError, UnsupportedModel
from pager.gguf import PLAIN
from pager.reading import one_line, shown
from pager.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECODED = ("fp8", "mxfp4", "compressed-tensors", "modelopt", "gptq", "awq")
"""The methods whose tensors are decoded, as a config's `quant_method` names them."""

_QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|absmax|quant_map|(weight|input)_scale(_inv)?|scales|weight_packed)$")
_PACKED = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2})
_PACKED_ENDS = ("weight", "_blocks", "_scales")
_KINDS = ("checkpoint_format", "version", "quant_algo", "format")
"""The fields in which methods name their kinds."""
_BITS = ("bits", "w_bit", "weight_bits", "num_bits", "nbits")


@dataclass(frozen=True, slots=True)
class Format:
    """A format whose tensors are decoded when they are read. `words` is its name with its sizes.

    `quantiser` adds its operations to a model's conversions, as transformers' quantisers do.
    """

    method: str
    words: str
    quantiser: Any = field(repr=False, compare=False)


def format_of(checkpoint: Checkpoint) -> Format | None:
    """The format of a checkpoint's weights; None where they are plain floats, whatever its config says.

    Raises UnsupportedModel, which names the method and its bits, and CheckpointError for a config that is none.
    """
    if checkpoint.gguf is not None:
        return _blocks_of(checkpoint)
    config = quantisation_of(checkpoint)
    found = _quantised_name(checkpoint, config)
    if found is None:
        return None
    method = config.get("quant_method")
    if method not in DECODED:
        raise _refused(checkpoint, config, found)
    try:
        quantiser = _quantiser(checkpoint, config, found)
    except ImportError as error:
        raise UnsupportedModel(
            f"{checkpoint.path} is quantised by {shown(method)}, which takes a package that is not installed "
            f"({one_line(error)}); install expert-pager[formats]"
        ) from error
    except UnsupportedModel:
        raise
    except Exception as error:  # each method checks its own fields in its own way
        raise CheckpointError(
            f"{checkpoint.config_path} is not valid: its quantization_config: {one_line(error)}"
        ) from error
    return Format(str(method), _words(config), quantiser)


def conversions_of(model: PreTrainedModel, found: Format | None) -> list[Any]:
    """transformers' renamings and converters for checkpoints of `model`, which decode where `found` is a format."""
    conversions: list[Any] = get_model_conversion_mapping(model, None, found.quantiser if found else None)
    for each in conversions:
        if isinstance(each, WeightConverter):
            each.operations = [_for_partial_blocks(operation) for operation in each.operations]
    return conversions


def decodes(operation: Any) -> bool:
    """The operation makes plain tensors of quantised ones."""
    return hasattr(operation, "hf_quantizer") or isinstance(operation, FromBlocks)


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
    # Methods that are not decoded have names of their own for numbers that are not floats.
    is_other = config.get("quant_method") not in (None, *DECODED)
    ends = ("",) if is_other else _PACKED_ENDS
    packed = (spec.name for spec in specs if config and spec.dtype in _PACKED and spec.name.endswith(ends))
    return next(found, None) or next(packed, None)


def _quantiser(checkpoint: Checkpoint, config: Mapping[str, Any], tensor: str) -> Any:
    """Returns what decodes the weights of a checkpoint. Raises UnsupportedModel for a kind of the method that is not
    decoded, and what each method raises for its fields.
    """
    method, is_compressed = config.get("quant_method"), config.get("quant_method") == "compressed-tensors"
    if is_compressed and _turns_activations(config):
        raise UnsupportedModel(
            f"{checkpoint.path} turns activations while it runs (transform_config in its quantization_config), which "
            "is not supported; fetch a checkpoint that was quantised without it"
        )
    if method in _VARIANTS and not (is_compressed and _formats_within(config) <= {"pack-quantized", None}):
        parts = _VARIANTS[method](config)
        if parts is None:
            raise _refused(checkpoint, config, tensor)
        return InParts(parts)
    read = AutoHfQuantizer.from_config({**config, "dequantize": True}, pre_quantized=True)
    if is_compressed:
        _silence_notes_on_shapes()
        read.validate_environment()  # which chooses how it reads; those of others ask for more than reading takes
    return read


def _silence_notes_on_shapes() -> None:
    """Silences what compressed-tensors writes to stderr for each weight of which it is given the shape alone."""
    with suppress(ImportError):  # earlier versions write nothing
        from loguru import logger

        logger.disable("compressed_tensors.compressors.pack_quantized.base")


def _bits(config: Mapping[str, Any]) -> Any:
    """The bits that a config gives a weight, however deep it says so."""
    named = (value for name, value in _fields(config) if name in _BITS and isinstance(value, int | float))
    return next(named, None) or (4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else None)


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value)
        else:
            yield name, value


def _words(config: Mapping[str, Any]) -> str:
    match config.get("quant_method"):
        case "fp8":
            block = config.get("weight_block_size", (128, 128))
            return f"fp8 in blocks of {block[0]} x {block[1]}" if block else "fp8"
        case "mxfp4":
            return "mxfp4 in blocks of 32"
        case "gptq" | "awq" as method:
            group = config.get("group_size", 128)
            bits = config.get("bits", config.get("w_bit"))
            return f"{method}, {bits} bits in groups of {group if group != -1 else 'all inputs'}"
        case "modelopt":
            is_fp8 = str(config.get("quant_algo")).upper() == "FP8"
            return "modelopt, fp8" if is_fp8 else "modelopt, nvfp4 in groups of 16"
        case method:
            return f"{method}, {shown(config.get('format', 'of no named format'))}"


def _refused(checkpoint: Checkpoint, config: Mapping[str, Any], tensor: str) -> UnsupportedModel:
    bits, method = _bits(config), "a method that its config does not name"
    if "quant_method" in config:
        method = shown(config["quant_method"])
    kind = next((config[name] for name in _KINDS if config.get(name)), None)
    return UnsupportedModel(
        f"{checkpoint.path} is quantised by {method}{f' ({shown(kind)})' if kind else ''}"
        f"{f' to {shown(bits)} bits' if bits else ''} (tensor {tensor!r}), which is not supported: experts are read as "
        f"float32, bfloat16 or float16, or decoded from {', '.join(DECODED)} of the kinds in docs/formats.md. "
        f"{_hint(checkpoint, config)}Fetch the checkpoint that it was made from, or load it with transformers, "
        "dequantize() it and save that, which `expert-pager pack --experts int8` makes small again"
    )


def _hint(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str:
    """Returns what to do about a checkpoint of modelopt whose config does not say so, as earlier ones do not."""
    name = "hf_quant_config.json"
    if "quant_method" in config or not (checkpoint.path / name).is_file():
        return ""
    return (
        f'It has a {name}: put {{"quant_method": "modelopt", "quant_algo": ...}} with the quant_algo of that file into '
        "config.json as quantization_config. "
    )


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


# --- formats whose weights are stored in parts ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parts:
    """A weight in several tensors: the last parts of their names, and what decodes them.

    `decode` gets the parts by these names, those that are there, and returns the weight, [outputs, inputs]. Of meta
    tensors it returns one of the right shape. It raises ValueError for parts that do not fit together.
    """

    ends: tuple[str, ...]
    decode: Callable[[Mapping[str, Tensor]], Tensor]


class InParts:
    """Adds the decoding of weights in parts to a model's conversions, in place of transformers' quantiser."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def update_weight_conversions(self, conversions: Sequence[Any], *_: Any) -> list[Any]:
        """Has every converter of weights take their parts, decoded first, and adds one for all other weights."""
        operation = _DecodeParts(self)
        ends = self.parts.ends
        updated = []
        for each in conversions:
            sources = getattr(each, "_original_source_patterns", [])
            if isinstance(each, WeightConverter) and all(source.endswith(".weight") for source in sources):
                stems = [source.removesuffix("weight") for source in sources]
                with_parts = [f"{stem}{end}$" for stem in stems for end in dict.fromkeys(("weight", *ends))]
                made = WeightConverter(with_parts, list(each._original_target_patterns), [operation, *each.operations])
                made.scope_prefix, made.base_model_prefix = each.scope_prefix, each.base_model_prefix
                updated.append(made)
            else:
                updated.append(each)
        return [*updated, WeightConverter([f"{end}$" for end in ends], ["weight"], [operation])]


class _DecodeParts:
    """The operation of a converter that makes weights of their parts; weights that are stored as such pass."""

    def __init__(self, quantiser: InParts) -> None:
        self.hf_quantizer = quantiser

    def convert(
        self, input_dict: Mapping[str, Any], full_layer_name: str | None = None, **_: Any
    ) -> dict[str, list[Tensor]]:
        by_stem: dict[str, dict[str, list[Tensor]]] = {}
        for pattern, tensors in input_dict.items():
            stem, dot, end = pattern.rstrip("$").rpartition(".")
            by_stem.setdefault(stem + dot, {})[end] = tensors if isinstance(tensors, list) else [tensors]
        return {f"{stem}weight$" if stem else str(full_layer_name): self._decoded(by_stem[stem]) for stem in by_stem}

    def _decoded(self, parts: Mapping[str, list[Tensor]]) -> list[Tensor]:
        if parts.keys() == {"weight"} and parts["weight"][0].is_floating_point():
            return parts["weight"]
        each_module = zip(*parts.values(), strict=True)
        return [self.hf_quantizer.parts.decode(dict(zip(parts, tensors, strict=True))) for tensors in each_module]


def _required(parts: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in parts]
    if missing:
        raise ValueError(f"there is no {missing[0]} beside {next(iter(parts))}")
    return [parts[name] for name in names]


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The numbers of `bits` bits in int32 `words`, the lowest bits first: [R, W] to uint8 [R, W * 32 / bits]."""
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"packed weights are matrices in int32, not {words.dtype} of shape {tuple(words.shape)}")
    data = words.contiguous().view(torch.uint8)  # the lowest byte first, as processors have it
    if bits == 8:
        return data
    numbers: list[Tensor] = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(numbers, -1).flatten(-2)


def _scaled(steps_OI: Tensor, zeros_GO: Tensor, scales_GO: Tensor, group_I: Tensor | None) -> Tensor:
    """`(steps - zero) * scale` in float32, the zero and scale being those of an input's group: [O, I].

    Without `group_I`, groups are inputs that follow each other. Raises ValueError for what does not belong together.
    """
    (outputs, inputs), groups = steps_OI.shape, len(scales_GO)
    if zeros_GO.shape != scales_GO.shape or scales_GO.shape[1:] != (outputs,):
        found = ", ".join(str(tuple(each.shape)) for each in (steps_OI, zeros_GO, scales_GO))
        raise ValueError(f"weights, zeros and scales of shapes {found} do not belong together")
    zeros_OG, scales_OG = zeros_GO.t().float(), scales_GO.t().float()
    weight_OI = steps_OI.float()
    if group_I is not None:
        weight_OI -= zeros_OG[:, group_I]
        weight_OI *= scales_OG[:, group_I]
        return weight_OI
    if not groups or inputs % groups:
        raise ValueError(f"{inputs} inputs are not in {groups} groups of equal size")
    weight_OGI = weight_OI.unflatten(1, (groups, -1))
    weight_OGI -= zeros_OG[..., None]
    weight_OGI *= scales_OG[..., None]
    return weight_OI


def _gptq(config: Mapping[str, Any]) -> Parts | None:
    """GPTQ, as AutoGPTQ and GPTQModel write it.

    `qweight` int32 [I * bits / 32, O]: each word has 32 / bits steps of one output, of inputs that follow each other,
    the first in the lowest bits. `qzeros` int32 [G, O * bits / 32]: the groups' zeros, packed along the outputs, stored
    less one in `gptq` and as they are in `gptq_v2`. `scales` [G, O]. `g_idx` int32 [I]: the group of each input, which
    are any where activations gave the order. A weight is (step - zero) * scale.
    """
    bits, kind = config.get("bits"), config.get("checkpoint_format") or "gptq"
    if bits not in (2, 4, 8) or kind not in ("gptq", "gptq_v2"):
        return None
    less_one = kind == "gptq"

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        qweight, qzeros, scales_GO = _required(parts, "qweight", "qzeros", "scales")
        words = _unpacked(qweight, bits).unflatten(1, (qweight.shape[1], -1))
        steps_OI = words.transpose(0, 1).flatten(1)
        zeros_GO = _unpacked(qzeros, bits)[:, : scales_GO.shape[1]]
        if less_one:
            zeros_GO = (zeros_GO + 1) & (2**bits - 1)
        return _scaled(steps_OI, zeros_GO, scales_GO, _groups(parts.get("g_idx"), steps_OI.shape[1], len(scales_GO)))

    return Parts(("qweight", "qzeros", "scales", "g_idx"), decode)


def _groups(group_I: Tensor | None, num_inputs: int, num_groups: int) -> Tensor | None:
    """Checks the groups of inputs; None where they are inputs that follow each other. Raises ValueError."""
    if group_I is None:
        return None
    if group_I.shape != (num_inputs,):
        raise ValueError(f"its {len(group_I)} inputs (g_idx) and {num_inputs} of qweight are not the same")
    group_I = group_I.long()
    if group_I.is_meta:
        return group_I
    if not 0 <= int(group_I.min()) <= int(group_I.max()) < num_groups:
        raise ValueError(f"g_idx names groups that are not among its {num_groups}")
    in_order = num_inputs % num_groups == 0 and group_I.equal(torch.arange(num_inputs) // (num_inputs // num_groups))
    return None if in_order else group_I


def _awq(config: Mapping[str, Any]) -> Parts | None:
    """AWQ in its version `gemm`, as AutoAWQ writes it.

    `qweight` int32 [I, O / 8]: each word has the steps of eight outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the
    lowest bits on. `qzeros` int32 [G, O / 8], packed alike, and `scales` [G, O], of groups of inputs that follow each
    other. A weight is (step - zero) * scale.
    """
    is_gemm = str(config.get("version") or "gemm").lower() == "gemm"
    if config.get("bits", config.get("w_bit")) != 4 or not is_gemm or config.get("zero_point") is False:
        return None

    def in_order(words: Tensor) -> Tensor:
        evens_and_odds: Tensor = _unpacked(words, 4).unflatten(-1, (-1, 2, 4))
        return evens_and_odds.transpose(-1, -2).flatten(-3)

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        qweight, qzeros, scales_GO = _required(parts, "qweight", "qzeros", "scales")
        return _scaled(in_order(qweight).t().contiguous(), in_order(qzeros), scales_GO, None)

    return Parts(("qweight", "qzeros", "scales"), decode)


NVFP4 = "nvfp4-pack-quantized"
"""compressed-tensors' name of the format, which both of its users' weights are decoded by."""

_NUMBERS = frozenset({"int-quantized", "float-quantized", "naive-quantized"})
"""compressed-tensors' names of the formats that store a number for each weight, in 8 bits."""


def _compressed(config: Mapping[str, Any]) -> Parts | None:
    """compressed-tensors' NVFP4 and 8 bits a weight; its `pack-quantized` is decoded by transformers."""
    groups, formats = config.get("config_groups"), _formats_within(config)
    if not isinstance(groups, Mapping) or not (formats == {NVFP4} or formats <= _NUMBERS):
        return None
    schemes = [_scheme(group) for group in groups.values()]
    return _numbers(schemes) if formats <= _NUMBERS else _nvfp4(schemes[0])


def _modelopt(config: Mapping[str, Any]) -> Parts | None:
    """Weights as NVIDIA's modelopt writes them.

    NVFP4: `weight`, `weight_scale` and `weight_scale_2`, the inverse of what compressed-tensors divides by; only
    weights in bytes are quantised. FP8: `weight` and one `weight_scale` for all of it.
    """
    from compressed_tensors.quantization import quant_scheme

    algorithm = str(config.get("quant_algo")).upper()
    if algorithm == "FP8":
        return _numbers([_scheme({"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}})])
    if algorithm != "NVFP4":
        return None
    scheme = _scheme({**quant_scheme.NVFP4, "targets": ["Linear"]})

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        packed, scale, inverse = _required(parts, "weight", "weight_scale", "weight_scale_2")
        return _from_nvfp4(packed, scale, 1 / inverse, scheme)

    return Parts(("weight", "weight_scale", "weight_scale_2"), decode)


def _formats_within(config: Mapping[str, Any]) -> set[Any]:
    """The formats that a config of compressed-tensors names, for all groups or for each."""
    groups = config.get("config_groups")
    of_groups = groups.values() if isinstance(groups, Mapping) else ()
    own = {group["format"] for group in of_groups if isinstance(group, Mapping) and group.get("format")}
    return own or {config.get("format")}


def _turns_activations(config: Mapping[str, Any]) -> bool:
    """Tells whether activations are multiplied with matrices of their own, as in QuIP, because stored weights were.

    Raises pydantic's ValidationError.
    """
    if not config.get("transform_config"):
        return False
    from compressed_tensors.transform import TransformConfig

    schemes = TransformConfig.model_validate(config["transform_config"]).config_groups.values()
    return any(each.is_online() for scheme in schemes for each in scheme.apply)


def _scheme(group: Any) -> Any:
    """Returns the scheme of a group of weights. Raises pydantic's ValidationError for fields that are no scheme."""
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme.model_validate(group)


def _numbers(schemes: Sequence[Any]) -> Parts | None:
    """Weights in 8 bits each, decoded by compressed-tensors.

    `weight` int8 or float8_e4m3fn [O, I], `weight_scale` for all of it, or of each output, group or block, and
    `weight_zero_point` of that shape where zero is not in the middle. Which of several schemes a weight has is seen by
    its dtype and by the shape of its scales, because those of experts are not told apart by names. None for schemes of
    other bits.
    """
    of_weights = [scheme.weights for scheme in schemes if scheme.weights is not None]
    if not of_weights or any(each.num_bits != 8 for each in of_weights):
        return None

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        weight, scale = _required(parts, "weight", "weight_scale")
        for each in of_weights if weight.dim() == 2 else ():
            shape = _shape_of_scales(each, weight.shape)
            if weight.dtype == each.pytorch_dtype() and shape in (tuple(scale.shape), (*scale.shape, 1)):
                return _from_numbers(weight, scale.reshape(shape), parts.get("weight_zero_point"), each)
        raise ValueError(
            f"weights {weight.dtype} {tuple(weight.shape)} and scales of shape {tuple(scale.shape)} are not those of "
            f"a scheme of its config ({', '.join(each.model_dump(mode='json')['strategy'] for each in of_weights)})"
        )

    return Parts(("weight", "weight_scale", "weight_zero_point"), decode)


def _shape_of_scales(scheme: Any, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of the scales of weights [O, I]; None for a strategy that weights do not have."""
    outputs, inputs = shape
    match scheme.strategy:
        case "tensor":
            return (1,)
        case "channel":
            return outputs, 1
        case "group" if scheme.group_size and inputs % scheme.group_size == 0:
            return outputs, inputs // scheme.group_size
        case "block":
            rows, columns = scheme.block_structure
            return -(-outputs // rows), -(-inputs // columns)
    return None


def _from_numbers(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Any) -> Tensor:
    """The weights that numbers stand for, multiplied in float32, which rounds no product of 8 and 16 bits."""
    from compressed_tensors.compressors import BaseCompressor

    # A tensor's only zero is left out by some versions where it is 0.
    if zero is None and not (scheme.symmetric or scheme.type == "float" or scheme.strategy == "tensor"):
        raise ValueError("there is no weight_zero_point beside weight, which its config says is not symmetric")
    if zero is not None and zero.numel() != scale.numel():
        raise ValueError(f"{zero.numel()} zeros and {scale.numel()} scales do not belong together")
    if weight.is_meta:
        return weight.new_empty(weight.shape, dtype=torch.float32)
    parts = {"weight": weight, "weight_scale": scale.float()}
    if zero is not None:
        parts["weight_zero_point"] = zero.reshape(scale.shape)
    decompress = BaseCompressor.get_value_from_registry("naive-quantized").decompress
    decoded: Tensor = decompress(parts, _scheme({"targets": ["Linear"], "weights": scheme}))["weight"]
    return decoded


def _nvfp4(scheme: Any) -> Parts:
    """NVFP4 as compressed-tensors writes it, which decodes it.

    `weight_packed` uint8 [O, I / 2]: two numbers of four bits in a byte. `weight_scale` float8_e4m3fn [O, I / 16]: a
    scale for 16 inputs. `weight_global_scale` float32 [1]: what these are to be divided by.
    """

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        packed, scale, global_scale = _required(parts, "weight_packed", "weight_scale", "weight_global_scale")
        return _from_nvfp4(packed, scale, global_scale, scheme)

    return Parts(("weight_packed", "weight_scale", "weight_global_scale"), decode)


def _from_nvfp4(packed: Tensor, scale: Tensor, global_scale: Tensor, scheme: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    found, expected = (tuple(each.shape) for each in (packed, scale))
    if packed.dtype != torch.uint8 or packed.dim() != 2 or expected != (found[0], found[1] // 8) or found[1] % 8:
        raise ValueError(f"weights {packed.dtype} {found} and scales of shape {expected} are not those of nvfp4")
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": global_scale}
    decoded: Tensor = BaseCompressor.get_value_from_registry(NVFP4).decompress(parts, scheme)["weight"]
    return decoded


_VARIANTS: Mapping[Any, Callable[[Mapping[str, Any]], Parts | None]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
}
"""By method: how its weights are decoded; None for kinds that are not."""


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _blocks_of(checkpoint: Checkpoint) -> Format | None:
    """The format of a GGUF file some of whose tensors are in blocks; `words` are about its experts."""
    kinds = sorted({spec.blocks for spec in checkpoint.specs.values() if spec.blocks and "_exps." in spec.name})
    if not any(spec.blocks for spec in checkpoint.specs.values()):
        return None
    return Format("gguf", f"gguf, experts in {' and '.join(kinds) or 'plain floats'}", None)


class FromBlocks:
    """The operation that makes float32 of a GGUF file's blocks, by the package that defines them."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        """Takes the kinds of blocks by pattern."""
        self.kinds = kinds

    def convert(self, input_dict: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
        alone = {pattern: each[0] if isinstance(each, list) else each for pattern, each in input_dict.items()}
        return {pattern: _from_blocks(stored, self.kinds[pattern]) for pattern, stored in alone.items()}


def _from_blocks(stored: Tensor, kind: str) -> Tensor:
    import gguf

    if kind in PLAIN:
        return stored.float()
    number = gguf.GGMLQuantizationType[kind]
    num_elements, num_bytes = gguf.GGML_QUANT_SIZES[number]
    if stored.is_meta:
        *outer, row_bytes = stored.shape
        return stored.new_empty((*outer, row_bytes // num_bytes * num_elements), dtype=torch.float32)
    return torch.from_numpy(gguf.dequantize(stored.numpy(), number))


class Processed:
    """The operation that does to one tensor what transformers' processor of an architecture does when it loads it."""

    def __init__(self, processor: Any, name: str) -> None:
        self._processor, self._name = processor, name

    def convert(self, input_dict: Mapping[str, Tensor], full_layer_name: str = "", **_: Any) -> dict[str, Tensor]:
        (tensor,) = input_dict.values()
        # Without values, one zero in the place of all has the shape and takes no memory.
        values = np.broadcast_to(np.float32(0), tensor.shape) if tensor.is_meta else tensor.numpy()
        made = self._processor.process(weights=values, name=self._name).weights
        return {full_layer_name: tensor.new_empty(made.shape) if tensor.is_meta else torch.from_numpy(made)}
