"""Texts that change their domain, read under pools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks.evidence_drift import ChangingText, changing_texts, read
from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import InvalidRequest
from pager.lab.corpus import Text
from pager.memory import Budgets
from pager.types import Count, DriftAction, DriftPolicy, PoolPolicy


def texts(*lengths: int) -> list[Text]:
    """One domain a length, with one document of so many tokens."""
    return [
        Text(f"domain{number}", f"document{number}", tuple(range(10 * number, 10 * number + length)))
        for number, length in enumerate(lengths)
    ]


@pytest.fixture
def paged(checkpoint: Callable[[str], Path]) -> Iterator[PagedModel]:
    opened = load_paged_model(checkpoint("emo"), dtype=torch.float32, budgets=Budgets(expert_memory="50%"))
    yield opened
    opened.close()


@pytest.fixture
def changing() -> ChangingText:
    ids = np.random.default_rng(0).integers(2, 256, 60).tolist()
    return ChangingText(tuple(ids), prompt_tokens=16, changes_at=30, domains=("a", "b"))


def test_a_text_goes_on_as_one_of_another_domain() -> None:
    first, second = changing_texts(texts(16, 20), 32, prompt_tokens=8)
    assert first.token_ids == (*range(16), *range(10, 26))
    assert second.token_ids == (*range(10, 26), *range(16))
    assert (first.changes_at, first.domains) == (16, ("domain0", "domain1"))


def test_the_change_may_come_in_the_prompt() -> None:
    first, _ = changing_texts(texts(28, 28), 32, prompt_tokens=8, in_prompt=True)
    assert first.token_ids == (*range(4), *range(10, 38))
    assert first.changes_at == 4


def test_domains_without_a_document_long_enough_are_left_out() -> None:
    pairs = changing_texts(texts(16, 15, 16), 32, prompt_tokens=8)
    assert [pair.domains for pair in pairs] == [("domain0", "domain2"), ("domain2", "domain0")]
    with pytest.raises(InvalidRequest, match="fewer than two"):
        changing_texts(texts(16, 15), 32, prompt_tokens=8)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 44])
def test_with_all_experts_it_is_the_models_own_loss(
    checkpoint: Callable[[str], Path], paged: PagedModel, changing: ChangingText, chunk_tokens: int
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoint("emo"), dtype=torch.float32)
    ids = torch.tensor([changing.token_ids])
    with torch.no_grad():
        logits = plain(ids).logits[0]
    nats = cross_entropy(logits[15:-1], ids[0, 16:], reduction="none").numpy()
    (reading,) = read(paged, [changing], PoolPolicy(), chunk_tokens=chunk_tokens)
    np.testing.assert_allclose(reading.nats, nats, atol=1e-4)
    assert reading.loss == pytest.approx(nats.mean(), abs=1e-4)
    assert reading.loss_after_change == pytest.approx(nats[14:].mean(), abs=1e-4)
    assert reading.bytes_paged > 0
    assert (reading.pool_experts, reading.report) == (None, None)


def test_drift_changes_what_follows_it_and_is_reported(paged: PagedModel, changing: ChangingText) -> None:
    narrow, wide, exact = (
        read(paged, [changing], PoolPolicy(Count(4), drift=drift))[0]
        for drift in (None, DriftPolicy(0.2, window=4), DriftPolicy(0.2, DriftAction.EXACT, window=4))
    )
    assert narrow.report is None
    assert narrow.pool_experts == 8
    assert wide.report is not None
    assert wide.pool_experts == 8 + wide.report.experts_added > 8
    assert exact.report is not None
    assert exact.report.exact_from == 5
    for changed in (wide, exact):
        np.testing.assert_allclose(changed.nats[:5], narrow.nats[:5], atol=1e-5)
        assert not np.allclose(changed.nats[5:], narrow.nats[5:], atol=1e-2)
