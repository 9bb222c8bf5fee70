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
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pager.gguf import GPT_OSS, PLAIN, GgufFile
from pager.models.formats import Format, FromBlocks, Processed, conversions_of, decodes
from pager.store.checkpoint import Checkpoint
from pager.store.expert_source import AsBytes, Made, Row
from pager.store.pack_format import BLOCK, num_blocks
from pager.store.safetensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK_SCALES = "_scale_inv"


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
        if any(isinstance(each, FromBlocks) for each in self.operations):
            return True
        has_others = any(pattern.rstrip("$").rpartition(".")[2] != "weight" for pattern in self.names)
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
    return _sorted(model, names, conversions_of(model, quantised))


def _sorted(model: PreTrainedModel, names: Iterable[str], conversions: Sequence[Any]) -> Layout:
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


@dataclass(frozen=True, slots=True)
class _Conversion:
    """A converter as transformers has them, for the tensors of one parameter."""

    source_patterns: Sequence[str]
    target_patterns: Sequence[str]
    operations: Sequence[Any]


def locate_in_blocks(model: PreTrainedModel, file: GgufFile) -> Layout:
    """Sorts a GGUF file's tensors by what transformers makes of them in `model`, and has them decoded first.

    Experts in plain floats are left as they are stored.
    """
    from transformers.integrations.gguf import GGUF_ARCHS, get_gguf_conversion_mapping

    if file.architecture in GGUF_ARCHS:
        found = _sorted(model, file.tensors, get_gguf_conversion_mapping(file.architecture, model.config))
    else:
        found = _sorted_by_tables(model, file)
    stored = {}
    for target, each in found.stored.items():
        kinds = {pattern: file.tensors[names[0]].kind for pattern, names in each.names.items()}
        if all("_exps." in name for names in each.names.values() for name in names) and {*kinds.values()} <= {*PLAIN}:
            stored[target] = each
            continue
        patterns = each.converter.source_patterns if each.converter else list(each.names)
        targets = each.converter.target_patterns if each.converter else [target]
        stored[target] = Stored(each.names, _Conversion(patterns, targets, [FromBlocks(kinds), *each.operations]))
    return Layout(stored, found.unused)


def _sorted_by_tables(model: PreTrainedModel, file: GgufFile) -> Layout:
    """The same for architectures that transformers maps by a table of names and a processor of values."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
    # Only the names of the whole: it would go on through all modules, and know these names already.
    whole = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=list)
    target_of = get_gguf_hf_weights_map(whole, processor)
    if file.architecture == GPT_OSS:
        target_of |= {name: target for name in file.tensors if (target := _of_gpt_oss(name))}
    names_of: dict[str, list[str]] = defaultdict(list)
    unused: list[str] = []
    for name in sorted(file.tensors, key=dot_natural_key):  # gates before ups
        target = target_of.get(name) or target_of.get(name.removesuffix(".weight"))
        (unused if target is None else names_of[target]).append(name)
    stored = {}
    for target, names in names_of.items():
        if "_exps." not in names[0]:
            operations: list[Any] = [Processed(processor, names[0])]
        elif file.architecture == GPT_OSS:
            operations = [_LikeGptOss()]
        else:
            operations = [Concatenate(dim=1)] if len(names) > 1 else []
        made = _Conversion(names, [target], operations) if operations else None
        stored[target] = Stored({name: [name] for name in names}, made)
    return Layout(stored, tuple(unused))


def _of_gpt_oss(name: str) -> str | None:
    """The parameter that a tensor of gpt-oss's experts belongs to, which transformers takes to be named otherwise."""
    found = re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.(weight|bias)", name)
    if found is None:
        return None
    layer, part, end = found.groups()
    joined = "down" if part == "down" else "gate_up"
    return f"model.layers.{layer}.mlp.experts.{joined}_proj{'_bias' if end == 'bias' else ''}"


class _LikeGptOss:
    """The operation that lays experts as gpt-oss has them: outputs last, and those of gate and up in turn."""

    def convert(self, input_dict: Mapping[str, Any], full_layer_name: str = "", **_: Any) -> dict[str, Tensor]:
        parts = [each[0] if isinstance(each, list) else each for each in input_dict.values()]
        in_turn = torch.stack(parts, 2).flatten(1, 2)
        return {full_layer_name: in_turn.transpose(1, 2) if in_turn.dim() == 3 else in_turn}


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

    def as_bytes(self, expert: int) -> tuple[AsBytes, AsBytes]:
        """Returns an expert's weights and their scales, as parts of a record that holds what is stored."""
        assert self.stored.converter is not None, "what is stored as it is has no scales"
        patterns = [each for each in self.stored.converter.source_patterns if each in self._names]
        weights, scales = (
            tuple(
                Row(self._names[each][0], expert) if self.is_stacked else self._names[each][expert]
                for each in patterns
                if each.rstrip("$").endswith(_BLOCK_SCALES) == is_scale
            )
            for is_scale in (False, True)
        )
        return AsBytes(weights), AsBytes(scales)

    def __str__(self) -> str:
        others = [type(each).__name__.lower() for each in self.stored.operations if not decodes(each)]
        kept = [each for each in others if each not in ("mergemodulelist", "concatenate")]
        return ", ".join(["stacked" if self.is_stacked else "one tensor an expert", *kept])


def is_held_in_blocks(
    parameters: Iterable[ExpertParameter], num_experts: int, checkpoint: Checkpoint, found: Format
) -> bool:
    """Tells whether a record of fp8 in blocks can hold what is stored of a layer's experts, byte by byte.

    Gate and up may lie one after the other where each ends with a whole block.
    """
    if found.method != "fp8":
        return False
    for parameter in parameters:
        stored = parameter.stored
        if not (stored.is_decoded and _is_as_stored([each for each in stored.operations if not decodes(each)])):
            return False
        for expert in range(num_experts):
            weights, scales = (
                [checkpoint.specs.get(each if isinstance(each, str) else each.name) for each in part.pieces]
                for part in parameter.as_bytes(expert)
            )
            pairs = list(zip(weights, scales, strict=False))
            if len(weights) != len(scales) or not all(_are_blocks(*pair, whole=len(pairs) > 1) for pair in pairs):
                return False
    return True


def _are_blocks(weight: TensorSpec | None, scale: TensorSpec | None, *, whole: bool) -> bool:
    """Tells whether a tensor is in 8 bits with such a scale for each block; `whole`: and ends with a whole one."""
    if weight is None or scale is None or (weight.dtype, scale.dtype) != (torch.float8_e4m3fn, torch.float32):
        return False
    rows, columns = weight.shape[-2:]
    return scale.shape[-2:] == (num_blocks(rows), num_blocks(columns)) and not (whole and rows % BLOCK)


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
    model: PreTrainedModel,
    *,
    own_attention: bool = True,
    with_mask: bool = False,
    with_masks: bool = False,
    cache: object = None,
    num_rows: int = 1,
    num_tokens: int = NUM_TOKENS,
) -> Trial:
    """Runs `model`, which is on the meta device and keeps these functions. Raises whatever the model does.

    With `own_attention` transformers builds no mask, as it does for engines that have attention of their own, unless
    `with_masks`; without, attention is not looked at. `with_mask` gives a mask of padding in the place of positions.
    With a `cache`, its layers ask that for what they know of earlier tokens.
    """
    name = NAME_WITH_MASKS if with_masks else NAME
    model.set_attn_implementation(name if own_attention else "eager")
    model.set_experts_implementation(NAME)
    inputs: dict[str, Any] = {"input_ids": torch.zeros(num_rows, num_tokens, dtype=torch.long, device="meta")}
    if own_attention:
        inputs["position_ids"] = torch.arange(num_tokens, device="meta").expand(num_rows, -1)
    if with_mask or with_masks:
        # Not on the meta device with masks, as layers that have states ask whether there is anything to leave out.
        device = "cpu" if with_masks else "meta"
        inputs["attention_mask"] = torch.ones(num_rows, num_tokens, dtype=torch.bool, device=device)
    if cache is not None:
        inputs |= {"past_key_values": cache, "logits_to_keep": 1}
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
    mask = torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool, device="meta")  # a forward of that many tokens
    _running.masks.append((mask, mask_function))
    return mask


def _experts(module: Any, hidden_TD: Tensor, index_TK: Tensor, _: Tensor) -> Tensor:
    _running.trial.experts.append(ExpertsCall(_running.names[module], index_TK.shape[-1]))
    return torch.empty_like(hidden_TD)


AttentionInterface.register(NAME, _attend)
AttentionInterface.register(NAME_WITH_MASKS, _attend)
AttentionMaskInterface.register(NAME_WITH_MASKS, _mask)
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
