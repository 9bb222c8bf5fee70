"""Fitted routers on a small made-up world of topics: what is found, what is refused, what is written. Numpy alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pager.errors import CheckpointError, InvalidRequest
from pager.lab.fit import DocumentReading, Fit, FitOptions, fit_router
from pager.pools.pick import pick_pool
from pager.predict.fitted import FORMAT, CombinedMap, LexicalPredictor, PredictorFile
from pager.types import Count, ExpertPool, RoutingFacts, RoutingScores

ROOT = Path(__file__).parents[2]
VOCABULARY, TOPICS, SIZE = 300, 5, 5
FACTS = RoutingFacts((21, 0, 21, 20), (1, 0, 1, 0), (2, 0, 2, 2))
ROUTED = FACTS.routed_per_layer


@dataclass(frozen=True, slots=True)
class World:
    """Documents of five topics; a topic has words of its own and experts of its own."""

    random: np.random.Generator
    words: np.ndarray
    experts: tuple[np.ndarray, ...]

    @classmethod
    def make(cls, seed: int) -> World:
        random = np.random.default_rng(seed)
        words = random.dirichlet(np.full(VOCABULARY, 0.05), TOPICS)
        return cls(random, words, tuple(random.dirichlet(np.full(count, 0.3), TOPICS) for count in ROUTED if count))

    def document(self) -> DocumentReading:
        topic = int(self.random.integers(TOPICS))
        ids = tuple(self.random.choice(VOCABULARY, 200, p=self.words[topic]).tolist())
        trunk = tuple(RoutingScores(self._layers(topic, length / 16), "trunk", length) for length in (16, 64))
        prompt = int(self.random.integers(2))
        prefill = RoutingScores(self._layers(topic, trunk[prompt].num_tokens / 4), "prefill", 0)
        chosen = ((prompt, pick_pool(prefill, Count(SIZE), FACTS)),)
        return DocumentReading(ids, np.concatenate(self._layers(topic, 1000)), trunk, chosen)

    def _layers(self, topic: int, clearness: float) -> tuple[np.ndarray, ...]:
        layers = iter(self.experts)
        return tuple(self._noisy(next(layers)[topic], clearness) if count else np.zeros(0) for count in ROUTED)

    def _noisy(self, wanted_R: np.ndarray, clearness: float) -> np.ndarray:
        noisy_R = wanted_R * self.random.gamma(clearness, 1, wanted_R.shape)
        return np.asarray(noisy_R / noisy_R.sum())


@pytest.fixture(scope="module")
def seen() -> list[DocumentReading]:
    world = World.make(0)
    return [world.document() for _ in range(60)]


@pytest.fixture(scope="module")
def unseen() -> list[DocumentReading]:
    world = World.make(0)
    return [world.document() for _ in range(120)][60:]


@pytest.fixture(scope="module")
def fit(seen: list[DocumentReading]) -> Fit:
    return fit_router(seen, VOCABULARY, ROUTED, "a model")


@pytest.fixture
def file(fit: Fit) -> PredictorFile:
    return fit.file


def pools_wanted(readings: Sequence[DocumentReading], file: PredictorFile) -> list[ExpertPool]:
    return [pick_pool(file.as_scores(each.wanted_O, "", 200), Count(SIZE), FACTS) for each in readings]


def both_passes(file: PredictorFile, ids: Sequence[int], trunk: RoutingScores) -> RoutingScores:
    return CombinedMap(file).scores(LexicalPredictor(file).features(ids), trunk)


def mean_recall(scores: Sequence[RoutingScores], wanted: Sequence[ExpertPool]) -> float:
    pools = [pick_pool(each, Count(SIZE), FACTS) for each in scores]
    return float(np.mean([pool.recall_of(actual) for pool, actual in zip(pools, wanted, strict=True)]))


def test_the_experts_of_unseen_documents_are_told_from_their_first_tokens(
    file: PredictorFile, unseen: list[DocumentReading]
) -> None:
    lexical = [LexicalPredictor(file).scores(each.token_ids[:64]) for each in unseen]
    trunk = [each.trunk[1] for each in unseen]
    both = [both_passes(file, each.token_ids[:64], each.trunk[1]) for each in unseen]
    wanted = pools_wanted(unseen, file)
    assert mean_recall(lexical, wanted) > 0.9
    assert mean_recall(both, wanted) > mean_recall(trunk, wanted) + 0.05


def test_scores_are_probabilities_of_every_sparse_layer(file: PredictorFile, unseen: list[DocumentReading]) -> None:
    lexical = LexicalPredictor(file).scores(unseen[0].token_ids[:64])
    both = both_passes(file, unseen[0].token_ids[:64], unseen[0].trunk[1])
    assert (lexical.source, both.source) == ("lexical", "fitted")
    for scores in (lexical, both):
        assert scores.num_tokens == 64
        assert tuple(map(len, scores.mean_LR)) == ROUTED
        for mean_R in scores.mean_LR:
            assert mean_R.dtype == np.float64
            assert (mean_R > 0).all()
            if len(mean_R):
                assert mean_R.sum() == pytest.approx(1)


def test_only_counts_of_tokens_matter_to_the_lexical_pass(file: PredictorFile, unseen: list[DocumentReading]) -> None:
    router = LexicalPredictor(file)
    ids = unseen[0].token_ids[:64]
    for mean_R, backwards_R in zip(router.scores(ids).mean_LR, router.scores(ids[::-1]).mean_LR, strict=True):
        np.testing.assert_allclose(mean_R, backwards_R, atol=1e-7)
    other = router.scores(unseen[0].token_ids[64:128])
    assert any(not np.allclose(*pair) for pair in zip(router.scores(ids).mean_LR, other.mean_LR, strict=True))


@pytest.mark.parametrize(("ids", "named"), [([], "empty"), ([1, 300], "token id 300"), ([-1, 4], "token id -1")])
def test_a_prompt_that_can_not_be_scored(file: PredictorFile, ids: list[int], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        LexicalPredictor(file).scores(ids)


@pytest.mark.parametrize("source", ["lexical", "trunk", "fitted"])
def test_recall_is_expected_about_as_it_turns_out(
    file: PredictorFile, unseen: list[DocumentReading], source: str
) -> None:
    errors = []
    for document in unseen:
        ((prompt, chosen),) = document.prefill_pools
        trunk = document.trunk[prompt]
        lexical = LexicalPredictor(file).scores(document.token_ids[: trunk.num_tokens])
        both = both_passes(file, document.token_ids[: trunk.num_tokens], trunk)
        scores = {"lexical": lexical, "trunk": trunk, "fitted": both}[source]
        pool = pick_pool(scores, Count(SIZE), FACTS)
        expected = file.expected_recall(scores, pool)
        assert 0 <= expected <= 1
        errors.append(expected - pool.recall_of(chosen))
    assert abs(np.mean(errors)) < 0.05, "right on average"
    assert np.mean(np.abs(errors)) < 0.1, "and not far off on one prompt, of 15 experts"


def test_recall_of_other_sources(file: PredictorFile, unseen: list[DocumentReading]) -> None:
    ((_, pool),), mean_LR = unseen[0].prefill_pools, unseen[0].trunk[0].mean_LR
    assert file.expected_recall(RoutingScores(mean_LR, "prefill", 16), pool) == 1
    with pytest.raises(InvalidRequest, match=r"'hint'.*fitted, lexical, trunk"):
        file.expected_recall(RoutingScores(mean_LR, "hint", 16), pool)


def test_fitting_again_writes_the_same_bytes(fit: Fit, seen: list[DocumentReading], tmp_path: Path) -> None:
    again = fit_router(seen, VOCABULARY, ROUTED, "a model")
    assert again.recall == fit.recall
    for name, made in (("first", fit), ("second", again)):
        made.file.save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_what_was_written_is_what_is_read(fit: Fit, unseen: list[DocumentReading], tmp_path: Path) -> None:
    nbytes = fit.file.save(tmp_path / "router.safetensors")
    assert nbytes == (tmp_path / "router.safetensors").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["router.safetensors"]
    for path in (tmp_path, tmp_path / "router.safetensors"):
        read = PredictorFile.load(path, "a model")
        assert read.routed_per_layer == ROUTED
        before, after = (LexicalPredictor(each).scores(unseen[0].token_ids[:64]) for each in (fit.file, read))
        for mean_R, read_R in zip(before.mean_LR, after.mean_LR, strict=True):
            np.testing.assert_allclose(mean_R, read_R, atol=2e-3)  # halves on disk


def test_another_models_router_is_refused(fit: Fit, tmp_path: Path) -> None:
    fit.file.save(tmp_path / "router.safetensors")
    with pytest.raises(CheckpointError, match=r"fitted to the model a model and this one is another.*fit-router"):
        PredictorFile.load(tmp_path, "another")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no .*router\.safetensors.*fit-router"):
        PredictorFile.load(tmp_path, "a model")


@pytest.mark.parametrize(
    "damage",
    [
        *("truncated", "garbage", "no tensor", "wrong shape", "not finite", "no format", "no layers"),
        *("short estimate", "a layer's stand-in"),
    ],
)
def test_a_damaged_file_is_refused(fit: Fit, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "router.safetensors"
    fit.file.save(path)
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as stored:
        facts = stored.metadata()
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        case "garbage":
            path.write_bytes(b"\x00" * 64)
        case "no tensor":
            save_file({name: value for name, value in tensors.items() if name != "lexical.head"}, path, facts)
        case "wrong shape":
            save_file(tensors | {"lexical.head": tensors["lexical.head"][:, :-1].copy()}, path, facts)
        case "not finite":
            save_file(tensors | {"lexical.mean": np.full_like(tensors["lexical.mean"], np.nan)}, path, facts)
        case "short estimate":
            save_file(tensors | {"recall.fitted": tensors["recall.fitted"][:-1].copy()}, path, facts)
        case "a layer's stand-in":
            save_file(tensors | {"stand_in.0": np.zeros((20, 8), np.float32)}, path, facts)
        case "no layers":
            save_file(tensors, path, {FORMAT: "{}"})
        case "no format":
            save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"router\.safetensors.*fit-router"):
        PredictorFile.load(tmp_path, "a model")


def test_options_bound_the_file(seen: list[DocumentReading], tmp_path: Path) -> None:
    low = fit_router(
        seen,
        VOCABULARY,
        ROUTED,
        "a model",
        options=FitOptions(lexical_features=2, lexical_points=2, fitted_features=2, fitted_points=2, codewords=2),
    )
    assert low.file.weights["lexical.tokens"].shape == (VOCABULARY, 2)
    assert low.file.save(tmp_path / "router.safetensors") < 8_000


def test_too_few_documents_are_refused(seen: list[DocumentReading]) -> None:
    with pytest.raises(InvalidRequest, match="at least 8 documents; 7"):
        fit_router(seen[:7], VOCABULARY, ROUTED, "a model")


def test_the_lexical_pass_runs_without_torch(fit: Fit, tmp_path: Path) -> None:
    fit.file.save(tmp_path / "router.safetensors")
    program = f"""
import sys
from pathlib import Path
sys.modules["torch"] = None
from pager.predict.fitted import LexicalPredictor, PredictorFile
print(LexicalPredictor(PredictorFile.load(Path({str(tmp_path)!r}), "a model")).scores([1, 2, 3]).source)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout == "lexical\n", result.stderr
