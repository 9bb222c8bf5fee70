"""bf16 in company: the logits of forced tokens, in batches of four pools and alone, and paged against unpaged.

Batch shapes change the order of sums, and bf16 keeps 8 bits: equal tokens can't be promised, close logits can.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pager
from pager.engine.attention import layers_of
from pager.engine.kv import BlockPool, KvCache
from pager.engine.paged_model import PagedModel, load_paged_model
from pager.engine.runner import DecodeBatch, ModelRunner, PromptPart, RowStart
from pager.memory import Budgets
from pager.types import ExpertPool, PoolPolicy, PoolSource
from tests.support.values import some

NUM_SEQUENCES, NUM_TOGETHER, PROMPT, FORCED = 16, 4, 24, 16
# Logits here reach 16, where neighbouring bf16 numbers are 1/16 apart.
MAX_DIFFERENCE, MEAN_DIFFERENCE = 0.25, 0.01
MEAN_DIFFERENCE_IN_COMPANY = 0.03  # prompts that run together are so many rows that another kernel multiplies them


@pytest.fixture(scope="module")
def paged(model: Path) -> Iterator[PagedModel]:
    budgets = Budgets(expert_memory="26%", kv_memory="16MiB")
    loaded = load_paged_model(model, dtype=torch.bfloat16, budgets=budgets)
    yield loaded
    loaded.close()


def tokens_of(sequence: int) -> list[int]:
    draw = torch.Generator().manual_seed(sequence)
    return torch.randint(2, 4096, (PROMPT + FORCED,), generator=draw).tolist()


def policy_of(sequence: int) -> PoolPolicy:
    draw = torch.Generator().manual_seed(1000 + sequence)
    layers = [torch.randperm(127, generator=draw)[:8].sort().values.tolist() for _ in range(6)]
    return PoolPolicy(source=PoolSource.FIXED, fixed=ExpertPool(tuple(map(tuple, layers))))


def forced_logits(paged: PagedModel, sequences: list[int]) -> torch.Tensor:
    """[B, FORCED, V]: what follows each token when all of them are given, the sequences running together."""
    cache = KvCache(layers_of(paged.config), paged.plan.num_kv_blocks, paged.dtype, paged.device)
    runner = ModelRunner(paged.model, cache, paged.device)
    blocks = BlockPool(paged.plan.num_kv_blocks)
    with ExitStack() as held:
        documents, tables = [], []
        for sequence in sequences:
            lease = paged.reserve(policy_of(sequence))
            assert lease is not None
            held.callback(lease.release)
            documents.append(paged.routing(policy_of(sequence), lease=lease))
            tables.append(some(blocks.allocate(PROMPT + FORCED)))
        rows_T = torch.arange(len(sequences)).repeat_interleave(PROMPT)
        with paged.step(documents, rows=rows_T, prefill=True):
            prompts = [tokens_of(sequence)[:PROMPT] for sequence in sequences]
            runner.prefill([PromptPart(prompt, table) for prompt, table in zip(prompts, tables, strict=True)])
        forced_BT = torch.tensor([tokens_of(sequence)[PROMPT:] for sequence in sequences])
        starts = [RowStart(table, token, PROMPT) for table, token in zip(tables, forced_BT[:, 0].tolist(), strict=True)]
        batch, logits = DecodeBatch(starts, paged.device), []
        for step in range(FORCED):
            with paged.step(documents):
                logits.append(runner.decode(batch).float())
            if step + 1 < FORCED:
                batch.advance(forced_BT[:, step + 1])
        return torch.stack(logits, 1)


def assert_close(found: torch.Tensor, expected: torch.Tensor, mean: float = MEAN_DIFFERENCE) -> None:
    difference = (found - expected).abs()
    assert difference.max() <= MAX_DIFFERENCE
    assert difference.mean() <= mean


@pytest.mark.slow
def test_logits_in_company_are_those_of_the_sequence_alone(paged: PagedModel) -> None:
    everybody = range(NUM_SEQUENCES)
    groups = [list(everybody[first : first + NUM_TOGETHER]) for first in everybody[::NUM_TOGETHER]]
    alone = torch.cat([forced_logits(paged, [sequence]) for sequence in everybody])
    assert_close(torch.cat([forced_logits(paged, group) for group in groups]), alone, MEAN_DIFFERENCE_IN_COMPANY)
    assert (alone[0] - alone[1]).abs().mean() > 10 * MEAN_DIFFERENCE_IN_COMPANY, (
        "the sequences are not the same to begin with"
    )


def test_exact_logits_are_those_of_the_unpaged_model(model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    paged = pager.load_model(model, dtype="bfloat16", expert_memory="25%")
    token_ids = torch.tensor([tokens_of(sequence) for sequence in range(8)])
    with torch.inference_mode():
        assert_close(paged(token_ids).logits.float(), plain(token_ids).logits.float())
    paged.expert_paging.close()
