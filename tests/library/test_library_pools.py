"""Pool sizes through load_model: what is asked for, what a document gets, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pager.errors import InvalidRequest, PoolTooSmall, UnsupportedModel

Load = Callable[..., PreTrainedModel]
MakeSmall = Callable[..., Any]


@pytest.mark.parametrize(
    ("pool_size", "routed"),
    [
        (3, 3),
        ("5", 5),
        ("25%", 3),
        ("50%", 7),
        ("99%", 14),
        ("mass:1:6", 6),
        ("mass:0.01", 3),
        (15, 15),
        (0.25, 3),
        (0.5, 7),
        (0.99, 14),
    ],
)
def test_a_document_gets_the_pool_that_was_asked_for(
    golden: Any, load: Load, pool_size: str | int, routed: int
) -> None:
    """Of 16 experts a layer one is shared; a token picks three of the others."""
    model = load(golden.checkpoint, pool_size=pool_size, expert_memory="25%")
    (document,) = model(golden.tensors["doc96.input_ids"]).past_key_values.documents
    assert [len(layer) for layer in document.pool.experts] == [routed] * 4
    assert all(max(layer) < 15 for layer in document.pool.experts), "the shared expert is implied"


@pytest.mark.parametrize("mass", [0.3, 0.6, 0.9])
def test_a_mass_takes_the_fewest_experts_that_reach_it(golden: Any, load: Load, mass: float) -> None:
    model = load(golden.checkpoint, pool_size=f"mass:{mass}:15", expert_memory="50%")
    output = model(golden.tensors["doc96.input_ids"], output_router_logits=True)
    (document,) = output.past_key_values.documents
    covered = []
    for logits, experts in zip(output.router_logits, document.pool.experts, strict=True):
        mean = logits[:, :15].softmax(-1).mean(0)
        inside = mean[list(experts)]
        assert inside.sum() >= mass - 1e-5
        assert len(experts) == 3 or inside.sum() - inside.min() < mass
        assert set(experts) == set(mean.topk(len(experts)).indices.tolist())
        covered.append(float(inside.sum()))
    assert not document.degraded
    assert document.pool.covered_mass == pytest.approx(sum(covered) / 4, abs=1e-5)


@pytest.mark.parametrize(
    ("pool_size", "degraded"), [("mass:0.95:4", True), ("mass:0.95", True), ("mass:0.95:15", False), (4, False)]
)
def test_a_mass_that_its_cap_did_not_allow_is_reported(
    golden: Any, load: Load, pool_size: str | int, degraded: bool
) -> None:
    model = load(golden.checkpoint, pool_size=pool_size, expert_memory="25%")
    (document,) = model(golden.tensors["doc96.input_ids"]).past_key_values.documents
    assert document.degraded is degraded


@pytest.mark.parametrize(("pool_size", "count"), [(2, 2), ("12.5%", 1), ("mass:0.9:2", 2), ("24%", 2)])
def test_fewer_than_a_token_picks_is_refused(golden: Any, load: Load, pool_size: str | int, count: int) -> None:
    with pytest.raises(
        PoolTooSmall, match=rf"{count} routed experts in layer 0 .* the 3 .* ask for at least 3"
    ) as caught:
        load(golden.checkpoint, pool_size=pool_size, expert_memory="50%")
    assert caught.value.field == "pool.size"


@pytest.mark.parametrize(
    "pool_size", ["a few", "mass:2", -1, 0, "0%", "mass:0.5:0", True, 1.5, 0.0, float("nan"), "0.5"]
)
def test_no_pool_size_is_refused(golden: Any, load: Load, pool_size: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load(golden.checkpoint, pool_size=pool_size)
    assert caught.value.field is not None
    assert caught.value.field.startswith("pool.size")


def test_layers_of_different_sizes_and_dense_ones(small: MakeSmall, load: Load) -> None:
    made = small(
        "emo",
        num_hidden_layers=4,
        num_experts_per_layer=[0, 12, 5, 9],
        num_shared_experts_per_layer=[0, 2, 1, 0],
        dense_intermediate_size=24,
    )
    for pool_size, expected in {4: [0, 4, 4, 4], "75%": [0, 7, 2, 6], 10: [0, 10, 4, 9]}.items():
        model = load(made.path, pool_size=pool_size, expert_memory="50%")
        for document in model(made.prompt()).past_key_values.documents:
            assert [len(layer) for layer in document.pool.experts] == expected


@pytest.mark.parametrize(
    "config", [{"always_active_experts": [0, 3]}, {"always_active_experts_per_layer": [None, [1], None]}]
)
@pytest.mark.parametrize("pool_size", [8, "50%", "mass:0.9"])
def test_always_active_experts_rule_out_pools(
    small: MakeSmall, load: Load, config: dict[str, Any], pool_size: str | int
) -> None:
    made = small("emo", **config)
    with pytest.raises(UnsupportedModel, match="not defined for always-active experts; ask for the full model"):
        load(made.path, pool_size=pool_size)
    assert load(made.path, pool_size="full")(made.prompt()).logits.isfinite().all()


def test_equal_mass_goes_to_the_lower_id(small: MakeSmall, load: Load) -> None:
    """A router of zeros finds all experts equal."""
    made = small("mixtral")
    for layer in made.plain.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    made.plain.save_pretrained(made.path)
    documents = load(made.path, pool_size=3)(made.prompt()).past_key_values.documents
    assert {document.pool.experts for document in documents} == {((0, 1, 2),) * 3}
