"""The configuration of EMO checkpoints (arXiv 2605.06663), as `allenai/Emo_*` and `StdMoE_*` store it."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from pager.errors import CheckpointError


@strict
class EmoConfig(PreTrainedConfig):  # type: ignore[misc] # transformers is untyped here
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
        """Returns how many experts every token uses with their own share of the common softmax."""
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
