"""How a model routes the tokens of documents: traces, clusters of tokens, and whether experts follow domains.

Legend: T tokens, L layers, R routed experts of a layer, C columns: the routed experts of all layers side by side,
K clusters, D domains, N documents, P components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.decomposition import PCA
from tokenizers import Tokenizer
from torch import Tensor

from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import InvalidRequest
from pager.lab.corpus import Document, tokenizer_of
from pager.lab.recording import Ids, recording, run_document
from pager.memory.plan import Budgets
from pager.tokenizing import encode
from pager.types import RoutingFacts

COMPONENTS = 64
MAX_FITTED = 40_000
MAX_FAMILIES = 8


@dataclass(frozen=True, slots=True)
class TokenClusters:
    """The clusters of tokens, numbered by size, the largest 0.

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
    """Groups tokens by PCA and spherical k-means: rows and centres of length one. The same for the same seed.

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
    """The family of each cluster, [K]: their centres are near one another. Numbered by their largest clusters."""
    if len(centres_KP) < 2:
        return np.zeros(len(centres_KP), dtype=int)
    grouping = AgglomerativeClustering(min(MAX_FAMILIES, len(centres_KP)), linkage="ward")
    found_K = grouping.fit_predict(centres_KP)
    _, first, inverse = np.unique(found_K, return_index=True, return_inverse=True)
    family_K: np.ndarray = np.argsort(np.argsort(first))[inverse]
    return family_K


def counts_of(label_T: np.ndarray, kind_T: np.ndarray, num_clusters: int, num_kinds: int) -> np.ndarray:
    """The number of a cluster's tokens of each kind (a domain, a piece of text): [K, kinds] int64."""
    counts = np.bincount(label_T * num_kinds + kind_T, minlength=num_clusters * num_kinds)
    return counts.reshape(num_clusters, num_kinds)


def concentration(count_KX: np.ndarray, largest: int) -> float:
    """The share of all tokens that are among the `largest` most frequent kinds of their own cluster, 0 to 1."""
    top_KX = -np.sort(-count_KX, axis=1)[:, :largest]
    return float(top_KX.sum() / max(1, count_KX.sum()))


@dataclass(frozen=True, slots=True)
class LayerCoverage:
    """The experts of one layer by domain. Rows are domains, columns its routed experts.

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
    """The coverage of every sparse layer. A document's pool is its experts of the largest gate probability.

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


# --- documents, traced ------------------------------------------------------------------------------------------------


LENGTH_STEP = 64
"""Documents are padded to a multiple of this: half precision on a CPU compiles and keeps kernels for every length."""


@dataclass(frozen=True, slots=True)
class TracedDocument:
    """A document's first tokens and how they are routed.

    `pieces` joined are its text to there; `probs_TC` is float32, each layer sums to 1.
    """

    domain: str
    name: str
    pieces: tuple[str, ...]
    probs_TC: np.ndarray


class GateTracer:
    """Runs documents through a model with all its experts and keeps the gates' probabilities. One at a time."""

    def __init__(self, paged: PagedModel, tokenizer: Tokenizer) -> None:
        self._paged = paged
        self._tokenizer = tokenizer
        self.max_tokens = int(paged.config.max_position_embeddings)

    def trace(self, document: Document, max_tokens: int) -> TracedDocument:
        """Traces the first tokens, as many as the model's context holds. Raises InvalidRequest, ExpertUnavailable."""
        encoding = encode(self._tokenizer, document.text, add_special_tokens=False)
        ids = tuple(encoding.ids[: min(max_tokens, self.max_tokens)])
        if not ids:
            raise InvalidRequest(f"document {document.name!r} of {document.domain} has no tokens; leave it out")
        pieces = tuple(text_pieces(document.text, encoding.offsets[: len(ids)]))
        return TracedDocument(document.domain, document.name, pieces, self.probabilities(ids))

    def probabilities(self, token_ids: Ids) -> np.ndarray:
        """The gates' probabilities over the routed experts, the layers side by side: [T, C] float32."""
        probs_LTR: dict[int, np.ndarray] = {}

        def keep(layer: int, probs_TR: Tensor, _: Tensor) -> None:
            probs_LTR[layer] = probs_TR[: len(token_ids)].cpu().numpy()

        # No token of the text looks at the padding behind it.
        num_padding = min(-len(token_ids) % LENGTH_STEP, self.max_tokens - len(token_ids))
        with recording(self._paged, keep):
            run_document(self._paged, token_ids, num_padding=num_padding)
        return np.concatenate([probs_LTR[layer] for layer in sorted(probs_LTR)], axis=1)


def trace_documents(
    model: Path, documents: Sequence[Document], max_tokens: int, *, device: str, dtype: str | None, budgets: Budgets
) -> tuple[RoutingFacts, list[TracedDocument]]:
    """Loads a checkpoint and traces each document: its facts and the traces. Raises PagerError."""
    tokenizer = tokenizer_of(model)
    paged = load_paged_model(model, device=device, dtype=dtype, budgets=budgets)
    try:
        tracer = GateTracer(paged, tokenizer)
        return paged.facts, [tracer.trace(document, max_tokens) for document in documents]
    finally:
        paged.close()


def text_pieces(text: str, offsets: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Yields the text between the ends of neighbouring tokens: joined, it is the text again.

    A token may be a part of a character; the character then belongs to its first token, and the others are empty.
    """
    starts = accumulate((end for _, end in offsets), max, initial=0)
    for start, (_, end) in zip(starts, offsets, strict=False):
        yield text[start : max(start, end)]
