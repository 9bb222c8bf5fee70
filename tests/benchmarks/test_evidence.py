"""docs/evidence.md from two small random models and made-up documents: all is measured, every claim judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import evidence_codebook
from benchmarks.evidence import CONTROL_METHODS, _draw, _store
from benchmarks.evidence_claims import Claim, all_claims
from benchmarks.evidence_codebook import codebook_claims, codebook_section, measure_held_out
from benchmarks.evidence_drift import ACTIONS, drift_claims, drift_section, measure_drift
from benchmarks.evidence_facts import Scale
from benchmarks.evidence_measure import measure
from benchmarks.evidence_page import page
from pager.lab.report import Interval
from pager.models import EmoConfig, EmoForCausalLM
from tests.support.checkpoints import byte_tokenizer

SCALE = Scale(max_documents=3, side_documents=2, calibration_documents=4, prompts=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for domain, alphabet in (("letters", "abcdefgh "), ("digits", "01234567 ")):
        for split in ("train", "valid"):
            texts = ["".join(random.choice(list(alphabet), 300)) for _ in range(6)]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{domain}.{split}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    paths = []
    for seed, name in enumerate(("emo-tiny", "stdmoe-tiny")):
        torch.manual_seed(seed)
        config = EmoConfig(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_experts=65,
            num_experts_per_tok=3,
            max_position_embeddings=256,
            initializer_range=0.3,
            pad_token_id=1,
            eos_token_id=0,
        )
        paths.append(folder / name)
        EmoForCausalLM(config).eval().save_pretrained(paths[-1])
        tokenizer.save(str(paths[-1] / "tokenizer.json"))
    return paths


@pytest.mark.slow
def test_a_page_is_made_of_what_was_measured(corpus: Path, two_models: list[Path], tmp_path: Path) -> None:
    emo, std = two_models
    found = [
        measure(emo, corpus, tmp_path / "emo", SCALE),
        measure(std, corpus, tmp_path / "std", SCALE, CONTROL_METHODS),
    ]
    again = measure(std, corpus, tmp_path / "std", SCALE, CONTROL_METHODS)
    assert again.facts == found[1].facts
    claims = all_claims(found[0], found[1])
    unmeasured = [claim.says for claim in claims if claim.measured is None]
    fitted = ("lexical", "fitted", "recall estimate", "one example")
    assert all(any(words in says for words in fitted) for says in unmeasured)
    learned = {"stream": {"legal": {"after": 0.9}}}
    shared = {claim.says: claim.verdict for claim in codebook_claims(found[0].main, learned)}
    assert shared.pop("after 200 documents of legal: at least 0.8 of its next ones share a codeword") == "holds"
    assert set(shared.values()) == {"not measured"}
    text = page(found[0], found[1], claims, {}, "make evidence")
    assert all(
        f"## {title}" in text
        for title in ("Claims and verdicts", "Memory and reads saved", "Pool sizes chosen by layer", "Domains")
    )
    assert text.count("| trunk |") == 0
    assert "| emo-tiny: trunk |" in text
    assert "| stdmoe-tiny: prefill+layers |" in text
    _draw(found[0], found[1], tmp_path)
    _store(found, tmp_path)
    assert (tmp_path / "rise.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "emo-tiny-facts.json").read_text()).keys() == {
        "continuations", "specialisation", "passes", "speed",
    }  # fmt: skip


@pytest.mark.slow
def test_drift_is_measured_where_the_domain_changes(corpus: Path, two_models: list[Path], tmp_path: Path) -> None:
    facts = measure_drift(two_models[0], corpus, tmp_path, SCALE, per_domain=1)
    assert measure_drift(two_models[0], corpus, tmp_path, SCALE, per_domain=1) == facts
    for where in ("in the prompt", "in the answer"):
        assert facts[where]["texts"] == 2
        assert facts[where].keys() >= set(ACTIONS)
        assert facts[where]["exact"]["above_exact"]["mean"] == 0
        assert facts[where]["exact"]["bytes_of_exact"]["mean"] == 1
        assert facts[where]["widened"]["pool_experts"] >= facts[where]["pool"]["pool_experts"]
    assert [claim.at for claim in drift_claims(facts)] == ["drift", "drift"]
    assert "| in the prompt: widened |" in drift_section(facts)


@pytest.mark.slow
def test_a_codebook_is_measured_on_domains_that_it_was_not_fitted_to(
    corpus: Path, two_models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure_held_out(two_models[0], corpus, tmp_path, SCALE) == {}
    small = {"CODEWORDS": 2, "STAGES": ((0, 2), (2, 4)), "LOOKED_AT": 2, "KNOWN_BEFORE": 2}
    for name, value in small.items():
        monkeypatch.setattr(evidence_codebook, name, value)
    with_new = tmp_path / "corpus"
    with_new.mkdir()
    for file in corpus.iterdir():
        (with_new / file.name).write_bytes(file.read_bytes())
        (with_new / file.name.replace("digits", "legal")).write_bytes(file.read_bytes())
    facts = measure_held_out(two_models[0], with_new, tmp_path, SCALE)
    assert facts["fit documents"] == 12
    assert facts["rises"].keys() == {"prefill_25", "codebook_25", "prefill_12.5", "codebook_12.5"}
    assert facts["stream"].keys() == facts["covered"].keys() == {"legal"}
    assert len(facts["stream"]["legal"]["stages"]) == 2
    assert measure_held_out(two_models[0], with_new, tmp_path, SCALE) == facts
    text = codebook_section(facts)
    assert text.count("| legal |") == 2
    assert "codewords were learned" in text


def test_a_claim_is_judged_by_its_mean() -> None:
    most = Claim("here", "at most 0.05", Interval(0.04, 0.03, 0.06), 0.05)
    assert (most.verdict, most.figure) == ("holds", "0.040 [0.030, 0.060]")
    assert Claim("here", "at most 0.03", Interval(0.04, 0.03, 0.06), 0.03).verdict == "**short by 0.010**"
    least = Claim("here", "at least 8", Interval(7.5, 7.0, 9.0), 8, "{:.1f}", at_least=True)
    assert least.verdict == "**short by 0.5**"
    assert Claim("here", "at least 3", Interval(3.0, 3.0, 3.0), 3, "{:.1f}", at_least=True).verdict == "holds"
    assert Claim("here", "something", None, 1).verdict == "not measured"
