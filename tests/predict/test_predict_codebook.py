"""Codebooks on a small made-up world of topics: what is shared, and which prompts are told to be unknown."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pager.errors import InvalidRequest
from pager.lab.fit import DocumentReading, FitOptions, fit_router, with_codebook
from pager.pools.pick import largest_counts, pick_pool
from pager.predict.fitted import MEANS, Codebook, LexicalPredictor, PredictorFile, codeword_names
from pager.types import Count, RoutingScores, Share
from tests.predict.test_predict_fitted import FACTS, ROUTED, SIZE, VOCABULARY, World

SMALL = FitOptions(codewords=6)


@pytest.fixture(scope="module")
def readings() -> list[DocumentReading]:
    world = World.make(0)
    return [world.document() for _ in range(100)]


@pytest.fixture(scope="module")
def file(readings: list[DocumentReading]) -> PredictorFile:
    return fit_router(readings[:60], VOCABULARY, ROUTED, "a model", options=SMALL).file


@pytest.fixture
def codebook(file: PredictorFile) -> Codebook:
    found = Codebook.of(file, FACTS)
    assert found is not None
    return found


def topic_of(reading: DocumentReading) -> int:
    """Documents of a topic want the same experts most."""
    return int(reading.wanted_O[: ROUTED[0]].argmax())


def test_documents_of_a_topic_share_a_codeword_and_its_pool(
    file: PredictorFile, codebook: Codebook, readings: list[DocumentReading]
) -> None:
    lexical = LexicalPredictor(file)
    found: dict[int, list[str]] = {}
    for reading in readings[60:]:
        codeword = codebook.assign(lexical.scores(reading.token_ids[:64]), Count(SIZE), reading.trunk[1])
        if codeword.is_covered:
            assert codeword.pool == codebook.pool(codeword.name, Count(SIZE))
        found.setdefault(topic_of(reading), []).append(codeword.name)
    commonest = sum(max(map(names.count, names)) for names in found.values())
    assert commonest > 0.8 * 40
    assert len({max(names, key=names.count) for names in found.values()}) == len(found)


def test_a_trunk_that_sees_something_else_leaves_a_prompt_uncovered(
    file: PredictorFile, codebook: Codebook, readings: list[DocumentReading]
) -> None:
    lexical = LexicalPredictor(file)
    random = np.random.default_rng(1)
    covered, strange = 0, 0
    for reading in readings[60:]:
        scores = lexical.scores(reading.token_ids[:64])
        covered += codebook.assign(scores, Count(SIZE), reading.trunk[1]).is_covered
        elsewhere = tuple(np.asarray(random.permutation(mean_R)) for mean_R in reading.trunk[1].mean_LR)
        strange += codebook.assign(scores, Count(SIZE), RoutingScores(elsewhere, "trunk", 64)).is_covered
    assert covered >= 0.7 * 40
    assert strange <= 0.1 * 40


def test_a_prompt_that_no_codeword_covers_gets_a_pool_between_its_own_and_the_nearest(
    file: PredictorFile, codebook: Codebook, readings: list[DocumentReading]
) -> None:
    lexical = LexicalPredictor(file)
    random = np.random.default_rng(2)
    seen_alike, shared_alike = [], []
    for reading in readings[60:]:
        scores, seen = lexical.scores(reading.token_ids[:64]), reading.trunk[1].mean_LR
        for noise in (0.5, 1.0):
            strange = tuple(
                (1 - noise) * mean_R + noise * random.permutation(mean_R) if len(mean_R) else mean_R for mean_R in seen
            )
            trunk = RoutingScores(strange, "trunk", 64)
            codeword = codebook.assign(scores, Count(SIZE), trunk)
            if codeword.is_covered:
                continue
            assert codeword.pool is not None
            seen_alike.append(codeword.pool.recall_of(pick_pool(trunk, Count(SIZE), FACTS)))
            shared_alike.append(codeword.pool.recall_of(codebook.pool(codeword.name, Count(SIZE))))
            without = codebook.assign(scores, Count(SIZE))
            assert without.is_covered or without.pool is None
    assert len(seen_alike) > 40
    assert np.mean(seen_alike) > 0.6
    assert 0.25 < np.mean(shared_alike) < 0.9


def test_a_share_is_shared_out_over_the_layers_and_a_count_is_not(codebook: Codebook) -> None:
    name = codebook.names[0]
    shared_out, alike = codebook.pool(name, Share(0.25)), codebook.pool(name, Count(5))
    assert [len(layer) for layer in alike.experts] == [5, 0, 5, 5]
    total = sum(largest_counts(Share(0.25), FACTS))
    assert shared_out.num_experts == total
    assert shared_out.covered_mass is not None


def test_learned_codewords_join_without_changing_the_fitted_ones(
    file: PredictorFile, codebook: Codebook, readings: list[DocumentReading]
) -> None:
    random = np.random.default_rng(3)
    new_O = np.concatenate([random.dirichlet(np.full(count, 0.2)) for count in ROUTED if count])
    trunk = RoutingScores(tuple(np.split(new_O, np.cumsum(ROUTED)[:-1])), "trunk", 64)
    scores = LexicalPredictor(file).scores(readings[60].token_ids[:64])
    before = codebook.assign(scores, Count(SIZE), trunk)
    assert not before.is_covered
    learning = codebook.with_learned(["t00-0123"], [new_O])
    after = learning.assign(scores, Count(SIZE), trunk)
    assert (after.name, after.is_covered, after.is_learned, after.coverage) == ("t00-0123", True, True, 1.0)
    assert after.pool == pick_pool(trunk, Count(SIZE), FACTS)
    assert codebook.names == learning.names[:-1]
    for name in codebook.names:
        assert learning.pool(name, Count(SIZE)) is codebook.pool(name, Count(SIZE))
    assert not codebook.assign(scores, Count(SIZE), trunk).is_covered
    assert learning.assign(scores, Count(SIZE)).name in codebook.names
    assert learning.with_learned((), ()).names == codebook.names


def test_pools_of_a_codeword_lie_inside_one_another(codebook: Codebook) -> None:
    for name in codebook.names:
        pools = [codebook.pool(name, size) for size in (Count(2), Count(5), Share(0.5), Count(15))]
        for small, large in itertools.pairwise(pools):
            assert all(set(one) <= set(other) for one, other in zip(small.experts, large.experts, strict=True))
    with pytest.raises(InvalidRequest, match="not a codeword"):
        codebook.pool("c99-0000", Count(2))


def test_names_are_those_of_the_stored_means(file: PredictorFile, codebook: Codebook, tmp_path: Path) -> None:
    file.save(tmp_path / "router.safetensors")
    loaded = PredictorFile.load(tmp_path, "a model")
    again = Codebook.of(loaded, FACTS)
    assert again is not None
    assert again.names == codebook.names == codeword_names(file.weights[MEANS])
    assert [name[:3] for name in again.names] == [f"c{number:02d}" for number in range(len(again.names))]


def test_a_codebook_is_added_to_a_file_whose_passes_stay_as_they_were(
    file: PredictorFile, readings: list[DocumentReading], tmp_path: Path
) -> None:
    bare = {name: weight for name, weight in file.weights.items() if not name.startswith("codebook.")}
    old = PredictorFile(file.fingerprint, file.routed_per_layer, bare, file.facts)
    assert Codebook.of(old, FACTS) is None
    old.save(tmp_path / "old.safetensors")
    made, fit = with_codebook(PredictorFile.load(tmp_path / "old.safetensors", "a model"), readings, VOCABULARY, SMALL)
    made.save(tmp_path / "new.safetensors")
    before, after = load_file(tmp_path / "old.safetensors"), load_file(tmp_path / "new.safetensors")
    assert after.keys() - before.keys() == fit.weights.keys()
    for name, weight in before.items():
        assert weight.tobytes() == after[name].tobytes()


def test_as_many_codewords_as_held_out_documents_ask_for(readings: list[DocumentReading], file: PredictorFile) -> None:
    _, fit = with_codebook(file, readings, VOCABULARY, FitOptions())
    assert fit.num_codewords in fit.lost_mass
    assert fit.lost_mass[fit.num_codewords] < 0.02
