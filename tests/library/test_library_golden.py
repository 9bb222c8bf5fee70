"""load_model on the small EMO checkpoint against what the authors' own code computed for it (tests/data/golden)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from pager.types import Count, PoolPolicy

Load = Callable[..., PreTrainedModel]

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}
EXPERT_BYTES = 3 * 64 * 32 * 4
SMALLEST = 3 * EXPERT_BYTES  # one token's routed experts of one layer
BUDGETS = ["100%", "50%", "25%", "12.5%", SMALLEST]


@pytest.mark.parametrize("budget", BUDGETS)
def test_logits_are_the_references_on_any_budget(golden: Any, load: Load, budget: str | int) -> None:
    model = load(golden.checkpoint, expert_memory=budget)
    for name in ("doc96", "prompt0", "prompt1", "prompt2"):
        logits = model(golden.tensors[f"{name}.input_ids"]).logits
        torch.testing.assert_close(logits, golden.tensors[f"{name}.logits"], **TOLERANCE)
    for name in ("batch_left", "batch_right"):
        mask = golden.tensors[f"{name}.attention_mask"]
        logits = model(golden.tensors[f"{name}.input_ids"], attention_mask=mask).logits
        real = mask.bool()
        torch.testing.assert_close(logits[real], golden.tensors[f"{name}.logits"][real], **TOLERANCE)
    model.expert_paging.pager.check_integrity()


def test_a_model_may_be_loaded_in_inference_mode(golden: Any, load: Load) -> None:
    with torch.inference_mode():
        model = load(golden.checkpoint, expert_memory="25%")
        logits = model(golden.tensors["doc96.input_ids"]).logits
    torch.testing.assert_close(logits, golden.tensors["doc96.logits"], **TOLERANCE)


@pytest.mark.parametrize("budget", BUDGETS)
def test_greedy_tokens_are_the_references_on_any_budget(golden: Any, load: Load, budget: str | int) -> None:
    model = load(golden.checkpoint, expert_memory=budget)
    for name in ("doc96", "prompt0", "prompt1", "prompt2"):
        assert generate(model, golden.tensors[f"{name}.input_ids"]) == golden.tensors[f"{name}.gen32"].tolist()
    left = generate(model, golden.tensors["batch_left.input_ids"], mask=golden.tensors["batch_left.attention_mask"])
    assert left == golden.tensors["batch_left.gen32"].tolist()


@pytest.mark.parametrize("budget", ["100%", SMALLEST])
@pytest.mark.parametrize("count", [4, 8])
def test_a_pool_over_the_whole_document(golden_pools: Any, load: Load, count: int, budget: str | int) -> None:
    model = load(golden_pools.checkpoint, pool_size=count, expert_memory=budget)
    output = model(golden_pools.tensors["input_ids"], use_cache=True)
    torch.testing.assert_close(output.logits, golden_pools.tensors[f"pool{count}.logits"], **TOLERANCE)
    (document,) = output.past_key_values.documents
    assert document.pool.experts == pools_of(golden_pools, f"pool{count}")


@pytest.mark.parametrize("count", [4, 8])
def test_the_router_logits_and_picks_inside_a_pool(golden_pools: Any, load: Load, count: int) -> None:
    model = load(golden_pools.checkpoint, pool_size=count)
    picks: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: picks.append(args[1]))
    output = model(golden_pools.tensors["input_ids"], output_router_logits=True)
    for layer, (logits, pick) in enumerate(zip(output.router_logits, picks, strict=True)):
        golden_logits = golden_pools.tensors[f"pool{count}.router_logits.{layer}"]
        torch.testing.assert_close(logits, golden_logits, **TOLERANCE)
        assert pick.sort(-1).values.equal(golden_pools.tensors[f"pool{count}.topk_idx.{layer}"].sort(-1).values)


@pytest.mark.parametrize("count", [4, 8])
def test_a_pool_chosen_over_a_prefix_is_frozen_for_the_rest(golden_pools: Any, load: Load, count: int) -> None:
    model = load(golden_pools.checkpoint, pool_size=count, expert_memory="50%")
    ids, cache = golden_pools.tensors["input_ids"], DynamicCache(config=model.config)
    logits = [model(part, past_key_values=cache, use_cache=True).logits for part in (ids[:, :64], ids[:, 64:])]
    torch.testing.assert_close(torch.cat(logits, 1), golden_pools.tensors[f"pool{count}_prefix64.logits"], **TOLERANCE)
    assert cache.documents[0].pool.experts == pools_of(golden_pools, f"pool{count}_prefix64")


@pytest.mark.parametrize("budget", ["100%", SMALLEST])
@pytest.mark.parametrize("count", [4, 8])
def test_generation_stays_in_the_pool_of_its_prompt(
    golden_pools: Any, load: Load, count: int, budget: str | int
) -> None:
    model = load(golden_pools.checkpoint, pool_size=count, expert_memory=budget)
    prompt = golden_pools.tensors["input_ids"][:, :64]
    output = model.generate(
        prompt, max_new_tokens=32, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=-1
    )
    name = f"pool{count}_prompt64"
    assert output.sequences[:, 64:].tolist() == golden_pools.tensors[f"{name}.gen32"].tolist()
    torch.testing.assert_close(torch.cat(output.logits), golden_pools.tensors[f"{name}.forced_logits"], **TOLERANCE)
    experts = output.past_key_values.documents[0].pool.experts
    assert [list(layer) for layer in experts] == golden_pools.facts[f"{name}.pools_per_layer"]


@pytest.mark.parametrize("count", [4, 8])
def test_two_documents_in_one_row_have_a_pool_each(golden_pools: Any, load: Load, count: int) -> None:
    """Attention sees the whole row, as in the reference; only the pools differ."""
    model = load(golden_pools.checkpoint, expert_memory="25%")
    paged = model.expert_paging
    documents = [paged.routing(PoolPolicy(size=Count(count))) for _ in range(2)]
    rows = torch.tensor([0] * 40 + [1] * 56)
    with torch.no_grad(), paged.step(documents, rows=rows, prefill=True):
        hidden = model.model(golden_pools.tensors["input_ids"]).last_hidden_state
    name = f"pool{count}_docs40_96"
    torch.testing.assert_close(model.lm_head(hidden), golden_pools.tensors[f"{name}.logits"], **TOLERANCE)
    per_layer = golden_pools.facts[f"{name}.pools_per_layer"]
    for index, document in enumerate(documents):
        assert [list(layer) for layer in document.pool.experts] == [layer[index] for layer in per_layer]


def test_a_pool_of_all_experts_restricts_nothing(golden: Any, load: Load) -> None:
    ids = golden.tensors["doc96.input_ids"]
    for size in (15, 1.0, "100%", "full"):
        logits = load(golden.checkpoint, pool_size=size, expert_memory="25%")(ids).logits
        torch.testing.assert_close(logits, golden.tensors["doc96.logits"], **TOLERANCE)


def generate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[list[int]]:
    mask = torch.ones_like(ids) if mask is None else mask
    output: torch.Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False, eos_token_id=-1)
    return [list(map(int, row)) for row in output[:, ids.shape[1] :]]


def pools_of(golden: Any, name: str) -> tuple[tuple[int, ...], ...]:
    """The reference's pools of the only document."""
    return tuple(tuple(documents[0]) for documents in golden.facts[f"{name}.pools_per_layer"])
