"""Model shapes by name. A shortened one keeps its experts: fewer layers and a smaller vocabulary, nothing else."""

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


SHAPES = {
    # hidden, intermediate, layers, heads, kv heads, experts, top-k, vocabulary, context
    "emo-1b14b": Shape(2048, 1024, 16, 16, 16, 128, 8, 100352, 4096),
    "emo-mini": Shape(512, 256, 8, 8, 8, 64, 8, 16384, 2048),
    "emo-micro": Shape(64, 32, 4, 4, 2, 64, 8, 256, 512),
}
