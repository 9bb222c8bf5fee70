"""The engine against plain transformers for every family with the experts interface, on small models of its own config.

Each request runs alone and among others of other lengths, its prompt in parts, and after a prefix that was computed
before; every family that is not served is refused before anything of it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pager.engine.attention import check_served
from pager.engine.interface import EngineLimits
from pager.engine.paged_model import load_paged_model
from pager.errors import UnsupportedModel
from pager.memory import Budgets
from pager.models.open_model import OpenModel
from pager.types import Count, Full, PoolPolicy
from tests.engine.conftest import Driver
from tests.support.checkpoints import letters_tokenizer
from tests.support.families import FAMILIES, NOT_POOLED, NOT_SERVED, saved_family, small_config

SERVED = sorted(FAMILIES.keys() - NOT_SERVED.keys())
NUM_TOKENS = 6
POOL = PoolPolicy(Count(4))
EXACT = PoolPolicy(Full())
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A team of threads waits for its last one, which takes seconds a step on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, (length,), generator=generator).tolist() for length in (2, 19, 37)]


@contextmanager
def driver_of(path: Path, expert_memory: str, **limits: Any) -> Iterator[Driver]:
    budgets = Budgets(expert_memory=expert_memory, kv_memory="1MiB", max_running=8)
    paged = load_paged_model(path, dtype=torch.float32, budgets=budgets)
    try:
        yield Driver(paged, EngineLimits(**limits), tokenizer=letters_tokenizer())
    finally:
        paged.close()


def plain_logprobs(model: PreTrainedModel, prompt: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    """The greedy answer, and the log-probability of each of its tokens."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False,
                            eos_token_id=None, output_logits=True, return_dict_in_generate=True)  # fmt: skip
    answer = output.sequences[0, len(prompt) :]
    rows = torch.stack([row[0] for row in output.logits]).log_softmax(-1)
    return answer.tolist(), rows.gather(1, answer[:, None])[:, 0]


def logprobs(driver: Driver, request_id: str) -> torch.Tensor:
    return torch.tensor([each.logprob for chunk in driver.chunks[request_id] for each in chunk.logprobs])


def run(driver: Driver, asked: Sequence[Sequence[int]], pool: PoolPolicy) -> list[str]:
    ids = [driver.submit(prompt, pool, max_tokens=NUM_TOKENS, logprobs=1) for prompt in asked]
    driver.finish()
    assert not driver.failures
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_each_request_alone_and_in_company_is_plain_transformers(name: str, tmp_path: Path) -> None:
    model = saved_family(name, tmp_path)
    expected = [plain_logprobs(model, prompt) for prompt in prompts()]
    with driver_of(tmp_path, "50%", prefill_chunk_tokens=16, lone_chunk_tokens=16) as driver:
        together = run(driver, prompts(), EXACT)
        alone = [run(driver, [prompt], EXACT)[0] for prompt in prompts()]
        for request_id, (tokens, numbers) in zip([*together, *alone], [*expected, *expected], strict=True):
            assert driver.tokens(request_id) == tokens
            torch.testing.assert_close(logprobs(driver, request_id), numbers, **TOLERANCE)
        cached = [0, 0, 0] if driver.paged.keeps_states else [0, 16, 32]
        assert [driver.usage(each).cached_prompt_tokens for each in alone] == cached
    with driver_of(tmp_path, "100%", prefix_cache=False) as driver:
        if name in NOT_POOLED:
            with pytest.raises(UnsupportedModel, match="runs with all its experts only"):
                driver.submit(prompts()[0], POOL)
            return
        everything = run(driver, prompts(), PoolPolicy(Count(max(driver.paged.facts.routed_per_layer))))
        for request_id, (tokens, _) in zip(everything, expected, strict=True):
            assert driver.tokens(request_id) == tokens, "a pool of all experts"
        pooled = run(driver, prompts(), POOL)
        for request_id, prompt in zip(pooled, prompts(), strict=True):
            (single,) = run(driver, [prompt], POOL)
            assert driver.tokens(request_id) == driver.tokens(single)
            torch.testing.assert_close(logprobs(driver, request_id), logprobs(driver, single), **TOLERANCE)
        driver.assert_nothing_held()


@pytest.mark.parametrize("name", NOT_SERVED)
def test_every_other_family_is_refused_before_it_loads(name: str, tmp_path: Path) -> None:
    if name not in FAMILIES:
        pytest.skip("this transformers does not have it")
    saved_family(name, tmp_path)
    opened = OpenModel.open(tmp_path, "float32")
    with opened.checkpoint, pytest.raises(UnsupportedModel) as caught:
        check_served(opened)
    assert caught.value.message.startswith(f"{small_config(FAMILIES[name]).model_type} is not supported by the service")
    # as transformers 5.17 calls that kind of layers
    said = caught.value.message.replace("deepseek_sparse_attention", "indexed_attention")
    assert NOT_SERVED[name] in said


def test_the_documented_table_is_what_the_tests_hold() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    table = {name.strip("`"): (exact, pools, service) for name, exact, pools, service in rows}
    assert table.keys() >= FAMILIES.keys() | NOT_SERVED.keys()
    for name, (exact, pools, service) in table.items():
        assert exact == "yes"
        assert pools.startswith("no: ") if name in NOT_POOLED else pools == "yes", name
        assert pools.endswith(NOT_POOLED.get(name, "yes")), name
        assert service == (f"no: {NOT_SERVED[name]}" if name in NOT_SERVED else "yes"), name
