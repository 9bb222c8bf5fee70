"""Gate probabilities of the golden checkpoint, against transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import InvalidRequest
from pager.lab.clusters import GateTracer
from pager.lab.corpus import Document
from pager.memory import Budgets
from pager.models import EmoForCausalLM

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "ckpt_emo_tiny"


@pytest.fixture
def load() -> Iterator[Callable[[str], PagedModel]]:
    loaded: list[PagedModel] = []

    def load(expert_memory: str) -> PagedModel:
        loaded.append(load_paged_model(CHECKPOINT, dtype="float32", budgets=Budgets(expert_memory=expert_memory)))
        return loaded[-1]

    yield load
    for paged in loaded:
        paged.close()


@pytest.mark.parametrize("expert_memory", ["100%", "25%"])
def test_probabilities_are_those_of_the_unpaged_model(load: Callable[[str], PagedModel], expert_memory: str) -> None:
    ids = torch.randint(2, 60, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = EmoForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
        logits = plain(ids, output_router_logits=True).router_logits
    shared = plain.config.num_shared_experts
    expected = torch.cat([layer.reshape(70, -1)[:, :-shared].softmax(-1) for layer in logits], 1).numpy()
    paged = load(expert_memory)
    tracer = GateTracer(paged, Tokenizer(BPE()))
    found = tracer.probabilities(ids[0].tolist())
    assert found.shape == (70, sum(paged.facts.routed_per_layer))
    assert np.abs(found - expected).max() < 1e-5
    again = tracer.probabilities(ids[0, :7].tolist())  # a shorter one leaves nothing of the longer
    assert np.abs(again - expected[:7]).max() < 1e-5


def test_a_document_without_tokens_is_refused(load: Callable[[str], PagedModel]) -> None:
    with pytest.raises(InvalidRequest, match="document 'd-1' of law has no tokens"):
        GateTracer(load("25%"), Tokenizer(BPE())).trace(Document("law", "d-1", "unknown"), 10)
