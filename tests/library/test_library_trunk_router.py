"""The routing-only pass: against a plain model whose routed experts write nothing, and that it holds none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from transformers import PreTrainedModel

from pager.errors import InvalidRequest
from pager.pools.pick import pick_pool
from pager.predict.trunk import TrunkPredictor
from pager.types import Count

MakeSmall = Callable[..., Any]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {}),
    "mixtral": ("mixtral", {}),
    "qwen3": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3-some-dense": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "emo": ("emo", {}),
    "emo-no-shared": ("emo", {"num_shared_experts": 0}),
    "emo-two-shared": ("emo", {"num_shared_experts": 2, "num_experts_per_tok": 4}),
    "emo-mixed": (
        "emo",
        {
            "num_experts_per_layer": [6, 0, 12],
            "num_shared_experts_per_layer": [0, 0, 2],
            "dense_intermediate_size": 24,
        },
    ),
    "emo-always-active": ("emo", {"always_active_experts": [4, 0]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_a_plain_model_whose_routed_experts_write_nothing(small: MakeSmall, variant: str) -> None:
    family, config = VARIANTS[variant]
    made = small(family, **config)
    ids = made.prompt(1, 30)
    scores = TrunkPredictor.load(made.path, dtype="float32").scores(ids[0].tolist())
    assert scores.num_tokens == 30
    assert scores.source == "trunk"
    expected = by_hand(made.plain, ids)
    assert [len(mean) for mean in scores.mean_LR] == [len(mean) for mean in expected]
    for mean, expected_mean in zip(scores.mean_LR, expected, strict=True):
        assert mean.dtype == np.float64
        np.testing.assert_allclose(mean, expected_mean, atol=1e-5)
        if len(mean):
            assert mean.sum() == pytest.approx(1, abs=1e-6)


def by_hand(plain: PreTrainedModel, ids: Tensor) -> list[np.ndarray]:
    """Each layer's mean gate probabilities while the weights of routed experts are zero."""
    means: list[np.ndarray] = []

    def hook(gate: Any, _: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, weights, index = output
        num_shared = getattr(gate, "num_shared", 0)
        routed = logits.shape[-1] - num_shared
        means.append(logits[:, :routed].softmax(-1).mean(0).detach().numpy())
        return logits, weights.masked_fill(index < routed, 0), index

    hooks = []
    order = []
    for number, layer in enumerate(plain.model.layers):
        if hasattr(layer.mlp, "experts"):
            hooks.append(layer.mlp.gate.register_forward_hook(hook))
            order.append(number)
    plain(ids)
    for handle in hooks:
        handle.remove()
    found = dict(zip(order, means, strict=True))
    return [found.get(number, np.zeros(0)) for number in range(len(plain.model.layers))]


def test_only_trunk_and_shared_experts_are_resident(golden: Any, load: Callable[..., PreTrainedModel]) -> None:
    router = TrunkPredictor.load(golden.checkpoint, dtype="float32")
    paged = load(golden.checkpoint).expert_paging
    assert router.resident_bytes == paged.plan.trunk_bytes + paged.plan.resident_bytes
    assert paged.plan.resident_bytes == 4 * 24576, "a shared expert in each of four layers"
    assert router.fingerprint == paged.fingerprint
    assert router.facts == paged.facts
    assert TrunkPredictor.load(golden.checkpoint).resident_bytes == router.resident_bytes // 2  # in bfloat16


def test_the_first_layers_scores_are_exact(golden: Any) -> None:
    """Below the first experts nothing is missing yet."""
    ids = golden.tensors["doc96.input_ids"][0].tolist()
    (first, *_) = TrunkPredictor.load(golden.checkpoint, dtype="float32").scores(ids).mean_LR
    expected = golden.tensors["doc96.router_logits.0"][:, :15].softmax(-1).mean(0)
    np.testing.assert_allclose(first, expected, atol=1e-5)


def test_a_prediction_finds_more_of_the_pool_than_chance(golden_pools: Any) -> None:
    router = TrunkPredictor.load(golden_pools.checkpoint, dtype="float32")
    scores = router.scores(golden_pools.tensors["input_ids"][0].tolist())
    predicted = pick_pool(scores, Count(4), router.facts)
    actual = [set(documents[0]) for documents in golden_pools.facts["pool4.pools_per_layer"]]
    found = [len(set(layer) & pool) for layer, pool in zip(predicted.experts, actual, strict=True)]
    assert found[0] == 4
    assert sum(found) / 16 > 4 / 15


@pytest.mark.parametrize(("ids", "named"), [([], "empty"), ([1, 256], "token id 256"), ([-1], "token id -1")])
def test_a_prompt_that_can_not_be_scored(golden: Any, ids: list[int], named: str) -> None:
    router = TrunkPredictor.load(golden.checkpoint)
    with pytest.raises(InvalidRequest, match=named):
        router.scores(ids)
    assert router.scores([1, 2]).num_tokens == 2


def test_prompts_do_not_leak_into_each_other(golden: Any) -> None:
    router = TrunkPredictor.load(golden.checkpoint, dtype="float32")
    first, second = (golden.tensors[f"prompt{number}.input_ids"][0].tolist() for number in (0, 1))
    before, _, after = router.scores(first), router.scores(second), router.scores(first)
    for mean, again in zip(before.mean_LR, after.mean_LR, strict=True):
        np.testing.assert_array_equal(mean, again)
