"""EMO (arXiv 2605.06663) for transformers 5: its configuration, its picking rule, and its model, read top-down."""

# transformers is untyped here: its base classes, decorators and buffers all look like Any or Module.
# mypy: disable-error-code="misc,no-any-return,untyped-decorator,no-untyped-call,operator,arg-type"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from pager.errors import CheckpointError

# --- the configuration ------------------------------------------------------------------------------------------------
#
# The configuration of EMO checkpoints (arXiv 2605.06663), as `allenai/Emo_*` and `StdMoE_*` store it.


@strict
class EmoConfig(PreTrainedConfig):
    """A configuration with every field of a released `config.json`, RoPE stored the old way (`rope_theta`,
    `rope_scaling`) or the new.

    `num_experts` and everything derived from it count all experts of a layer, shared ones included; the shared
    experts are the last of the list. Layer `i` may differ from the rest: ask `experts_in_layer(i)`,
    `shared_in_layer(i)` and `always_active_in_layer(i)`, not the fields. Raises CheckpointError when the fields
    contradict each other.
    """

    model_type = "emo"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers declares it so
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012
    default_theta = 500000.0

    vocab_size: int = 100352
    hidden_size: int = 2048
    intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 100277
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 100257
    tie_word_embeddings: bool = False
    rope_parameters: Any = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    num_experts_per_tok: int = 8
    num_experts: int = 128
    num_shared_experts: int = 1
    num_experts_per_layer: list[int] | None = None
    num_shared_experts_per_layer: list[int] | None = None
    always_active_experts: list[int] | None = None
    always_active_experts_per_layer: list[list[int] | None] | None = None
    dense_intermediate_size: int | None = None
    dense_mlp_bias: bool = False
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        self._check_consistency()

    def experts_in_layer(self, layer: int) -> int:
        """Returns the number of all experts of the layer, shared ones included; 0 means the layer is dense."""
        return self.num_experts if self.num_experts_per_layer is None else self.num_experts_per_layer[layer]

    def shared_in_layer(self, layer: int) -> int:
        """Returns how many experts at the end of the layer's list serve every token; 0 where always-active ones take
        over.
        """
        if self.always_active_in_layer(layer):
            return 0
        if self.num_shared_experts_per_layer is not None:
            return self.num_shared_experts_per_layer[layer]
        return min(self.num_shared_experts, self.experts_in_layer(layer))

    def always_active_in_layer(self, layer: int) -> tuple[int, ...]:
        """Returns the experts that every token uses, each with its own share of the common softmax."""
        if not self.experts_in_layer(layer):
            return ()
        if self.always_active_experts_per_layer is not None:
            return tuple(self.always_active_experts_per_layer[layer] or ())
        return tuple(self.always_active_experts or ())

    def _check_consistency(self) -> None:
        for name in (
            "num_experts_per_layer",
            "num_shared_experts_per_layer",
            "always_active_experts_per_layer",
        ):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_hidden_layers:
                raise CheckpointError(
                    f"{name} has {len(values)} entries for {self.num_hidden_layers} layers; give one entry a layer"
                )
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        for layer in range(self.num_hidden_layers):
            self._check_layer(layer)

    def _check_layer(self, layer: int) -> None:
        experts, top_k = self.experts_in_layer(layer), self.num_experts_per_tok
        shared, always = self.shared_in_layer(layer), self.always_active_in_layer(layer)
        if not experts:
            if self.dense_intermediate_size is None:
                raise CheckpointError(f"layer {layer} has no experts, so dense_intermediate_size must be set")
            return
        if shared > min(experts, top_k):
            raise CheckpointError(
                f"layer {layer}: {shared} shared experts do not fit in {experts} experts and top-{top_k}"
            )
        if len(set(always)) != len(always) or not all(0 <= expert < experts for expert in always):
            raise CheckpointError(
                f"layer {layer}: always-active experts {list(always)} must be distinct and below {experts}"
            )
        if len(always) > top_k:
            raise CheckpointError(f"layer {layer}: {len(always)} always-active experts are more than top-{top_k}")
        if self.norm_topk_prob and (shared or always):
            raise CheckpointError(
                f"norm_topk_prob=true is defined only without shared and always-active experts; layer {layer} "
                f"has {shared} shared and {len(always)} always active"
            )


# --- the picking rule -------------------------------------------------------------------------------------------------
#
# EMO's picking rule as a pure function of the gate's logits.
#
# Legend: T tokens, E experts of the layer (shared last), K experts picked for a token (top_k).


def pick_experts(
    logits_TE: Tensor,
    *,
    top_k: int,
    num_shared: int = 0,
    always_active: Sequence[int] = (),
    norm_topk_prob: bool = False,
    allowed_TE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Picks each token's experts and weighs them: `(weights_TK fp32, index_TK)`, indices over all E experts.

    The last `num_shared` experts serve every token, weighed by a softmax of their own; the other K − num_shared
    come from a softmax over the routed columns. `always_active` experts take precedence over `num_shared`: one
    softmax over all columns, those experts first. Nothing is renormalised after top-k unless `norm_topk_prob`,
    which is legal only without shared and always-active experts (EmoConfig checks it).

    `allowed_TE` (bool, broadcastable to [T, E]) is the document's pool: a routed expert outside it takes no part in
    the softmax. Its entries for shared and always-active experts are not read. It must leave at least K − num_shared
    routed experts; otherwise experts of weight 0 from outside the pool fill the places.
    """
    if always_active:
        return _pick_beside_always_active(_scores(logits_TE, allowed_TE, always_active), top_k, always_active)
    num_routed = logits_TE.shape[-1] - num_shared
    allowed_TR = None if allowed_TE is None else allowed_TE[..., :num_routed]
    probs_TR = _scores(logits_TE[:, :num_routed], allowed_TR).softmax(-1)
    weights_TK, index_TK = probs_TR.topk(min(top_k - num_shared, num_routed), dim=-1)
    if norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    if num_shared == 1:  # a softmax over one column is 1
        return pad(weights_TK, (0, 1), value=1.0), pad(index_TK, (0, 1), value=num_routed)
    if not num_shared:
        return weights_TK, index_TK
    shared_TS = logits_TE[:, num_routed:].float().softmax(-1)
    index_TS = torch.arange(num_routed, num_routed + num_shared, device=logits_TE.device).expand_as(shared_TS)
    return torch.cat([weights_TK, shared_TS], -1), torch.cat([index_TK, index_TS], -1)


def _pick_beside_always_active(scores_TE: Tensor, top_k: int, always_active: Sequence[int]) -> tuple[Tensor, Tensor]:
    probs_TE = scores_TE.softmax(-1)
    always_A = torch.tensor(always_active, device=scores_TE.device)
    always_TA = always_A.expand(len(scores_TE), -1)
    others_TE = probs_TE.index_fill(-1, always_A, -1.0)
    num_others = min(top_k, scores_TE.shape[-1]) - len(always_active)
    weights_TK, index_TK = others_TE.topk(num_others, dim=-1)
    return torch.cat([probs_TE.gather(-1, always_TA), weights_TK], -1), torch.cat([always_TA, index_TK], -1)


def _scores(logits_TE: Tensor, allowed_TE: Tensor | None, always_active: Sequence[int] = ()) -> Tensor:
    """Returns fp32 scores, minus infinity where an expert is not allowed."""
    if allowed_TE is None:
        return logits_TE.float()
    if always_active:
        allowed_TE = allowed_TE.index_fill(-1, torch.tensor(always_active, device=allowed_TE.device), True)
    return torch.where(allowed_TE, logits_TE.float(), -torch.inf)


# --- the model --------------------------------------------------------------------------------------------------------
#
# EMO for transformers 5, read top-down: block, gate and experts, attention, model, language model.
#
# Written after the rules of the paper and checked against outputs of Ai2's reference code (tests/data/golden).
# Legend: B batch, N positions, T = B·N tokens, E experts of a layer (shared last), K top-k, D hidden.


class EmoRMSNorm(nn.Module):
    """RMS norm that multiplies by the weight before the cast: Llama's order differs in bf16."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden.float(), hidden.shape[-1:], self.weight.float(), self.eps).to(hidden.dtype)


class EmoMLP(nn.Module):
    """The dense SwiGLU of a layer without experts."""

    def __init__(self, config: EmoConfig) -> None:
        super().__init__()
        hidden, intermediate, bias = config.hidden_size, config.dense_intermediate_size, config.dense_mlp_bias
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class EmoTopKRouter(nn.Module):
    """The gate: `hidden_TD` → `(logits_TE, weights_TK, index_TK)`: weights in the hidden dtype, indices over all E
    experts.
    """

    def __init__(self, config: EmoConfig, layer_idx: int) -> None:
        super().__init__()
        self.num_experts = config.experts_in_layer(layer_idx)
        self.num_shared = config.shared_in_layer(layer_idx)
        self.always_active = config.always_active_in_layer(layer_idx)
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(self.num_experts, config.hidden_size))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = functional.linear(hidden_TD, self.weight)
        weights_TK, index_TK = self.pick(logits_TE)
        return logits_TE, weights_TK.to(hidden_TD.dtype), index_TK

    def pick(self, logits_TE: Tensor, allowed_TE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs `pick_experts` with this layer's settings."""
        return pick_experts(
            logits_TE,
            top_k=self.top_k,
            num_shared=self.num_shared,
            always_active=self.always_active,
            norm_topk_prob=self.norm_topk_prob,
            allowed_TE=allowed_TE,
        )


@use_experts_implementation
class EmoExperts(nn.Module):
    """All experts of a layer, stacked. This forward is the reference; transformers swaps in others by name."""

    def __init__(self, config: EmoConfig, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output_TD = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, rank = torch.where(top_k_index == expert)
            gate, up = functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_out = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output_TD.index_add_(0, token, expert_out * top_k_weights[token, rank, None])
        return output_TD


class EmoSparseMoeBlock(nn.Module):
    def __init__(self, config: EmoConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = EmoTopKRouter(config, layer_idx)
        self.experts = EmoExperts(config, config.experts_in_layer(layer_idx))

    def forward(self, hidden_BND: Tensor) -> Tensor:
        hidden_TD = hidden_BND.flatten(0, 1)
        _, weights_TK, index_TK = self.gate(hidden_TD)
        return self.experts(hidden_TD, index_TK, weights_TK).view_as(hidden_BND)


class EmoRotaryEmbedding(nn.Module):
    """Computes cos and sin of every position, always in fp32.

    Its buffers have the names that transformers restores on loading.
    """

    def __init__(self, config: EmoConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable[..., tuple[Tensor, float]] = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: EmoConfig, **_: Any) -> tuple[Tensor, float]:
        head_dim = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x_BHND: Tensor, cos_BND: Tensor, sin_BND: Tensor) -> Tensor:
    """Rotates halves in fp32 and casts back to the input's dtype."""
    x = x_BHND.float()
    first, second = x.chunk(2, dim=-1)
    rotated = x * cos_BND.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin_BND.unsqueeze(1)
    return rotated.to(x_BHND.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probs = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    probs = functional.dropout(probs, p=dropout, training=module.training)
    return (probs @ value).transpose(1, 2).contiguous(), probs


class EmoAttention(nn.Module):
    def __init__(self, config: EmoConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_proj(hidden_states).view(heads).transpose(1, 2), *position_embeddings)
        key = rotate(self.k_proj(hidden_states).view(heads).transpose(1, 2), *position_embeddings)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, probs = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), probs


class EmoDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: EmoConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = EmoAttention(config, layer_idx)
        has_experts = config.experts_in_layer(layer_idx) > 0
        self.mlp = EmoSparseMoeBlock(config, layer_idx) if has_experts else EmoMLP(config)
        self.pre_attention_layernorm = EmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = EmoRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attention, _ = self.self_attn(self.pre_attention_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.pre_feedforward_layernorm(hidden_states))


class EmoPreTrainedModel(PreTrainedModel):
    config: EmoConfig
    config_class = EmoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EmoDecoderLayer"]  # noqa: RUF012 - transformers declares these so
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(EmoTopKRouter, index=0),
        "hidden_states": EmoDecoderLayer,
        "attentions": EmoAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, EmoExperts):
            initialization.normal_(module.gate_up_proj, mean=0.0, std=std)
            initialization.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, EmoTopKRouter):
            initialization.normal_(module.weight, mean=0.0, std=std)


class EmoModel(EmoPreTrainedModel):
    def __init__(self, config: EmoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(EmoDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = EmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = EmoRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            end = seen + hidden_states.shape[1]
            position_ids = torch.arange(seen, end, device=hidden_states.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer for a draft that exits early
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class EmoForCausalLM(EmoPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: EmoConfig) -> None:
        super().__init__(config)
        self.model = EmoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Released configs store output_router_logits=true from training; only the argument turns it on here."""
        outputs = self.model(input_ids=input_ids, output_router_logits=output_router_logits, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
