"""What is done to single rows' logits, and what is reported of them, is what transformers makes of the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

import pager  # noqa: F401 - from here on transformers knows the family
from pager.engine.sampler import Context, Draw, LogitEdits, Sampler
from pager.errors import InvalidRequest
from pager.sampling import default_sampling
from pager.types import Count, PoolPolicy, PoolSource, SamplingParams, TokenLogprobs

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "ckpt_emo_tiny"
CPU = torch.device("cpu")
V = 40
tokens = st.integers(0, V - 1)
params_of_logits = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=4).map(lambda d: tuple(d.items())),
    min_tokens=st.integers(0, 6),
)


def by_transformers(logits_V: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> Any:
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, [0, 7], device="cpu"))
    return processors(torch.tensor([prompt + output]), logits_V[None].clone())[0]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(params_of_logits, st.lists(tokens, min_size=1, max_size=8), st.lists(tokens, max_size=8)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 1000),
)
def test_edited_logits_equal_those_of_transformers_processors_in_any_company(
    rows: list[tuple[SamplingParams, list[int], list[int]]], seed: int
) -> None:
    logits_BV = 4 * torch.randn(2 * len(rows), V, generator=torch.Generator().manual_seed(seed))
    edited = [(2 * place, Context(row[0], row[1], row[2], frozenset({0, 7}))) for place, row in enumerate(rows)]
    edits = LogitEdits(edited, CPU)
    edits.prepare()
    found_BV = edits.apply(logits_BV)
    for place, row in enumerate(rows):
        torch.testing.assert_close(found_BV[2 * place], by_transformers(logits_BV[2 * place], *row), rtol=0, atol=1e-5)
        assert torch.equal(found_BV[2 * place + 1], logits_BV[2 * place + 1])


def test_presence_and_frequency_count_the_answer_as_it_grows_and_nothing_of_the_prompt() -> None:
    params, output = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [3, 3]
    edits = LogitEdits([(0, Context(params, [1, 2, 3], output))], CPU)
    for added in ([], [5], [3, 5]):
        output += added
        edits.prepare()
        expected_V = torch.zeros(8)
        for token in set(output):
            expected_V[token] = -0.5 - 0.25 * output.count(token)
        assert torch.equal(edits.apply(torch.zeros(1, 8))[0], expected_V)


def test_a_row_whose_tokens_are_changed_is_drawn_as_alone_whatever_else_is_in_the_batch() -> None:
    params = SamplingParams(temperature=0.9, min_p=0.05, seed=3, frequency_penalty=1.5, logit_bias=((2, 3.0),))
    output: dict[str, list[int]] = {"alone": [], "together": []}
    draws = {name: Draw(params, Context(params, [1], ids)) for name, ids in output.items()}
    others = [
        Draw(SamplingParams()),
        Draw(SamplingParams(repetition_penalty=2.0), Context(SamplingParams(repetition_penalty=2.0), [4, 5], [6])),
    ]
    alone, together = Sampler([draws["alone"]], CPU), Sampler([others[0], draws["together"], others[1]], CPU)
    for step in range(40):
        logits_V = torch.randn(V, generator=torch.Generator().manual_seed(step))
        output["alone"] += alone.sample(logits_V[None]).tolist()
        output["together"].append(together.sample(torch.stack([torch.randn(V), logits_V, torch.randn(V)])).tolist()[1])
    assert output["alone"] == output["together"]


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    ({"logit_bias": ((7, 4.0), (9, -100.0))}, {"sequence_bias": [[[7], 4.0], [[9], -100.0]]}),
    (
        {"repetition_penalty": 1.2, "logit_bias": ((7, 1.5),), "min_tokens": 10},
        {"repetition_penalty": 1.2, "sequence_bias": [[[7], 1.5]], "min_new_tokens": 10},
    ),
]


def test_greedy_answers_equal_those_of_generate_alone_and_in_company(
    make_driver: Callable[..., Any], random_prompt: Callable[..., list[int]], plain: PreTrainedModel
) -> None:
    driver, expected, found = make_driver(60), [], []
    prompts = [random_prompt(seed, 9 + seed) for seed in range(len(OPTIONS))]
    for prompt, (_, options) in zip(prompts, OPTIONS, strict=True):
        ids = plain.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=[0], pad_token_id=1, **options
        )
        expected.append(ids[0, len(prompt) :].tolist())
    for prompt, (options, _) in zip(prompts, OPTIONS, strict=True):
        found.append(driver.submit(prompt, max_tokens=24, ignore_eos=False, stop_token_ids=(0,), **options))
        driver.finish()
    found += [
        driver.submit(prompt, max_tokens=24, ignore_eos=False, stop_token_ids=(0,), **options)
        for prompt, (options, _) in zip(prompts, OPTIONS, strict=True)
    ]
    driver.submit(random_prompt(8, 5), max_tokens=24, temperature=1.0, top_p=0.9)
    driver.finish()
    assert [driver.tokens(each) for each in found] == 2 * expected
    driver.assert_nothing_held()


def test_a_stop_token_ends_the_answer_but_not_before_min_tokens(
    make_driver: Callable[..., Any], random_prompt: Callable[..., list[int]]
) -> None:
    driver, prompt = make_driver(60), random_prompt(1, 8)
    free = driver.submit(prompt, max_tokens=12)
    driver.finish()
    third = driver.tokens(free)[2]
    stopped = driver.submit(prompt, max_tokens=12, stop_token_ids=(third,))
    late = driver.submit(prompt, max_tokens=12, stop_token_ids=(third,), min_tokens=8)
    driver.finish()
    assert driver.tokens(stopped) == driver.tokens(free)[: driver.tokens(free).index(third) + 1]
    assert driver.usage(stopped).finish_reason == "stop"
    assert third not in driver.tokens(late)[:7]


def prompt_logprobs(driver: Any, request_id: str) -> list[TokenLogprobs]:
    return [token for chunk in driver.chunks[request_id] for token in chunk.prompt_logprobs]


def assert_is_log_softmax(found: list[TokenLogprobs], logits_TV: torch.Tensor, ids: list[int], num_top: int) -> None:
    expected_TV = logits_TV.float().log_softmax(dim=-1)
    assert [token.token_id for token in found] == ids
    for token, expected_V in zip(found, expected_TV, strict=True):
        assert token.logprob == pytest.approx(float(expected_V[token.token_id]), abs=1e-4)
        top = expected_V.topk(num_top)
        assert token.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)
        assert token.top_ids == tuple(top.indices.tolist())


@pytest.mark.parametrize("chunk", [7, 2048])
def test_logprobs_of_prompt_and_answer_equal_log_softmax_of_an_exact_model(
    make_driver: Callable[..., Any], random_prompt: Callable[..., list[int]], plain: PreTrainedModel, chunk: int
) -> None:
    driver, prompt = make_driver(60, prefill_chunk_tokens=chunk), random_prompt(1, 50)
    other = driver.submit(random_prompt(2, 20), max_tokens=30, temperature=1.0, logprobs=2)
    driver.engine.step()
    # What is reported is the model's distribution, whatever is done to it before a token is drawn.
    ask = {"logprobs": 5, "prompt_logprobs": 3, "temperature": 0.7, "repetition_penalty": 1.5, "seed": 1}
    asked = driver.submit(prompt, max_tokens=16, **ask)
    driver.finish()
    answer = driver.tokens(asked)
    with torch.no_grad():
        logits_TV = plain(torch.tensor([prompt + answer])).logits[0]
    assert_is_log_softmax(prompt_logprobs(driver, asked), logits_TV[:49], prompt[1:], 3)
    chunks = [chunk for chunk in driver.chunks[asked] if chunk.token_ids]
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
    assert_is_log_softmax([each for chunk in chunks for each in chunk.logprobs], logits_TV[49:-1], answer, 5)
    assert all(len(chunk.logprobs[0].top_ids) == 2 for chunk in driver.chunks[other])
    driver.assert_nothing_held()


def test_logprobs_under_a_pool_are_of_the_pools_distribution(
    make_driver: Callable[..., Any], random_prompt: Callable[..., list[int]], random_pool: Callable[..., Any]
) -> None:
    driver, prompt = make_driver(60), random_prompt(1, 30)
    policies = [PoolPolicy(), PoolPolicy(Count(3)), PoolPolicy(Count(3), PoolSource.FIXED, random_pool(1))]
    ids = [driver.submit(prompt, policy, max_tokens=4, logprobs=1, prompt_logprobs=0) for policy in policies]
    driver.finish()
    sums = [sum(token.logprob for token in prompt_logprobs(driver, each)) for each in ids]
    assert len({round(each, 2) for each in sums}) == 3
    for each in ids:  # greedy: the token is the likeliest of the same distribution
        assert all(chunk.logprobs[0].top_ids == chunk.token_ids for chunk in driver.chunks[each] if chunk.token_ids)


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_a_token_that_the_model_does_not_have_is_refused(make_driver: Callable[..., Any], field: str) -> None:
    value = ((256, 1.0),) if field == "logit_bias" else (256,)
    with pytest.raises(InvalidRequest, match="256") as caught:
        make_driver(60).submit([1], **{field: value})
    assert caught.value.field == f"sampling.{field}"


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 7}, {"top_k": 0, "temperature": 2.0}, {"top_p": 0.6}, {"min_p": 0.01, "temperature": 0.5}],
    ids=str,
)
def test_what_a_models_settings_leave_open_when_they_ask_for_draws_is_as_in_generate(
    plain: PreTrainedModel, random_prompt: Callable[..., list[int]], settings: dict[str, Any]
) -> None:
    """The same tokens can be drawn, and each has the same probability up to rounding."""
    config = GenerationConfig(do_sample=True, pad_token_id=1, **settings)
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    made: Any = plain.generate(torch.tensor([random_prompt(1, 9)]), generation_config=config, **options)
    params, num_draws = replace(default_sampling(config), seed=1), 20_000
    drawn = Sampler([Draw(params)] * num_draws, CPU).sample(made.logits[0].float().expand(num_draws, -1))
    counts_V = torch.bincount(drawn, minlength=made.logits[0].shape[1])
    expected_V = made.scores[0][0].softmax(dim=-1)
    assert counts_V[expected_V == 0].sum() == 0
    margin_V = 5 * (num_draws * expected_V * (1 - expected_V)).sqrt() + 1
    assert ((counts_V - num_draws * expected_V).abs() <= margin_V).all()
