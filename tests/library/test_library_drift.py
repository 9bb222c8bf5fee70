"""Drift in library use: forwards with a past measure, of one token or of several, and pools change between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pager.errors import InvalidRequest
from pager.types import DriftAction, DriftPolicy

Load = Callable[..., PreTrainedModel]
MakeSmall = Callable[..., Any]

PAD = 63
POOL, LAYERS = 4, 3
EXACT = DriftPolicy(0.2, DriftAction.EXACT, window=4)
WIDEN = DriftPolicy(0.2, DriftAction.WIDEN, window=4)


def chunks(model: PreTrainedModel, ids: torch.Tensor, prompt: int, size: int, **options: Any) -> tuple[Any, list[Any]]:
    """The cache's documents and each forward's logits, teacher-forced."""
    output = model(ids[:, :prompt], **options)
    cache, logits = output.past_key_values, [output.logits]
    for start in range(prompt, ids.shape[1], size):
        logits.append(model(ids[:, start : start + size], past_key_values=cache, **options).logits)
    return cache.documents, logits


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_pool_is_widened_after_a_window_and_a_trial(small: MakeSmall, load: Load, size: int) -> None:
    made = small("emo")
    model = load(made.path, pool_size=POOL, expert_memory="60%", drift=WIDEN)
    ids = made.prompt(1, 24 + 12)
    (document,), _ = chunks(model, ids, 24, size)
    report = document.monitor.report()
    assert report.widenings == 1
    assert document.pool.num_experts == LAYERS * POOL + report.experts_added
    assert document.first_pool.num_experts == LAYERS * POOL
    assert not document.is_exact


def test_going_exact_is_felt_by_the_next_forward(small: MakeSmall, load: Load) -> None:
    made = small("emo")
    ids = made.prompt(1, 24 + 12)
    _, pooled = chunks(load(made.path, pool_size=POOL), ids, 24, 4)
    (document,), logits = chunks(load(made.path, pool_size=POOL, drift=EXACT), ids, 24, 4)
    assert document.monitor.report().exact_from == 5
    assert document.is_exact
    for index in (0, 1):
        torch.testing.assert_close(logits[index], pooled[index], rtol=0, atol=1e-5)
    assert not torch.allclose(logits[2], pooled[2], atol=1e-2)


def test_padding_is_not_measured(small: MakeSmall, load: Load) -> None:
    made = small("emo")
    model = load(made.path, pool_size=POOL, drift=DriftPolicy(0.99, window=4))
    ids = made.prompt(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    padded = ids.clone()
    padded[1, 16:] = PAD
    first = model(padded[:, :12], attention_mask=mask[:, :12])
    model(padded[:, 12:], attention_mask=mask, past_key_values=first.past_key_values)
    together = first.past_key_values.documents
    for row, length in ((0, 20), (1, 16)):
        (alone,), _ = chunks(model, ids[row : row + 1, :length], 12, length)
        assert together[row].out_of_pool_mass() == pytest.approx(alone.out_of_pool_mass(), abs=1e-5)
        assert together[row].out_of_pool_mass() > 0


def test_without_drift_nothing_is_measured(small: MakeSmall, load: Load) -> None:
    made = small("emo")
    (document,), _ = chunks(load(made.path, pool_size=POOL), made.prompt(1, 20), 12, 4)
    assert document.monitor is None
    assert document.out_of_pool_mass() == 0


def test_drift_without_a_pool_is_refused(small: MakeSmall, load: Load) -> None:
    with pytest.raises(InvalidRequest, match="all experts"):
        load(small("emo").path, drift=WIDEN)
