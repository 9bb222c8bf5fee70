"""Model shapes by name. A shortened one keeps its experts: fewer layers and a smaller vocabulary, nothing else.

Legend: D hidden, F expert intermediate, E experts of a layer, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """`num_experts` counts all experts of a layer, the shared one (the last) included; `top_k` includes it too."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int
    top_k: int
    vocabulary: int
    context: int

    def shortened(self, num_layers: int | None) -> Shape:
        """Fewer layers and as much less vocabulary: experts and output head keep their parts of a token's time."""
        if num_layers is None or num_layers == self.num_layers:
            return self
        if num_layers < 1:
            raise ValueError(f"a model has at least one layer, not {num_layers}")
        vocabulary = max(64, self.vocabulary * num_layers // self.num_layers)
        return replace(self, num_layers=num_layers, vocabulary=vocabulary)

    def config(self, dtype: str) -> dict[str, Any]:
        """`config.json` as the released checkpoints have it."""
        return {
            "architectures": ["EmoForCausalLM"],
            "model_type": "emo",
            "dtype": dtype,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "num_shared_experts": 1,
            "norm_topk_prob": False,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rope_theta": 500000.0,
            "rope_scaling": None,
            "rms_norm_eps": 1e-06,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "use_cache": True,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.01,
            "bos_token_id": None,
            "eos_token_id": self.vocabulary - 2,
            "pad_token_id": self.vocabulary - 1,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, in the order in which they are stored."""
        D, F, kv = self.hidden, self.intermediate, self.hidden // self.num_heads * self.num_kv_heads
        expert = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, D)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            found |= {f"{prefix}{name}_layernorm.weight": (D,) for name in ("pre_attention", "pre_feedforward")}
            attention = {"q": (D, D), "k": (kv, D), "v": (kv, D), "o": (D, D)}
            found |= {f"{prefix}self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
            found[f"{prefix}mlp.gate.weight"] = (self.num_experts, D)
            for number in range(self.num_experts):
                found |= {f"{prefix}mlp.experts.{number}.{name}.weight": shape for name, shape in expert.items()}
        return found | {"model.norm.weight": (D,), "lm_head.weight": (self.vocabulary, D)}


@dataclass(frozen=True, slots=True)
class OlmoeShape(Shape):
    """As the OLMoE checkpoints are stored: no shared expert, queries and keys normalised over all heads."""

    def config(self, dtype: str) -> dict[str, Any]:
        shared = Shape.config(self, dtype)
        return {name: value for name, value in shared.items() if name != "num_shared_experts"} | {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-05,
            "clip_qkv": None,
            "output_router_logits": False,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        D, kv = self.hidden, self.hidden // self.num_heads * self.num_kv_heads
        return {"model.embed_tokens.weight": (self.vocabulary, D)} | self._after_embedding((D, kv), D, kv)

    def _after_embedding(self, normed: tuple[int, int], query: int, key: int) -> dict[str, tuple[int, ...]]:
        """Layers with norms of `normed` sizes on queries and keys, and the head."""
        D, F, E, V = self.hidden, self.intermediate, self.num_experts, self.vocabulary
        expert = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
        attention = {"q": (query, D), "k": (key, D), "v": (key, D), "o": (D, query)}
        found: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            found |= {f"{prefix}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
            found |= {f"{prefix}self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
            found |= {f"{prefix}self_attn.{name}_norm.weight": (size,) for name, size in zip("qk", normed, strict=True)}
            found[f"{prefix}mlp.gate.weight"] = (E, D)
            for number in range(E):
                found |= {f"{prefix}mlp.experts.{number}.{name}.weight": shape for name, shape in expert.items()}
        return found | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


@dataclass(frozen=True, slots=True)
class Qwen3MoeShape(OlmoeShape):
    """As the Qwen3-MoE checkpoints are stored: heads of a size of their own, normalised one by one."""

    head_dim: int = 128

    def config(self, dtype: str) -> dict[str, Any]:
        shared = OlmoeShape.config(self, dtype)
        return {name: value for name, value in shared.items() if name != "clip_qkv"} | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.intermediate,
            "intermediate_size": 8 * self.intermediate,
            "head_dim": self.head_dim,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-06,
            "sliding_window": None,
            "use_sliding_window": False,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        embedding = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        return embedding | self._after_embedding((self.head_dim, self.head_dim), query, key)


SHAPES = {
    # hidden, intermediate, layers, heads, kv heads, experts, top-k, vocabulary, context
    "emo-1b14b": Shape(2048, 1024, 16, 16, 16, 128, 8, 100352, 4096),
    "emo-mini": Shape(512, 256, 8, 8, 8, 64, 8, 16384, 2048),
    "emo-micro": Shape(64, 32, 4, 4, 2, 64, 8, 256, 512),
    "olmoe-1b7b": OlmoeShape(2048, 1024, 16, 16, 16, 64, 8, 50304, 4096),
    "olmoe-micro": OlmoeShape(256, 256, 4, 4, 4, 16, 4, 1024, 1024),
    "qwen3-30b-a3b": Qwen3MoeShape(2048, 768, 48, 32, 4, 128, 8, 151936, 40960),
    "qwen3-micro": Qwen3MoeShape(256, 256, 4, 4, 2, 16, 4, 1024, 1024, 64),
}
