import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pager.engine.sampler import NOT_FINITE, Draw, Sampler
from pager.errors import InvalidRequest
from pager.sampling import check_sampling
from pager.types import Grammar, GrammarKind, SamplingParams

CPU = torch.device("cpu")


def sample_alone(logits_V: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    """`count` draws of one request, all from the same logits."""
    ids: list[int] = Sampler([Draw(params)] * count, CPU).sample(logits_V.expand(count, -1)).tolist()
    return ids


def warped_probabilities(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    warped: torch.Tensor = warpers(torch.zeros(1, 1, dtype=torch.long), logits_V[None])[0]
    return warped.softmax(dim=-1)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.5, seed=2),
        SamplingParams(temperature=1.3, top_k=5, seed=3),
        SamplingParams(temperature=1.0, top_p=0.8, seed=4),
        SamplingParams(temperature=0.7, top_k=12, top_p=0.9, seed=5),
        SamplingParams(temperature=1.2, min_p=0.1, seed=6),
        SamplingParams(temperature=0.8, top_k=12, top_p=0.95, min_p=0.05, seed=7),
    ],
)
def test_draws_follow_the_distribution_that_transformers_warpers_leave(params: SamplingParams) -> None:
    logits_V = torch.randn(20, generator=torch.Generator().manual_seed(0)) * 2
    expected_V = warped_probabilities(logits_V, params)
    num_draws = 20_000
    counts_V = torch.bincount(torch.tensor(sample_alone(logits_V, params, num_draws)), minlength=20)
    assert counts_V[expected_V == 0].sum() == 0
    # Five standard deviations of a binomial count.
    margin_V = 5 * (num_draws * expected_V * (1 - expected_V)).sqrt() + 1
    assert ((counts_V - num_draws * expected_V).abs() <= margin_V).all()


@settings(deadline=None)
@given(seed=st.integers(0, 2**64 - 1), place=st.integers(0, 3), top_k=st.sampled_from([0, 3]))
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(seed: int, place: int, top_k: int) -> None:
    params = SamplingParams(temperature=0.9, top_k=top_k, seed=seed)
    logits_SV = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed % 1000))
    alone = Sampler([Draw(params)], CPU)
    others = [Draw(SamplingParams(temperature=t, top_p=p)) for t, p in ((0.0, 1.0), (1.0, 1.0), (2.0, 0.5))]
    batch = Sampler([*others[:place], Draw(params), *others[place:]], CPU)
    for logits_V in logits_SV:
        rows_BV = torch.randn(4, 50)
        rows_BV[place] = logits_V
        assert batch.sample(rows_BV)[place] == alone.sample(logits_V[None])[0]


def test_greedy_rows_take_the_maximum() -> None:
    logits_BV = torch.randn(3, 100)
    draws = [Draw(SamplingParams()), Draw(SamplingParams(temperature=1.0)), Draw(SamplingParams())]
    ids_B = Sampler(draws, CPU).sample(logits_BV)
    assert ids_B[[0, 2]].tolist() == logits_BV[[0, 2]].argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits_V = torch.tensor([0.0, 30.0, 29.0])
    ids = sample_alone(logits_V, SamplingParams(temperature=temperature, top_k=2, seed=1), 50)
    assert set(ids) == ({1} if temperature < 1 else {1, 2})


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_without_a_distribution_is_named_and_spoils_no_other(poison: float) -> None:
    logits_BV = torch.randn(3, 10)
    expected = int(logits_BV[0].argmax())
    logits_BV[1:, 4] = poison
    draws = [Draw(SamplingParams()), Draw(SamplingParams()), Draw(SamplingParams(temperature=1.0, top_p=0.5))]
    assert Sampler(draws, CPU).sample(logits_BV).tolist() == [expected, NOT_FINITE, NOT_FINITE]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(max_tokens=1.5), "max_tokens"),  # type: ignore[arg-type]
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(temperature=math.nan), "temperature"),
        (SamplingParams(temperature=math.inf), "temperature"),
        (SamplingParams(temperature=101.0), "temperature"),
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(top_p=1.01), "top_p"),
        (SamplingParams(top_p=math.nan), "top_p"),
        (SamplingParams(top_k=-1), "top_k"),
        (SamplingParams(seed=-1), "seed"),
        (SamplingParams(seed=2**64), "seed"),
        (SamplingParams(stop=("",)), "stop"),
        (SamplingParams(stop=("x" * 257,)), "stop"),
        (SamplingParams(stop=("x",) * 17), "stop"),
        (SamplingParams(min_p=1.1), "min_p"),
        (SamplingParams(min_p=math.nan), "min_p"),
        (SamplingParams(presence_penalty=2.1), "presence_penalty"),
        (SamplingParams(frequency_penalty=-2.1), "frequency_penalty"),
        (SamplingParams(repetition_penalty=0.0), "repetition_penalty"),
        (SamplingParams(repetition_penalty=math.inf), "repetition_penalty"),
        (SamplingParams(min_tokens=-1), "min_tokens"),
        (SamplingParams(max_tokens=4, min_tokens=5), "min_tokens"),
        (SamplingParams(logit_bias=((1, 101.0),)), "logit_bias"),
        (SamplingParams(logit_bias=((-1, 1.0),)), "logit_bias"),
        (SamplingParams(logit_bias=((1, 1.0), (1, 2.0))), "logit_bias"),
        (SamplingParams(logit_bias=tuple((each, 1.0) for each in range(1025))), "logit_bias"),
        (SamplingParams(stop_token_ids=(-1,)), "stop_token_ids"),
        (SamplingParams(stop_token_ids=tuple(range(65))), "stop_token_ids"),
        (SamplingParams(logprobs=21), "logprobs"),
        (SamplingParams(prompt_logprobs=-1), "prompt_logprobs"),
        (SamplingParams(grammar=Grammar(GrammarKind.REGEX)), "regex"),
        (SamplingParams(grammar=Grammar(GrammarKind.EBNF, "x" * 65537)), "ebnf"),
        (SamplingParams(grammar=Grammar(GrammarKind.JSON_OBJECT), ignore_eos=True), "ignore_eos"),
    ],
)
def test_illegal_parameters_are_refused_by_name(params: SamplingParams, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        check_sampling(params)
    assert caught.value.field == f"sampling.{field}"


def test_the_bounds_themselves_are_legal() -> None:
    check_sampling(SamplingParams())
    check_sampling(
        SamplingParams(max_tokens=1, temperature=100.0, top_p=1.0, top_k=1, seed=2**64 - 1, stop=("x" * 256,) * 16)
    )


@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_a_number_for_a_token_that_did_not_come_is_drawn_again(num_taken: int) -> None:
    undisturbed, draw = (Draw(SamplingParams(temperature=1.0, seed=7)) for _ in range(2))
    expected = [undisturbed.next_uniform() for _ in range(8)]
    drawn = [draw.next_uniform() for _ in range(num_taken)]
    draw.rewind(num_taken)
    for _ in range(3):
        assert draw.next_uniform() == expected[num_taken]
        draw.rewind(num_taken)
    drawn += [draw.next_uniform() for _ in range(8 - num_taken)]
    assert drawn == expected
