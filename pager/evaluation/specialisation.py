"""Whether experts follow domains: documents told apart by their router probabilities, and what their pools share.

Legend: N documents, E routed experts of all layers in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two documents' pools have in common over what they have together: means over pairs, domains alike."""

    same_domain: float
    cross_domain: float

    @property
    def times(self) -> float:
        return self.same_domain / max(self.cross_domain, 1e-12)


def nearest_centroid(
    known_NE: np.ndarray, known_domains: Sequence[str], asked_NE: np.ndarray, asked_domains: Sequence[str]
) -> np.ndarray:
    """bool [N]: was the nearest domain the right one? A domain is the mean of its known documents.

    The distance is Hellinger's, the natural one between probabilities: between their square roots.
    """
    names = sorted(set(known_domains))
    of_known = np.asarray(known_domains)
    centroids = np.sqrt(np.stack([known_NE[of_known == name].mean(0) for name in names]))
    distances = ((np.sqrt(asked_NE)[:, None] - centroids[None]) ** 2).sum(-1)
    nearest = np.asarray(names)[distances.argmin(1)]
    return np.asarray(nearest == np.asarray(asked_domains))


def pool_overlap(inside_NE: np.ndarray, domains: Sequence[str]) -> Overlap:
    """Of all pairs of different documents. Needs two documents of every domain, and two domains."""
    pools = inside_NE.astype(np.float32)
    shared = pools @ pools.T
    sizes = pools.sum(1)
    jaccard = shared / np.maximum(sizes[:, None] + sizes[None] - shared, 1)
    of_document = np.asarray(domains)
    members = [np.flatnonzero(of_document == name) for name in sorted(set(domains))]
    same, cross = [], []
    for number, mine in enumerate(members):
        block = jaccard[np.ix_(mine, mine)]
        same.append((block.sum() - np.trace(block)) / (len(mine) * (len(mine) - 1)))
        cross += [jaccard[np.ix_(mine, other)].mean() for other in members[number + 1 :]]
    return Overlap(float(np.mean(same)), float(np.mean(cross)))
