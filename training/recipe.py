"""The settings that a training run depends on besides its corpus."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from pager.models import EmoConfig
from training.run_folder import whole

PoolMode = Literal["document", "none"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a run.

    Sizes count all experts of a layer, shared ones included; the defaults are what `make train` makes.
    """

    pool: PoolMode = "document"
    hidden_size: int = 128
    intermediate_size: int = 32
    num_layers: int = 6
    num_heads: int = 4
    num_experts: int = 128
    num_shared: int = 1
    top_k: int = 8
    vocab_size: int = 4096
    initializer_range: float = 0.088  # 1/sqrt(hidden), as 0.02 is at the released width
    context: int = 1024
    train_context: int = 512
    rows_per_step: int = 4
    learning_rate: float = 5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    min_pool: int = 8
    balance_weight: float = 1e-1
    z_weight: float = 1e-3
    seed: int = 1

    def model_config(self) -> EmoConfig:
        return EmoConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            max_position_embeddings=self.context,
            initializer_range=self.initializer_range,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            num_shared_experts=self.num_shared,
            eos_token_id=0,
            pad_token_id=1,
        )

    def settle(self, run: Path) -> None:
        """Stores the recipe in a new run folder; refuses to continue an old one with another recipe."""
        path = run / "recipe.json"
        if not path.exists():
            with whole(path) as partial:
                partial.write_text(json.dumps(asdict(self), indent=1))
            return
        stored = Recipe.of(run)
        changed = [f.name for f in fields(self) if getattr(stored, f.name) != getattr(self, f.name)]
        if changed:
            raise SystemExit(f"{run} holds a run with another {', '.join(changed)}; choose another --out")

    @classmethod
    def of(cls, run: Path) -> Recipe:
        """Reads the recipe stored in a run folder."""
        stored: dict[str, object] = json.loads((run / "recipe.json").read_text())
        return cls(**stored)  # type: ignore[arg-type]
