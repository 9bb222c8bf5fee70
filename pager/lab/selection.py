"""Every way to choose a pool from example texts, behind one interface. Numpy only; a `Probe` runs the model.

A method turns examples into `RoutingScores`; `pick_pool` picks. Rules 17 to 20 of EMO name the paper's methods.
Legend: L layers, R routed experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from pager.errors import InvalidRequest
from pager.pools.pick import largest_counts, pick_layer, pick_pool, resolve_size
from pager.types import Bytes, ExpertPool, PoolSize, RoutingFacts, RoutingScores

Examples = Sequence[Sequence[int]]
Layers = tuple[np.ndarray, ...]  # a float64 [R] a layer, empty where dense


class Probe(Protocol):
    """What the methods ask of a model. Means are over all tokens of all examples. Raises InvalidRequest."""

    @property
    def facts(self) -> RoutingFacts: ...

    def mean_probabilities(self, examples: Examples) -> Layers:
        """Each routed expert's mean gate probability, with all experts."""

    def layer_probabilities(self, examples: Examples, below: Sequence[Sequence[int]]) -> np.ndarray:
        """[R] of layer `len(below)`, while the layers below it have only these routed experts."""

    def prefill_probabilities(self, example: Sequence[int], size: PoolSize) -> Layers:
        """Of one example as a request's prefill sees it: each layer chooses its pool and runs with it."""

    def easy_ep(self, examples: Examples) -> Layers:
        """Sum over the tokens that pick an expert of its weighted output's norm, times how far MoE turns the token."""

    def frequency(self) -> Layers:
        """Each expert's share of the picks over a sample of everything the model reads, whatever the examples."""

    def predicted(self, source: str, example: Sequence[int]) -> RoutingScores:
        """What a routing-only pass ("trunk", "lexical" or "fitted") expects of one example."""


SelectionMethod = Callable[[Probe, Examples, PoolSize, int], Layers]


def select(method: str, probe: Probe, examples: Examples, size: PoolSize, *, seed: int = 0) -> ExpertPool:
    """The pool of `size` that `method` chooses from one or more examples, as token ids. Only `random` has a seed.

    Raises InvalidRequest for an unknown method and for examples that the method cannot use, PoolTooSmall.
    """
    method = RENAMED.get(method, method)
    if method in LAYER_BY_LAYER:
        size = _size_by_layer(probe, examples, size)
    pool = pick_pool(score(method, probe, examples, size, seed=seed), size, probe.facts)
    return replace(pool, covered_mass=None) if method in NOT_A_MASS else pool


def score(method: str, probe: Probe, examples: Examples, size: PoolSize, *, seed: int = 0) -> RoutingScores:
    """The scores behind `select`. Those of `prefill` and `greedy` hold for this size alone, which is not in bytes."""
    method = RENAMED.get(method, method)
    if method not in METHODS:
        raise InvalidRequest(f"{method!r} is not a selection method; known are {', '.join(METHODS)}", field="method")
    if not examples or not all(examples):
        what = "one of them is empty" if examples else "there are none"
        raise InvalidRequest(
            f"a pool is made from examples, and {what}; give at least one token each", field="examples"
        )
    layers = METHODS[method](probe, examples, size, seed)
    return RoutingScores(layers, source=method, num_tokens=sum(map(len, examples)))


def _mean(probe: Probe, examples: Examples, _: PoolSize, __: int) -> Layers:
    return probe.mean_probabilities(examples)


def _greedy(probe: Probe, examples: Examples, size: PoolSize, _: int) -> Layers:
    """Layer by layer, each measured with the layers below pruned to what they chose from all the examples together."""
    facts, counts = probe.facts, largest_counts(size, probe.facts)
    means: list[np.ndarray] = []
    chosen: list[tuple[int, ...]] = []
    for layer, routed in enumerate(facts.routed_per_layer):
        means.append(probe.layer_probabilities(examples, chosen) if routed else np.zeros(0))
        chosen.append(pick_layer(means[-1], size, counts[layer], facts.top_k_per_layer[layer]))
    return tuple(means)


def _prefill(probe: Probe, examples: Examples, size: PoolSize, _: int) -> Layers:
    """What each example would choose for itself as a prompt, averaged: of one example, the pool of that request."""
    return _average([probe.prefill_probabilities(example, size) for example in examples], examples)


def _easy_ep(probe: Probe, examples: Examples, _: PoolSize, __: int) -> Layers:
    return probe.easy_ep(examples)


def _frequency(probe: Probe, _: Examples, __: PoolSize, ___: int) -> Layers:
    return probe.frequency()


def _predicted(source: str) -> SelectionMethod:
    def predict(probe: Probe, examples: Examples, _: PoolSize, __: int) -> Layers:
        return _average([probe.predicted(source, example).mean_LR for example in examples], examples)

    return predict


def _random(probe: Probe, _: Examples, __: PoolSize, seed: int) -> Layers:
    return random_layers(probe.facts, seed)


def random_layers(facts: RoutingFacts, seed: int) -> Layers:
    """Scores whose order is a shuffle of each layer's experts: a larger pool holds the smaller ones of the same seed.

    Numpy's legacy generator draws the same numbers in every version, and those of `torch.randperm` after
    `torch.manual_seed(seed)`, which the reference implementation used.
    """
    draw = np.random.RandomState(seed)
    layers = []
    for routed in facts.routed_per_layer:
        order = list(range(routed))
        for place in range(routed - 1):
            other = place + int(draw.randint(0, 2**32, dtype=np.uint32)) % (routed - place)
            order[place], order[other] = order[other], order[place]
        scores_R = np.empty(routed)
        scores_R[order] = np.arange(routed, 0, -1.0)
        layers.append(scores_R / max(scores_R.sum(), 1.0))
    return tuple(layers)


def _size_by_layer(probe: Probe, examples: Examples, size: PoolSize) -> PoolSize:
    """Bytes are shared out before the first layer can choose, by the probabilities with all experts."""
    if not isinstance(size, Bytes):
        return size
    return resolve_size(size, RoutingScores(probe.mean_probabilities(examples), "mean", 1), probe.facts)


def _average(layers_of: Sequence[Layers], examples: Examples) -> Layers:
    """The mean over all tokens, from each example's own."""
    weights = np.array([len(example) for example in examples], dtype=np.float64)
    weights /= weights.sum()
    return tuple(np.tensordot(weights, np.stack(layer), axes=1) for layer in zip(*layers_of, strict=True))


METHODS: dict[str, SelectionMethod] = {
    "prefill": _prefill,
    "trunk": _predicted("trunk"),
    "lexical": _predicted("lexical"),
    "fitted": _predicted("fitted"),
    "mean": _mean,
    "greedy": _greedy,
    "easy-ep": _easy_ep,
    "frequency": _frequency,
    "random": _random,
}

LAYER_BY_LAYER = frozenset({"prefill", "greedy"})  # a layer's scores depend on what the layers below it chose
RENAMED = {"fused": "prefill"}  # names of earlier versions
NOT_A_MASS = frozenset({"easy-ep", "frequency", "random"})  # these scores are no gate probabilities
