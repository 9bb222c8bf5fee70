"""A total number of experts shared out over the layers. Pure: numpy in, integers out.

Legend: L layers, R routed experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pager.errors import PoolTooSmall
from pager.types import Counts, RoutingFacts, RoutingScores


def share_out(scores: RoutingScores, total_experts: int, facts: RoutingFacts) -> Counts:
    """How many routed experts each layer keeps when all layers together keep `total_experts` (or all there are).

    Every layer gets what one token picks; beyond that, a layer's share of its experts is in proportion to the router
    mass of its quarter of most wanted ones: where mass lies on a few experts, missing one of them costs most. (Router
    mass left outside is a worse guide: early layers spread theirs evenly, and hardly notice.) Ties go to the smaller
    count, then to the lower layer. A larger total takes no expert away from any layer. Raises PoolTooSmall below one
    token's picks.
    """
    gains_LR = [_claim(mean_R) / (np.arange(len(mean_R)) + 0.5) for mean_R in scores.mean_LR]
    return Counts(_share_out(gains_LR, total_experts, facts))


def share_out_evenly(total_experts: int, facts: RoutingFacts) -> Counts:
    """The same total with every layer alike, as far as its number of experts allows. Raises PoolTooSmall."""
    return Counts(_share_out([np.zeros(routed) for routed in facts.routed_per_layer], total_experts, facts))


def _claim(mean_R: np.ndarray) -> float:
    """In experts: the mass of the most wanted quarter, times how many the layer has."""
    wanted = np.sort(mean_R)[::-1][: -(-len(mean_R) // 4)].sum()
    return round(len(mean_R) * float(wanted) / max(float(mean_R.sum()), 1e-300), 9)


def _share_out(gains_LR: Sequence[np.ndarray], total_experts: int, facts: RoutingFacts) -> tuple[int, ...]:
    """`gains_LR`: what a layer's n-th expert brings, descending."""
    counts = list(facts.top_k_per_layer)
    if total_experts < sum(counts):
        raise PoolTooSmall(
            f"{total_experts} routed experts in all layers together are fewer than the {sum(counts)} that the routers "
            f"pick for one token; ask for at least {sum(counts)}",
            field="pool.size",
        )
    candidates = sorted(
        (-float(gain), place, layer)
        for layer, gains_R in enumerate(gains_LR)
        for place, gain in enumerate(gains_R)
        if place >= facts.top_k_per_layer[layer]
    )
    for _, _, layer in candidates[: total_experts - sum(counts)]:
        counts[layer] += 1
    return tuple(counts)
