"""The facts that paging needs of each model family: where experts are stored and how the gate picks.

An entry per family; everything else is taken from the transformers model itself.
Legend: T tokens, E experts of a layer (all of them), R routed experts, K experts a token picks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pager.errors import UnsupportedModel
from pager.reading import shown
from pager.types import ExpertKey, ExpertShape, RoutingFacts

Pick = Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Family:
    """The facts of one family.

    `pick(gate, logits_TE, allowed_TE)` repeats the family's own choice from raw gate logits, restricted to the
    allowed experts (bool, shared ones always True; None: all); it returns weights [T, K] and indices [T, K] over all
    experts, as the gate itself would.
    """

    model_type: str
    facts: Callable[[Any], RoutingFacts]
    expert_shape: Callable[[Any], ExpertShape]
    expert_names: Callable[[ExpertKey], tuple[str, str, str]]  # gate, up, down tensors of one expert in the checkpoint
    stored_name: Callable[[str], str]  # a trunk parameter's name → its name in the checkpoint
    pick: Pick
    poolable: Callable[[Any], str | None]  # why this config cannot be pooled, or None


def family_of(model_type: object) -> Family:
    """Returns the family that a config names. Raises UnsupportedModel, naming the supported ones."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(f"model type {shown(model_type)} cannot be paged; supported are {supported}")
    return family


def routed_probabilities(logits_TE: Tensor, num_shared: int) -> Tensor:
    """Returns fp32 gate probabilities over the routed experts [T, R] (EMO rule 13)."""
    routed = logits_TE.shape[-1] - num_shared
    return torch.softmax(logits_TE[..., :routed].float(), dim=-1)


def _swiglu_names(key: ExpertKey) -> tuple[str, str, str]:
    prefix = f"model.layers.{key.layer}.mlp.experts.{key.expert}."
    return f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight", f"{prefix}down_proj.weight"


def _mixtral_names(key: ExpertKey) -> tuple[str, str, str]:
    prefix = f"model.layers.{key.layer}.block_sparse_moe.experts.{key.expert}."
    return f"{prefix}w1.weight", f"{prefix}w3.weight", f"{prefix}w2.weight"


def _softmax_top_k(logits_TE: Tensor, allowed_TE: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    if allowed_TE is not None:
        logits_TE = logits_TE.masked_fill(~allowed_TE, float("-inf"))
    return torch.topk(torch.softmax(logits_TE.float(), dim=-1), top_k, dim=-1)


def _pick_olmoe(gate: Any, logits_TE: Tensor, allowed_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    weights, index = _softmax_top_k(logits_TE, allowed_TE, gate.top_k)
    if gate.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits_TE.dtype), index


def _pick_mixtral(gate: Any, logits_TE: Tensor, allowed_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    weights, index = _softmax_top_k(logits_TE, allowed_TE, gate.top_k)
    return weights / weights.sum(dim=-1, keepdim=True), index


def _pick_emo(gate: Any, logits_TE: Tensor, allowed_TE: Tensor | None) -> tuple[Tensor, Tensor]:
    weights, index = gate.pick(logits_TE, allowed_TE)
    return weights.to(logits_TE.dtype), index


def _uniform_facts(config: Any, layers: list[bool], num_experts: int) -> RoutingFacts:
    return RoutingFacts(
        experts_per_layer=tuple(num_experts if sparse else 0 for sparse in layers),
        shared_per_layer=(0,) * len(layers),
        top_k_per_layer=tuple(config.num_experts_per_tok if sparse else 0 for sparse in layers),
    )


def _every_layer(config: Any) -> list[bool]:
    return [True] * config.num_hidden_layers


def _qwen3_layers(config: Any) -> list[bool]:
    return [
        layer not in config.mlp_only_layers and config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    ]


def _emo_facts(config: Any) -> RoutingFacts:
    experts = tuple(config.experts_in_layer(layer) for layer in range(config.num_hidden_layers))
    shared = tuple(config.shared_in_layer(layer) for layer in range(config.num_hidden_layers))
    top_k = tuple(
        min(config.num_experts_per_tok, experts_) - shared_ for experts_, shared_ in zip(experts, shared, strict=True)
    )
    return RoutingFacts(experts_per_layer=experts, shared_per_layer=shared, top_k_per_layer=top_k)


def _emo_unpoolable(config: Any) -> str | None:
    if any(config.always_active_in_layer(layer) for layer in range(config.num_hidden_layers)):
        return "pools are not defined for always-active experts"
    return None


def _same_name(name: str) -> str:
    return name


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="emo",
            facts=_emo_facts,
            expert_shape=lambda config: ExpertShape(config.hidden_size, config.intermediate_size),
            expert_names=_swiglu_names,
            stored_name=_same_name,
            pick=_pick_emo,
            poolable=_emo_unpoolable,
        ),
        Family(
            model_type="olmoe",
            facts=lambda config: _uniform_facts(config, _every_layer(config), config.num_experts),
            expert_shape=lambda config: ExpertShape(config.hidden_size, config.intermediate_size),
            expert_names=_swiglu_names,
            stored_name=_same_name,
            pick=_pick_olmoe,
            poolable=lambda _: None,
        ),
        Family(
            model_type="mixtral",
            facts=lambda config: _uniform_facts(config, _every_layer(config), config.num_local_experts),
            expert_shape=lambda config: ExpertShape(config.hidden_size, config.intermediate_size),
            expert_names=_mixtral_names,
            stored_name=lambda name: name.replace(".mlp.", ".block_sparse_moe."),
            pick=_pick_mixtral,
            poolable=lambda _: None,
        ),
        Family(
            model_type="qwen3_moe",
            facts=lambda config: _uniform_facts(config, _qwen3_layers(config), config.num_experts),
            expert_shape=lambda config: ExpertShape(config.hidden_size, config.moe_intermediate_size),
            expert_names=_swiglu_names,
            stored_name=_same_name,
            pick=_pick_olmoe,
            poolable=lambda _: None,
        ),
    )
}
