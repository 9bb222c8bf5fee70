"""Attention over KV blocks, as an attention function of transformers, and rotary embeddings that depend on a row alone.

Legend: B rows, S new tokens a row, C tokens of context read, N token slots, H query heads, G key/value heads,
D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pager.engine.kv import KvCache, heads_of
from pager.errors import PagerError, UnsupportedModel
from pager.models.layout import AttentionCall, try_forward
from pager.models.open_model import OpenModel
from pager.reading import one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NAME = "expert_pager_blocks"

_PLAIN_KINDS = frozenset({"full_attention", "sliding_attention"})
"""Entries of a config's `layer_types` whose attention is as its arguments say."""

_WITHOUT_EFFECT = frozenset(
    {
        "cache_position", "dropout", "is_causal", "output_attentions", "output_hidden_states", "output_router_logits",
        "position_ids", "return_dict", "sliding_window", "use_cache",
    }
)  # fmt: skip
"""Arguments that change nothing here: no training, positions are in the keys already, and `check` saw the window."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptStep:
    """The tokens `start:end` of a forward's only row, which are of one prompt, and what its queries see.

    `read_1C` [1, C]: token slots of the context, the new tokens included; None where the new tokens are the whole
    context, which is then causal. `mask_SC` [S, C]: True where a query sees a slot.
    """

    start: int
    end: int
    read_1C: torch.Tensor | None = None
    mask_SC: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class KvStep:
    """Where one forward writes its keys and values, and what its queries see. The same for every layer.

    `write_T` [B*S]: token slots of the new tokens. A forward runs either `prompts`, one after the other in a single
    row, or one token for each of B rows. Of these, `read_BC` [B, C] are token slots of the context, the new token
    included, and `mask` (broadcast to [B, H, 1, C]) is 0 where a query sees a slot; None where it sees all it reads.
    """

    cache: KvCache
    write_T: torch.Tensor
    read_BC: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    prompts: Sequence[PromptStep] = ()


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    kv_step: KvStep | None = None,
    on_layer: Callable[[], None] | None = None,
    **arguments: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, S, D], key and value [B, G, S, D] → ([B, S, H, D], None).

    `on_layer` is called first, before the layer writes anything; what it raises leaves the forward. Raises
    UnsupportedModel for an argument that it would have to leave out of account, which `check` looks for at the start.
    """
    if attention_mask is not None or not arguments.keys() <= _WITHOUT_EFFECT:
        _refuse_arguments(module, attention_mask, arguments)
    assert kv_step is not None, "a model set up for the engine runs through its ModelRunner only"
    if on_layer is not None:
        on_layer()
    cache, layer = kv_step.cache, int(module.layer_idx)  # type: ignore[arg-type]
    cache.k[layer].index_copy_(0, kv_step.write_T, key.transpose(1, 2).flatten(0, 1))
    cache.v[layer].index_copy_(0, kv_step.write_T, value.transpose(1, 2).flatten(0, 1))

    if kv_step.prompts:
        own = (query, key, value)
        parts = [_attend_part(part, cache, layer, own, scaling) for part in kv_step.prompts]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0], None
    assert kv_step.read_BC is not None, "rows of one token read their context from blocks"
    rows = max(1, cache.gather_tokens // kv_step.read_BC.shape[1])
    if len(query) <= rows:
        return _attend_one_token(query, *cache.gather(layer, kv_step.read_BC), kv_step.mask, scaling), None
    assert kv_step.mask is not None, "rows have contexts of different lengths"
    some = zip(query.split(rows), kv_step.read_BC.split(rows), kv_step.mask.split(rows), strict=True)
    parts = [_attend_one_token(q, *cache.gather(layer, read_BC), mask, scaling) for q, read_BC, mask in some]
    return torch.cat(parts), None


def _refuse_arguments(module: torch.nn.Module, mask: torch.Tensor | None, arguments: Mapping[str, object]) -> None:
    unknown = [name for name, value in arguments.items() if name not in _WITHOUT_EFFECT and value is not None]
    if mask is not None or unknown:
        what = f"the argument {unknown[0]}" if unknown else "a mask of its own"
        raise UnsupportedModel(f"layer {module.layer_idx} attends with {what}, which is not supported by the service")


def _attend_part(
    part: PromptStep,
    cache: KvCache,
    layer: int,
    own: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scaling: float | None,
) -> torch.Tensor:
    """[1, S, H, D] for the tokens of one prompt, of `own` query, key and value of the whole row."""
    query, key, value = (tensor[:, :, part.start : part.end] for tensor in own)
    if part.read_1C is not None:
        key, value = cache.gather(layer, part.read_1C)
    return _attend_prompt(query, key, value, part.mask_SC, scaling)


def _attend_prompt(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attends from the tokens of a prompt; causally without a mask.

    On a CPU in fp32 whatever the dtype: in half precision torch compiles and keeps 0.7 MB for every length of prompt.
    """
    dtype = query.dtype
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and query.device.type != "cpu":  # torch's frugal kernels take no groups everywhere
        queries_a_key = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(queries_a_key, 1), value.repeat_interleave(queries_a_key, 1)
        is_grouped = False
    causal = mask is None and query.shape[2] > 1
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, is_causal=causal, enable_gqa=is_grouped
    )
    return out.transpose(1, 2).to(dtype)


def _attend_one_token(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attends from one token a row. Query heads that share a key head stand in as its query tokens."""
    rows, num_heads, _, head_dim = query.shape
    grouped = query.view(rows, key.shape[1], -1, head_dim)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, num_heads, head_dim)


def install(model: PreTrainedModel) -> None:
    """Makes `model` attend over blocks. Raises UnsupportedModel as `check` does.

    No mask function is registered under the name: transformers then builds no mask, as it does for other engines'
    attention.
    """
    check(model.config)
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)


def check_served(opened: OpenModel) -> None:
    """Raises UnsupportedModel, before anything is loaded, for a model that only the library runs."""
    check(opened.config)
    for each in opened.family.layers:
        if each.pick is None:
            raise _refused(opened.config, f"the gate of {each.experts} picks in a way of its own")


def check(config: PretrainedConfig) -> None:
    """Raises UnsupportedModel, which names the layer, unless every layer attends as `attend` does: to all that came
    before, with keys and values of one shape, and with no argument that would be left out of account.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deepcopy(config)).eval()
        _refuse_other_mixers(model)
        _check_calls(try_forward(model).attention, config)
    except PagerError:
        raise
    except Exception as error:  # what a family needs beyond this interface, a mask for one, fails in its own way
        raise _refused(config, f"it does not run without transformers' own attention ({one_line(error)})") from error


def _check_calls(calls: Sequence[AttentionCall], config: PretrainedConfig) -> None:
    by_layer = {call.layer: call for call in calls}
    for layer in range(config.num_hidden_layers):
        if layer not in by_layer:
            raise _refused(config, f"layer {layer} does not attend through transformers' attention interface")
        if reason := _foreign(by_layer[layer], config):
            raise _refused(config, f"layer {layer} attends {reason}")
    if len(calls) != config.num_hidden_layers:
        raise _refused(config, f"{len(calls)} attentions in {config.num_hidden_layers} layers")


def _refuse_other_mixers(model: PreTrainedModel) -> None:
    """Layers that hand something from token to token by other ways than keys and values."""
    config = model.config
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in _PLAIN_KINDS:
            raise _refused(config, f"layer {layer} is of the kind {kind!r}")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            raise _refused(config, f"{name} is a convolution, which keeps a state of its own for each request")
    if getattr(getattr(model, "model", None), "rotary_emb", None) is None:
        raise _refused(config, "it has no rotary embedding for all its layers, which is where positions are looked at")


def _foreign(call: AttentionCall, config: PretrainedConfig) -> str | None:
    """How the call asks for more than `attend` does; None where it does not."""
    window = call.arguments.get("sliding_window")
    if window is not None and int(str(window)) < config.max_position_embeddings:
        return (
            f"with a sliding window of {window} tokens; set sliding_window to null in its config.json if it was "
            "trained without one"
        )
    if call.key != call.value or call.key != heads_of(config):
        keys, values, expected = (f"{heads} of {width}" for heads, width in (call.key, call.value, heads_of(config)))
        return f"with keys in heads of another shape than its config says: {keys}, values {values}, not {expected}"
    if call.query[1] != call.key[1] or call.query[0] % call.key[0]:
        return f"with {call.query[0]} query heads of {call.query[1]} for {call.key[0]} of {call.key[1]}"
    if call.arguments.get("is_causal", True) is not True:
        return "to what comes after a token too"
    if call.has_mask:
        return "with a mask of its own"
    unknown = sorted(call.arguments.keys() - _WITHOUT_EFFECT - {"scaling"})
    return f"with the argument {unknown[0]}" if unknown else None


def _refused(config: PretrainedConfig, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{config.model_type} is not supported by the service: {why}. pager.load_model runs it, as transformers does"
    )


SAME_FOR_EVERY_LENGTH = frozenset({"default", "linear", "llama3", "proportional", "yarn"})


class RowRotary(nn.Module):
    """Stands in for a model's rotary embedding: each row gets the tables that transformers gives it alone.

    Some rope types choose their frequencies by the longest position of a forward. In transformers that is the longest
    row of the batch, so a short prompt would be computed differently while a long one decodes beside it.

    `longrope` has two tables, for rows up to `original_max_position_embeddings` and for longer ones. `dynamic` grows
    its table past `max_position_embeddings`, which no request of an engine reaches, and so keeps its first.

    `prompt_tokens` is the length of the whole prompt that the next forward runs a part of, 0 for any other forward.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.prompt_tokens = 0
        self._angles: Callable[..., tuple[Tensor, Tensor]] = inspect.unwrap(type(rotary).forward)  # without the update
        config, device = rotary.config, rotary.inv_freq.device
        # New ones: earlier forwards may have left another table in `rotary`.
        self._short: Any = type(rotary)(config=config).to(device)
        self._long: Any = None
        if rotary.rope_type == "longrope":
            self._short_tokens: int = config.rope_parameters["original_max_position_embeddings"]
            self._long = type(rotary)(config=config).to(device)
            self._long.inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](config, device, seq_len=self._short_tokens + 1)

    def is_long(self, num_tokens: int) -> bool:
        """Whether a prompt of so many tokens takes another table than shorter ones."""
        return self._long is not None and num_tokens > self._short_tokens

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, D] at `position_ids` [B, S]."""
        short_cos_BSD, short_sin_BSD = self._angles(self._short, x, position_ids)
        if self._long is None:
            return short_cos_BSD, short_sin_BSD
        long_cos_BSD, long_sin_BSD = self._angles(self._long, x, position_ids)
        tokens_B = (position_ids.amax(1) + 1).clamp_min(self.prompt_tokens)
        is_long_B11 = (tokens_B > self._short_tokens)[:, None, None]
        return torch.where(is_long_B11, long_cos_BSD, short_cos_BSD), torch.where(
            is_long_B11, long_sin_BSD, short_sin_BSD
        )


def install_rotary(model: PreTrainedModel) -> RowRotary | None:
    """Makes the rows of `model`'s batches independent of each other; None where they are already.

    Raises UnsupportedModel for a rope type that is not known to depend on a row alone.
    """
    rotary: Any = model.model.rotary_emb
    if isinstance(rotary, RowRotary):
        return rotary
    kinds = set(rotary.rope_type.values()) if isinstance(rotary.rope_type, dict) else {rotary.rope_type}
    if kinds <= SAME_FOR_EVERY_LENGTH:
        return None
    if not kinds <= {"dynamic", "longrope"} or isinstance(rotary.rope_type, dict):
        known = ", ".join(sorted({"dynamic", "longrope", *SAME_FOR_EVERY_LENGTH}))
        raise UnsupportedModel(
            f"rope_type {rotary.rope_type!r} is not supported where requests share a batch, since the length of one "
            f"could change the answer of another; supported are {known}. pager.load_model runs it as transformers does"
        )
    model.model.rotary_emb = RowRotary(rotary)
    return model.model.rotary_emb  # type: ignore[no-any-return]
