"""What paging needs to know of a model: which layers have experts, of what shape, and how a token's are picked.

There is no table of families. The experts are the modules behind transformers' experts interface; how many of them a
token picks shows in a forward on the meta device; and how a gate picks is tried against the gate itself.
Legend: T tokens, E experts of a layer (all of them), R routed experts, K experts a token picks, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pager.errors import UnsupportedModel
from pager.models.config_bounds import largest
from pager.models.trial import try_forward
from pager.reading import shown
from pager.types import ExpertShape, RoutingFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pick = Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""`pick(gate, logits_TE, allowed_TE)` repeats a gate's own choice from raw gate logits, restricted to the allowed
experts (bool, shared ones always True; None: all). Returns weights [T, K] and indices [T, K] over all experts."""

TRIED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """A layer with experts: the names of its experts module and of its gate, where that is one that can be pooled."""

    layer: int
    experts: str
    num_experts: int
    num_picks: int
    num_shared: int
    gate: str | None = None
    pick: Pick | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """The facts of one model. `unpoolable` says why it runs with all its experts only; None where pools are defined."""

    model_type: str
    layers: tuple[ExpertLayer, ...]
    shape: ExpertShape
    facts: RoutingFacts
    unpoolable: str | None


def family_of(model: PreTrainedModel) -> Family:
    """What `model`, which is on the meta device and whole, says of itself. Raises UnsupportedModel."""
    config = model.config.get_text_config()
    modules = dict(expert_modules(model))
    num_layers = int(config.num_hidden_layers)
    if not modules:
        raise _refused(config.model_type, "no layer of it has experts behind transformers' experts interface")
    picks = _num_picks(model)
    tried: dict[Any, Pick | None] = {}
    layers = [_layer(model, name, module, picks, tried) for name, module in modules.items()]
    _check_layers(layers, num_layers, config.model_type)
    by_layer = {each.layer: each for each in layers}
    found = [by_layer.get(layer) for layer in range(num_layers)]
    facts = RoutingFacts(
        experts_per_layer=tuple(each.num_experts if each else 0 for each in found),
        shared_per_layer=tuple(each.num_shared if each else 0 for each in found),
        top_k_per_layer=tuple(each.num_picks - each.num_shared if each else 0 for each in found),
    )
    shape = _shape(modules, config.model_type)
    return Family(config.model_type, tuple(layers), shape, facts, _unpoolable(model, layers))


def expert_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """`(name, module)` of every module behind transformers' experts interface, which gave it its flags."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    )


def expert_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of all experts of a layer, stacked: [E, ...]. Those of a sub-module belong to the trunk."""
    return {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.dim() >= 2}


def routed_probabilities(logits_TE: Tensor, num_shared: int) -> Tensor:
    """fp32 gate probabilities over the routed experts [T, R] (EMO rule 13)."""
    routed = logits_TE.shape[-1] - num_shared
    return torch.softmax(logits_TE[..., :routed].float(), dim=-1)


def _num_picks(model: PreTrainedModel) -> Mapping[str, int]:
    """By experts module, how many experts a token picks. Raises UnsupportedModel where nothing says so."""
    for with_mask in (True, False):  # some families look at the values of a mask, of which there are none
        with suppress(Exception):  # each fails in its own way
            trial = try_forward(model, own_attention=False, with_mask=with_mask)
            return {call.module: call.num_picks for call in trial.experts}
    num_picks = largest(model.config.get_text_config(), "num_experts_per_tok")
    if num_picks is None:
        why = "neither its config nor a forward without weights says how many experts a token picks"
        raise _refused(model.config.model_type, why)
    return {name: num_picks for name, _ in expert_modules(model)}


def _layer(
    model: PreTrainedModel, name: str, module: Any, picks: Mapping[str, int], tried: dict[Any, Pick | None]
) -> ExpertLayer:
    """`tried` keeps how gates that are alike pick."""
    number = re.search(r"\.(\d+)\.", f"{name}.")
    if number is None or name not in picks:
        raise UnsupportedModel(
            f"model type {model.config.model_type!r} cannot be paged: {name} is not the experts of one layer"
        )
    num_experts = len(next(iter(expert_parameters(module).values())))
    block_name = name.rpartition(".")[0]
    gate_name, gate = _gate(model.get_submodule(block_name), num_experts)
    num_shared = int(getattr(gate, "num_shared", 0))
    if gate is not None:
        alike = (type(gate), num_experts, picks[name], num_shared)
        if alike not in tried:
            tried[alike] = tried_pick(gate, picks[name])
    return ExpertLayer(
        layer=int(number.group(1)),
        experts=name,
        num_experts=num_experts,
        num_picks=picks[name],
        num_shared=num_shared,
        gate=f"{block_name}.{gate_name}" if gate is not None else None,
        pick=tried[alike] if gate is not None else None,
    )


def _gate(block: nn.Module, num_experts: int) -> tuple[str, Any]:
    """The child of a block that has the gate's matrix and nothing else; an empty name where there is none."""
    for name, child in block.named_children():
        parameters = dict(child.named_parameters())
        if parameters.keys() == {"weight"} and len(parameters["weight"]) == num_experts:
            return name, child
    return "", None


def _check_layers(layers: list[ExpertLayer], num_layers: int, model_type: str) -> None:
    numbers = [each.layer for each in layers]
    if len(set(numbers)) < len(numbers) or max(numbers) >= num_layers:
        raise _refused(model_type, f"it has experts in the layers {numbers}, not once a layer of {num_layers}")


def _shape(modules: Mapping[str, Any], model_type: str) -> ExpertShape:
    shapes = {}
    for name, module in modules.items():
        parameters = {each: tuple(value.shape[1:]) for each, value in expert_parameters(module).items()}
        down = parameters["down_proj"]
        hidden, intermediate = reversed(down) if module.is_transposed else down
        shapes[name] = ExpertShape.of(parameters, hidden=hidden, intermediate=intermediate)
    first, *others = dict.fromkeys(shapes.values())
    if others:
        different = f"{first.named} and {others[0].named}"
        raise _refused(model_type, f"its layers have experts of different shapes, {different}")
    return first


def _unpoolable(model: PreTrainedModel, layers: list[ExpertLayer]) -> str | None:
    if any(getattr(model.get_submodule(each.gate), "always_active", ()) for each in layers if each.gate):
        return "pools are not defined for always-active experts"
    others = [each for each in layers if each.pick is None]
    if others:
        return f"the gate of {others[0].experts.rpartition('.')[0]} picks in a way of its own"
    return None


def _refused(model_type: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"model type {shown(model_type)} cannot be paged: {why}")


# --- how gates pick -----------------------------------------------------------------------------------------------


def _pick_own(gate: Any, logits_TE: Tensor, allowed_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gate's own method, as EMO's has one."""
    weights, index = gate.pick(logits_TE, allowed_TE)
    return weights.to(logits_TE.dtype), index


def _softmax_top_k(gate: Any, logits_TE: Tensor, allowed_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    if allowed_TE is not None:
        logits_TE = logits_TE.masked_fill(~allowed_TE, float("-inf"))
    return torch.topk(torch.softmax(logits_TE.float(), dim=-1), gate.top_k, dim=-1)


def _pick_softmax(gate: Any, logits_TE: Tensor, allowed_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    weights, index = _softmax_top_k(gate, logits_TE, allowed_TE)
    return weights.to(logits_TE.dtype), index


def _pick_renormalised(gate: Any, logits_TE: Tensor, allowed_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    weights, index = _pick_renormalised_fp32(gate, logits_TE, allowed_TE)
    return weights.to(logits_TE.dtype), index


def _pick_renormalised_fp32(gate: Any, logits_TE: Tensor, allowed_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    weights, index = _softmax_top_k(gate, logits_TE, allowed_TE)
    return weights / weights.sum(dim=-1, keepdim=True), index


PICKS: tuple[Pick, ...] = (_pick_own, _pick_softmax, _pick_renormalised, _pick_renormalised_fp32, _softmax_top_k)
"""The ways of picking that can be restricted to a pool, each tried in turn."""


def tried_pick(gate: nn.Module, num_picks: int) -> Pick | None:
    """The way that gives this gate's own weights and indices, in both dtypes; None where none does."""
    for pick in PICKS:
        try:
            if all(_repeats(pick, gate, dtype, num_picks) for dtype in (torch.float32, torch.bfloat16)):
                return pick
        except Exception:
            continue
    return None


@torch.no_grad()
def _repeats(pick: Pick, gate: nn.Module, dtype: torch.dtype, num_picks: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    real: Any = deepcopy(gate).to_empty(device="cpu").to(dtype).eval()
    real.weight.data = torch.randn(real.weight.shape, generator=generator).to(dtype)
    hidden_TD = torch.randn(TRIED_TOKENS, real.weight.shape[1], generator=generator).to(dtype)
    logits_TE, weights_TK, index_TK = real(hidden_TD)
    if not logits_TE.equal(linear(hidden_TD, real.weight)) or index_TK.shape != (TRIED_TOKENS, num_picks):
        return False
    found_TK, found_index_TK = pick(real, logits_TE, None)
    return found_TK.dtype == weights_TK.dtype and found_TK.equal(weights_TK) and found_index_TK.equal(index_TK)
