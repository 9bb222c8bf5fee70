"""From traced documents to what the page shows: clusters with their tokens, documents by cluster, experts by domain.

Legend: T tokens of all documents, K clusters, D domains, W distinct pieces of text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pager.evaluation.clusters import LayerCoverage, TokenClusters, cluster_tokens, concentration, counts_of, coverage
from pager.evaluation.traces import TracedDocument
from pager.types import RoutingFacts

TYPICAL_TOKENS = 24
COMMON_TOKENS = 10
EXAMPLES = 16
EXAMPLES_A_DOCUMENT = 2
EXAMPLES_A_PIECE = 2


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model's view of the documents. `domain_share`: tokens in the main domain of their cluster; `word_share`:
    tokens among the ten commonest of their cluster; both shares of all tokens, 0 to 1."""

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
    """Raises InvalidRequest for fewer tokens than clusters."""
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
    """JSON for the page: everything counted over all documents, texts of the documents `shown` only."""
    return {
        "name": report.name,
        "tokens": report.num_tokens,
        "domainShare": round(report.domain_share, 4),
        "wordShare": round(report.word_share, 4),
        **_shown_documents(report, shown),
        "coverage": [_coverage_payload(layer) for layer in report.coverage],
    }


def _shown_documents(report: ModelReport, shown: Sequence[int]) -> dict[str, Any]:
    """Pieces are renumbered: the page gets only those that it shows."""
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
    """(piece, times here, times anywhere): what adds most to the divergence of this cluster's text from all text."""
    here_W = np.bincount(report.piece_T[mine_T], minlength=len(common_W))
    share_W = here_W / max(1, len(mine_T))
    gain_W = share_W * np.log(np.maximum(share_W, 1e-12) / (common_W / common_W.sum()))
    best = np.argsort(-gain_W, kind="stable")[: 2 * TYPICAL_TOKENS].tolist()
    kept = [piece for piece in best if here_W[piece] and report.pieces[piece]]
    return [(piece, int(here_W[piece]), int(common_W[piece])) for piece in kept[:TYPICAL_TOKENS]]


def _examples(report: ModelReport, mine_T: np.ndarray, shown: Sequence[int], starts: np.ndarray) -> list[list[int]]:
    """[document as shown, token]: nearest to the centre first, a few at most of one document or one piece of text."""
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
    """Shares of documents in percent, of router probability in hundredths of a percent."""
    return {
        "layer": layer.layer,
        "pool": layer.pool,
        "same": _figure(layer.overlap_same),
        "other": _figure(layer.overlap_other),
        "held": np.rint(layer.held_DR * 100).astype(int).tolist(),
        "mass": np.rint(layer.mass_DR * 10_000).astype(int).tolist(),
    }


def _figure(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else round(value, 4)
