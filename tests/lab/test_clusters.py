"""Clusters and coverage of gate probabilities made by hand, and the documents they come from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pager.errors import InvalidRequest
from pager.lab.clusters import cluster_tokens, concentration, counts_of, coverage, text_pieces, unit_rows
from pager.lab.corpus import Document, sample_documents
from pager.types import RoutingFacts

FACTS = RoutingFacts(experts_per_layer=(9, 0, 17), shared_per_layer=(1, 0, 1), top_k_per_layer=(2, 0, 3))
COLUMNS = 8 + 16


def peaked(experts: list[int], num_tokens: int, seed: int = 0) -> np.ndarray:
    """[T, 24] probabilities that lie on these columns, with some noise; each layer sums to 1."""
    probs_TC = np.random.default_rng(seed).random((num_tokens, COLUMNS)) * 0.05
    probs_TC[:, experts] += 1.0
    for columns in (slice(0, 8), slice(8, 24)):
        probs_TC[:, columns] /= probs_TC[:, columns].sum(1, keepdims=True)
    return probs_TC.astype(np.float32)


# --- clusters -------------------------------------------------------------------------------------------------------


def test_tokens_routed_alike_are_one_cluster_and_the_largest_comes_first() -> None:
    kinds = [peaked([0, 9], 50, 1), peaked([3, 12], 200, 2), peaked([7, 23], 100, 3)]
    found = cluster_tokens(np.concatenate(kinds), 3, seed=0)
    parts = np.split(found.label_T, [50, 250])
    assert [np.unique(part).tolist() for part in parts] == [[2], [0], [1]]
    assert found.closeness_T.min() > 0.9
    assert found.num_clusters == 3
    assert found.num_fitted == 350
    assert 0.9 < found.explained <= 1.0


def test_the_same_seed_gives_the_same_clusters() -> None:
    probs_TC = np.random.default_rng(5).dirichlet(np.ones(COLUMNS), 300).astype(np.float32)
    first, second = (cluster_tokens(probs_TC, 8, seed=3) for _ in range(2))
    assert (first.label_T == second.label_T).all()
    assert (first.family_K == second.family_K).all()


def test_near_clusters_are_a_family() -> None:
    # Nine groups: eight families hold them only if the two that share three of four columns are together.
    groups = [[n, 8 + 2 * n] for n in range(7)] + [[7, 22, 23], [7, 21, 22, 23]]
    found = cluster_tokens(np.concatenate([peaked(group, 40, n) for n, group in enumerate(groups)]), 9, seed=0)
    family_of = [int(found.family_K[found.label_T[40 * n]]) for n in range(9)]
    assert family_of[7] == family_of[8]
    assert sorted(set(family_of)) == list(range(8))


def test_fewer_tokens_than_clusters_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="5 tokens cannot make 6 clusters"):
        cluster_tokens(peaked([0, 9], 5), 6, seed=0)


def test_a_row_of_zeros_has_no_direction() -> None:
    assert unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0.6, 0.8], [0.0, 0.0]]


def test_concentration_counts_the_commonest_kinds_of_each_cluster() -> None:
    counts_KX = counts_of(np.array([0, 0, 0, 1, 1]), np.array([2, 2, 0, 1, 2]), 2, 3)
    assert counts_KX.tolist() == [[1, 0, 2], [0, 1, 1]]
    assert concentration(counts_KX, 1) == pytest.approx(3 / 5)
    assert concentration(counts_KX, 2) == 1.0


# --- coverage -------------------------------------------------------------------------------------------------------


def test_domains_with_experts_of_their_own_share_no_pool() -> None:
    documents = [peaked([0, 1, 8, 9, 10], 20, 1), peaked([0, 1, 8, 9, 10], 30, 2), peaked([4, 5, 18, 19, 20], 20, 3)]
    first, last = coverage(documents, np.array([0, 0, 1]), 2, FACTS)
    assert (first.layer, last.layer) == (0, 2)  # the dense layer has none
    # An eighth of 9 and of 17 experts would be less than a token picks.
    assert (first.pool, last.pool) == (2, 3)
    assert first.held_DR.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]
    assert np.flatnonzero(last.held_DR[1]).tolist() == [10, 11, 12]
    assert last.mass_DR.sum(1) == pytest.approx([1, 1])
    assert (first.overlap_same, first.overlap_other) == (1.0, 0.0)


def test_half_of_the_documents_hold_an_expert() -> None:
    documents = [peaked([0, 1, 8], 20, 1), peaked([0, 2, 8], 20, 2)]
    first, _ = coverage(documents, np.array([0, 0]), 1, FACTS)
    assert first.held_DR[0, :3].tolist() == [1.0, 0.5, 0.5]
    assert first.overlap_same == 0.5
    assert np.isnan(first.overlap_other)


def test_a_share_of_all_experts_counts_the_shared_ones() -> None:
    first, last = coverage([peaked([0, 8], 9)], np.array([0]), 1, FACTS, share=0.5)
    assert (first.pool, last.pool) == (3, 7)


# --- documents ------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a file of JSON lines, gzipped where its name says so; returns the pattern that finds all."""

    def write(name: str, *lines: object) -> str:
        text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(tmp_path / "*.jsonl*")

    return write


def test_a_domain_is_a_files_name_up_to_its_first_dot(write: Callable[..., str]) -> None:
    write("law.valid.jsonl.gz", {"text": "The Mayor shall", "id": "d-1"}, "", {"text": "  "}, {"text": "§ 2"})
    pattern = write("c.valid.jsonl", {"text": "int main(void)"})
    assert sample_documents([pattern], 9, seed=0) == [
        Document("c", "c.valid.jsonl, line 1", "int main(void)"),
        Document("law", "d-1", "The Mayor shall"),
        Document("law", "law.valid.jsonl.gz, line 4", "§ 2"),
    ]


def test_a_sample_is_bounded_and_drawn_from_all_by_the_seed(write: Callable[..., str]) -> None:
    pattern = write("a.jsonl", *({"text": f"document {n}", "id": str(n)} for n in range(200)))
    draws = [[int(document.name) for document in sample_documents([pattern], 5, seed)] for seed in range(8)]
    assert all(len(set(draw)) == 5 and draw == sorted(draw) for draw in draws)
    assert max(map(max, draws)) > 100
    assert len(set(map(tuple, draws))) > 1
    assert [int(document.name) for document in sample_documents([pattern], 5, 0)] == draws[0]


def test_bad_lines_are_named(write: Callable[..., str]) -> None:
    pattern = write("a.jsonl", {"text": "fine"}, '{"text": ')
    with pytest.raises(InvalidRequest, match=r"line 2 of .*a\.jsonl is not JSON"):
        sample_documents([pattern], 5, 0)
    write("a.jsonl", {"words": "fine"})
    with pytest.raises(InvalidRequest, match=r'line 1 of .*a\.jsonl has no "text"'):
        sample_documents([pattern], 5, 0)
    write("a.jsonl", {"text": "\n"})
    with pytest.raises(InvalidRequest, match="contain no document with text"):
        sample_documents([pattern], 5, 0)
    with pytest.raises(InvalidRequest, match="no file matches"):
        sample_documents([f"{pattern}.nothing"], 5, 0)


def test_a_file_that_is_no_gzip_is_named(write: Callable[..., str], tmp_path: Path) -> None:
    pattern = write("a.jsonl", {"text": "fine"})
    (tmp_path / "b.jsonl.gz").write_text("plain")
    with pytest.raises(InvalidRequest, match=r"b\.jsonl\.gz cannot be read"):
        sample_documents([pattern], 5, 0)


def test_pieces_joined_are_the_text() -> None:
    # The second and third tokens are bytes of one character, and the gap before the last belongs to it.
    pieces = list(text_pieces("a東 b\nrest", [(0, 1), (1, 2), (1, 2), (3, 4)]))
    assert pieces == ["a", "東", "", " b"]
