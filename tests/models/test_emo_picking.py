"""`pick_experts` as a pure function: its settings and its pool mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pager.models.emo import pick_experts

LOGITS_TE = torch.tensor([[1.0, 5.0, 3.0, 4.0, 2.0, 0.5], [6.0, 1.0, 2.0, 3.0, 4.0, -3.0]])


def allowed(*experts: int) -> Tensor:
    return torch.tensor([[expert in experts for expert in range(6)]])


def test_shared_experts_come_last_with_a_softmax_of_their_own() -> None:
    weights_TK, index_TK = pick_experts(LOGITS_TE, top_k=4, num_shared=2)
    assert index_TK.tolist() == [[1, 3, 4, 5], [0, 3, 4, 5]]
    torch.testing.assert_close(weights_TK[:, :2], LOGITS_TE[:, :4].softmax(-1).gather(1, index_TK[:, :2]))
    torch.testing.assert_close(weights_TK[:, 2:], LOGITS_TE[:, 4:].softmax(-1))


def test_always_active_experts_come_first_and_override_shared_ones() -> None:
    weights_TK, index_TK = pick_experts(LOGITS_TE, top_k=3, num_shared=2, always_active=[5])
    assert index_TK.tolist() == [[5, 1, 3], [5, 0, 4]]
    torch.testing.assert_close(weights_TK, LOGITS_TE.softmax(-1).gather(1, index_TK))


def test_weights_are_fp32_whatever_the_logits() -> None:
    weights_TK, _ = pick_experts(LOGITS_TE.bfloat16(), top_k=2)
    assert weights_TK.dtype == torch.float32


@pytest.mark.parametrize("shared", [0, 1])
def test_a_pool_of_everything_changes_nothing(shared: int) -> None:
    free = pick_experts(LOGITS_TE, top_k=3, num_shared=shared)
    pooled = pick_experts(LOGITS_TE, top_k=3, num_shared=shared, allowed_TE=allowed(0, 1, 2, 3, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(free, pooled, strict=True))


def test_the_softmax_runs_over_the_pool_only() -> None:
    pool = [0, 2, 4]
    weights_TK, index_TK = pick_experts(LOGITS_TE, top_k=3, num_shared=1, allowed_TE=allowed(*pool))
    assert index_TK.tolist() == [[2, 4, 5], [0, 4, 5]]
    over_pool = LOGITS_TE[:, pool].softmax(-1)
    torch.testing.assert_close(weights_TK[0, :2], over_pool[0, [1, 2]])
    assert weights_TK[:, 2].eq(1.0).all()


def test_the_pool_does_not_touch_always_active_experts() -> None:
    weights_TK, index_TK = pick_experts(LOGITS_TE, top_k=3, always_active=[5], allowed_TE=allowed(0, 1))
    assert index_TK.tolist() == [[5, 1, 0], [5, 0, 1]]
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(2))


def test_tokens_may_have_different_pools() -> None:
    pools_TE = torch.cat([allowed(0, 1), allowed(2, 3)])
    _, index_TK = pick_experts(LOGITS_TE, top_k=2, allowed_TE=pools_TE)
    assert index_TK.tolist() == [[1, 0], [3, 2]]
