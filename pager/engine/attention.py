"""Attention over KV blocks, as an attention function of transformers, and rotary embeddings that depend on a row alone.

Legend: B rows, S new tokens a row, C tokens of context read, W tokens of a window, N token slots, H query heads,
G key/value heads, D head dimension.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pager.engine.kv import KvCache, LayerAttention, layers_by_config
from pager.engine.states import PLAIN_KINDS, StateShape, StateStep, states_of
from pager.errors import PagerError, UnsupportedModel
from pager.memory import PADDED_TOKENS, PREFILL_CHUNK_TOKENS
from pager.models.layout import AttentionCall, Sees, try_forward
from pager.models.open_model import OpenModel, model_class_of
from pager.reading import one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NAME = "expert_pager_blocks"

_TOKENWISE_KINDS = frozenset({"mlp", "moe"})
"""Entries of a config's `layer_types` whose layers look at each token by itself."""

_WITHOUT_EFFECT = frozenset(
    {
        "cache_position", "dropout", "is_causal", "output_attentions", "output_hidden_states", "output_router_logits",
        "position_ids", "return_dict", "sliding_window", "use_cache",
    }
)  # fmt: skip
"""Arguments that change nothing here: no training, positions are in the keys already, and `layers_of` saw the window
that transformers' own masks have."""

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What `scaled_dot_product_attention` calls on a CPU, and throws away the second result of."""

FEW_TOKENS = 768
"""From this many queries on, torch's kernel uses tiles of 256. With fewer it uses tiles of 64 and is slower than
`_attend_causally`, unless one tile holds them all."""

SCORED_TOKENS, SCORES = 64, 2**18
"""The queries that `_attend_causally` runs at a time, and their scores at most: buffers of 1 MiB (`workspace`)."""

SINK_WIDTH = 8
"""By how much queries and keys are widened for sinks: by one, and what kernels want to be aligned to."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptStep:
    """The tokens `start:end` of a forward's only row, which are of one prompt, after `num_past` others of it.

    `read_1C` [1, C]: token slots of the context, the new tokens included; None where the new tokens are all of it.
    """

    start: int
    end: int
    num_past: int = 0
    read_1C: torch.Tensor | None = None


class RowContexts:
    """The context that the queries of B rows of one token each see, by how far back their layer looks. Made once for
    all layers.
    """

    def __init__(self, slots_BC: Tensor, position_B1: Tensor, dtype: torch.dtype, *, is_full: bool) -> None:
        """`slots_BC`: token slots of each row's positions; rows end at `position_B1`. `is_full`: the only one at C."""
        self._slots_BC = slots_BC
        self._position_B1 = position_B1
        self._dtype = dtype
        self._is_full = is_full
        self._seen: dict[int | None, tuple[Tensor, Tensor | None]] = {}

    def seen(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        """Token slots to read [B, C], and a mask to add [B, 1, 1, C]: 0 where a query sees a slot. None: all it reads.

        A masked position still takes part with weight 0, and 0 * NaN is NaN: so it reads the row's own first token,
        never what another request left behind.
        """
        if window is not None and window >= self._slots_BC.shape[1]:
            window = None
        if window not in self._seen:
            self._seen[window] = self._all() if window is None else self._last(window)
        return self._seen[window]

    def _all(self) -> tuple[Tensor, Tensor | None]:
        if self._is_full:
            return self._slots_BC, None
        is_there_BC = torch.arange(self._slots_BC.shape[1], device=self._slots_BC.device) <= self._position_B1
        return torch.where(is_there_BC, self._slots_BC, self._slots_BC[:, :1]), self._added(is_there_BC)

    def _last(self, window: int) -> tuple[Tensor, Tensor | None]:
        place_BW = self._position_B1 + torch.arange(1 - window, 1, device=self._slots_BC.device)
        read_BW = self._slots_BC.gather(1, place_BW.clamp_min(0))
        return read_BW, None if self._is_full else self._added(place_BW >= 0)

    def _added(self, is_there_BC: Tensor) -> Tensor:
        """Returns an additive mask: each layer's attention would otherwise convert a mask of bools."""
        return torch.where(is_there_BC, 0.0, -torch.inf).to(self._dtype)[:, None, None]


@dataclass(frozen=True, slots=True, eq=False)
class KvStep:
    """The places where one forward writes its keys and values, and the context that its queries see.

    `write_T` [B*S]: token slots of the new tokens. A forward runs `prompts`, one after the other in a single row, or
    one token for each of B rows, which see their `rows`; or both, all in a single row, the prompts first. Where layers
    have `states`, it runs one prompt or rows.
    """

    cache: KvCache
    write_T: torch.Tensor
    rows: RowContexts | None = None
    prompts: Sequence[PromptStep] = ()
    states: StateStep | None = None


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
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Implements transformers' attention interface: query [B, H, S, D], key and value [B, G, S, D] → ([B, S, H, D],
    None).

    `s_aux` [H] among the arguments is a layer's sinks. `on_layer` is called first, before the layer writes anything;
    what it raises leaves the forward. Raises UnsupportedModel for an argument that it would have to leave out of
    account, which `layers_of` looks for at the start.
    """
    assert kv_step is not None, "a model set up for the engine runs through its ModelRunner only"
    cache, layer = kv_step.cache, int(module.layer_idx)  # type: ignore[arg-type]
    s_aux: torch.Tensor | None = arguments.pop("s_aux", None)
    if attention_mask is not None or not arguments.keys() <= _WITHOUT_EFFECT:
        _refuse_arguments(layer, attention_mask, arguments)
    if (s_aux is not None) is not cache.layers[layer].has_sinks:
        _refuse_arguments(layer, None, {"s_aux": s_aux if s_aux is not None else "left out"})
    if on_layer is not None:
        on_layer()
    cache.k[layer].index_copy_(0, kv_step.write_T, key.transpose(1, 2).flatten(0, 1))
    cache.v[layer].index_copy_(0, kv_step.write_T, value.transpose(1, 2).flatten(0, 1))

    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    own, prompts, rows = (query, key, value), kv_step.prompts, kv_step.rows
    parts = [_attend_prompt(part, cache, layer, own, scaling, s_aux) for part in prompts]
    if rows is not None and prompts:
        query_B1 = query[:, :, prompts[-1].end :].transpose(0, 2)
        parts.append(_attend_rows(rows, cache, layer, query_B1, scaling, s_aux).transpose(0, 1))
    elif rows is not None:
        return _attend_rows(rows, cache, layer, query, scaling, s_aux), None
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0], None


def _attend_rows(
    rows: RowContexts, cache: KvCache, layer: int, query: Tensor, scaling: float, sinks_H: Tensor | None
) -> Tensor:
    """[B, 1, H, D] for a token of each row: as many rows at a time as the buffers to gather in have room for."""
    read_BC, mask = rows.seen(cache.layers[layer].window)
    num_rows = max(1, cache.gather_tokens // read_BC.shape[1])
    if len(query) <= num_rows:
        return _attend_one_token(query, *cache.gather(layer, read_BC), mask, scaling, sinks_H)
    assert mask is not None, "rows have contexts of different lengths"
    some = zip(query.split(num_rows), read_BC.split(num_rows), mask.split(num_rows), strict=True)
    parts = [_attend_one_token(q, *cache.gather(layer, read), mask, scaling, sinks_H) for q, read, mask in some]
    return torch.cat(parts)


def _refuse_arguments(layer: int, mask: torch.Tensor | None, arguments: Mapping[str, object]) -> None:
    unknown = [name for name, value in arguments.items() if name not in _WITHOUT_EFFECT and value is not None]
    if mask is not None or unknown:
        what = f"the argument {unknown[0]}" if unknown else "a mask of its own"
        raise UnsupportedModel(f"layer {layer} attends with {what}, which is not supported by the service")


def _attend_prompt(
    part: PromptStep,
    cache: KvCache,
    layer: int,
    own: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scaling: float,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """[1, S, H, D] for the tokens of one prompt, of `own` query, key and value of the whole row.

    Where a mask is needed, a part of the queries at a time: the plan has room for so many rows of it.
    """
    query, key, value = (tensor[:, :, part.start : part.end] for tensor in own)
    num_past, num_new, window = part.num_past, query.shape[2], cache.layers[layer].window
    if sinks_H is None and (window is None or window >= num_past + num_new):
        if part.read_1C is None and query.device.type == "cpu" and SCORED_TOKENS < num_new < FEW_TOKENS:
            return _attend_causally(query, key, value, scaling)
        if part.read_1C is None:
            return _attend_tokens(query, key, value, None, scaling, None)
        if query.device.type == "cpu":
            return _attend_after(query, (key, value), cache, layer, part.read_1C[:, :num_past], scaling)
    multiple = PADDED_TOKENS if query.device.type == "cpu" and attends_in(query.dtype) else 1
    outputs = []
    for start in range(num_past, num_past + num_new, PREFILL_CHUNK_TOKENS):
        end = min(start + PREFILL_CHUNK_TOKENS, num_past + num_new)
        first = 0 if window is None else max(0, start - window + 1)
        place_C = torch.arange(first, end, device=query.device)
        if part.read_1C is not None:
            place_C = pad(place_C, (0, -len(place_C) % multiple), value=end)  # which no query sees
            seen = cache.gather(layer, part.read_1C[:, place_C.where(place_C < end, first)])
        else:
            seen = key[:, :, first:end], value[:, :, first:end]
        place_S1 = torch.arange(start, end, device=query.device)[:, None]
        mask_SC = place_C <= place_S1
        if window is not None:
            mask_SC &= place_C > place_S1 - window
        queries = query[:, :, start - num_past : end - num_past]
        outputs.append(_attend_tokens(queries, *seen, mask_SC, scaling, sinks_H))
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def _attend_after(
    query: Tensor, own: tuple[Tensor, Tensor], cache: KvCache, layer: int, past_1C: Tensor, scaling: float
) -> Tensor:
    """[1, S, H, D] on a CPU, for tokens that see each other causally, and all of those before: no pair is masked.

    torch's kernel returns the logarithm of what it divided by, which says how much each of the two results counts.
    """

    def attended(key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> tuple[Tensor, Tensor]:
        queries, keys, values, _ = _for_cpu(query, key, value, None)
        added = None if mask is None else mask.to(queries.dtype)
        out, divisor = flash_attention(queries, keys, values, 0.0, causal, attn_mask=added, scale=scaling)
        return out[:, :, :num_new, : value.shape[3]].float(), divisor[:, :, :num_new]

    num_new, num_past, mask = query.shape[2], past_1C.shape[1], None
    if attends_in(query.dtype) and (padding := -num_past % PADDED_TOKENS):
        past_1C = torch.cat([past_1C, past_1C[:, :1].expand(1, padding)], 1)
        is_padding_1C = torch.arange(num_past + padding)[None] >= num_past
        mask = torch.zeros(is_padding_1C.shape, dtype=query.dtype).masked_fill_(is_padding_1C, -torch.inf)
    before, divisor_before = attended(*cache.gather(layer, past_1C), mask, causal=False)
    among, divisor_among = attended(*own, None, causal=True)
    return among.lerp_(before, (divisor_before - divisor_among).sigmoid_()[..., None]).transpose(1, 2).to(query.dtype)


def _attend_causally(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """[1, S, H, D] for all tokens of a prompt: scores and weights in fp32, of some heads and queries at a time.

    What no query of a part sees is left out, which torch's kernel does for whole blocks of 512 keys only.
    """
    num_heads, num_tokens = key.shape[1:3]
    keys_GSD, values_GSD = key[0].float(), value[0].float()
    query_GQSD = query[0].unflatten(0, (num_heads, -1))
    num_queries = query_GQSD.shape[1]
    out = query.new_empty(num_tokens, num_heads, num_queries, value.shape[3])
    is_later = torch.ones(SCORED_TOKENS, SCORED_TOKENS, dtype=torch.bool).triu_(1)
    for start in range(0, num_tokens, SCORED_TOKENS):
        end = min(start + SCORED_TOKENS, num_tokens)
        size = end - start
        heads = max(1, SCORES // (num_queries * size * end))
        for first in range(0, num_heads, heads):
            some = slice(first, first + heads)
            queries = query_GQSD[some, :, start:end].float().mul_(scaling).flatten(1, 2)
            scores = torch.bmm(queries, keys_GSD[some, :end].transpose(1, 2))
            new = scores.unflatten(1, (num_queries, size))[..., start:]
            new.masked_fill_(is_later[:size, :size], -torch.inf)
            weighted = torch.bmm(scores.softmax(-1), values_GSD[some, :end])
            out[start:end, some] = weighted.unflatten(1, (num_queries, size)).permute(2, 0, 1, 3)
    return out.view(1, num_tokens, -1, value.shape[3])


@functools.cache
def attends_in(dtype: torch.dtype) -> bool:
    """Tells whether this processor multiplies in this dtype, without which attention in it takes longer than in
    fp32.
    """
    capabilities = torch.cpu.get_capabilities()
    units = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16",)}
    return any(capabilities.get(unit, False) for unit in units.get(dtype, ()))


def _attend_tokens(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attends from the tokens of a prompt; causally without a mask. A GPU has each key and value once a query head."""
    dtype, width, num_new, on_cpu = query.dtype, value.shape[3], query.shape[2], query.device.type == "cpu"
    if on_cpu:
        query, key, value, mask = _for_cpu(query, key, value, mask, has_sinks=sinks_H is not None)
    if sinks_H is not None:
        query, key, value, mask = _with_sinks(query, key, value, mask, sinks_H.view(-1, 1) / scaling)
        if on_cpu:
            value = pad(value, (0, SINK_WIDTH))
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and not on_cpu:  # torch's frugal kernels take no groups everywhere
        queries_a_key = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(queries_a_key, 1), value.repeat_interleave(queries_a_key, 1)
        is_grouped = False
    causal = mask is None and query.shape[2] > 1
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, is_causal=causal, enable_gqa=is_grouped
    )
    return out[:, :, :num_new, :width].transpose(1, 2).to(dtype)


def _for_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, has_sinks: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same as torch's kernels on a CPU want it. They want values as wide as keys.

    In half precision torch compiles and keeps a kernel for every length that it meets, so lengths are padded to a few;
    without such kernels it computes in fp32.
    """
    if not has_sinks and key.shape[3] == value.shape[3] and attends_in(query.dtype):
        return _padded(query, key, value, mask)
    query, key, value = query.float(), key.float(), value.float()
    return query, key, pad(value, (0, key.shape[3] - value.shape[3])), mask


def _padded(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same with tokens at the end that no query of before sees, up to multiples of PADDED_TOKENS."""
    queries, keys = (-tensor.shape[2] % PADDED_TOKENS for tensor in (query, key))
    if queries:
        query = pad(query, (0, 0, 0, queries))
    if keys:
        key, value = pad(key, (0, 0, 0, keys)), pad(value, (0, 0, 0, keys))
    if mask is not None and (queries or keys):
        mask = pad(mask, (0, keys, 0, queries))
    return query, key, value, mask


def _attend_one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attends from one token a row. Query heads that share a key head are treated as its query tokens."""
    rows, num_heads, _, head_dim = query.shape
    grouped = query.view(rows, key.shape[1], -1, head_dim)
    if sinks_H is not None:
        sinks = sinks_H.view(*grouped.shape[1:3]) / scaling
        grouped, key, value, mask = _with_sinks(grouped, key, value, mask, sinks)
    is_half_on_cpu = query.device.type == "cpu" and query.dtype != torch.float32
    if is_half_on_cpu and key.shape[2] * max(key.shape[3], value.shape[3]) <= MOST_FP32_VALUES:
        out = _attend_in_fp32(grouped, key, value, mask, scaling)
    else:
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, num_heads, value.shape[3])


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same attention with a further key that all queries see, whose value is 0.

    It alone has something in a further dimension, where each query has its sink: `sinks`, broadcast to [heads, tokens]
    of the query, so that the kernels need no logits of their own for it.
    """
    dim = key.shape[3]
    query, key, value = pad(query, (0, SINK_WIDTH)), pad(key, (0, SINK_WIDTH, 0, 1)), pad(value, (0, 0, 0, 1))
    query[..., dim] = sinks.to(query.dtype)
    key[:, :, -1, dim] = 1
    return query, key, value, None if mask is None else pad(mask, (0, 1), value=mask.dtype == torch.bool)


FP32_VALUES, MOST_FP32_VALUES = 2**18, 2**20
"""How many keys are converted at a time, and of one head at most: buffers whose places malloc keeps (`workspace`)."""


def _attend_in_fp32(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    """[B, G, Q, D] in half precision, computed from a few rows or heads at a time in fp32.

    For a single query torch's kernel for half precision takes two to nine times as long: it packs whole tiles.
    """
    num_rows, num_heads, num_tokens, head_dim = key.shape
    head_values = num_tokens * max(head_dim, value.shape[3])
    heads, rows = max(1, FP32_VALUES // head_values), max(1, FP32_VALUES // (head_values * num_heads))
    out = query.new_empty(*query.shape[:3], value.shape[3])
    query = query.float()
    mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    for row in range(0, num_rows, rows):
        some_mask = mask if mask is None or len(mask) == 1 else mask[row : row + rows]
        for head in range(0, num_heads, heads):
            part = (slice(row, row + rows), slice(head, head + heads))
            keys, values = key[part].float(), value[part].float()
            out[part] = scaled_dot_product_attention(query[part], keys, values, attn_mask=some_mask, scale=scale)
    return out


def install(model: PreTrainedModel) -> None:
    """Makes `model` attend over blocks, of a cache for its `layers_of`.

    No mask function is registered under the name, so transformers builds no mask, as for other engines' attention.
    """
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)


def layers_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> tuple[LayerAttention, ...]:
    """Returns what each layer of a model that runs in `dtype` keeps and sees.

    Raises UnsupportedModel, which names the layer, unless every layer either attends as `attend` does, to what came
    before, or the last of it, by keys and values alone, and with no argument that would be left out of account; or
    hands on a state that it asks the cache for.
    """
    with torch.device("meta"):
        model = model_class_of(config)(deepcopy(config)).eval()
    return _layers_of(model, dtype)


def check_served(opened: OpenModel) -> tuple[LayerAttention, ...]:
    """The same for a checkpoint, before anything of it is loaded. Raises UnsupportedModel."""
    return _layers_of(opened.whole, opened.dtype)


def layers_in_library(opened: OpenModel) -> tuple[LayerAttention, ...]:
    """The same for a model that the service may not run; as far as its config says it, then."""
    try:
        return check_served(opened)
    except UnsupportedModel:
        return layers_by_config(opened.config)


def _layers_of(model: PreTrainedModel, dtype: torch.dtype) -> tuple[LayerAttention, ...]:
    config = model.config
    try:
        states = _states(model, dtype)
        if (name := _rotary_name(model)) is not None:
            _refuse_other_tables(getattr(model.base_model, name), config)
        return _checked(try_forward(model).attention, try_forward(model, with_masks=True).attention, states, config)
    except PagerError:
        raise
    except Exception as error:  # what a family needs beyond this interface, such as a mask, fails in its own way
        raise _refused(config, f"it does not run without transformers' own attention ({one_line(error)})") from error


def _checked(
    calls: Sequence[AttentionCall],
    masked: Sequence[AttentionCall],
    states: Mapping[int, StateShape],
    config: PretrainedConfig,
) -> tuple[LayerAttention, ...]:
    """`masked` are the same calls with the masks that transformers makes for its own attention."""
    by_layer = {call.layer: (call, with_mask) for call, with_mask in zip(calls, masked, strict=True)}
    layers = []
    for layer in range(config.num_hidden_layers):
        if layer not in by_layer and (layer in states or _is_tokenwise(config, layer)):
            layers.append(LayerAttention(0, 0, 0, 0, state=states.get(layer)))
            continue
        if layer not in by_layer:
            raise _refused(config, f"layer {layer} does not attend through transformers' attention interface")
        call, with_mask = by_layer[layer]
        reason = _foreign(call)
        if reason is None and (with_mask.sees is None or with_mask.layer != layer):
            reason = "with a mask of its own"
        if reason is not None:
            raise _refused(config, f"layer {layer} attends {reason}")
        assert with_mask.sees is not None
        try:
            window = _window(with_mask.sees, int(config.max_position_embeddings))
        except ValueError as error:
            raise _refused(config, f"layer {layer} attends {error}") from None
        has_sinks = "s_aux" in call.arguments
        state = states.get(layer)
        layers.append(LayerAttention(call.query[0], call.key[0], call.key[1], call.value[1], window, has_sinks, state))
    num_attending = sum(each.num_query_heads > 0 for each in layers)
    if len(calls) != num_attending:
        raise _refused(config, f"{len(calls)} attentions in {num_attending} layers")
    return tuple(layers)


def _states(model: PreTrainedModel, dtype: torch.dtype) -> dict[int, StateShape]:
    """Returns the layers that hand on a state. Raises UnsupportedModel for those that do so in other ways than by the
    cache, or beside keys and values.
    """
    config = model.config
    why = None
    try:
        states = states_of(model, dtype)
    except Exception as error:  # what a family wants of a cache of its own fails in its own way
        states, why = {}, error
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in PLAIN_KINDS and layer not in states and not _is_tokenwise(config, layer):
            raise _refused(config, f"layer {layer} is of the kind {kind!r}") from why
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd) and not _is_within(name, states):
            raise _refused(config, f"{name} is a convolution, which keeps a state of its own for each request")
    return states


def _is_tokenwise(config: PretrainedConfig, layer: int) -> bool:
    """Tells whether a layer has nothing that looks at other tokens."""
    return layer < len(kinds := getattr(config, "layer_types", None) or ()) and kinds[layer] in _TOKENWISE_KINDS


def _is_within(module: str, layers: Collection[int]) -> bool:
    """Tells whether a module is part of one of these layers."""
    return any(f".{layer}." in module for layer in layers)


def _foreign(call: AttentionCall) -> str | None:
    """Returns how the call asks for more than `attend` does; None where it does not."""
    if call.key[0] != call.value[0] or call.query[1] != call.key[1] or call.query[0] % call.key[0]:
        shapes = (f"{heads} of {width}" for heads, width in (call.query, call.key, call.value))
        return "with heads that do not fit to each other: queries {}, keys {}, values {}".format(*shapes)
    if call.key[1] < call.value[1]:
        return f"with values in heads of {call.value[1]}, wider than its keys of {call.key[1]}"
    if call.arguments.get("is_causal", True) is not True:
        return "to later tokens too"
    if call.has_mask:
        return "with a mask of its own"
    sinks = call.arguments.get("s_aux")
    if sinks is not None and getattr(sinks, "shape", None) != (call.query[0],):
        return "with sinks that are not one number a head"
    unknown = sorted(call.arguments.keys() - _WITHOUT_EFFECT - {"scaling", "s_aux"})
    return f"with the argument {unknown[0]}" if unknown else None


def _window(sees: Sees, context_tokens: int) -> int | None:
    """Returns how many tokens a query sees, itself included; None for all. Raises ValueError where those are not the
    last.
    """
    keys = torch.arange(context_tokens + 1)
    window = None
    for place in sorted({context_tokens - 1, context_tokens - 2, context_tokens // 2} - {-1, 0}, reverse=True):
        seen = torch.as_tensor(sees(0, 0, torch.tensor(place), keys)).expand(len(keys)).nonzero().flatten()
        num_seen = len(seen)
        if window is None:
            window = num_seen
        if num_seen != min(window, place + 1) or not seen.equal(keys[place + 1 - num_seen : place + 1]):
            raise ValueError("to other tokens than the last ones before each")
    return None if window is None or window >= context_tokens else window


def _refused(config: PretrainedConfig, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{config.model_type} is not supported by the service: {why}. pager.load_model runs it, as transformers does"
    )


SAME_FOR_EVERY_LENGTH = frozenset({"default", "linear", "llama3", "proportional", "yarn"})
_BY_ROW = frozenset({"dynamic", "longrope"})


class RowRotary(nn.Module):
    """Replaces a model's rotary embedding: each row gets the tables that transformers gives it when it runs alone.

    Some rope types choose their frequencies by the longest position of a forward. In transformers that is the longest
    row of the batch, so a short prompt would be computed differently while a long one decodes beside it.

    `longrope` has two tables, for rows up to `original_max_position_embeddings` and for longer ones. `dynamic` grows
    its table past `max_position_embeddings`, which no request of an engine reaches, and so keeps its first.

    `prompt_tokens` is the length of the whole prompt that the next forward runs a part of, 0 for any other forward.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.prompt_tokens = 0
        # without the update of the tables
        self._angles: Callable[..., tuple[Tensor, Tensor]] = inspect.unwrap(type(rotary).forward)
        config, device = rotary.config, rotary.inv_freq.device
        # Computed anew: earlier forwards may have left another table in `rotary`.
        self._short: Any = type(rotary)(config=config).to(device)
        self._long: Any = None
        if rotary.rope_type == "longrope":
            self._short_tokens: int = config.rope_parameters["original_max_position_embeddings"]
            self._long = type(rotary)(config=config).to(device)
            self._long.inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](config, device, seq_len=self._short_tokens + 1)

    def is_long(self, num_tokens: int) -> bool:
        """Tells whether a prompt of this many tokens takes another table than shorter ones."""
        return self._long is not None and num_tokens > self._short_tokens

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and sin [B, S, D] at `position_ids` [B, S]."""
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
    """Makes the rows of `model`'s batches independent of each other; returns None where they are already.

    Raises UnsupportedModel for a rope type that is not known to depend on a row alone.
    """
    if (name := _rotary_name(model)) is None:
        return None
    rotary: Any = getattr(model.base_model, name)
    if isinstance(rotary, RowRotary):
        return rotary
    _refuse_other_tables(rotary, model.config)
    if _rope_types(rotary) <= SAME_FOR_EVERY_LENGTH:
        return None
    installed = RowRotary(rotary)
    setattr(model.base_model, name, installed)
    return installed


def _rotary_name(model: PreTrainedModel) -> str | None:
    """Returns the name of the rotary embedding of all layers; None for a model that has none, and so no positions.

    Raises UnsupportedModel where layers have their own.
    """
    for name, module in model.base_model.named_children():
        if isinstance(module, RowRotary) or hasattr(module, "rope_type"):
            return str(name)
    if any(hasattr(module, "rope_type") or hasattr(module, "inv_freq") for module in model.modules()):
        why = "it has no rotary embedding for all its layers, which is where positions are looked at"
        raise _refused(model.config, why)
    return None


def _rope_types(rotary: Any) -> set[str]:
    return set(rotary.rope_type.values()) if isinstance(rotary.rope_type, dict) else {rotary.rope_type}


def _has_one_table(rotary: Any) -> bool:
    """Tells whether it returns cosines and sines that are the same for all layers."""
    device = rotary.inv_freq.device if hasattr(rotary, "inv_freq") else None
    if device is None or isinstance(rotary.rope_type, dict):
        return False
    angles = inspect.unwrap(type(rotary).forward)  # without the update of the tables, which asks for values
    return isinstance(angles(rotary, torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, device=device)), tuple)


def _refuse_other_tables(rotary: Any, config: PretrainedConfig) -> None:
    kinds = _rope_types(rotary)
    if kinds <= SAME_FOR_EVERY_LENGTH or (kinds <= _BY_ROW and _has_one_table(rotary)):
        return
    known = ", ".join(sorted(_BY_ROW | SAME_FOR_EVERY_LENGTH))
    raise UnsupportedModel(
        f"rope_type {rotary.rope_type!r} is not supported where requests share a batch, since the length of one "
        f"could change the answer of another; supported are {known}. pager.load_model runs it as transformers does"
    )
