"""How many threads a model's steps are computed with: what is measured, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pager.engine import runner
from pager.engine.paged_model import load_paged_model
from pager.engine.runner import BATCHES, choose, step_seconds, use_fastest_num_threads
from pager.memory import Budgets
from pager.models import EmoConfig, EmoForCausalLM

pytestmark = pytest.mark.slow


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "intermediate_size": 16, "max_position_embeddings": 128, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "emo": lambda: EmoForCausalLM(EmoConfig(**SMALL, num_experts=8)),
    "emo, some always active": lambda: EmoForCausalLM(EmoConfig(**SMALL, num_experts=8, always_active_experts=[1])),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=8, head_dim=8)),
    "qwen3, some dense": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_experts=8, moe_intermediate_size=16, head_dim=8, mlp_only_layers=[0])
    ),
}


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_measured_without_paging_anything(name: str, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    paged = load_paged_model(tmp_path, dtype=torch.float32, budgets=Budgets(expert_memory="50%", kv_memory="1MiB"))
    try:
        slot_of_LE, stats = paged.pager.slots.slot_of_LE.clone(), paged.pager.stats()
        seconds = step_seconds(paged, [1, 2])
        assert [len(found) for found in seconds.values()] == [len(BATCHES)] * 2
        assert all(each > 0 for found in seconds.values() for each in found)
        assert use_fastest_num_threads(paged, 2) == torch.get_num_threads()
        assert paged.pager.slots.slot_of_LE.equal(slot_of_LE)
        assert paged.pager.stats() == stats
        paged.pager.check_integrity()
    finally:
        paged.close()


def test_answers_after_the_measurement_are_those_without_it(make_driver: Any, random_prompt: Any) -> None:
    plain, measured = make_driver(48), make_driver(48)
    step_seconds(measured.paged, [1])
    prompts = [random_prompt(seed, 10) for seed in range(3)]
    answers = []
    for driver in (plain, measured):
        ids = [driver.submit(prompt, max_tokens=8) for prompt in prompts]
        driver.finish()
        answers.append([driver.tokens(each) for each in ids])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: [1.0, 2.0], 2: [0.6, 1.2]}, 2),
        ({1: [1.0, 2.0], 2: [0.97, 1.9]}, 1),  # not worth a thread that others could use
        ({1: [1.0, 2.0], 2: [30.0, 60.0]}, 1),
        ({1: [1.0, 2.0], 2: [1.0, 1.2]}, 2),  # one batch gains, and the other does not lose
        ({1: [1.0, 2.0], 2: [0.97, 1.9], 4: [0.5, 1.0]}, 4),
        ({1: [1.0, 2.0], 2: [0.6, 1.2], 4: [0.58, 1.2], 6: [0.7, 1.4]}, 2),
    ],
)
def test_more_threads_are_taken_where_they_are_worth_it(seconds: dict[int, list[float]], chosen: int) -> None:
    assert choose(seconds) == chosen


def test_the_fastest_is_in_force(make_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paged = make_driver().paged
    asked: list[list[int]] = []

    def found(_: object, counts: list[int]) -> dict[int, list[float]]:
        asked.append(counts)
        return {count: [1.0 / count] * len(BATCHES) for count in counts}

    monkeypatch.setattr(runner, "step_seconds", found)
    assert use_fastest_num_threads(paged, 6) == torch.get_num_threads() == 6
    assert use_fastest_num_threads(paged, 4) == torch.get_num_threads() == 4
    assert use_fastest_num_threads(paged, 1) == torch.get_num_threads() == 1
    assert asked == [[1, 2, 4, 6], [1, 2, 4]]
