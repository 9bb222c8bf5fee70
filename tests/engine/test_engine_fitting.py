"""Reading documents for fit-router, and the fitted pass, on the shipped model and a few short texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import CheckpointError, InvalidRequest
from pager.lab.fit import PENALTY, DocumentReader, DocumentReading, Fit, StandInFit, StandIns, fit_router
from pager.memory import Budgets
from pager.pools.pick import pick_pool
from pager.predict.fitted import FittedPredictor, LexicalPredictor
from pager.predict.trunk import TrunkPredictor
from pager.types import Count, PoolPolicy, Share

pytestmark = pytest.mark.slow


MODEL = Path(__file__).parents[2] / "models" / "emo-tiny"
GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "ckpt_emo_tiny"
DOCUMENTS = sorted((Path(__file__).parents[1] / "data" / "documents").glob("*.jsonl"))


@pytest.fixture(scope="module")
def documents() -> list[tuple[int, ...]]:
    """Three of each of four kinds, tokenised; the kinds take turns."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    kinds = [[json.loads(line)["text"] for line in path.read_text().splitlines()] for path in DOCUMENTS]
    return [tuple(tokenizer.encode(text).ids) for texts in zip(*kinds, strict=True) for text in texts]


@pytest.fixture(scope="module")
def paged() -> Iterator[PagedModel]:
    """With fewer slots than experts: what is read must not depend on the budget."""
    made = load_paged_model(MODEL, dtype="float32", budgets=Budgets(expert_memory="50%"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def stand_ins(paged: PagedModel, documents: list[tuple[int, ...]]) -> StandIns:
    fit = StandInFit(paged)
    for ids in documents:
        for size in (Share(0.125), Share(0.5)):
            fit.add(ids[:100], size)
    return fit.fit()


@pytest.fixture(scope="module")
def trunk(stand_ins: StandIns) -> TrunkPredictor:
    return TrunkPredictor.load(MODEL, dtype="float32", stand_ins=stand_ins)


@pytest.fixture(scope="module")
def readings(paged: PagedModel, trunk: TrunkPredictor, documents: list[tuple[int, ...]]) -> list[DocumentReading]:
    reader = DocumentReader(paged, trunk, seed=0)
    found = [reader.read(ids[:100]) for ids in documents]
    assert all(found)
    return [reading for reading in found if reading is not None]


@pytest.fixture(scope="module")
def fit(paged: PagedModel, readings: list[DocumentReading], stand_ins: StandIns) -> Fit:
    vocabulary, routed = paged.config.vocab_size, paged.facts.routed_per_layer
    return fit_router(readings, vocabulary, routed, paged.fingerprint, stand_ins=stand_ins)


def test_what_a_document_wanted_is_the_mean_of_its_router_probabilities(
    readings: list[DocumentReading], documents: list[tuple[int, ...]]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.tensor([documents[0][:100]])
    with torch.inference_mode():
        logits = plain(ids, output_router_logits=True).router_logits
    expected = np.concatenate([layer[:, :-1].softmax(-1).mean(0).numpy() for layer in logits])
    assert len(readings[0].token_ids) == 100
    np.testing.assert_allclose(readings[0].wanted_O, expected, atol=1e-5)


def test_the_trunks_scores_are_those_of_the_starts_of_documents(
    readings: list[DocumentReading], trunk: TrunkPredictor, documents: list[tuple[int, ...]]
) -> None:
    (short, long) = readings[0].trunk
    assert (short.num_tokens, long.num_tokens) == (16, 32), "at most half of the document"
    for found in (short, long):
        expected = trunk.scores(documents[0][: found.num_tokens])
        for mean_R, expected_R in zip(found.mean_LR, expected.mean_LR, strict=True):
            np.testing.assert_allclose(mean_R, expected_R, atol=1e-6)


def test_the_pools_of_a_reading_are_those_of_prefills(
    readings: list[DocumentReading], paged: PagedModel, documents: list[tuple[int, ...]]
) -> None:
    assert {prompt for reading in readings for prompt, _ in reading.prefill_pools} == {0, 1}
    for reading in readings[:4]:
        assert [len(pool.experts[0]) for _, pool in reading.prefill_pools] == [15, 31, 63]
        for prompt, pool in reading.prefill_pools:
            document = paged.routing(PoolPolicy(size=Count(len(pool.experts[0]))))
            with torch.inference_mode(), paged.step([document], prefill=True):
                paged.model(torch.tensor([reading.token_ids[: (16, 32)[prompt]]]), use_cache=False)
            assert document.pool is not None
            assert document.pool.experts == pool.experts


def test_a_document_of_a_few_tokens_is_left_out(paged: PagedModel, trunk: TrunkPredictor) -> None:
    assert DocumentReader(paged, trunk, seed=0).read(range(2, 30)) is None


def test_reading_again_finds_the_same(
    paged: PagedModel, trunk: TrunkPredictor, documents: list[tuple[int, ...]], readings: list[DocumentReading]
) -> None:
    again = DocumentReader(paged, trunk, seed=0).read(documents[0][:100])
    assert again is not None
    np.testing.assert_allclose(again.wanted_O, readings[0].wanted_O, atol=1e-7)
    expected = [(prompt, pool.experts) for prompt, pool in readings[0].prefill_pools]
    assert [(prompt, pool.experts) for prompt, pool in again.prefill_pools] == expected


def test_the_fitted_pass_knows_what_the_documents_it_was_fitted_to_want(
    fit: Fit, trunk: TrunkPredictor, readings: list[DocumentReading]
) -> None:
    """Twelve texts prove no more; what it is worth on unseen ones is measured, not tested."""
    fitted, lexical = FittedPredictor(fit.file, trunk), LexicalPredictor(fit.file)
    recalls: dict[str, list[float]] = {"fitted": [], "lexical": [], "trunk": []}
    for reading in readings:
        wanted = pick_pool(fit.file.as_scores(reading.wanted_O, "", 100), Share(0.125), trunk.facts)
        for router in (fitted, lexical, trunk):
            scores = router.scores(reading.token_ids[:32])
            assert tuple(map(len, scores.mean_LR)) == trunk.facts.routed_per_layer
            assert all(mean_R.sum() == pytest.approx(1) for mean_R in scores.mean_LR)
            pool = pick_pool(scores, Share(0.125), trunk.facts)
            recalls[scores.source].append(pool.recall_of(wanted))
            assert 0 < fit.file.expected_recall(scores, pool) <= 1
    means = {source: float(np.mean(values)) for source, values in recalls.items()}
    assert means["lexical"] > 0.4, "chance is 0.12"
    assert means["fitted"] > means["trunk"]


def test_stand_ins_are_the_least_squares_answer(paged: PagedModel, documents: list[tuple[int, ...]]) -> None:
    """Against the sum of what each routed expert of the plain model adds, document by document, in one layer."""
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    block = plain.model.layers[2].mlp
    probs, added = [], []

    def collect(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        hidden_TD = inputs[0].flatten(0, 1)
        logits_TE, weights_TK, index_TK = block.gate(hidden_TD)
        probs.append(logits_TE[:, :-1].softmax(-1))
        added.append(block.experts(hidden_TD, index_TK[:, :-1], weights_TK[:, :-1]))

    handle = block.register_forward_pre_hook(collect)
    fit = StandInFit(paged)
    with torch.inference_mode():
        for ids in documents[:4]:
            plain(torch.tensor([ids[:100]]))
            fit.add(ids[:100], Share(1.0))
    handle.remove()
    probs_TR, added_TD = torch.cat(probs).double(), torch.cat(added).double()
    strength = PENALTY * probs_TR.square().sum() / len(probs_TR)
    gram_RR = probs_TR.T @ probs_TR + strength * torch.eye(127)
    expected_RD = torch.linalg.solve(gram_RR, probs_TR.T @ added_TD)
    np.testing.assert_allclose(fit.fit()[2], expected_RD.numpy(), atol=2e-3)


def test_stand_ins_bring_the_trunk_nearer_to_the_prefill(
    fit: Fit, trunk: TrunkPredictor, paged: PagedModel, documents: list[tuple[int, ...]]
) -> None:
    bare = TrunkPredictor.load(MODEL, dtype="float32")
    assert trunk.resident_bytes == bare.resident_bytes + 6 * 127 * 128 * 4
    recalls: dict[bool, list[float]] = {True: [], False: []}
    for ids in documents:
        document = paged.routing(PoolPolicy(size=Share(0.125)))
        with torch.inference_mode(), paged.step([document], prefill=True):
            paged.model(torch.tensor([ids[-64:]]), use_cache=False)
        assert document.pool is not None
        for router in (trunk, bare):
            predicted = pick_pool(router.scores(ids[-64:]), Share(0.125), trunk.facts)
            recalls[router.has_stand_ins].append(predicted.recall_of(document.pool))
    assert np.mean(recalls[True]) > np.mean(recalls[False])
    with pytest.raises(CheckpointError, match="stand-ins"):
        FittedPredictor(fit.file, bare)


def test_a_router_and_a_trunk_of_different_models_do_not_go_together(fit: Fit) -> None:
    with pytest.raises(CheckpointError, match="fit it again"):
        FittedPredictor(fit.file, TrunkPredictor.load(GOLDEN))


def test_a_prompt_that_can_not_be_scored(fit: Fit, trunk: TrunkPredictor) -> None:
    for ids, named in (([], "empty"), ([4096], "token id 4096")):
        with pytest.raises(InvalidRequest, match=named):
            FittedPredictor(fit.file, trunk).scores(ids)
