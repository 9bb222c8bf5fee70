"""The report of how a model, or two, route tokens, as one HTML page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from pager.errors import InvalidRequest
from pager.lab.clusters import (
    COMPONENTS,
    LayerCoverage,
    TokenClusters,
    TracedDocument,
    cluster_tokens,
    concentration,
    counts_of,
    coverage,
)
from pager.types import RoutingFacts

TYPICAL_TOKENS = 24
COMMON_TOKENS = 10
EXAMPLES = 16
EXAMPLES_A_DOCUMENT = 2
EXAMPLES_A_PIECE = 2


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model's view of the documents. `domain_share`: tokens in the main domain of their cluster; `word_share`:
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
    """The figures of a report, for scripts."""
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
    """One model as JSON for the page: counts over all documents, texts of the documents `shown` only."""
    return {
        "name": report.name,
        "tokens": report.num_tokens,
        "domainShare": round(report.domain_share, 4),
        "wordShare": round(report.word_share, 4),
        **_shown_documents(report, shown),
        "coverage": [_coverage_payload(layer) for layer in report.coverage],
    }


def _shown_documents(report: ModelReport, shown: Sequence[int]) -> dict[str, Any]:
    """The documents that the page shows, their pieces renumbered: the page gets no others."""
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
    """The pieces that set a cluster's text apart from all text most: (piece, times here, times anywhere)."""
    here_W = np.bincount(report.piece_T[mine_T], minlength=len(common_W))
    share_W = here_W / max(1, len(mine_T))
    gain_W = share_W * np.log(np.maximum(share_W, 1e-12) / (common_W / common_W.sum()))
    best = np.argsort(-gain_W, kind="stable")[: 2 * TYPICAL_TOKENS].tolist()
    kept = [piece for piece in best if here_W[piece] and report.pieces[piece]]
    return [(piece, int(here_W[piece]), int(common_W[piece])) for piece in kept[:TYPICAL_TOKENS]]


def _examples(report: ModelReport, mine_T: np.ndarray, shown: Sequence[int], starts: np.ndarray) -> list[list[int]]:
    """A cluster's tokens, nearest to its centre first, as [document as shown, token]: few of a document or a piece."""
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
    """One layer as JSON: shares of documents in percent, of gate probability in hundredths of a percent."""
    return {
        "layer": layer.layer,
        "pool": layer.pool,
        "same": _figure(layer.overlap_same),
        "other": _figure(layer.overlap_other),
        "held": np.rint(layer.held_DR * 100).astype(int).tolist(),
        "mass": np.rint(layer.mass_DR * 10_000).astype(int).tolist(),
    }


def _figure(value: float) -> float | None:
    """A rounded number, or None for NaN, which JSON does not have."""
    return None if np.isnan(value) else round(value, 4)


MAX_PAGE_BYTES = 5_000_000
LONGEST_NAME = 90


def build_page(reports: Sequence[ModelReport], seed: int, max_tokens: int) -> str:
    """The page for one model, or for two of the same documents. At most MAX_PAGE_BYTES in UTF-8.

    It shows every document if they fit, else as many of each domain as do, and says so. Raises InvalidRequest when
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
    """The command that writes a domain's experts as a checkpoint of their own."""
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
    """The hash by which the page's content security policy admits its own script and style, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def embed_json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    # A lone surrogate cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")
