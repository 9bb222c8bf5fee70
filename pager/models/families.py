"""The facts of a model that paging needs: which layers have experts, of what shape, and how a token's are picked.

There is no table of families. The experts are the modules behind transformers' experts interface; how many of them a
token picks shows in a forward on the meta device; and how a gate picks is tried against the gate itself.
Legend: T tokens, E experts of a layer (all of them), R routed experts, K experts a token picks, D hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pager.errors import CheckpointError, UnsupportedModel
from pager.models.layout import try_forward
from pager.reading import shown
from pager.types import ExpertShape, RoutingFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# --- bounds -----------------------------------------------------------------------------------------------------------
#
# Bounds on the values of a `config.json`, checked before a model is made of it.
#
# A size that no model has is the sign of a damaged or hostile file, and would cost minutes or all memory before it
# fails by itself. Missing fields have their family's defaults, and each family checks what it demands beyond this.


MAX_EXPERTS = 1 << 18
"""Of all layers together: several times what the largest models have."""

_MAX_LAYERS, _MAX_EXPERTS_A_LAYER = 1 << 10, 1 << 16
_SIZES: Mapping[str, tuple[int, int]] = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 18),
    "intermediate_size": (1, 1 << 20),
    "moe_intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, _MAX_LAYERS),
    "num_attention_heads": (1, 1 << 12),
    "max_position_embeddings": (1, 1 << 26),
    "num_experts": (0, _MAX_EXPERTS_A_LAYER),
    "num_local_experts": (0, _MAX_EXPERTS_A_LAYER),
    "num_experts_per_tok": (1, _MAX_EXPERTS_A_LAYER),
    "num_shared_experts": (0, _MAX_EXPERTS_A_LAYER),
    "decoder_sparse_step": (1, _MAX_LAYERS),
    "num_labels": (0, 1 << 16),
}
_OPTIONAL_SIZES: Mapping[str, tuple[int, int]] = {
    "dense_intermediate_size": (1, 1 << 20),
    "num_key_value_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 12),
    "sliding_window": (0, 1 << 26),
}
_LISTS_OF_SIZES: Mapping[str, tuple[int, int]] = {
    "num_experts_per_layer": (0, _MAX_EXPERTS_A_LAYER),
    "num_shared_experts_per_layer": (0, _MAX_EXPERTS_A_LAYER),
    "mlp_only_layers": (0, _MAX_LAYERS),
}
_FLAGS = (
    "tie_word_embeddings", "attention_bias", "norm_topk_prob", "dense_mlp_bias", "use_cache", "use_sliding_window",
    "output_router_logits", "output_hidden_states", "output_attentions",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CHOICES = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "auto_map",
    "quantization_config",
)
_ROPE_FIELDS = ("rope_scaling", "rope_parameters")


def without_choices(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `config` without the fields that say how to run the model.

    How to run it is decided here, and transformers would fetch the code of an implementation that is named by a
    repository.
    """
    return {name: value for name, value in config.items() if name not in _CHOICES}


def check_config(config: Mapping[str, Any]) -> None:
    """Checks the fields of a config. Raises CheckpointError, which names the field, its value and what is possible."""
    for name, number in _floats(config):
        if not math.isfinite(number):
            raise _outside(name, number, "a finite number")
    for name, bounds in _SIZES.items():
        if name in config:
            _check_size(name, config[name], bounds)
    for name, bounds in _OPTIONAL_SIZES.items():
        if config.get(name) is not None:
            _check_size(name, config[name], bounds)
    for name, bounds in _LISTS_OF_SIZES.items():
        values = config.get(name)
        if values is not None and not isinstance(values, list):
            raise _outside(name, values, "a list of numbers")
        for value in values or ():
            _check_size(name, value, bounds)
    for name in _FLAGS:
        if type(config.get(name, False)) is not bool:
            raise _outside(name, config[name], "true or false")
    check_token_ids({name: config.get(name) for name in TOKEN_IDS})
    for name, needed in (("is_encoder_decoder", False), ("return_dict", True)):
        if config.get(name, needed) is not needed:
            raise _outside(name, config[name], "as it is in a decoder, which alone can be paged")
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise _outside("hidden_act", activation, f"one of {', '.join(sorted(ACT2FN))}")
    epsilon = config.get("rms_norm_eps") or 0
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise _outside("rms_norm_eps", epsilon, "a number from 0 to 1")
    for holder in (config, *(config[name] for name in _ROPE_FIELDS if isinstance(config.get(name), Mapping))):
        _check_rope(holder)


def check_shape(config: Any, experts_per_layer: tuple[int, ...]) -> None:
    """The same of a config that transformers has completed: what its fields must be to each other."""
    hidden, heads, head_dim = (_field(config, name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if head_dim is None and hidden and heads and hidden % heads:
        raise _outside("hidden_size", hidden, f"a multiple of num_attention_heads, {heads}")
    if head_dim is None and hidden and heads:
        head_dim = hidden // heads
    if head_dim and head_dim % 2:
        raise _outside("head_dim", head_dim, "even, for rotary embeddings")
    if heads and heads % (_field(config, "num_key_value_heads") or heads):
        raise _outside("num_attention_heads", heads, f"a multiple of num_key_value_heads, {config.num_key_value_heads}")
    if not 0 < sum(experts_per_layer) <= MAX_EXPERTS:
        raise _outside("number of experts", sum(experts_per_layer), f"from 1 to {MAX_EXPERTS} in all layers together")
    top_k, largest = _field(config, "num_experts_per_tok"), max(experts_per_layer)
    if top_k is not None and top_k > largest:
        raise _outside("num_experts_per_tok", top_k, f"at most {largest}, the experts of a layer")


def _field(config: Any, name: str) -> int | None:
    """A size of all layers alike; None where a family has none of this name, or one for each layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # what transformers raises for what layers have each for themselves is no AttributeError
        return None
    return value if isinstance(value, int) else None


def largest(config: Any, name: str) -> int | None:
    """A size, or where layers have each their own the largest; None where a family has none of this name."""
    if (value := _field(config, name)) is not None:
        return value
    layers = getattr(config, "per_layer_config", None) or {}
    of_layers = [_field(each, name) for each in (layers.values() if isinstance(layers, Mapping) else layers)]
    return max((each for each in of_layers if each is not None), default=None)


def check_token_ids(ids: Mapping[str, Any]) -> None:
    """Checks token ids by name: they are numbers, lists of numbers or None. Raises CheckpointError."""
    for name, value in ids.items():
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and (type(token_id) is not int or not -1 <= token_id < 2**31):
                raise _outside(name, value, "the number of a token or null")


def _check_size(name: str, value: Any, bounds: tuple[int, int]) -> None:
    least, most = bounds
    if type(value) is not int or not least <= value <= most:
        raise _outside(name, value, f"a whole number from {least} to {most}")


def _check_rope(holder: Mapping[str, Any]) -> None:
    """Checks rotary settings; `holder` is the config or its own object for rotary embeddings."""
    for name in ("rope_theta", "factor"):
        value = holder.get(name, 1)
        if value is not None and (type(value) not in (int, float) or value <= 0):
            raise _outside(name, value, "a number above 0")
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    kind = holder.get("rope_type", holder.get("type", "default"))
    if kind not in kinds:
        raise _outside("rope_type", kind, f"one of {', '.join(kinds)}")


def _floats(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields every float, however deep, with the name of its field."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _floats(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for each in value:
            yield from _floats(each, name)


def _outside(name: str, value: Any, possible: str) -> CheckpointError:
    return CheckpointError(f"its {name} is {shown(value)}; it must be {possible}")


# --- families ---------------------------------------------------------------------------------------------------------


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

    @property
    def gates_are_known(self) -> bool:
        """Every gate is one matrix and a known way of picking, so that its logits are there to be read."""
        return all(each.pick is not None for each in self.layers)


def family_of(model: PreTrainedModel) -> Family:
    """Returns what `model`, which is on the meta device and whole, says of itself. Raises UnsupportedModel."""
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
    """Returns by experts module how many experts a token picks. Raises UnsupportedModel where nothing says so."""
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
