"""Attention over KV blocks, as an attention function of transformers: the models call it and know nothing of blocks.

Legend: B rows, S new tokens a row, C tokens of context read, N token slots, H query heads, G key/value heads,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pager.engine.kv import KvCache
from pager.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NAME = "expert_pager_blocks"


@dataclass(frozen=True, slots=True, eq=False)
class KvStep:
    """Where one forward writes its keys and values, and what its queries see. The same for every layer.

    `write_T` [B*S]: token slots of the new tokens. `read_BC` [B, C]: token slots of the context, the new tokens
    included; None where the new tokens are the whole context, which is then causal. `mask` (broadcast to [B, H, S, C]):
    True, or 0 of a mask to add, where a query sees a slot; None where every query sees all that is read.
    """

    cache: KvCache
    write_T: torch.Tensor
    read_BC: torch.Tensor | None = None
    mask: torch.Tensor | None = None


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
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, S, D], key and value [B, G, S, D] → ([B, S, H, D], None).

    `on_layer` is called first, before the layer writes anything; what it raises leaves the forward.
    """
    assert kv_step is not None, "a model set up for the engine runs through its ModelRunner only"
    if on_layer is not None:
        on_layer()
    cache, layer = kv_step.cache, int(module.layer_idx)  # type: ignore[arg-type]
    cache.k[layer].index_copy_(0, kv_step.write_T, key.transpose(1, 2).flatten(0, 1))
    cache.v[layer].index_copy_(0, kv_step.write_T, value.transpose(1, 2).flatten(0, 1))

    if kv_step.read_BC is None:
        return _attend_prompt(query, key, value, None, scaling), None
    if query.shape[2] > 1:
        assert kv_step.mask is not None, "the tokens of a prompt see what lies before them"
        return _attend_prompt(query, *cache.gather(layer, kv_step.read_BC), kv_step.mask, scaling), None
    rows = max(1, cache.gather_tokens // kv_step.read_BC.shape[1])
    if len(query) <= rows:
        return _attend_one_token(query, *cache.gather(layer, kv_step.read_BC), kv_step.mask, scaling), None
    assert kv_step.mask is not None, "rows have contexts of different lengths"
    some = zip(query.split(rows), kv_step.read_BC.split(rows), kv_step.mask.split(rows), strict=True)
    parts = [_attend_one_token(q, *cache.gather(layer, read_BC), mask, scaling) for q, read_BC, mask in some]
    return torch.cat(parts), None


def _attend_prompt(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Prefill; causal without a mask.

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
    """Decode. The query heads that share a key head stand in as its query tokens, so that no key is repeated."""
    rows, num_heads, _, head_dim = query.shape
    grouped = query.view(rows, key.shape[1], -1, head_dim)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, num_heads, head_dim)


def install(model: PreTrainedModel) -> None:
    """Makes `model` attend over blocks. Raises UnsupportedModel where a layer's attention is not plainly causal.

    No mask function is registered under the name: transformers then builds no mask, as it does for other engines'
    attention.
    """
    _refuse_sliding_windows(model.config)
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModel(f"{type(model).__name__} does not attend through transformers' attention interface")


def _refuse_sliding_windows(config: PretrainedConfig) -> None:
    window = getattr(config, "sliding_window", None)
    is_used = getattr(config, "use_sliding_window", True)
    if window is not None and is_used and window < config.max_position_embeddings:
        raise UnsupportedModel(
            f"{config.model_type} with a sliding window of {window} tokens is not supported; set sliding_window to "
            f"null in its config.json if it was trained without one"
        )
