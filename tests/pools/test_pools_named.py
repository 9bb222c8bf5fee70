from __future__ import annotations

import numpy as np
import pytest

from pager.errors import DamagedPool, InvalidRequest, PoolOfAnotherModel, PromptTooLong
from pager.pools.pick import (
    check_example,
    check_name,
    check_num_examples,
    decode_named,
    encode_named,
    mean_scores,
    pool_for,
)
from pager.types import ExpertPool, NamedPool, RoutingFacts, RoutingScores

FACTS = RoutingFacts(experts_per_layer=(0, 9, 9), shared_per_layer=(0, 1, 1), top_k_per_layer=(0, 2, 2))
NAMED = NamedPool("law", ExpertPool(((), (0, 3, 7), (1, 2)), 0.5), "fitted", 3, 70, "f")


@pytest.mark.parametrize("mass", [None, 0.5])
def test_it_is_read_as_it_was_written(mass: float | None) -> None:
    named = NamedPool("law", ExpertPool(NAMED.pool.experts, mass), "fitted", 3, 70, "f")
    assert decode_named(encode_named(named), "law") == named


def test_it_is_for_its_model_alone() -> None:
    assert pool_for(NAMED, "f", FACTS) == NAMED.pool
    with pytest.raises(PoolOfAnotherModel, match=r"with fingerprint f, and this one has g; calibrate it again"):
        pool_for(NAMED, "g", FACTS)
    smaller = RoutingFacts((0, 9, 3), (0, 1, 1), (0, 2, 2))
    with pytest.raises(DamagedPool, match="'law'"):
        pool_for(NAMED, "f", smaller)


def test_nothing_that_is_cut_short_is_read() -> None:
    data = encode_named(NAMED)
    for length in range(len(data)):
        with pytest.raises(DamagedPool, match="'law' cannot be used"):
            decode_named(data[:length], "law")


def test_examples_count_by_their_tokens() -> None:
    few = RoutingScores((np.zeros(0), np.array([1.0, 0.0])), "trunk", 1)
    many = RoutingScores((np.zeros(0), np.array([0.2, 0.8])), "trunk", 3)
    mean = mean_scores([few, many])
    assert (mean.source, mean.num_tokens, len(mean.mean_LR[0])) == ("trunk", 4, 0)
    assert mean.mean_LR[1] == pytest.approx([0.4, 0.6])
    assert mean_scores([many]).mean_LR[1] == pytest.approx(many.mean_LR[1])


def test_what_makes_no_pool_is_refused() -> None:
    for name in ("", "a b", "a/b", "x" * 65, "ä"):
        with pytest.raises(InvalidRequest, match="1 to 64"):
            check_name(name)
    assert check_name("..") == ".."
    for count in (0, 101):
        with pytest.raises(InvalidRequest, match=f"not from {count}"):
            check_num_examples(count)
    with pytest.raises(InvalidRequest, match="example 1 is empty"):
        check_example(0, 0, 10)
    with pytest.raises(PromptTooLong, match="example 3 has 11 tokens"):
        check_example(2, 11, 10)
    check_example(2, 10, 10)
