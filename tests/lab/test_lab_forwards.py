"""Losses under pools against plain transformers, whatever the family and the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pager.engine.paged_model import PagedModel, load_paged_model
from pager.lab.recording import Forwards, batches, experts_in_bulk
from pager.memory import Budgets
from pager.types import Count, ExpertPool, PoolPolicy, PoolSource

PROMPT = 12
TEXTS = [
    torch.randint(2, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (40, 24, 33, 64, 40)
]


@pytest.fixture
def open_model(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., PagedModel]]:
    opened: list[PagedModel] = []

    def load(family: str, expert_memory: str = "100%") -> PagedModel:
        budgets = Budgets(expert_memory=expert_memory)
        opened.append(load_paged_model(checkpoint(family), dtype=torch.float32, budgets=budgets))
        return opened[-1]

    yield load
    for paged in opened:
        paged.close()


def nats_of(logits_SV: Tensor, text: list[int]) -> float:
    """Cross entropy of the tokens after the prompt, written out."""
    log_probs = logits_SV.double().log_softmax(-1)
    return -sum(float(log_probs[place - 1, text[place]]) for place in range(PROMPT, len(text)))


@pytest.mark.parametrize("family", ["emo", "olmoe", "mixtral", "qwen3_moe"])
def test_with_all_experts_losses_are_those_of_transformers(
    family: str, open_model: Callable[..., PagedModel], checkpoint: Callable[[str], Path]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    forwards = Forwards(open_model(family), PROMPT, batch_tokens=100)
    outcomes, means = forwards.full(TEXTS)
    for text, outcome, mean in zip(TEXTS, outcomes, means, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([text])).logits[0]
        assert outcome.nats == pytest.approx(nats_of(logits, text), rel=1e-5)
        assert outcome.best_P.tolist() == logits[PROMPT - 1 : -1].argmax(-1).tolist()
        assert outcome.pool is None
        assert all(layer.sum() == pytest.approx(1.0, abs=1e-5) for layer in (*mean.prompt_LR, *mean.whole_LR))
    labels = torch.tensor([TEXTS[3]])
    labels[:, :PROMPT] = -100
    with torch.no_grad():
        own = plain(torch.tensor([TEXTS[3]]), labels=labels).loss.item()
    assert outcomes[3].nats / (len(TEXTS[3]) - PROMPT) == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("family", ["emo", "mixtral"])
def test_a_tight_budget_and_all_in_memory_give_the_same_losses(
    family: str, open_model: Callable[..., PagedModel]
) -> None:
    resident, tight = open_model(family), open_model(family, "25%")
    policies = [PoolPolicy(Count(4))] * len(TEXTS)
    with experts_in_bulk(resident), experts_in_bulk(tight):
        roomy = Forwards(resident, PROMPT).outcomes(TEXTS, policies)
        paged = Forwards(tight, PROMPT, batch_tokens=70).outcomes(TEXTS, policies)
        exact = Forwards(resident, PROMPT).outcomes(TEXTS, [PoolPolicy()] * len(TEXTS))
    assert resident.fully_resident
    assert not tight.fully_resident
    assert tight.pager.stats().evictions > 0
    pools = [[outcome.pool.experts for outcome in found if outcome.pool] for found in (roomy, paged)]
    assert len(pools[0]) == len(TEXTS)
    assert pools[0] == pools[1]
    assert [outcome.nats for outcome in roomy] == pytest.approx([outcome.nats for outcome in paged], rel=1e-5)
    for one, other in zip(roomy, paged, strict=True):
        assert np.array_equal(one.best_P, other.best_P)
    assert max(abs(one.nats - other.nats) for one, other in zip(roomy, exact, strict=True)) > 0.1


def test_a_pool_of_all_experts_changes_nothing(open_model: Callable[..., PagedModel]) -> None:
    paged = open_model("emo")
    every = ExpertPool(tuple(tuple(range(routed)) for routed in paged.facts.routed_per_layer))
    forwards = Forwards(paged, PROMPT)
    full = forwards.outcomes(TEXTS, [PoolPolicy()] * len(TEXTS))
    fixed = forwards.outcomes(TEXTS, [PoolPolicy(source=PoolSource.FIXED, fixed=every)] * len(TEXTS))
    assert [outcome.nats for outcome in fixed] == [outcome.nats for outcome in full]


def test_one_forward_is_the_prefill_and_what_follows(
    open_model: Callable[..., PagedModel], masked_by_hand: Callable[[Path, list[int], ExpertPool], Tensor],
    checkpoint: Callable[[str], Path],
) -> None:  # fmt: skip
    paged = open_model("emo")
    policies = [PoolPolicy(Count(5))] * len(TEXTS)
    outcomes = Forwards(paged, PROMPT, batch_tokens=100).outcomes(TEXTS, policies)
    for text, outcome in zip(TEXTS, outcomes, strict=True):
        document = paged.routing(PoolPolicy(Count(5)))
        with torch.inference_mode(), paged.step([document], prefill=True):
            paged.model.model(input_ids=torch.tensor([text[:PROMPT]]), use_cache=False)
        assert outcome.pool is not None
        assert document.pool is not None
        assert outcome.pool.experts == document.pool.experts
        logits = masked_by_hand(checkpoint("emo"), text, outcome.pool)
        assert outcome.nats == pytest.approx(nats_of(logits, text), rel=1e-5)


@pytest.fixture
def masked_by_hand() -> Callable[[Path, list[int], ExpertPool], Tensor]:
    """A plain model whose router rows outside of the pool cannot win: their logits are made -1e9 by a hook."""

    def run(path: Path, text: list[int], pool: ExpertPool) -> Tensor:
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for layer, kept in zip(plain.model.layers, pool.experts, strict=True):
            outside = [expert for expert in range(16) if expert not in kept]
            pick = layer.mlp.gate.pick
            layer.mlp.gate.pick = lambda logits, allowed=None, pick=pick, outside=outside: pick(
                logits.index_fill(1, torch.tensor(outside), -1e9)
            )
        with torch.no_grad():
            logits: Tensor = plain(torch.tensor([text])).logits[0]
        return logits

    return run


def test_whole_texts_choose_from_all_their_tokens(open_model: Callable[..., PagedModel]) -> None:
    paged = open_model("emo")
    forwards = Forwards(paged, PROMPT, batch_tokens=100)
    pools = forwards.pools(TEXTS, Count(4))
    alone = [forwards.pools([text], Count(4))[0] for text in TEXTS]
    assert [pool.experts for pool in pools] == [pool.experts for pool in alone]
    oracle = forwards.outcomes(TEXTS, [PoolPolicy(Count(4))] * len(TEXTS), voters=64)
    assert [outcome.pool.experts for outcome in oracle if outcome.pool] == [pool.experts for pool in pools]


def test_batches_hold_every_text_once_and_no_more_than_they_may() -> None:
    lengths = [3, 50, 7, 50, 20, 64, 1]
    made = list(batches(lengths, 100))
    assert sorted(index for rows in made for index in rows) == list(range(7))
    assert made[0] == [5]
    for rows in made:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= 100
