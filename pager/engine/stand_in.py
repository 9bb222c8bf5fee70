"""Stand-ins: what a layer's routed experts would add, told from its router's probabilities alone. No gradients.

Each routed expert is represented by one vector, its usual output, weighted with its router probability. The vectors of
a layer are fitted together, to what the experts add when a document runs under pools of several sizes, as prompts will.

Legend: T tokens, D hidden, R routed experts, E all experts of a layer (shared last).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pager.engine.loading import PagedModel
from pager.engine.trunk import moe_blocks
from pager.models.families import routed_probabilities
from pager.routing.regression import ridge_of_sums
from pager.types import PoolPolicy, PoolSize

PENALTY = 1.0

StandIns = dict[int, np.ndarray]  # [R, D] float32 by sparse layer


class StandInFit:
    """Adds up documents, then fits. Owned by the model's thread."""

    def __init__(self, paged: PagedModel) -> None:
        self._paged = paged
        self._probs_TR = torch.empty(0)
        self._num_tokens = 0
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # probs.T @ probs [R, R], probs.T @ added [R, D], float64

    @torch.inference_mode()
    def add(self, token_ids: Sequence[int], size: PoolSize) -> None:
        """Runs a document under the pool of that size that it chooses for itself."""
        inputs = torch.tensor([list(token_ids)], device=self._paged.device)
        with ExitStack() as hooks:
            for layer, block in moe_blocks(self._paged.model):
                # Each layer's gate runs right before its experts.
                hooks.callback(block.gate.register_forward_hook(self._keep_probabilities(layer)).remove)
                hooks.callback(block.experts.register_forward_hook(self._sum_up(layer)).remove)
            with self._paged.step([self._paged.document(PoolPolicy(size=size))], prefill=True):
                self._paged.model.model(input_ids=inputs, use_cache=False)
        self._num_tokens += len(token_ids)

    def fit(self) -> StandIns:
        fitted = {}
        for layer, (gram_RR, cross_RD) in self._sums.items():
            fitted[layer] = ridge_of_sums(gram_RR.numpy(), cross_RD.numpy(), self._num_tokens, PENALTY)
        return fitted

    def _keep_probabilities(self, layer: int) -> Callable[[Any, Any, tuple[Tensor, ...]], None]:
        num_shared = self._paged.facts.shared_per_layer[layer]

        def keep(_: Any, __: Any, output: tuple[Tensor, ...]) -> None:
            self._probs_TR = routed_probabilities(output[0], num_shared)

        return keep

    def _sum_up(self, layer: int) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        num_shared = self._paged.facts.shared_per_layer[layer]

        def sum_up(experts: Any, inputs: tuple[Tensor, ...], moe_TD: Tensor) -> None:
            hidden_TD, index_TK, weights_TK = inputs
            added_TD = moe_TD.float()
            if num_shared:  # last among a token's picks; past this hook
                shared = slice(index_TK.shape[1] - num_shared, None)
                added_TD = added_TD - experts.forward(hidden_TD, index_TK[:, shared], weights_TK[:, shared]).float()
            probs_RT = self._probs_TR.double().T
            gram_RR, cross_RD = (probs_RT @ probs_RT.T).cpu(), (probs_RT @ added_TD.double()).cpu()
            if layer in self._sums:
                self._sums[layer][0].add_(gram_RR)
                self._sums[layer][1].add_(cross_RD)
            else:
                self._sums[layer] = (gram_RR, cross_RD)

        return sum_up
