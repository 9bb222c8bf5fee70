"""The predictor that runs the model's trunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pager.errors import InvalidRequest
from pager.models.families import routed_probabilities
from pager.models.open_model import OpenModel, moe_blocks
from pager.store.expert_source import ExpertSource
from pager.types import ExpertKey, RoutingFacts, RoutingScores

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME = "expert_pager_routing_only"

# In half precision on a CPU, torch compiles and keeps 0.7 MB of kernels for every length of prompt.
HALF_PRECISION_STEP = 64


class TrunkPredictor:
    """Scores prompts for their experts with the model's trunk. Not thread-safe: one pass at a time."""

    def __init__(
        self,
        opened: OpenModel,
        device: torch.device | str = "cpu",
        stand_ins: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """Loads trunk and shared experts. `stand_ins`: [R, D] by sparse layer. Raises CheckpointError."""
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
        self.has_stand_ins = bool(stand_ins)
        self._load_layers(opened, stand_ins or {})
        self._model.set_experts_implementation(NAME)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | str | None = None,
        stand_ins: Mapping[int, np.ndarray] | None = None,
    ) -> TrunkPredictor:
        """Loads the trunk of a checkpoint. Raises CheckpointError, UnsupportedModel."""
        opened = OpenModel.open(path, dtype)
        with opened.checkpoint:
            return cls(opened, device, stand_ins)

    def scores(self, token_ids: Sequence[int]) -> RoutingScores:
        """Returns each routed expert's mean gate probability over the prompt, in one forward without a cache.

        Raises InvalidRequest for an empty prompt and for token ids that the vocabulary does not have.
        """
        (scores,) = self.prefix_scores(token_ids, (len(token_ids),))
        return scores

    @torch.inference_mode()
    def prefix_scores(self, token_ids: Sequence[int], lengths: Sequence[int]) -> tuple[RoutingScores, ...]:
        """Returns the scores of the first `lengths[i]` tokens as prompts, in one forward: no token looks at a later
        one.

        Raises as `scores` does.
        """
        unknown = [token for token in token_ids if not 0 <= token < self.config.vocab_size]
        if unknown or not token_ids:
            what = (
                f"token id {unknown[0]} is outside of the {self.config.vocab_size} known" if unknown else "it is empty"
            )
            raise InvalidRequest(f"the prompt cannot be scored: {what}", field="prompt")
        self._means = [[np.zeros(0)] * self.facts.num_layers for _ in lengths]
        self._lengths = lengths
        padding = [0] * (-len(token_ids) % self._length_step)  # behind the prompt, where no token of it looks
        self._model.model(input_ids=torch.tensor([[*token_ids, *padding]], device=self.device), use_cache=False)
        return tuple(
            RoutingScores(tuple(mean_LR), source="trunk", num_tokens=length)
            for mean_LR, length in zip(self._means, lengths, strict=True)
        )

    def _load_layers(self, opened: OpenModel, stand_ins: Mapping[int, np.ndarray]) -> None:
        with closing(opened.open_experts()) as source:
            for layer, block in moe_blocks(self._model):
                gate_up, down = self._read_shared(layer, opened, source)
                vectors_RD = torch.from_numpy(stand_ins[layer]).float().to(self.device) if stand_ins else None
                self.resident_bytes += gate_up.nbytes + down.nbytes + (0 if vectors_RD is None else vectors_RD.nbytes)
                block.experts.instead = RoutingOnlyExperts(gate_up, down, vectors_RD)
                block.gate.register_forward_hook(self._record(layer, block.experts.instead))

    def _read_shared(self, layer: int, opened: OpenModel, source: ExpertSource) -> tuple[Tensor, Tensor]:
        num_experts, num_shared = self.facts.experts_per_layer[layer], self.facts.shared_per_layer[layer]
        shape = opened.family.shape
        gate_up = torch.empty(num_shared, 2 * shape.intermediate, shape.hidden, dtype=opened.dtype)
        down = torch.empty(num_shared, shape.hidden, shape.intermediate, dtype=opened.dtype)
        for index in range(num_shared):
            read = opened.read_expert(source, ExpertKey(layer, num_experts - num_shared + index))
            gate_up[index], down[index] = read
        return gate_up.to(self.device), down.to(self.device)

    def _record(self, layer: int, experts: RoutingOnlyExperts) -> Any:
        num_shared = self.facts.shared_per_layer[layer]

        def record(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            probs_TR = routed_probabilities(output[0], num_shared)
            experts.see(probs_TR)
            probs_TR = probs_TR[: max(self._lengths)].double()
            for mean_LR, length in zip(self._means, self._lengths, strict=True):
                mean_LR[layer] = probs_TR[:length].mean(0).cpu().numpy()

        return record


class RoutingOnlyExperts:
    """One layer without its routed experts: runs the shared ones and, where there are any, stand-ins for the others."""

    def __init__(self, gate_up: Tensor, down: Tensor, vectors_RD: Tensor | None) -> None:
        self._shared = list(zip(gate_up, down, strict=True))
        self._vectors_RD = vectors_RD
        self._added_TD: Tensor | None = None  # by the stand-in, between gate and experts

    def see(self, probs_TR: Tensor) -> None:
        """Takes the gate's probabilities, right before `run`."""
        if self._vectors_RD is not None:
            self._added_TD = probs_TR @ self._vectors_RD

    def run(self, module: Any, hidden_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """Returns [T, D]; zeros where there are neither shared experts nor stand-ins."""
        out_TD = torch.zeros_like(hidden_TD) if self._added_TD is None else self._added_TD.to(hidden_TD.dtype)
        self._added_TD = None
        first = weights_TK.shape[1] - len(self._shared)  # shared experts come last among a token's picks
        for place, (gate_up, down) in enumerate(self._shared, first):
            inner_TF = module._apply_gate(hidden_TD @ gate_up.t())
            out_TD += (inner_TF @ down.t()) * weights_TK[:, place, None]
        return out_TD


def routing_only_experts(module: Any, hidden_TD: Tensor, _: Tensor, weights_TK: Tensor) -> Tensor:
    """Runs a layer's experts; the function that is registered with transformers."""
    instead: RoutingOnlyExperts = module.instead
    return instead.run(module, hidden_TD, weights_TK)


ALL_EXPERTS_FUNCTIONS.register(NAME, routing_only_experts)
