"""Reads documents for `fit-router`: what their gates wanted, and the stand-ins for routed experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pager.engine.paged_model import PagedModel
from pager.lab.fit import DocumentReading, ridge_of_sums
from pager.models.families import routed_probabilities
from pager.models.open_model import moe_blocks
from pager.pools.document import DocumentRouting
from pager.predict.trunk import TrunkPredictor
from pager.types import ExpertPool, PoolPolicy, PoolSize, RoutingFacts, Share

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


PROMPT_LENGTHS = (16, 32, 64, 128, 256)
FUSED_SIZES = (Share(0.125), Share(0.25), Share(0.5))
MIN_TOKENS = 32


class DocumentReader:
    """Runs documents through a model with all experts and through its trunk, and prompts of them under prefills' pools.

    Owned by one thread.
    """

    def __init__(self, paged: PagedModel, trunk: TrunkPredictor, *, seed: int) -> None:
        self._paged = paged
        self._trunk = trunk
        self._random = np.random.default_rng(seed)
        self._sizes = sizes_of_pools(paged.facts)

    def read(self, token_ids: Sequence[int]) -> DocumentReading | None:
        """None for a document too short to learn from."""
        ids = tuple(token_ids)
        if len(ids) < MIN_TOKENS:
            return None
        lengths = [length for length in PROMPT_LENGTHS if 2 * length <= len(ids)]
        trunk = self._trunk.prefix_scores(ids[: lengths[-1]], lengths)
        prompts = [int(self._random.integers(len(lengths))) for _ in self._sizes]
        pools = [self._prefill_pool(ids[: lengths[n]], size) for n, size in zip(prompts, self._sizes, strict=True)]
        return DocumentReading(ids, self._wanted(ids), trunk, tuple(zip(prompts, pools, strict=True)))

    @torch.inference_mode()
    def _wanted(self, ids: Sequence[int]) -> np.ndarray:
        document = self._paged.document(PoolPolicy())
        with recorded_means(self._paged) as means, self._paged.step([document], prefill=True):
            self._forward(ids)
        return np.concatenate([means.get(layer, np.zeros(0)) for layer in range(self._paged.facts.num_layers)])

    @torch.inference_mode()
    def _prefill_pool(self, ids: Sequence[int], size: PoolSize) -> ExpertPool:
        document: DocumentRouting = self._paged.document(PoolPolicy(size=size))
        with self._paged.step([document], prefill=True):
            self._forward(ids)
        assert document.pool is not None
        return document.pool

    def _forward(self, ids: Sequence[int]) -> None:
        self._paged.model.model(input_ids=torch.tensor([list(ids)], device=self._paged.device), use_cache=False)


def sizes_of_pools(facts: RoutingFacts) -> list[Share]:
    """Sizes to learn from: those of FUSED_SIZES that hold a token's picks."""
    top_k, experts = max(facts.top_k_per_layer), max(facts.experts_per_layer)
    return [size for size in FUSED_SIZES if size.share * experts - 1 >= top_k] or [FUSED_SIZES[-1]]


@contextmanager
def recorded_means(paged: PagedModel) -> Iterator[dict[int, np.ndarray]]:
    """Per sparse layer, each routed expert's mean probability over the tokens of the forward inside: [R] float64."""
    means: dict[int, np.ndarray] = {}

    def record(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            probs_TR = routed_probabilities(output[0], paged.facts.shared_per_layer[layer])
            means[layer] = probs_TR.double().mean(0).cpu().numpy()

        return hook

    hooks = [block.gate.register_forward_hook(record(layer)) for layer, block in moe_blocks(paged.model)]
    try:
        yield means
    finally:
        for handle in hooks:
            handle.remove()
