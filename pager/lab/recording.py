"""Records what a model's gates and experts do in a forward: the one place in which the lab hooks into a model.

Experts are paged as they are needed, whatever the model's budget.
Legend: T tokens, K experts a token picks, E experts of a layer (shared last), R routed experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pager.engine.paged_model import PagedModel
from pager.errors import InvalidRequest
from pager.models.families import routed_probabilities
from pager.models.open_model import moe_blocks
from pager.pools.routing import RequestRouting
from pager.types import ExpertPool, PoolPolicy, PoolSize, PoolSource, RoutingFacts, RoutingScores

Ids = Sequence[int]
Examples = Sequence[Ids]
Layers = tuple[np.ndarray, ...]  # a float64 [R] a layer, empty where dense
Predictor = Callable[[Ids], RoutingScores]
OnGate = Callable[[int, Tensor, Tensor], None]  # layer, probs_TR over the routed experts, index_TK as the pool allows
OnExperts = Callable[
    [int, Any, tuple[Tensor, ...], Tensor], None
]  # layer, module, (hidden_TD, index_TK, weights_TK), out

EVERY_EXPERT = PoolPolicy()


@contextmanager
def recording(paged: PagedModel, on_gate: OnGate, on_experts: OnExperts | None = None) -> Iterator[None]:
    """Inside, `on_gate` is called after every gate of a forward, and `on_experts` after the experts of its layer.

    In a layer the gate comes first.
    """

    def after_gate(layer: int) -> Callable[..., None]:
        num_shared = paged.facts.shared_per_layer[layer]
        return lambda _, __, output: on_gate(layer, routed_probabilities(output[0], num_shared), output[2])

    def after_experts(layer: int, called: OnExperts) -> Callable[..., None]:
        return lambda module, inputs, output: called(layer, module, inputs, output)

    with ExitStack() as hooks:
        for layer, block in moe_blocks(paged.model):
            hooks.callback(block.gate.register_forward_hook(after_gate(layer)).remove)
            if on_experts is not None:
                hooks.callback(block.experts.register_forward_hook(after_experts(layer, on_experts)).remove)
        yield


@torch.inference_mode()
def run_document(
    paged: PagedModel, token_ids: Ids, policy: PoolPolicy = EVERY_EXPERT, *, num_padding: int = 0
) -> RequestRouting:
    """Runs one document as a prefill and returns its routing, which has the pool. Padding goes behind it."""
    document: RequestRouting = paged.routing(policy)
    inputs = torch.tensor([[*token_ids, *[0] * num_padding]], device=paged.device)
    with paged.step([document], prefill=True):
        paged.model.model(input_ids=inputs, use_cache=False)
    return document


def mean_probabilities(paged: PagedModel, documents: Examples, policy: PoolPolicy = EVERY_EXPERT) -> Layers:
    """Each routed expert's mean gate probability over all tokens of documents that run one after the other."""
    totals = _Totals(paged.facts)
    with recording(paged, totals.add):
        for document in documents:
            run_document(paged, document, policy)
    return totals.means(sum(map(len, documents)))


class Probe:
    """What the selection methods ask of a model. Means are over all tokens of all examples.

    One thread only, the model's own. Examples run one at a time, unpadded. Every method raises InvalidRequest for
    token ids that the model does not have and for examples longer than its context.
    """

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
        """Each routed expert's mean gate probability, with all experts."""
        return mean_probabilities(self._paged, self._checked(examples))

    def prefill_probabilities(self, example: Ids, size: PoolSize) -> Layers:
        """The same of one example as a request's prefill sees it: each layer chooses its pool and runs with it."""
        return mean_probabilities(self._paged, self._checked([example]), PoolPolicy(size))

    def layer_probabilities(self, examples: Examples, below: Sequence[Sequence[int]]) -> np.ndarray:
        """[R] of layer `len(below)`, while the layers below it have only these routed experts."""
        totals, target = _Totals(self.facts), len(below)
        above = [tuple(range(routed)) for routed in self.facts.routed_per_layer[target:]]
        policy = PoolPolicy(source=PoolSource.FIXED, fixed=ExpertPool((*map(tuple, below), *above)))

        def stop_at_target(layer: int, probs_TR: Tensor, index_TK: Tensor) -> None:
            if layer == target:
                totals.add(layer, probs_TR, index_TK)
                raise _LayerReached

        with recording(self._paged, stop_at_target):
            for example in self._checked(examples):
                with suppress(_LayerReached):
                    run_document(self._paged, example, policy)
        return totals.means(sum(map(len, examples)))[target]

    def easy_ep(self, examples: Examples) -> Layers:
        """Sum over the tokens that pick an expert of its weighted output's norm, times how far MoE turns the token.

        arXiv 2504.06792, as the authors of EMO coded it (rule 19). Each rank of the picks runs again by itself, so that
        any kernel and budget will do.
        """
        totals = [torch.zeros(all_, dtype=torch.float64) for all_ in self.facts.experts_per_layer]

        def add(layer: int, experts: Any, inputs: tuple[Tensor, ...], moe_TD: Tensor) -> None:
            hidden_TD, index_TK, weights_TK = inputs
            hidden = hidden_TD.float()
            turned_T = 1 - cosine_similarity(hidden, hidden + moe_TD.float(), dim=-1).double()
            for rank in range(index_TK.shape[1]):
                kept = slice(rank, rank + 1)
                out_TD = experts.forward(hidden_TD, index_TK[:, kept], weights_TK[:, kept])  # past the hook
                score_T = out_TD.float().norm(dim=-1).double() * turned_T
                totals[layer].index_add_(0, index_TK[:, rank].cpu(), score_T.cpu())

        with recording(self._paged, _nothing, add):
            for example in self._checked(examples):
                run_document(self._paged, example)
        routed = self.facts.routed_per_layer
        return tuple(score_E[:num].numpy() for score_E, num in zip(totals, routed, strict=True))

    def frequency(self) -> Layers:
        """Each expert's share of the picks over a sample of everything the model reads, whatever the examples."""
        if not self._sample:
            raise InvalidRequest(
                "the frequency of experts is counted over a sample of documents, and none was given; give some, or "
                "choose another method",
                field="method",
            )
        if self._frequency is None:
            self._frequency = self._count_picks(self._checked(self._sample))
        return self._frequency

    def predicted(self, source: str, example: Ids) -> RoutingScores:
        """What a routing-only pass ("trunk", "lexical" or "fitted") expects of one example."""
        if source not in self._predictors:
            remedy = (
                "load a TrunkPredictor" if source == "trunk" else "run `expert-pager fit-router` on this checkpoint"
            )
            raise InvalidRequest(f"there is no {source!r} router for this model; {remedy} first", field="method")
        return self._predictors[source](self._checked([example])[0])

    def _count_picks(self, documents: Examples) -> Layers:
        totals = [torch.zeros(routed, dtype=torch.float64) for routed in self.facts.routed_per_layer]

        def count(layer: int, _: Tensor, index_TK: Tensor) -> None:
            picks_E = torch.bincount(index_TK.flatten(), minlength=self.facts.experts_per_layer[layer])
            totals[layer] += picks_E[: len(totals[layer])].double().cpu()

        with recording(self._paged, count):
            for document in documents:
                run_document(self._paged, document)
        return tuple((picks_R / max(float(picks_R.sum()), 1.0)).numpy() for picks_R in totals)

    def _checked(self, examples: Examples) -> Examples:
        config = self._paged.config
        for example in examples:
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
        return examples


class _Totals:
    """Gate probabilities added up over tokens, layer by layer."""

    def __init__(self, facts: RoutingFacts) -> None:
        self._total = [torch.zeros(routed, dtype=torch.float64) for routed in facts.routed_per_layer]

    def add(self, layer: int, probs_TR: Tensor, _: Tensor) -> None:
        self._total[layer] += probs_TR.double().sum(0).cpu()

    def means(self, num_tokens: int) -> Layers:
        return tuple((mass_R / num_tokens).numpy() for mass_R in self._total)


class _LayerReached(Exception):
    """Ends a forward at the layer that was asked about; what lies above it need not run."""


def _nothing(*_: object) -> None:
    """An `on_gate` that records nothing."""
