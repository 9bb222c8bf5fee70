"""The routing-only pass: embeddings, attention, norms, gates and shared experts; no routed expert is loaded or run.

A prediction: layer L's router reads what layer L-1's experts wrote, and here the routed ones wrote nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pager.engine.trunk import OpenModel, moe_blocks
from pager.errors import InvalidRequest
from pager.models.families import routed_probabilities
from pager.store.experts import ExpertSource
from pager.types import ExpertKey, ExpertShape, RoutingFacts, RoutingScores

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME = "expert_pager_shared_only"

# In half precision on a CPU, torch compiles and keeps 0.7 MB of kernels for every length of prompt.
HALF_PRECISION_STEP = 64


class TrunkRouter:
    """Scores prompts for their experts with the model's trunk. Not thread-safe: one pass at a time."""

    def __init__(self, opened: OpenModel, device: torch.device | str = "cpu") -> None:
        """Loads trunk and shared experts. Raises CheckpointError."""
        self.facts: RoutingFacts = opened.facts
        self.config: PretrainedConfig = opened.config
        self.fingerprint: str = opened.checkpoint.fingerprint
        self.device = torch.device(device)
        self._lengths: Sequence[int] = ()
        self._means: list[list[np.ndarray]] = []  # by prefix, by layer
        keeps_kernels = self.device.type == "cpu" and opened.dtype != torch.float32
        self._length_step = HALF_PRECISION_STEP if keeps_kernels else 1
        self._model = opened.load_trunk(device)
        self.resident_bytes = sum(parameter.nbytes for parameter in self._model.parameters())
        self._load_shared(opened)
        self._model.set_experts_implementation(NAME)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", dtype: torch.dtype | str | None = None) -> TrunkRouter:
        """Raises CheckpointError, UnsupportedModel."""
        opened = OpenModel.open(path, dtype)
        with opened.checkpoint:
            return cls(opened, device)

    def scores(self, token_ids: Sequence[int]) -> RoutingScores:
        """Each routed expert's mean router probability over the prompt, in one forward without a cache.

        Raises InvalidRequest for an empty prompt and for token ids that the vocabulary does not have.
        """
        (scores,) = self.prefix_scores(token_ids, (len(token_ids),))
        return scores

    @torch.inference_mode()
    def prefix_scores(self, token_ids: Sequence[int], lengths: Sequence[int]) -> tuple[RoutingScores, ...]:
        """The scores of the first `lengths[i]` tokens as prompts, in one forward: no token looks at a later one.

        Raises as `scores` does.
        """
        unknown = [token for token in token_ids if not 0 <= token < self.config.vocab_size]
        if unknown or not token_ids:
            what = (
                f"token id {unknown[0]} is outside of the {self.config.vocab_size} known" if unknown else "it is empty"
            )
            raise InvalidRequest(f"the prompt can not be scored: {what}", field="prompt")
        self._means = [[np.zeros(0)] * self.facts.num_layers for _ in lengths]
        self._lengths = lengths
        padding = [0] * (-len(token_ids) % self._length_step)  # behind the prompt, where no token of it looks
        self._model.model(input_ids=torch.tensor([[*token_ids, *padding]], device=self.device), use_cache=False)
        return tuple(
            RoutingScores(tuple(mean_LR), source="trunk", num_tokens=length)
            for mean_LR, length in zip(self._means, lengths, strict=True)
        )

    def _load_shared(self, opened: OpenModel) -> None:
        shape = opened.family.expert_shape(opened.config)
        with closing(opened.open_experts()) as source:
            self._fill_shared(opened.dtype, shape, source)

    def _fill_shared(self, dtype: torch.dtype, shape: ExpertShape, source: ExpertSource) -> None:
        for layer, block in moe_blocks(self._model):
            num_experts, num_shared = self.facts.experts_per_layer[layer], self.facts.shared_per_layer[layer]
            gate_up = torch.empty(num_shared, 2 * shape.intermediate, shape.hidden, dtype=dtype)
            down = torch.empty(num_shared, shape.hidden, shape.intermediate, dtype=dtype)
            for index in range(num_shared):
                source.read(ExpertKey(layer, num_experts - num_shared + index), gate_up[index], down[index])
            self.resident_bytes += gate_up.nbytes + down.nbytes
            # Plain attributes: transformers' own parameters of these names are the ones that were taken out.
            object.__setattr__(block.experts, "gate_up_proj", gate_up.to(self.device))
            object.__setattr__(block.experts, "down_proj", down.to(self.device))
            block.gate.register_forward_hook(self._record(layer, num_shared))

    def _record(self, layer: int, num_shared: int) -> Any:
        def record(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            probs_TR = routed_probabilities(output[0][: max(self._lengths)], num_shared).double()
            for mean_LR, length in zip(self._means, self._lengths, strict=True):
                mean_LR[layer] = probs_TR[:length].mean(0).cpu().numpy()

        return record


def shared_experts_only(module: Any, hidden_TD: Tensor, _: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, D]: what the shared experts add; a family without any adds nothing."""
    out_TD = torch.zeros_like(hidden_TD)
    num_shared = len(module.gate_up_proj)
    for index in range(num_shared):
        inner_TF = module._apply_gate(hidden_TD @ module.gate_up_proj[index].t())
        # Shared experts come last among a token's picks.
        out_TD += (inner_TF @ module.down_proj[index].t()) * weights_TK[
            :, weights_TK.shape[1] - num_shared + index, None
        ]
    return out_TD


ALL_EXPERTS_FUNCTIONS.register(NAME, shared_experts_only)
