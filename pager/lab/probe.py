"""What the selection methods ask of a model, answered by a paged one: whatever its budget, experts are paged as needed.

Legend: T tokens, K experts a token picks, E experts of a layer (shared last), R routed experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from pager.engine.paged_model import PagedModel
from pager.errors import InvalidRequest
from pager.lab.selection import Examples, Layers
from pager.models.families import routed_probabilities
from pager.models.open_model import moe_blocks
from pager.pools.document import DocumentRouting
from pager.types import ExpertPool, PoolPolicy, PoolSize, PoolSource, RoutingFacts, RoutingScores

Predictor = Callable[[Sequence[int]], RoutingScores]
GateHook = Callable[[int, Tensor, Tensor], None]  # layer, logits_TE, index_TK


class PagedProbe:
    """A `pager.lab.selection.Probe`. One thread only: the model's own. Examples run one at a time, unpadded."""

    def __init__(
        self, paged: PagedModel, *, predictors: Mapping[str, Predictor] | None = None, sample: Examples = ()
    ) -> None:
        """`predictors` are the routing-only passes by name, `sample` the documents that `frequency` counts over."""
        self._paged = paged
        self._predictors = dict(predictors or {})
        self._sample = sample
        self._frequency: Layers | None = None

    @property
    def facts(self) -> RoutingFacts:
        return self._paged.facts

    def mean_probabilities(self, examples: Examples) -> Layers:
        total = self._totals()
        with self._on_gates(lambda layer, logits_TE, _: self._add_mass(total, layer, logits_TE)):
            for example in examples:
                self._run(example, PoolPolicy())
        return _means(total, sum(map(len, examples)))

    def layer_probabilities(self, examples: Examples, below: Sequence[Sequence[int]]) -> np.ndarray:
        total, target = self._totals(), len(below)
        above = [tuple(range(routed)) for routed in self.facts.routed_per_layer[target:]]
        pool = ExpertPool((*map(tuple, below), *above))
        policy = PoolPolicy(source=PoolSource.FIXED, fixed=pool)

        def stop_at_target(layer: int, logits_TE: Tensor, _: Tensor) -> None:
            if layer == target:
                self._add_mass(total, layer, logits_TE)
                raise _LayerReached

        with self._on_gates(stop_at_target):
            for example in examples:
                with suppress(_LayerReached):
                    self._run(example, policy)
        return _means(total, sum(map(len, examples)))[target]

    def prefill_probabilities(self, example: Sequence[int], size: PoolSize) -> Layers:
        total = self._totals()
        with self._on_gates(lambda layer, logits_TE, _: self._add_mass(total, layer, logits_TE)):
            self._run(example, PoolPolicy(size))
        return _means(total, len(example))

    def easy_ep(self, examples: Examples) -> Layers:
        """arXiv 2504.06792, as the authors of EMO coded it (rule 19)."""
        total = [torch.zeros(all_, dtype=torch.float64) for all_ in self.facts.experts_per_layer]
        with ExitStack() as hooks:
            for layer, block in moe_blocks(self._paged.model):
                hooks.callback(block.experts.register_forward_hook(_easy_ep_hook(total[layer])).remove)
            for example in examples:
                self._run(example, PoolPolicy())
        routed = self.facts.routed_per_layer
        return tuple(score_E[:num].numpy() for score_E, num in zip(total, routed, strict=True))

    def frequency(self) -> Layers:
        if not self._sample:
            raise InvalidRequest(
                "the frequency of experts is counted over a sample of documents, and none was given; give some, or "
                "choose another method",
                field="method",
            )
        if self._frequency is None:
            self._frequency = self._count_picks(self._sample)
        return self._frequency

    def predicted(self, source: str, example: Sequence[int]) -> RoutingScores:
        if source not in self._predictors:
            remedy = (
                "load a TrunkPredictor" if source == "trunk" else "run `expert-pager fit-router` on this checkpoint"
            )
            raise InvalidRequest(f"there is no {source!r} router for this model; {remedy} first", field="method")
        self._check(example)
        return self._predictors[source](example)

    def _count_picks(self, documents: Examples) -> Layers:
        total = self._totals()

        def count(layer: int, logits_TE: Tensor, index_TK: Tensor) -> None:
            picks_E = torch.bincount(index_TK.flatten(), minlength=logits_TE.shape[-1])
            total[layer] += picks_E[: len(total[layer])].double().cpu()

        with self._on_gates(count):
            for document in documents:
                self._run(document, PoolPolicy())
        return tuple((picks_R / max(float(picks_R.sum()), 1.0)).numpy() for picks_R in total)

    def _totals(self) -> list[Tensor]:
        return [torch.zeros(routed, dtype=torch.float64) for routed in self.facts.routed_per_layer]

    def _add_mass(self, total: list[Tensor], layer: int, logits_TE: Tensor) -> None:
        probs_TR = routed_probabilities(logits_TE, self.facts.shared_per_layer[layer])
        total[layer] += probs_TR.double().sum(0).cpu()

    @contextmanager
    def _on_gates(self, hook: GateHook) -> Iterator[None]:
        """Calls `hook` after every gate; it sees the raw logits and the picks that the pool allows."""

        def watch(layer: int) -> Callable[[nn.Module, Any, tuple[Tensor, ...]], None]:
            return lambda _, __, output: hook(layer, output[0], output[2])

        with ExitStack() as hooks:
            for layer, block in moe_blocks(self._paged.model):
                hooks.callback(block.gate.register_forward_hook(watch(layer)).remove)
            yield

    @torch.inference_mode()
    def _run(self, example: Sequence[int], policy: PoolPolicy) -> None:
        self._check(example)
        document: DocumentRouting = self._paged.document(policy)
        inputs = torch.tensor([list(example)], device=self._paged.device)
        with self._paged.step([document], prefill=True):
            self._paged.model.model(input_ids=inputs, use_cache=False)

    def _check(self, example: Sequence[int]) -> None:
        config = self._paged.config
        unknown = [token for token in example if not 0 <= token < config.vocab_size]
        if unknown:
            raise InvalidRequest(
                f"an example has the token id {unknown[0]}, which is outside of the {config.vocab_size} known",
                field="examples",
            )
        if not 0 < len(example) <= config.max_position_embeddings:
            raise InvalidRequest(
                f"an example has {len(example)} tokens; 1 to {config.max_position_embeddings} can be read",
                field="examples",
            )


class _LayerReached(Exception):
    """The layer asked about has spoken; what lies above it need not run."""


def _means(total: Sequence[Tensor], num_tokens: int) -> Layers:
    return tuple((mass_R / num_tokens).numpy() for mass_R in total)


def _easy_ep_hook(total_E: Tensor) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
    """Adds up one layer's scores. Each rank of the picks runs again by itself, so any kernel and budget will do."""

    def add(experts: Any, inputs: tuple[Tensor, ...], moe_TD: Tensor) -> None:
        hidden_TD, index_TK, weights_TK = inputs
        hidden = hidden_TD.float()
        turned_T = 1 - cosine_similarity(hidden, hidden + moe_TD.float(), dim=-1).double()
        for rank in range(index_TK.shape[1]):
            kept = slice(rank, rank + 1)
            out_TD = experts.forward(hidden_TD, index_TK[:, kept], weights_TK[:, kept])  # past this hook
            score_T = out_TD.float().norm(dim=-1).double() * turned_T
            total_E.index_add_(0, index_TK[:, rank].cpu(), score_T.cpu())

    return add
