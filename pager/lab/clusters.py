"""Clusters of tokens by how a model routes them, and whether experts follow domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.decomposition import PCA

from pager.errors import InvalidRequest
from pager.types import RoutingFacts


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


COMPONENTS = 64
MAX_FITTED = 40_000
MAX_FAMILIES = 8


@dataclass(frozen=True, slots=True)
class TokenClusters:
    """Clusters are numbered by size, the largest 0.

    `label_T` is each token's cluster, `closeness_T` its cosine to that cluster's centre, `family_K` groups clusters
    whose centres are near, `explained` is the share of variance that the kept components hold, and `num_fitted` says
    how many of the tokens the centres were fitted to.
    """

    label_T: np.ndarray
    closeness_T: np.ndarray
    family_K: np.ndarray
    explained: float
    num_fitted: int

    @property
    def num_clusters(self) -> int:
        return len(self.family_K)


def cluster_tokens(probs_TC: np.ndarray, num_clusters: int, seed: int) -> TokenClusters:
    """PCA, then spherical k-means: rows of length one, centres too. The same for the same seed.

    Raises InvalidRequest for fewer tokens than clusters.
    """
    num_tokens = len(probs_TC)
    if num_tokens < num_clusters:
        raise InvalidRequest(
            f"{num_tokens} tokens cannot make {num_clusters} clusters; give more documents or ask for fewer clusters",
            field="clusters",
        )
    random = np.random.default_rng(seed)
    fitted = np.sort(random.permutation(num_tokens)[:MAX_FITTED])
    pca = PCA(min(COMPONENTS, probs_TC.shape[1], len(fitted)), svd_solver="covariance_eigh")
    pca.fit(probs_TC[fitted])
    points_TP = unit_rows(pca.transform(probs_TC))
    means = KMeans(num_clusters, n_init=3, random_state=seed).fit(points_TP[fitted])
    centres_KP = unit_rows(means.cluster_centers_)
    cosine_TK = points_TP @ centres_KP.T
    found_T = cosine_TK.argmax(1)
    order_K = np.argsort(-np.bincount(found_T, minlength=num_clusters), kind="stable")
    return TokenClusters(
        label_T=np.argsort(order_K)[found_T],
        closeness_T=cosine_TK.max(1),
        family_K=_families(centres_KP[order_K]),
        explained=float(pca.explained_variance_ratio_.sum()),
        num_fitted=len(fitted),
    )


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Each row divided by its length; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    units: np.ndarray = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return units


def _families(centres_KP: np.ndarray) -> np.ndarray:
    """[K]: which centres are near one another. Families are numbered in the order of their largest clusters."""
    if len(centres_KP) < 2:
        return np.zeros(len(centres_KP), dtype=int)
    grouping = AgglomerativeClustering(min(MAX_FAMILIES, len(centres_KP)), linkage="ward")
    found_K = grouping.fit_predict(centres_KP)
    _, first, inverse = np.unique(found_K, return_index=True, return_inverse=True)
    family_K: np.ndarray = np.argsort(np.argsort(first))[inverse]
    return family_K


def counts_of(label_T: np.ndarray, kind_T: np.ndarray, num_clusters: int, num_kinds: int) -> np.ndarray:
    """[K, kinds] int64: how many of a cluster's tokens are of each kind (a domain, a piece of text)."""
    counts = np.bincount(label_T * num_kinds + kind_T, minlength=num_clusters * num_kinds)
    return counts.reshape(num_clusters, num_kinds)


def concentration(count_KX: np.ndarray, largest: int) -> float:
    """The share of all tokens that are among the `largest` most frequent kinds of their own cluster, 0 to 1."""
    top_KX = -np.sort(-count_KX, axis=1)[:, :largest]
    return float(top_KX.sum() / max(1, count_KX.sum()))


@dataclass(frozen=True, slots=True)
class LayerCoverage:
    """One layer. Rows are domains, columns its routed experts.

    `held_DR`: the share of a domain's documents whose pool holds the expert. `mass_DR`: the expert's share of the
    gate probability over the domain's tokens. `overlap_same` and `overlap_other`: of two documents' pools, the share
    that both hold, for documents of one domain and of two; NaN where there is no such pair.
    """

    layer: int
    pool: int
    held_DR: np.ndarray
    mass_DR: np.ndarray
    overlap_same: float
    overlap_other: float


def coverage(
    probs_NTC: Sequence[np.ndarray], domain_N: np.ndarray, num_domains: int, facts: RoutingFacts, share: float = 0.125
) -> tuple[LayerCoverage, ...]:
    """Every sparse layer. A document's pool: its experts of the largest gate probability over its tokens.

    `share` is of all experts of a layer, shared ones included, but a pool never has fewer than a token picks. The
    probabilities are of an unrestricted forward in every layer.
    """
    sums_NC = np.stack([probs_TC.sum(0, dtype=np.float64) for probs_TC in probs_NTC])
    layers = [layer for layer, routed in enumerate(facts.routed_per_layer) if routed]
    edges = np.cumsum([0, *(facts.routed_per_layer[layer] for layer in layers)])
    found = []
    for layer, (start, end) in zip(layers, pairwise(edges), strict=True):
        kept = int(share * facts.experts_per_layer[layer]) - facts.shared_per_layer[layer]
        pool = max(kept, facts.top_k_per_layer[layer])
        found.append(_layer_coverage(layer, sums_NC[:, start:end], pool, domain_N, num_domains))
    return tuple(found)


def _layer_coverage(
    layer: int, sums_NR: np.ndarray, pool: int, domain_N: np.ndarray, num_domains: int
) -> LayerCoverage:
    order_NR = np.argsort(-sums_NR, axis=1, kind="stable")  # ties go to the lower id, as in a pool
    held_NR = np.zeros_like(sums_NR)
    np.put_along_axis(held_NR, order_NR[:, :pool], 1.0, axis=1)
    member_DN = np.eye(num_domains)[:, domain_N]
    mass_DR = member_DN @ sums_NR
    both_NN = held_NR @ held_NR.T / pool
    same_NN = member_DN.T @ member_DN > 0
    pair_NN = ~np.eye(len(sums_NR), dtype=bool)
    return LayerCoverage(
        layer=layer,
        pool=pool,
        held_DR=member_DN @ held_NR / member_DN.sum(1, keepdims=True).clip(1),
        mass_DR=mass_DR / mass_DR.sum(1, keepdims=True).clip(1e-12),
        overlap_same=_mean(both_NN[same_NN & pair_NN]),
        overlap_other=_mean(both_NN[~same_NN]),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
