"""Bounds on the values of a `config.json`, checked before a model is made of it.

A size that no model has is the sign of a damaged or hostile file, and would cost minutes or all memory before it fails
by itself. Missing fields have their family's defaults, and each family checks what it demands beyond this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pager.errors import CheckpointError
from pager.reading import shown

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
            raise _refused(name, number, "a finite number")
    for name, bounds in _SIZES.items():
        if name in config:
            _check_size(name, config[name], bounds)
    for name, bounds in _OPTIONAL_SIZES.items():
        if config.get(name) is not None:
            _check_size(name, config[name], bounds)
    for name, bounds in _LISTS_OF_SIZES.items():
        values = config.get(name)
        if values is not None and not isinstance(values, list):
            raise _refused(name, values, "a list of numbers")
        for value in values or ():
            _check_size(name, value, bounds)
    for name in _FLAGS:
        if type(config.get(name, False)) is not bool:
            raise _refused(name, config[name], "true or false")
    check_token_ids({name: config.get(name) for name in TOKEN_IDS})
    for name, needed in (("is_encoder_decoder", False), ("return_dict", True)):
        if config.get(name, needed) is not needed:
            raise _refused(name, config[name], "as it is in a decoder, which alone can be paged")
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise _refused("hidden_act", activation, f"one of {', '.join(sorted(ACT2FN))}")
    epsilon = config.get("rms_norm_eps") or 0
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise _refused("rms_norm_eps", epsilon, "a number from 0 to 1")
    for holder in (config, *(config[name] for name in _ROPE_FIELDS if isinstance(config.get(name), Mapping))):
        _check_rope(holder)


def check_shape(config: Any, experts_per_layer: tuple[int, ...]) -> None:
    """The same of a config that transformers has completed: what its fields must be to each other."""
    hidden, heads, head_dim = (_field(config, name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if head_dim is None and hidden and heads and hidden % heads:
        raise _refused("hidden_size", hidden, f"a multiple of num_attention_heads, {heads}")
    if head_dim is None and hidden and heads:
        head_dim = hidden // heads
    if head_dim and head_dim % 2:
        raise _refused("head_dim", head_dim, "even, for rotary embeddings")
    if heads and heads % (_field(config, "num_key_value_heads") or heads):
        raise _refused("num_attention_heads", heads, f"a multiple of num_key_value_heads, {config.num_key_value_heads}")
    if not 0 < sum(experts_per_layer) <= MAX_EXPERTS:
        raise _refused("number of experts", sum(experts_per_layer), f"from 1 to {MAX_EXPERTS} in all layers together")
    top_k, largest = _field(config, "num_experts_per_tok"), max(experts_per_layer)
    if top_k is not None and top_k > largest:
        raise _refused("num_experts_per_tok", top_k, f"at most {largest}, the experts of a layer")


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
                raise _refused(name, value, "the number of a token or null")


def _check_size(name: str, value: Any, bounds: tuple[int, int]) -> None:
    least, most = bounds
    if type(value) is not int or not least <= value <= most:
        raise _refused(name, value, f"a whole number from {least} to {most}")


def _check_rope(holder: Mapping[str, Any]) -> None:
    """Checks rotary settings; `holder` is the config or its own object for rotary embeddings."""
    for name in ("rope_theta", "factor"):
        value = holder.get(name, 1)
        if value is not None and (type(value) not in (int, float) or value <= 0):
            raise _refused(name, value, "a number above 0")
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    kind = holder.get("rope_type", holder.get("type", "default"))
    if kind not in kinds:
        raise _refused("rope_type", kind, f"one of {', '.join(kinds)}")


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


def _refused(name: str, value: Any, possible: str) -> CheckpointError:
    return CheckpointError(f"its {name} is {shown(value)}; it must be {possible}")
