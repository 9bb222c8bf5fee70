"""A transformers model without its experts: what a checkpoint has for it, and the trunk, which transformers loads."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

import pager.models  # noqa: F401 - registers the models this project adds
from pager.errors import CheckpointError, ConfigError, PagerError, UnsupportedModel
from pager.models.families import (
    TOKEN_IDS,
    Family,
    check_config,
    check_shape,
    check_token_ids,
    expert_modules,
    expert_parameters,
    family_of,
    without_choices,
)
from pager.models.formats import Format, format_of
from pager.models.layout import ExpertParameter, Layout, Stored, is_held_in_blocks, locate, locate_in_blocks
from pager.reading import one_line, shown
from pager.store.checkpoint import Checkpoint, read_json_object
from pager.store.expert_source import AsBytes, ExpertSource, Made, Row, open_experts
from pager.store.pack_format import MATRICES, RecordFormat, scales_of
from pager.store.safetensors import PLAIN_FLOATS
from pager.types import ExpertKey, ExpertShape, RoutingFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FP32 = 4
_TRIES = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint on disk together with what its model says of itself; no weights are in memory yet."""

    checkpoint: Checkpoint
    config: PretrainedConfig
    family: Family
    facts: RoutingFacts
    dtype: torch.dtype
    quantised: Format | None  # what the checkpoint's tensors are decoded from
    whole: PreTrainedModel = field(repr=False, compare=False)  # on the meta device, its experts included
    is_for_cpu: bool = True

    @classmethod
    def open(cls, path: str | Path, dtype: torch.dtype | str | None = None, *, device: str = "cpu") -> OpenModel:
        """Opens a checkpoint, to run on `device`: what slots hold depends on what computes there.

        Raises CheckpointError for a damaged one, UnsupportedModel for a model that cannot be paged, ConfigError for the
        dtype.
        """
        checkpoint = Checkpoint.open(path)
        try:
            config = _config_of(checkpoint)
            with _config_errors(checkpoint):
                with torch.device("meta"):
                    whole = model_class_of(config)(deepcopy(config)).eval()
                family = family_of(whole)
                check_shape(config, family.facts.experts_per_layer)
            quantised = format_of(checkpoint)
            chosen = _choose_dtype(dtype, checkpoint)
        except BaseException:
            checkpoint.close()
            raise
        opened = cls(checkpoint, config, family, family.facts, chosen, quantised, whole, not device.startswith("cuda"))
        expert_bytes = opened.slot_shape.num_elements * opened.slot_dtype.itemsize
        # In place, as a copy would look for every tensor again.
        object.__setattr__(opened, "facts", replace(family.facts, expert_bytes=expert_bytes))
        return opened

    @property
    def expert_bytes(self) -> int:
        return self.facts.expert_bytes

    @cached_property
    def record(self) -> RecordFormat | None:
        """Returns what experts are quantised to in slots, as they are stored; None where slots hold the serving
        dtype.
        """
        if self.checkpoint.pack is not None:
            return self.checkpoint.pack.record
        quantised, layers = self.quantised, self.family.layers
        if quantised is None or not self.is_for_cpu or self.family.shape.parameters:
            return None
        if not all(f"{each.experts}.{name}" in self.layout.stored for each in layers for name in MATRICES):
            return None  # which is refused where it is read
        is_held = all(
            is_held_in_blocks(self.expert_parameters[each.layer], each.num_experts, self.checkpoint, quantised)
            for each in layers
        )
        return RecordFormat("fp8", self.dtype) if is_held else None

    @property
    def slot_shape(self) -> ExpertShape:
        """The parameters of an expert as a slot holds them."""
        return self.record.record(self.family.shape) if self.record else self.family.shape

    @property
    def slot_dtype(self) -> torch.dtype:
        return torch.uint8 if self.record else self.dtype

    @property
    def trunk_bytes(self) -> int:
        """The bytes of everything but the experts, in the serving dtype."""
        model = self.build_empty()
        num_elements: int = sum(parameter.numel() for parameter in model.parameters())
        return num_elements * self.dtype.itemsize

    @cached_property
    def layout(self) -> Layout:
        """Which stored tensors make which parameter."""
        if self.checkpoint.gguf is not None:
            return locate_in_blocks(self.whole, self.checkpoint.gguf)
        return locate(self.whole, self.checkpoint.specs, self.quantised)

    @cached_property
    def expert_parameters(self) -> Mapping[int, tuple[ExpertParameter, ...]]:
        """Returns by layer where each parameter of its experts is stored. Raises CheckpointError where one is
        nowhere.
        """
        found = {}
        for each in self.family.layers:
            parameters = []
            for parameter, _ in self.family.shape.named:
                name = f"{each.experts}.{parameter}"
                if name not in self.layout.stored:
                    raise CheckpointError(
                        f"{self.checkpoint.path} lacks the expert tensors of layer {each.layer}: nothing in it makes "
                        f"{name!r}; is the checkpoint complete, and of the family that its config names?"
                    )
                parameters.append(ExpertParameter(self.layout.stored[name], each.num_experts, name, self.whole))
            found[each.layer] = tuple(parameters)
        return found

    @property
    def layout_name(self) -> str:
        """Returns how the experts are stored, in words."""
        if self.checkpoint.is_packed:
            return "one extent an expert"
        kinds = (str(each) for parameters in self.expert_parameters.values() for each in parameters)
        return "; ".join(dict.fromkeys(kinds))

    def pieces(self, key: ExpertKey) -> tuple[tuple[str | Row, ...] | Made, ...]:
        """Returns what each parameter of an expert is stored as. Raises CheckpointError."""
        return tuple(each.of_expert(key.expert) for each in self.expert_parameters[key.layer])

    def _parts(self, key: ExpertKey) -> tuple[AsBytes, ...]:
        """Returns what each part of a record that holds what is stored is made of."""
        return tuple(part for each in self.expert_parameters[key.layer] for part in each.as_bytes(key.expert))

    @property
    def quantised_names(self) -> frozenset[str]:
        """The stored tensors that are decoded: what they hold, and what that is scaled by."""
        decoded = (each for each in self.layout.stored.values() if each.is_decoded)
        return frozenset(name for each in decoded for names in each.names.values() for name in names)

    @property
    def making_bytes(self) -> int:
        """The most that a thread holds while it makes an expert of what is stored; 0 where its bytes are read as such.

        Beside the pieces, three tensors of the largest parameter in float32.
        """
        pieces = self._pieces_to_make()
        largest = max(math.prod(shape) for shape in self.family.shape.shapes)
        return sum(piece.nbytes for each in pieces for piece in each[1]) + 3 * FP32 * largest if pieces else 0

    def seconds_to_make(self) -> float:
        """Returns how long it takes this machine to make one expert of what is stored, tried with zeros.

        The least of several times, of which the first is of getting ready. 0 where nothing is made.
        """
        pieces = [(made, [piece.zero_() for piece in each]) for made, each in self._pieces_to_make("cpu")]
        tried_s = []
        for _ in range(_TRIES if pieces else 0):
            started_s = time.perf_counter()
            for made, each in pieces:
                made.make(each)
            tried_s.append(time.perf_counter() - started_s)
        return min(tried_s, default=0.0)

    def seconds_of_a_row(self) -> tuple[float, float]:
        """Returns how long this machine's CPU multiplies one row with the matrices of an expert that slots hold as
        bytes, and with those of one in the serving dtype; tried with zeros.
        """
        assert self.record is not None, "slots hold bytes"
        typed = self.record.views({name: torch.zeros(part, dtype=torch.uint8) for name, part in self.slot_shape.named})
        shapes = self.family.shape.shapes
        rows = [torch.zeros(1, shape[1], dtype=self.dtype) for shape in shapes]
        plain = [torch.zeros(shape, dtype=self.dtype) for shape in shapes]
        held: list[float] = []
        in_dtype: list[float] = []
        for _ in range(5):
            started_s = time.perf_counter()
            for name, row in zip(MATRICES, rows, strict=True):
                self.record.product(row, typed[name], typed[scales_of(name)])
            held.append(time.perf_counter() - started_s)
            started_s = time.perf_counter()
            for matrix, row in zip(plain, rows, strict=True):
                torch.nn.functional.linear(row, matrix)
            in_dtype.append(time.perf_counter() - started_s)
        return min(held), min(in_dtype)

    def _pieces_to_make(self, device: str = "meta") -> list[tuple[Made, list[Tensor]]]:
        """Returns what one expert's parameters are made of, with tensors like it, of unknown values."""
        if self.checkpoint.is_packed or self.record:
            return []
        first = self.pieces(ExpertKey(self.family.layers[0].layer, 0))
        made = [parameter for parameter in first if isinstance(parameter, Made)]
        return [(each, [self._like(piece, device) for piece in each.pieces]) for each in made]

    def _like(self, piece: str | Row, device: str) -> Tensor:
        name = piece if isinstance(piece, str) else piece.name
        spec = self.checkpoint.specs.get(name)
        if spec is None:
            raise CheckpointError(f"{self.checkpoint.path} has no tensor {name!r}; is the checkpoint complete?")
        return torch.empty(spec.shape if piece is name else spec.shape[1:], dtype=spec.dtype, device=device)

    def open_experts(self) -> ExpertSource:
        """The disk tier. Raises CheckpointError when an expert is missing or misshapen."""
        pieces = self._parts if self.record else self.pieces
        return open_experts(self.checkpoint, pieces, self.facts.experts_per_layer, self.slot_shape)

    def build_empty(self) -> PreTrainedModel:
        """The model on the meta device, its experts' parameters taken out."""
        with torch.device("meta"), _InDtype(self.dtype), _config_errors(self.checkpoint):
            model = model_class_of(self.config)(deepcopy(self.config))
        model.config.dtype = self.dtype
        _take_out_experts(model)
        return model.eval()

    def read_expert(self, source: ExpertSource, key: ExpertKey) -> tuple[Tensor, ...]:
        """One expert's parameters in the serving dtype, whatever a slot holds. Raises ExpertUnavailable."""
        parts = tuple(torch.empty(part, dtype=self.slot_dtype) for part in self.slot_shape.shapes)
        source.read(key, *parts)
        if self.record is None:
            return parts
        names = (name for name, _ in self.slot_shape.named)
        return tuple(self.record.matrices(dict(zip(names, parts, strict=True))))

    def check(self) -> None:
        """Reads headers only. Raises CheckpointError unless every tensor is there, in its shape and a usable dtype."""
        for tensor in self._trunk_tensors([]).values():
            tensor.check()
        self.open_experts().close()
        self._generation_config()

    def load_trunk(self, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The model with everything but its experts in memory, loaded by transformers. Raises CheckpointError."""
        failed: list[CheckpointError] = []  # as transformers' loader reports what reading raises in its own words
        tensors = self._trunk_tensors(failed)
        kind: Any = model_class_of(self.config)
        try:
            with _LOADING, _InDtype(self.dtype), _no_progress_bars(), _config_errors(self.checkpoint):
                model: Any = without_experts(kind).from_pretrained(
                    None, config=self.config, state_dict=tensors, dtype=self.dtype
                )
        except PagerError as error:
            raise (failed[0] if failed else error) from None
        if failed:
            raise failed[0]
        model.__class__ = kind
        model = model.to(device).requires_grad_(False)
        left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        if left:
            raise CheckpointError(f"nothing was loaded for {', '.join(left[:3])} ({len(left)} tensors)")
        object.__setattr__(model, "gates_are_known", self.family.gates_are_known)
        model.generation_config = self._generation_config()
        model.get_output_embeddings().register_forward_pre_hook(_own_strides)
        return model

    def _trunk_tensors(self, failed: list[CheckpointError]) -> dict[str, StoredTensor]:
        """The tensors that the trunk is made of, those that are decoded under the model's own names.

        Raises CheckpointError where the checkpoint lacks some.
        """
        model, stored = self.build_empty(), self.layout.stored
        tied = dict(getattr(model, "all_tied_weights_keys", {}))
        partners = {**tied, **{source: name for name, source in tied.items()}}
        ignored = [re.compile(each) for each in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
        tensors: dict[str, StoredTensor] = {}
        for name, expected in model.state_dict().items():
            if name not in stored:
                if partners.get(name) in stored or any(each.search(name) for each in ignored):
                    continue
                self.checkpoint.require(name, expected.shape)  # by the name that the model has for it
            if stored[name].is_decoded:
                tensors[name] = DecodedTensor(self.checkpoint, name, failed, stored[name], self.whole, expected.shape)
                continue
            for stored_name in (each for group in stored[name].names.values() for each in group):
                spec = self.checkpoint.specs[stored_name]
                if stored[name].converter is None:
                    self.checkpoint.require(stored_name, expected.shape)
                if expected.is_floating_point() and spec.dtype not in PLAIN_FLOATS:
                    raise CheckpointError(
                        f"tensor {spec.name!r} is stored as {spec.dtype}; it must be in floating point"
                    )
                tensors[stored_name] = StoredTensor(self.checkpoint, stored_name, failed)
        return tensors

    def _generation_config(self) -> GenerationConfig:
        path = self.checkpoint.path / "generation_config.json"
        if not path.exists():
            config = GenerationConfig.from_model_config(self.config)
        else:
            read_json_object(path)  # what is no file, or none of this kind, is refused before transformers opens it
            try:
                config = GenerationConfig.from_pretrained(self.checkpoint.path)
            except Exception as error:  # it validates its fields in its own ways
                raise CheckpointError(f"{path} is malformed: {one_line(error)}; repair it or remove it") from error
        try:
            if not isinstance(suppressed := config.suppress_tokens, list | None):
                raise CheckpointError(f"its suppress_tokens are {shown(suppressed)}, and must be a list or null")
            check_token_ids({name: getattr(config, name) for name in (*TOKEN_IDS, "suppress_tokens")})
        except CheckpointError as error:
            raise CheckpointError(f"{path} is malformed: {error.message}; repair it or remove it") from None
        return config


@contextmanager
def _config_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns whatever transformers raises for a config that it cannot build into a CheckpointError."""
    path = checkpoint.config_path
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not valid: {error.message}") from None
    except PagerError:
        raise
    except Exception as error:  # each family validates its fields in its own way
        raise CheckpointError(f"{path} is not valid: {one_line(error)}") from error


def moe_blocks(model: PreTrainedModel) -> Iterator[tuple[int, Any]]:
    """`(layer, block)` of every sparse layer; a block has a `gate` that returns raw logits first and `experts`.

    Raises UnsupportedModel for a model whose gates pick in ways of their own: their logits may be anywhere.
    """
    if not getattr(model, "gates_are_known", True):
        raise UnsupportedModel(
            f"{type(model).__name__} has gates that pick in ways of their own, so nothing here reads what they say: "
            "no predictor, evaluation or calibration runs with it. pager.load_model runs it"
        )
    for name, _ in expert_modules(model):
        block = model.get_submodule(name.rpartition(".")[0])
        yield int(name.partition("layers.")[2].partition(".")[0]), block


_LOADING = threading.RLock()
"""Held while transformers loads a trunk, with its progress bars switched off for the whole process."""


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


class _InDtype(TorchFunctionMode):
    """A context in which tensors that this thread makes without a dtype get this one. torch's default would be every
    other thread's too.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in _FACTORIES and kwargs.get("dtype") is None:
            kwargs["dtype"] = self._dtype
        return function(*args, **kwargs)


_FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn})


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that transformers' loader reads when it needs it: `stored[...]`."""

    checkpoint: Checkpoint
    name: str
    failed: list[CheckpointError]

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self.checkpoint.read_tensor(self.name)[index]
        except CheckpointError as error:
            self.failed.append(error)
            raise

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.specs[self.name].dtype

    def check(self) -> None:
        """Checks what the headers show before anything is read. A plain tensor's header was read already; others raise
        CheckpointError.
        """


@dataclass(frozen=True, slots=True)
class DecodedTensor(StoredTensor):
    """A parameter of the trunk that is decoded when transformers' loader needs it."""

    stored: Stored
    model: PreTrainedModel  # on the meta device
    shape: torch.Size

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self._made(self.checkpoint.read_tensor)[index]
        except CheckpointError as error:
            self.failed.append(error)
            raise

    def check(self) -> None:
        """Tries the decoding with tensors that have no values. A shape that is itself a value is not known yet."""
        parts = self.stored.names.values()
        if not any(name.endswith(".weight_shape") for names in parts for name in names):
            self._made(self._without_values)

    def _made(self, read: Callable[[str], Tensor]) -> Tensor:
        pieces = {pattern: [read(each) for each in names] for pattern, names in self.stored.names.items()}
        try:
            made = self.stored.make(pieces, self.name, self.model)
            if made.shape != self.shape:
                raise ValueError(f"its shape is {tuple(made.shape)}, and its config calls for {tuple(self.shape)}")
        except Exception as error:  # what decodes checks its tensors in ways of its own
            first = next(iter(self.stored.names.values()))[0]
            raise CheckpointError(f"tensor {first!r} makes no {self.name!r}: {one_line(error)}") from error
        return made

    def _without_values(self, name: str) -> Tensor:
        spec = self.checkpoint.specs[name]
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32  # as the model is that it is decoded for


def model_class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of the language model that a config is for. Raises UnsupportedModel."""
    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedModel(f"model type {shown(config.model_type)} is not that of a language model") from None
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


class _WithoutExperts:
    """The state of a model class while its trunk is loaded: its experts have no parameters."""

    @classmethod
    def get_init_context(cls, dtype: torch.dtype, *args: Any) -> Any:
        return super().get_init_context(torch.get_default_dtype(), *args)  # type: ignore[misc]

    def post_init(self) -> None:
        super().post_init()  # type: ignore[misc]
        _take_out_experts(self)


@cache
def without_experts(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`kind` under its own name, which transformers looks conversions up by."""
    return type(kind.__name__, (_WithoutExperts, kind), {"__module__": kind.__module__})


def _take_out_experts(model: Any) -> None:
    for _, module in expert_modules(model):
        for name in expert_parameters(module):
            delattr(module, name)
            object.__setattr__(module, name, torch.empty(0))  # what initialises weights looks at it


def _config_of(checkpoint: Checkpoint) -> PretrainedConfig:
    """Makes the config of the language model, also where a checkpoint has others. Raises UnsupportedModel,
    CheckpointError.
    """
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            f"model type {shown(model_type)} cannot be paged: the installed transformers {transformers.__version__} "
            "does not know it"
        )
    with _config_errors(checkpoint):
        check_config(checkpoint.config)
        decoded = PretrainedConfig._decode_special_floats(without_choices(checkpoint.config))
        config: PretrainedConfig = AutoConfig.for_model(**decoded)
        text = config.get_text_config()
        return text if model_class_of(config).config_class is type(text) else config


def _own_strides(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies the hidden states that the output head gets, often those of the last token alone.

    Such a slice has the strides of the whole, and torch then multiplies it with a transposed copy of the head's
    weights: with a vocabulary of 100352, 5.3 s a prefill instead of 0.04.
    """
    hidden, *rest = inputs
    return (hidden.clone(memory_format=torch.contiguous_format), *rest)


def _choose_dtype(asked: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype:
    """Returns the dtype asked for, else bfloat16, in which float32 checkpoints are served too.

    "auto" is what the config says, or else what the first tensor in floating point is stored as.
    """
    name = str(asked or "bfloat16").removeprefix("torch.")
    if name == "auto":
        stored = (spec.dtype for spec in checkpoint.specs.values() if spec.dtype in PLAIN_FLOATS)
        said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or next(stored, torch.bfloat16)
        name = str(said).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(DTYPES)} or auto")
    return DTYPES[name]
