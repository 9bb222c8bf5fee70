"""Which stored tensors make which parameter of a model, found with transformers' own list of conversions.

Checkpoints name and group tensors in other ways than models do: one a projection and expert, or all experts of a layer
in one, transposed or interleaved. transformers describes each family's way by renamings and converters, and its loader
applies them to whole layers. Here the same operations are applied to one expert's part at a time.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AutoHfQuantizer

from pager.errors import CheckpointError, UnsupportedModel
from pager.reading import one_line, shown
from pager.store.checkpoint import Checkpoint
from pager.store.expert_source import Made, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer

# --- formats ----------------------------------------------------------------------------------------------------------
#
# The formats that a checkpoint's weights can be in beside plain floats: which are decoded, and which are refused.
#
# transformers reads each format by operations that its loader applies to whole layers: a quantised tensor and its
# scales become the tensor that they stand for. Here the same operations decode one expert, or one tensor of the trunk.


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


# --- the layout of a model --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    """The parts that one parameter is made of: stored names in natural order, by the pattern that they match.

    `converter` is None where the one tensor is the parameter.
    """

    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    converter: WeightConverter | None = None

    @property
    def operations(self) -> Sequence[Any]:
        return self.converter.operations if self.converter is not None else ()

    @property
    def is_decoded(self) -> bool:
        """Quantised tensors make this parameter: beside weights, of which a format leaves some as they are, scales."""
        has_others = any(not pattern.rstrip("$").endswith("weight") for pattern in self.names)
        return has_others and any(map(decodes, self.operations))

    def make(self, pieces: Mapping[str, Sequence[Tensor]], name: str, model: PreTrainedModel) -> Tensor:
        """The parameter `name`, by its converter's operations on the tensors of each pattern."""
        assert self.converter is not None, "what is stored as it is needs no conversion"
        tensors: dict[str, Any] = {pattern: list(each) for pattern, each in pieces.items()}
        for operation in self.converter.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=name,
                model=model,
                config=model.config,
                missing_keys=set(),
            )
        made = [tensor for pattern, tensor in tensors.items() if len(tensors) == 1 or name.endswith(pattern)]
        tensor: Tensor = made[0][0] if isinstance(made[0], list) else made[0]
        return tensor.detach()  # some operations make parameters


@dataclass(frozen=True, slots=True)
class Layout:
    """The stored tensors of a model by the parameter or buffer that they make; `unused` are those that make none."""

    stored: Mapping[str, Stored]
    unused: tuple[str, ...]


def locate(model: PreTrainedModel, names: Iterable[str], quantised: Format | None = None) -> Layout:
    """Sorts a checkpoint's tensors by what transformers' loader would make of them in `model`."""
    conversions = conversions_of(model, quantised)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
    expected = model.state_dict()
    stored: dict[str, Stored] = {}
    unused = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:
            target, pattern = name, None
        converter = converter_of[pattern] if pattern is not None else None
        targets = [target]
        if converter is not None:
            first, *others = converter.target_patterns
            targets += [target.replace(first, other) for other in others]
        known = [each for each in targets if each in expected]
        for each in known:
            stored.setdefault(each, Stored(converter=converter)).names[pattern or name].append(name)
        if not known:
            unused.append(name)
    return Layout(stored, tuple(unused))


class ExpertParameter:
    """The place where one parameter of a layer's experts is stored, and the part of each expert."""

    def __init__(self, stored: Stored, num_experts: int, name: str, model: PreTrainedModel) -> None:
        self.stored = stored
        merges = any(isinstance(each, MergeModulelist) for each in stored.operations)
        self.is_stacked = not merges and all(len(names) == 1 for names in stored.names.values())
        self._names = {
            pattern: names if self.is_stacked else _of_all_experts(names, num_experts)
            for pattern, names in stored.names.items()
            if not pattern.rstrip("$").endswith("weight_shape")  # known from the weights, and no value without reading
        }
        self._make: Callable[[Sequence[Tensor]], Tensor] | None = None
        if not _is_as_stored(stored.operations):
            self._make = partial(_one_expert, stored, tuple(self._names), self.is_stacked, name, model)

    def of_expert(self, expert: int) -> tuple[str | Row, ...] | Made:
        patterns: Iterable[str] = self._names
        if self._make is None and self.stored.converter is not None:  # pieces lie in the order of the converter's list
            patterns = [pattern for pattern in self.stored.converter.source_patterns if pattern in self._names]
        pieces = tuple(
            Row(self._names[pattern][0], expert) if self.is_stacked else self._names[pattern][expert]
            for pattern in patterns
        )
        return pieces if self._make is None else Made(pieces, self._make, self.stored.is_decoded)

    def __str__(self) -> str:
        others = [type(each).__name__.lower() for each in self.stored.operations if not decodes(each)]
        kept = [each for each in others if each not in ("mergemodulelist", "concatenate")]
        return ", ".join(["stacked" if self.is_stacked else "one tensor an expert", *kept])


def _is_as_stored(operations: Sequence[Any]) -> bool:
    """Each expert's pieces lie in its parameter as they are, one after the other along its first dimension."""
    left = [each for each in operations if not isinstance(each, MergeModulelist)]
    merges = [each for each in operations if isinstance(each, MergeModulelist)]
    joins = [each for each in left if isinstance(each, Concatenate)]
    return left == joins and len(joins) <= 1 and all(each.dim == 1 for each in joins) and all(not m.dim for m in merges)


def _of_all_experts(names: Sequence[str], num_experts: int) -> list[str]:
    """The names of all experts, in order, by those of some: what a checkpoint lacks has its name too."""
    parts = [name.split(".") for name in names]
    differing = [place for place, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1]
    numbers = [place for place, each in enumerate(parts[0]) if each.isdigit()]
    place = (differing or numbers or [0])[-1]
    if not parts[0][place].isdigit():
        return list(names)
    template = parts[0]
    return [".".join([*template[:place], str(expert), *template[place + 1 :]]) for expert in range(num_experts)]


def _one_expert(
    stored: Stored,
    patterns: Sequence[str],
    is_stacked: bool,
    name: str,
    model: PreTrainedModel,
    pieces: Sequence[Tensor],
) -> Tensor:
    """One expert's parameter: the converter's operations on a layer that has this expert alone."""
    tensors = {pattern: [piece[None] if is_stacked else piece] for pattern, piece in zip(patterns, pieces, strict=True)}
    return stored.make(tensors, name, model)[0]


# --- the trial: one forward on the meta device, without weights -------------------------------------------------------
#
# One forward of a model on the meta device, which has no weights: what its layers ask of attention and of experts.
#
# Families differ in what they hand to both. What a model really calls says more than a table of families would, and it
# is known before any weight is read.


NAME, NAME_WITH_MASKS = "expert_pager_trial", "expert_pager_trial_masks"
NUM_TOKENS = 3

Sees = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""A mask as transformers describes it: by batch row, head, and the places of a query and a key, whether it sees it."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of the attention function. Shapes are [heads, head dimension]; `arguments` are those that are given.

    `sees` is the mask that transformers makes for the layer, where the trial asks for masks; `has_mask`: any other.
    """

    module: str
    layer: int | None
    query: tuple[int, int]
    key: tuple[int, int]
    value: tuple[int, int]
    has_mask: bool
    sees: Sees | None
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """One call of the experts function: the module's name and how many experts a token picks."""

    module: str
    num_picks: int


@dataclass(slots=True)
class Trial:
    """The calls of a forward, in order."""

    attention: list[AttentionCall] = field(default_factory=list)
    experts: list[ExpertsCall] = field(default_factory=list)


class _Running(threading.local):
    trial: Trial
    names: Mapping[Any, str]
    masks: list[tuple[Tensor, Sees]]


_running = _Running()


@torch.no_grad()
def try_forward(
    model: PreTrainedModel, *, own_attention: bool = True, with_mask: bool = False, with_masks: bool = False
) -> Trial:
    """Runs `model`, which is on the meta device and keeps these functions. Raises whatever the model does.

    With `own_attention` transformers builds no mask, as it does for engines that have attention of their own, unless
    `with_masks`; without, attention is not looked at. `with_mask` gives a mask of padding in the place of positions.
    """
    name = NAME_WITH_MASKS if with_masks else NAME
    model.set_attn_implementation(name if own_attention else "eager")
    model.set_experts_implementation(NAME)
    inputs = {"input_ids": torch.zeros(1, NUM_TOKENS, dtype=torch.long, device="meta")}
    if own_attention:
        inputs["position_ids"] = torch.arange(NUM_TOKENS, device="meta")[None]
    if with_mask or with_masks:
        inputs["attention_mask"] = torch.ones(1, NUM_TOKENS, dtype=torch.bool, device="meta")
    _running.trial = trial = Trial()
    _running.masks = []
    _running.names = {module: name for name, module in model.named_modules()}
    try:
        with _plain_tables(model):
            model(**inputs, use_cache=False)
    finally:
        del _running.trial, _running.names, _running.masks
    return trial


@contextmanager
def _plain_tables(model: PreTrainedModel) -> Iterator[None]:
    """Tables that grow with the longest position ask for its value, which there is not."""
    kinds = {each: kind for each in model.modules() if isinstance(kind := getattr(each, "rope_type", None), str | dict)}
    for module, kind in kinds.items():
        module.rope_type = "default" if isinstance(kind, str) else dict.fromkeys(kind, "default")
    try:
        yield
    finally:
        for module, kind in kinds.items():
            module.rope_type = kind


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, None]:
    (_, heads, tokens, _), width = query.shape, value.shape[3]
    sees = next((sees for mask, sees in _running.masks if mask is attention_mask), None)
    call = AttentionCall(
        module=_running.names[module],
        layer=getattr(module, "layer_idx", None),
        query=(query.shape[1], query.shape[3]),
        key=(key.shape[1], key.shape[3]),
        value=(value.shape[1], value.shape[3]),
        has_mask=attention_mask is not None and sees is None,
        sees=sees,
        arguments={name: argument for name, argument in arguments.items() if argument is not None},
    )
    _running.trial.attention.append(call)
    return query.new_empty(len(query), tokens, heads, width), None


def _mask(*_: Any, mask_function: Sees, **__: Any) -> Tensor:
    mask = torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool, device="meta")
    _running.masks.append((mask, mask_function))
    return mask


def _experts(module: Any, hidden_TD: Tensor, index_TK: Tensor, _: Tensor) -> Tensor:
    _running.trial.experts.append(ExpertsCall(_running.names[module], index_TK.shape[-1]))
    return torch.empty_like(hidden_TD)


AttentionInterface.register(NAME, _attend)
AttentionInterface.register(NAME_WITH_MASKS, _attend)
AttentionMaskInterface.register(NAME_WITH_MASKS, _mask)
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
