"""Clusters of tokens by routing: traces of documents, their clusters, how experts follow domains, and the report of it.

Legend: T tokens, L layers, R routed experts of a layer, C columns: the routed experts of all layers side by side,
K clusters, D domains, N documents, P components.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate, pairwise
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.decomposition import PCA
from tokenizers import Tokenizer
from torch import Tensor

from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import InvalidRequest
from pager.lab.corpus import Document, tokenizer_of
from pager.lab.recording import Ids, recording, run_document
from pager.memory import Budgets
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
    """Returns each row divided by its length; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    units: np.ndarray = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return units


def _families(centres_KP: np.ndarray) -> np.ndarray:
    """Returns the family of each cluster, [K]: clusters with near centres. Numbered by their largest clusters."""
    if len(centres_KP) < 2:
        return np.zeros(len(centres_KP), dtype=int)
    grouping = AgglomerativeClustering(min(MAX_FAMILIES, len(centres_KP)), linkage="ward")
    found_K = grouping.fit_predict(centres_KP)
    _, first, inverse = np.unique(found_K, return_index=True, return_inverse=True)
    family_K: np.ndarray = np.argsort(np.argsort(first))[inverse]
    return family_K


def counts_of(label_T: np.ndarray, kind_T: np.ndarray, num_clusters: int, num_kinds: int) -> np.ndarray:
    """Returns the number of a cluster's tokens of each kind (a domain, a piece of text): [K, kinds] int64."""
    counts = np.bincount(label_T * num_kinds + kind_T, minlength=num_clusters * num_kinds)
    return counts.reshape(num_clusters, num_kinds)


def concentration(count_KX: np.ndarray, largest: int) -> float:
    """Returns the share of all tokens that are among the `largest` most frequent kinds of their own cluster, 0 to 1."""
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
    """Computes the coverage of every sparse layer. A document's pool is its experts of the largest gate probability.

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


# --- traces of documents ----------------------------------------------------------------------------------------------


LENGTH_STEP = 64
"""Documents are padded to a multiple of this: half precision on a CPU compiles and keeps kernels for every length."""


@dataclass(frozen=True, slots=True)
class TracedDocument:
    """A document's first tokens and their routing.

    `pieces` joined are its text up to there; `probs_TC` is float32, each layer sums to 1.
    """

    domain: str
    name: str
    pieces: tuple[str, ...]
    probs_TC: np.ndarray


class GateTracer:
    """Runs documents through a model with all its experts and records the gates' probabilities. One at a time."""

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
        """Returns the gates' probabilities over the routed experts, the layers side by side: [T, C] float32."""
        probs_LTR: dict[int, np.ndarray] = {}

        def keep(layer: int, probs_TR: Tensor, _: Tensor) -> None:
            probs_LTR[layer] = probs_TR[: len(token_ids)].cpu().numpy()

        # No token of the text attends to the padding behind it.
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
    """Yields the text between the ends of neighbouring tokens; joined, it is the whole text.

    A token may be a part of a character; the character then belongs to its first token, and the others are empty.
    """
    starts = accumulate((end for _, end in offsets), max, initial=0)
    for start, (_, end) in zip(starts, offsets, strict=False):
        yield text[start : max(start, end)]


# --- the report -------------------------------------------------------------------------------------------------------


TYPICAL_TOKENS = 24
COMMON_TOKENS = 10
EXAMPLES = 16
EXAMPLES_A_DOCUMENT = 2
EXAMPLES_A_PIECE = 2


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model's report on the documents. `domain_share`: tokens in the main domain of their cluster; `word_share`:
    tokens among the ten commonest of their cluster; both shares of all tokens, 0 to 1.
    """

    name: str
    facts: RoutingFacts
    documents: tuple[TracedDocument, ...]
    domains: tuple[str, ...]
    clusters: TokenClusters
    coverage: tuple[LayerCoverage, ...]
    piece_T: np.ndarray
    pieces: tuple[str, ...]
    domain_T: np.ndarray
    domain_share: float
    word_share: float

    @property
    def num_tokens(self) -> int:
        return len(self.piece_T)


def make_report(
    name: str, facts: RoutingFacts, documents: Sequence[TracedDocument], num_clusters: int, seed: int
) -> ModelReport:
    """Groups the tokens of traced documents. Raises InvalidRequest for fewer tokens than clusters."""
    domains = tuple(sorted({document.domain for document in documents}))
    domain_N = np.array([domains.index(document.domain) for document in documents])
    domain_T = domain_N.repeat([len(document.pieces) for document in documents])
    clusters = cluster_tokens(np.concatenate([document.probs_TC for document in documents]), num_clusters, seed)
    number_of: dict[str, int] = {}
    texts = (piece for document in documents for piece in document.pieces)
    piece_T = np.array([number_of.setdefault(text, len(number_of)) for text in texts])
    by_domain_KD = counts_of(clusters.label_T, domain_T, num_clusters, len(domains))
    by_piece_KW = counts_of(clusters.label_T, piece_T, num_clusters, len(number_of))
    return ModelReport(
        name=name,
        facts=facts,
        documents=tuple(documents),
        domains=domains,
        clusters=clusters,
        coverage=coverage([document.probs_TC for document in documents], domain_N, len(domains), facts),
        piece_T=piece_T,
        pieces=tuple(number_of),
        domain_T=domain_T,
        domain_share=concentration(by_domain_KD, 1),
        word_share=concentration(by_piece_KW, COMMON_TOKENS),
    )


def summary(report: ModelReport) -> dict[str, Any]:
    """Returns the figures of a report, for scripts."""
    return {
        "model": report.name,
        "documents": len(report.documents),
        "tokens": report.num_tokens,
        "clusters": report.clusters.num_clusters,
        "variance_kept": round(report.clusters.explained, 4),
        "tokens_in_main_domain_of_cluster": round(report.domain_share, 4),
        "tokens_in_ten_commonest_of_cluster": round(report.word_share, 4),
        "pool_overlap": [
            {
                "layer": layer.layer,
                "pool": layer.pool,
                "same_domain": _figure(layer.overlap_same),
                "other_domain": _figure(layer.overlap_other),
            }
            for layer in report.coverage
        ],
    }


def model_payload(report: ModelReport, shown: Sequence[int]) -> dict[str, Any]:
    """Returns one model as JSON for the page: counts over all documents, texts of the documents `shown` only."""
    return {
        "name": report.name,
        "tokens": report.num_tokens,
        "domainShare": round(report.domain_share, 4),
        "wordShare": round(report.word_share, 4),
        **_shown_documents(report, shown),
        "coverage": [_coverage_payload(layer) for layer in report.coverage],
    }


def _shown_documents(report: ModelReport, shown: Sequence[int]) -> dict[str, Any]:
    """Returns the documents that the page shows, with their pieces renumbered: the page gets no others."""
    number_of: dict[int, int] = {}
    starts = np.cumsum([0, *(len(document.pieces) for document in report.documents)])
    documents = []
    for index in shown:
        span = slice(starts[index], starts[index + 1])
        documents.append(
            {
                "pieces": [number_of.setdefault(piece, len(number_of)) for piece in report.piece_T[span].tolist()],
                "clusters": report.clusters.label_T[span].tolist(),
            }
        )
    common_W = np.bincount(report.piece_T)
    clusters = [
        _cluster_payload(report, number, common_W, number_of, shown, starts)
        for number in range(report.clusters.num_clusters)
    ]
    return {"documents": documents, "clusters": clusters, "pieces": [report.pieces[piece] for piece in number_of]}


def _cluster_payload(
    report: ModelReport,
    number: int,
    common_W: np.ndarray,
    number_of: dict[int, int],
    shown: Sequence[int],
    starts: np.ndarray,
) -> dict[str, Any]:
    mine_T = np.flatnonzero(report.clusters.label_T == number)
    domains = Counter(report.domain_T[mine_T].tolist()).most_common()
    typical = _typical(report, mine_T, common_W)
    return {
        "size": len(mine_T),
        "family": int(report.clusters.family_K[number]),
        "domains": [list(pair) for pair in domains],
        "typical": [[number_of.setdefault(piece, len(number_of)), size, all_] for piece, size, all_ in typical],
        "examples": _examples(report, mine_T, shown, starts),
    }


def _typical(report: ModelReport, mine_T: np.ndarray, common_W: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns the pieces that set a cluster's text apart from all text most: (piece, times here, times anywhere)."""
    here_W = np.bincount(report.piece_T[mine_T], minlength=len(common_W))
    share_W = here_W / max(1, len(mine_T))
    gain_W = share_W * np.log(np.maximum(share_W, 1e-12) / (common_W / common_W.sum()))
    best = np.argsort(-gain_W, kind="stable")[: 2 * TYPICAL_TOKENS].tolist()
    kept = [piece for piece in best if here_W[piece] and report.pieces[piece]]
    return [(piece, int(here_W[piece]), int(common_W[piece])) for piece in kept[:TYPICAL_TOKENS]]


def _examples(report: ModelReport, mine_T: np.ndarray, shown: Sequence[int], starts: np.ndarray) -> list[list[int]]:
    """Returns a cluster's tokens, nearest to its centre first, as [document as shown, token]: few of a document or a
    piece.
    """
    place_of = {document: place for place, document in enumerate(shown)}
    found: list[list[int]] = []
    documents: Counter[int] = Counter()
    pieces: Counter[int] = Counter()
    for token in mine_T[np.argsort(-report.clusters.closeness_T[mine_T], kind="stable")].tolist():
        document = int(np.searchsorted(starts, token, side="right")) - 1
        piece = int(report.piece_T[token])
        if document not in place_of or not report.pieces[piece].strip():
            continue
        if documents[document] == EXAMPLES_A_DOCUMENT or pieces[piece] == EXAMPLES_A_PIECE:
            continue
        documents[document] += 1
        pieces[piece] += 1
        found.append([place_of[document], token - int(starts[document])])
        if len(found) == EXAMPLES:
            break
    return found


def _coverage_payload(layer: LayerCoverage) -> dict[str, Any]:
    """Returns one layer as JSON: shares of documents in percent, of gate probability in hundredths of a percent."""
    return {
        "layer": layer.layer,
        "pool": layer.pool,
        "same": _figure(layer.overlap_same),
        "other": _figure(layer.overlap_other),
        "held": np.rint(layer.held_DR * 100).astype(int).tolist(),
        "mass": np.rint(layer.mass_DR * 10_000).astype(int).tolist(),
    }


def _figure(value: float) -> float | None:
    """Returns a rounded number, or None for NaN, which JSON does not have."""
    return None if np.isnan(value) else round(value, 4)


MAX_PAGE_BYTES = 5_000_000
LONGEST_NAME = 90


def build_page(reports: Sequence[ModelReport], seed: int, max_tokens: int) -> str:
    """Builds the page for one model, or for two of the same documents. At most MAX_PAGE_BYTES in UTF-8.

    It shows every document if they fit, else as many of each domain as do, and states that. Raises InvalidRequest when
    even one of each does not fit.
    """
    names = _names(reports)
    all_per_domain = max(_documents_of(reports[0]).values())
    for per_domain in _halvings(all_per_domain):
        shown = _first_of_each(reports[0], per_domain)
        payload = _payload(reports, shown, seed, max_tokens)
        page = _render(" and ".join(names), payload)
        if len(page.encode()) <= MAX_PAGE_BYTES:
            return page
    raise InvalidRequest(
        f"the page would be larger than {MAX_PAGE_BYTES / 1e6:g} MB with a single document of each domain; give fewer "
        "files, or fewer tokens a document"
    )


def _halvings(number: int) -> list[int]:
    return [number >> shift for shift in range(number.bit_length())]


def _names(reports: Sequence[ModelReport]) -> list[str]:
    return [report.name for report in reports]


def _documents_of(report: ModelReport) -> dict[str, int]:
    return {domain: sum(document.domain == domain for document in report.documents) for domain in report.domains}


def _first_of_each(report: ModelReport, per_domain: int) -> list[int]:
    seen = dict.fromkeys(report.domains, 0)
    shown = []
    for index, document in enumerate(report.documents):
        if seen[document.domain] < per_domain:
            seen[document.domain] += 1
            shown.append(index)
    return shown


def _payload(reports: Sequence[ModelReport], shown: Sequence[int], seed: int, max_tokens: int) -> dict[str, Any]:
    first = reports[0]
    documents = [first.documents[index] for index in shown]
    return {
        "lede": _lede(reports),
        "method": _method(reports, len(shown), seed, max_tokens),
        "domains": list(first.domains),
        "documentsOf": list(_documents_of(first).values()),
        "documents": [
            {"domain": first.domains.index(document.domain), "name": _shorten(document.name)} for document in documents
        ],
        "models": [model_payload(report, shown) for report in reports],
    }


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _lede(reports: Sequence[ModelReport]) -> str:
    first = reports[0]
    tokens = " and ".join(f"{number:,}" for number in sorted({report.num_tokens for report in reports}))
    what = f"{tokens} tokens of {len(first.documents)} documents from {len(first.domains)} domains"
    if len(reports) > 1:
        return f"{what}. Each model groups them by the experts that its gates would send them to."
    return f"{what}, grouped by the experts that the gates of all layers would send them to."


def _method(reports: Sequence[ModelReport], num_shown: int, seed: int, max_tokens: int) -> list[list[str]]:
    first = reports[0]
    counts = _documents_of(first).values()
    each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    fitted = "; ".join(
        f"{report.name}: {sum(report.facts.routed_per_layer):,} probabilities a token, {report.clusters.explained:.0%} "
        f"of the variance kept, centres fitted to {report.clusters.num_fitted:,} of {report.num_tokens:,} tokens"
        for report in reports
    )
    shown = "all of them" if num_shown == len(first.documents) else f"{num_shown} of them, the first of each domain"
    return [
        ["Sampling", f"{each} documents of each domain, drawn at random (seed {seed}), each cut at its first "
         f"{max_tokens} tokens. Figures count all {len(first.documents)} documents; the page holds the text of "
         f"{shown}."],
        ["Routing", "A forward with every expert allowed. A token is described by its gate probabilities over the "
         "routed experts of each layer, the layers side by side; shared experts, which every token uses, are left "
         "out."],
        ["Clusters", f"PCA to at most {COMPONENTS} components, then spherical k-means (rows and centres of length "
         f"one). {fitted}. Clusters are numbered by size; a hue stands for clusters whose centres are near."],
        ["Typical tokens", "Those that set the text of a cluster apart most: frequent in it, and more so than "
         "elsewhere. ␣ is a space, ⏎ the end of a line, ⇥ a tab."],
        ["Experts", "The pool of a document is the eighth of the experts of a layer (shared ones included, and never "
         "fewer than a token picks) with the most gate probability over its tokens. A cell says how many documents "
         "of a domain have the expert in their pool, or what share of the gate probability of the domain it gets."],
        ["Slices", "The experts of one domain can be a model of their own, chosen by up to a hundred of its "
         f"documents: {slice_line('MODEL')}"],
    ]  # fmt: skip


def slice_line(model: str) -> str:
    """Returns the command that writes a domain's experts as a checkpoint of their own."""
    return f"expert-pager slice {shlex.quote(model)} OUT --examples FILE --size 12.5%"


def _render(names: str, payload: dict[str, Any]) -> str:
    style, script = _part("page.css"), _part("page.js")
    return Template(_part("page.html")).substitute(
        title=html.escape(f"How {names} route{'' if len(payload['models']) > 1 else 's'} tokens"),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=embed_json(payload),
    )


def _part(name: str) -> str:
    return resources.files("pager.lab").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Returns the hash by which the page's content security policy admits its own script and style, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def embed_json(value: Any) -> str:
    """Returns JSON that can stand inside a script element: nothing in it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    # A lone surrogate cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")
