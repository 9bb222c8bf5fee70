"""One forward of a model on the meta device, which has no weights: what its layers ask of attention and of experts.

Families differ in what they hand to both. What a model really calls says more than a table of families would, and it
is known before any weight is read.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "expert_pager_trial"
NUM_TOKENS = 3


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of the attention function. Shapes are [heads, head dimension]; `arguments` are those that are given."""

    module: str
    layer: int | None
    query: tuple[int, int]
    key: tuple[int, int]
    value: tuple[int, int]
    has_mask: bool
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """One call of the experts function: the module's name and how many experts a token picks."""

    module: str
    num_picks: int


@dataclass(slots=True)
class Trial:
    """What a forward called, in order."""

    attention: list[AttentionCall] = field(default_factory=list)
    experts: list[ExpertsCall] = field(default_factory=list)


class _Running(threading.local):
    trial: Trial
    names: Mapping[Any, str]


_running = _Running()


@torch.no_grad()
def try_forward(model: PreTrainedModel, *, own_attention: bool = True, with_mask: bool = False) -> Trial:
    """Runs `model`, which is on the meta device and keeps these functions. Raises whatever the model does.

    With `own_attention` transformers builds no mask, as it does for engines that have attention of their own; without,
    attention is not looked at. `with_mask` gives a mask of padding in the place of positions.
    """
    model.set_attn_implementation(NAME if own_attention else "eager")
    model.set_experts_implementation(NAME)
    for module in model.modules():  # tables that grow with the longest position ask for its value, which there is not
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str | dict):
            module.rope_type = "default" if isinstance(kind, str) else dict.fromkeys(kind, "default")
    _running.trial = trial = Trial()
    inputs = {"input_ids": torch.zeros(1, NUM_TOKENS, dtype=torch.long, device="meta")}
    if own_attention:
        inputs["position_ids"] = torch.arange(NUM_TOKENS, device="meta")[None]
    if with_mask:
        inputs["attention_mask"] = torch.ones(1, NUM_TOKENS, dtype=torch.bool, device="meta")
    _running.names = {module: name for name, module in model.named_modules()}
    try:
        model(**inputs, use_cache=False)
    finally:
        del _running.trial, _running.names
    return trial


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, None]:
    (_, heads, tokens, _), width = query.shape, value.shape[3]
    call = AttentionCall(
        module=_running.names[module],
        layer=getattr(module, "layer_idx", None),
        query=(query.shape[1], query.shape[3]),
        key=(key.shape[1], key.shape[3]),
        value=(value.shape[1], value.shape[3]),
        has_mask=attention_mask is not None,
        arguments={name: argument for name, argument in arguments.items() if argument is not None},
    )
    _running.trial.attention.append(call)
    return query.new_empty(len(query), tokens, heads, width), None


def _experts(module: Any, hidden_TD: Tensor, index_TK: Tensor, _: Tensor) -> Tensor:
    _running.trial.experts.append(ExpertsCall(_running.names[module], index_TK.shape[-1]))
    return torch.empty_like(hidden_TD)


AttentionInterface.register(NAME, _attend)
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
