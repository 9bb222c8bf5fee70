"""How much of the fused pool a predicted one will hold: an estimate from what can be seen before any prefill. Pure.

Legend: N predictions, L layers, R routed experts of a layer, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pager.routing.pool import pick_layer
from pager.types import Count, ExpertPool, RoutingScores

PENALTIES = (0.1, 1.0, 10.0)
"""Of the regression, in observations: with few of them only the larger keep the estimate near their mean."""

_FLOOR = 1e-6


def recall_features(scores: RoutingScores, pool: ExpertPool) -> np.ndarray:
    """[F], all of about 1: the length of the prompt, the size of the pool, how clear the scores' cut is in every layer,
    and the scores themselves, because some kinds of text are told more easily than others. Scores that look ahead are
    also held against those of the prompt, which are nearer to what its prefill will choose.
    """
    layers = list(zip(scores.mean_LR, pool.experts, strict=True))
    by_layer_L4 = np.array([_layer_features(*layer) for layer in layers])
    share, mass, cut, _ = by_layer_L4[[len(mean_R) > 0 for mean_R, _ in layers]].mean(0)
    length, size = math.log(max(scores.num_tokens, 1)) / 4, 1 + math.log(max(share, _FLOOR)) / 2
    plain = np.array([1.0, length, size, mass, cut])
    uneven = np.concatenate([mean_R * len(mean_R) - 1 for mean_R, _ in layers])
    detail = np.concatenate([by_layer_L4[:, 1:].ravel(), uneven / math.sqrt(len(uneven))])
    parts = [np.outer(plain, plain)[np.triu_indices(len(plain))], detail, size * detail, length * detail]
    if scores.of_prompt is not None:
        parts.append(5 * _overlap(pool, pool_like(scores.of_prompt, pool)))
    return np.concatenate(parts)


def num_features(routed_per_layer: Sequence[int], looks_ahead: bool) -> int:
    """F of `recall_features`."""
    num_layers = len(routed_per_layer)
    return 15 + 3 * (3 * num_layers + sum(routed_per_layer)) + (1 + num_layers if looks_ahead else 0)


def fit_recall(features_NF: np.ndarray, recall_N: np.ndarray, penalty: float) -> np.ndarray:
    """[F]: ridge regression of what differs from the mean."""
    mean = float(recall_N.mean())
    gram_FF = features_NF.T @ features_NF + penalty * np.eye(features_NF.shape[1])
    weights_F = np.asarray(np.linalg.solve(gram_FF, features_NF.T @ (recall_N - mean)))
    weights_F[0] += mean  # the first feature is 1
    return weights_F


def pool_like(scores: RoutingScores, pool: ExpertPool) -> ExpertPool:
    """What the scores pick, of the same sizes as `pool`."""
    layers = zip(scores.mean_LR, pool.experts, strict=True)
    return ExpertPool(tuple(pick_layer(mean_R, Count(len(experts)), len(experts), 0) for mean_R, experts in layers))


def expected_recall(weights_F: np.ndarray, scores: RoutingScores, pool: ExpertPool) -> float:
    return float(np.clip(recall_features(scores, pool) @ weights_F, 0.0, 1.0))


def _layer_features(mean_R: np.ndarray, experts: Sequence[int]) -> tuple[float, float, float, float]:
    """Share of experts, share of mass, by what factor scores fall across the cut, how far they are from even."""
    count, routed = len(experts), len(mean_R)
    if not routed:
        return 0.0, 0.0, 0.0, 0.0
    order_R = np.maximum(np.sort(mean_R)[::-1], _FLOOR)
    high, low = order_R[count // 2], order_R[min(routed - 1, count + count // 2)]
    spread = math.log(routed) + float((order_R * np.log(order_R)).sum())
    return count / routed, float(mean_R[list(experts)].sum()), math.log(high / low), spread


def _overlap(pool: ExpertPool, other: ExpertPool) -> np.ndarray:
    """[1 + L]: the share of `pool` that is in `other`, on the whole and by layer."""
    shares = [
        len(set(ours) & set(theirs)) / max(len(ours), 1)
        for ours, theirs in zip(pool.experts, other.experts, strict=True)
    ]
    return np.array([pool.recall_of(other), *shares])
