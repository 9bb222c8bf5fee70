"""State that layers hand from token to token beside keys and values: linear attention, convolutions, state spaces.

transformers' layers ask the cache of a forward for it and give it back there. The engine passes a cache of its own, a
`StateStep`, over tensors with a place for every answer in flight.

Legend: B rows, S new tokens a row, C channels of a convolution, W its width, P places of states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pager.errors import UnsupportedModel
from pager.models.layout import try_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Kept:
    """One tensor of a state: its shape, without rows, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateShape:
    """The state that one layer has of a text: the last inputs [C, W] of a convolution, and what a recurrence knows."""

    conv: Kept | None
    recurrent: Kept | None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.conv, self.recurrent) if each is not None)


class StateStore:
    """The states of all answers in flight, layer by layer: a place for each, which its request owns.

    A place has two states, of texts with an even and with an odd number of tokens. A forward reads one and writes the
    other, so that it can run again where it was left or its tokens were not taken.
    """

    def __init__(self, shapes: Mapping[int, StateShape], num_places: int, device: torch.device) -> None:
        """Makes the tensors, `num_places` of each; of the layers in `shapes`."""

        def zeros(kept: Kept | None) -> Tensor | None:
            return None if kept is None else torch.zeros(2 * num_places, *kept.shape, dtype=kept.dtype, device=device)

        self.conv = {layer: zeros(shape.conv) for layer, shape in shapes.items()}
        self.recurrent = {layer: zeros(shape.recurrent) for layer, shape in shapes.items()}

    def __bool__(self) -> bool:
        return bool(self.conv)

    def copy(self, source: int, to: int) -> None:
        """Copies the state in one place to another."""
        for held in self.tensors:
            held[2 * to : 2 * to + 2] = held[2 * source : 2 * source + 2]

    @property
    def tensors(self) -> list[Tensor]:
        return [held for held in (*self.conv.values(), *self.recurrent.values()) if held is not None]

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self.tensors)


class StateStep:
    """The states of one forward's rows, as a layer of transformers reads and updates them through its cache.

    Methods that transformers calls have its names and arguments (`transformers.Cache`): `layers` up to 5.17, the others
    since. Keys and values are not kept here.
    """

    def __init__(
        self,
        store: StateStore,
        place_B: Tensor,
        before_B: Tensor | None,
        after_B: Tensor,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_B`: how many tokens each row's text had; None for texts that begin here. `after_B`: has with this.

        `on_layer` is called before a layer's states are read; what it raises leaves the forward.
        """
        self._store = store
        self._on_layer = on_layer
        self._read_B = None if before_B is None else 2 * place_B + before_B % 2
        self._write_B = 2 * place_B + after_B % 2
        self._layer: int | None = None
        self._conv: Tensor | None = None  # the states of that layer, which it may change in their place
        self._recurrent: Tensor | None = None

    def _turn_to(self, layer: int | None) -> None:
        """Keeps what the last layer made of its states, and reads those of `layer`."""
        if layer == self._layer:
            return
        if self._layer is not None:
            for held, state in ((self._store.conv[self._layer], self._conv),
                                (self._store.recurrent[self._layer], self._recurrent)):  # fmt: skip
                if held is not None:
                    assert state is not None, f"layer {self._layer} has left out one of its states"
                    held.index_copy_(0, self._write_B, state.to(held.dtype))
        self._layer, self._conv, self._recurrent = layer, None, None
        if layer is not None:
            self._on_layer()
        if layer is not None and self._read_B is not None:
            conv, recurrent = self._store.conv[layer], self._store.recurrent[layer]
            self._conv = None if conv is None else conv.index_select(0, self._read_B)
            self._recurrent = None if recurrent is None else recurrent.index_select(0, self._read_B)

    def finish(self) -> None:
        """Keeps what the last layer made, once the forward is through."""
        self._turn_to(None)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self._read_B is not None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self._turn_to(layer_idx)
        return self._conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self._turn_to(layer_idx)
        return self._recurrent

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self._turn_to(layer_idx)
        held = self._store.conv[layer_idx]
        assert held is not None, "a layer has a convolution that it did not have in the trial"
        width = held.shape[-1]
        seen = _widened(conv_states, width) if self._conv is None else torch.cat([self._conv, conv_states], -1)
        self._conv = seen[..., -width:]
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self._turn_to(layer_idx)
        self._recurrent = recurrent_states
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    @property
    def layers(self) -> Mapping[int, Any]:
        return {layer: _LayerStates(self, layer) for layer in self._store.conv}


class _LayerStates:
    """A layer's states by their numbers, as transformers 5.17 reads them."""

    record_past = False

    def __init__(self, step: StateStep, layer: int) -> None:
        self._step, self._layer = step, layer

    @property
    def conv_states(self) -> Mapping[int, Tensor | None]:
        return {0: self._step.get_conv_state(self._layer)}

    @property
    def recurrent_states(self) -> Mapping[int, Tensor | None]:
        return {0: self._step.get_recurrent_state(self._layer)}


def _widened(conv_states: Tensor, width: int) -> Tensor:
    """The same with zeros before it, where a text is shorter than the convolution."""
    return pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))


# --- what a model's layers keep, and what computing it takes ---------------------------------------------------------


PLAIN_KINDS = frozenset({"full_attention", "sliding_attention"})
"""Entries of a config's `layer_types` whose layers hand on keys and values alone."""

_TRIED_TOKENS = 256  # a multiple of the chunks in which recurrences are computed
_TRIED_ROWS = 8


class _Recorder(StateStep):
    """A cache without states that notes the shapes of those it is given."""

    def __init__(self) -> None:
        self.conv: dict[int, Kept] = {}
        self.recurrent: dict[int, Kept] = {}

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        width = conv_kernel_size or conv_states.shape[-1]
        self._note(self.conv, layer_idx, state_idx, (*conv_states.shape[1:-1], width), conv_states.dtype)
        return _widened(conv_states, width)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self._note(self.recurrent, layer_idx, state_idx, recurrent_states.shape[1:], recurrent_states.dtype)
        return recurrent_states

    def _note(self, kept: dict[int, Kept], layer: int, state: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        if state or layer in kept:
            raise UnsupportedModel(f"layer {layer} has several states of a kind")
        kept[layer] = Kept(tuple(shape), dtype)


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made in the block have at a time, views of `known` ones left out."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most_bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {place: each for place, each in self._live.items() if not each[0].expired()}
        self.most_bytes = max(self.most_bytes, sum(nbytes for _, nbytes in self._live.values()))
        return made


def states_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[int, StateShape]:
    """Returns the state of each layer that has one, of a model on the meta device that is to run in `dtype`.

    Raises UnsupportedModel, and whatever the model does with a cache that has no more than states.
    """
    if set(getattr(model.config, "layer_types", None) or ()) <= PLAIN_KINDS:
        return {}
    return _states_of(deepcopy(model).to(dtype))


def _states_of(model: PreTrainedModel) -> dict[int, StateShape]:
    found = _Recorder()
    try_forward(model, cache=found)
    layers = sorted(found.conv.keys() | found.recurrent.keys())
    return {layer: StateShape(found.conv.get(layer), found.recurrent.get(layer)) for layer in layers}


@dataclass(frozen=True, slots=True)
class StateWork:
    """The bytes that the layers of a model with states take, but for attention and experts: for any prompt and for each
    of its tokens, and for a row of one token.
    """

    prompt_bytes: int = 0
    token_bytes: int = 0
    row_bytes: int = 0


def work_of(model: PreTrainedModel, dtype: torch.dtype) -> StateWork:
    """Returns what forwards of `model` take in `dtype`. They run on the meta device, where it is, and are counted."""
    model = deepcopy(model).to(dtype)
    shapes = _states_of(model)
    _leave_one_of_a_kind(model, shapes)
    store = StateStore(shapes, 1, torch.device("meta"))
    known = [*model.parameters(), *model.buffers(), *store.tensors]

    def taken(rows: int, tokens: int, *, is_new: bool) -> int:
        place_B = torch.zeros(rows, dtype=torch.long, device="meta")
        step = StateStep(store, place_B, None if is_new else place_B, place_B)
        with _Peak(known) as peak:
            try_forward(model, cache=step, num_rows=rows, num_tokens=tokens)
            step.finish()
        return int(peak.most_bytes)

    prompt = partial(taken, 1, is_new=True)
    token_bytes = -(-(prompt(2 * _TRIED_TOKENS) - prompt(_TRIED_TOKENS)) // _TRIED_TOKENS)
    rows = partial(taken, tokens=1, is_new=False)
    return StateWork(prompt(1), token_bytes, -(-(rows(2 * _TRIED_ROWS) - rows(_TRIED_ROWS)) // _TRIED_ROWS))


def _leave_one_of_a_kind(model: PreTrainedModel, shapes: Mapping[int, StateShape]) -> None:
    """Takes all layers from `model` that follow the first one of each shape: layers of a shape take the same."""
    layers = getattr(model.base_model, "layers", None)
    if isinstance(layers, torch.nn.ModuleList):
        first = {shape: layer for layer, shape in reversed([*shapes.items()])}
        del layers[max(first.values()) + 1 :]
