"""load_model against plain transformers for every family with the experts interface, on small models of its config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pager.errors import UnsupportedModel
from pager.models.families import expert_modules
from pager.models.open_model import OpenModel
from tests.support.families import FAMILIES, NOT_POOLED, saved_family

pytestmark = pytest.mark.slow

Load = Callable[..., PreTrainedModel]

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}
POOL = 4

Plain = tuple[str, PreTrainedModel, Path]
PROMPT = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, PreTrainedModel, Path]:
    """A family's name, a random model of it, and where transformers saved it."""
    path = tmp_path_factory.mktemp(request.param)
    return request.param, saved_family(request.param, path), path


@torch.no_grad()
def test_exact_is_plain_transformers_at_every_budget(plain: Plain, load: Load) -> None:
    _, model, path = plain
    expected, tokens = model(PROMPT).logits, model.generate(PROMPT, **GREEDY)
    opened = OpenModel.open(path, "float32")
    opened.checkpoint.close()
    for budget in ("100%", "50%", max(opened.facts.top_k_per_layer) * opened.expert_bytes):
        paged = load(path, dtype="float32", expert_memory=budget)
        torch.testing.assert_close(paged(PROMPT).logits, expected, **TOLERANCE)
    assert paged.generate(PROMPT, **GREEDY).equal(tokens), "with the least budget"


@torch.no_grad()
def test_stacked_as_the_model_has_them_they_load_the_same(plain: Plain, load: Load, tmp_path: Path) -> None:
    _, model, _ = plain
    model.save_pretrained(tmp_path, save_original_format=False)
    paged = load(tmp_path, dtype="float32", expert_memory="50%")
    torch.testing.assert_close(paged(PROMPT).logits, model(PROMPT).logits, **TOLERANCE)


@torch.no_grad()
def test_pools_hold_the_picks_and_all_experts_are_no_pool(plain: Plain, load: Load) -> None:
    name, model, path = plain
    if name in NOT_POOLED:
        with pytest.raises(UnsupportedModel, match=f"runs with all its experts only: .*{NOT_POOLED[name]}"):
            load(path, dtype="float32", pool_size=POOL)
        return
    paged = load(path, dtype="float32", pool_size=POOL)
    facts, picked = paged.expert_paging.facts, list[tuple[int, Tensor]]()
    for _, experts in expert_modules(paged):
        experts.register_forward_pre_hook(lambda module, inputs: picked.append((module.paging.layer, inputs[1])))
    output = paged(PROMPT, use_cache=True)
    documents = output.past_key_values.documents
    paged(PROMPT[:, :1], past_key_values=output.past_key_values, use_cache=True)
    assert {len(experts) for each in documents for experts in each.pool.experts if experts} == {POOL}
    for layer, index_TK in picked:
        for row, picks in enumerate(index_TK.view(len(documents), -1)):
            shared = facts.experts_per_layer[layer] - facts.shared_per_layer[layer]
            inside = {*documents[row].pool.experts[layer], *range(shared, facts.experts_per_layer[layer])}
            assert set(picks.tolist()) <= inside, f"row {row} of layer {layer}"
    full = load(path, dtype="float32", pool_size=max(facts.routed_per_layer))
    torch.testing.assert_close(full(PROMPT).logits, model(PROMPT).logits, **TOLERANCE)
