"""A total shared out over the layers: it adds up, no layer starves, and layers get in proportion to their claims."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pager.errors import InvalidRequest, PoolTooSmall
from pager.pools.pick import (
    check_pool,
    largest_counts,
    parse_pool_size,
    pick_pool,
    resolve_size,
    share_out,
    share_out_evenly,
)
from pager.types import Bytes, Count, Counts, Mass, PoolSize, RoutingFacts, RoutingScores, Share

Case = tuple[RoutingFacts, RoutingScores, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A model with dense and sparse layers, scores for it, and a total that one token's picks fit into."""
    experts, shared, top_k, means = [], [], [], []
    for _ in range(draw(st.integers(1, 4))):
        routed = draw(st.integers(0, 7))
        num_shared = draw(st.integers(0, 2)) if routed else 0
        experts.append(routed + num_shared)
        shared.append(num_shared)
        top_k.append(draw(st.integers(1, routed)) if routed else 0)
        # Few distinct values, so that ties are common; a layer may have no mass at all.
        weights = draw(st.lists(st.integers(0, 4), min_size=routed, max_size=routed))
        means.append(np.array(weights, dtype=np.float64) / max(sum(weights), 1))
    facts = RoutingFacts(tuple(experts), tuple(shared), tuple(top_k), expert_bytes=1000)
    total = draw(st.integers(sum(top_k), sum(facts.routed_per_layer) + 2))
    return facts, RoutingScores(tuple(means), "test", 1), total


@given(cases())
def test_it_adds_up_and_no_layer_gets_less_than_a_token_needs_or_more_than_it_has(case: Case) -> None:
    facts, scores, total = case
    ways = (share_out(scores, total, facts), share_out(scores, total, facts, 0.5), share_out_evenly(total, facts))
    for counts in (way.per_layer for way in ways):
        assert sum(counts) == min(total, sum(facts.routed_per_layer))
        limits = zip(facts.top_k_per_layer, counts, facts.routed_per_layer, strict=True)
        assert all(top_k <= count <= routed for top_k, count, routed in limits)


@given(cases())
def test_one_more_expert_takes_none_away_from_any_layer(case: Case) -> None:
    facts, scores, total = case
    for power in (0.5, 1.0):
        fewer, more = (share_out(scores, number, facts, power).per_layer for number in (total, total + 1))
        grown = [more_ - fewer_ for fewer_, more_ in zip(fewer, more, strict=True)]
        assert min(grown) >= 0
        assert sum(grown) == (1 if total < sum(facts.routed_per_layer) else 0)
        if sum(grown):
            pools = [pick_pool(scores, Counts(counts), facts) for counts in (fewer, more)]
            assert set(pools[0].keys()) < set(pools[1].keys())


@given(cases())
def test_layers_get_in_proportion_to_what_their_most_wanted_quarter_weighs(case: Case) -> None:
    """To the rounding of one expert, in layers that are neither at what a token needs nor at what they have."""
    facts, scores, total = case
    counts = share_out(scores, total, facts).per_layer
    claims = [len(mean_R) * np.sort(mean_R)[::-1][: math.ceil(len(mean_R) / 4)].sum() for mean_R in scores.mean_LR]
    for one, other in itertools.permutations(range(facts.num_layers), 2):
        if counts[one] > facts.top_k_per_layer[one] and counts[other] < facts.routed_per_layer[other]:
            last, next_ = claims[one] / (counts[one] - 0.5), claims[other] / (counts[other] + 0.5)
            assert last >= next_ - 1e-6


@given(cases(), st.floats(0.1, 10))
def test_only_the_proportions_of_a_layer_count(case: Case, factor: float) -> None:
    facts, scores, total = case
    factors = [2.0**layer * factor for layer in range(facts.num_layers)]
    scaled = tuple(mean_R * by for mean_R, by in zip(scores.mean_LR, factors, strict=True))
    covered = [
        pick_pool(scores, share_out(each, total, facts), facts).covered_mass
        for each in (scores, RoutingScores(scaled, "test", 1))
    ]
    assert covered[0] == pytest.approx(covered[1])


@given(cases())
def test_bytes_are_as_many_whole_experts_as_fit(case: Case) -> None:
    facts, scores, total = case
    for spare in (0, 999):
        size = Bytes(1000 * total + spare)
        pool = check_pool(pick_pool(scores, size, facts), facts)
        assert pool.num_experts == sum(largest_counts(size, facts)) == min(total, sum(facts.routed_per_layer))
        assert resolve_size(size, scores, facts) == Counts(tuple(map(len, pool.experts)))


FACTS = RoutingFacts((9, 0, 9), (1, 0, 1), (2, 0, 2), expert_bytes=24 * 1024)
PEAKED, FLAT = np.array([0.9, 0.1, 0, 0, 0, 0, 0, 0]), np.full(8, 0.125)


def test_the_layer_whose_router_knows_what_it_wants_gets_more() -> None:
    assert share_out(RoutingScores((PEAKED, np.zeros(0), FLAT), "test", 1), 10, FACTS) == Counts((8, 0, 2))
    sloping = np.arange(1.0, 9) / 36  # 15 / 36 in its upper quarter, 9 / 36 in an even one
    assert share_out(RoutingScores((sloping, np.zeros(0), FLAT), "test", 1), 8, FACTS) == Counts((5, 0, 3))


def test_equal_layers_share_alike_and_the_lower_one_takes_what_is_left() -> None:
    assert share_out(RoutingScores((FLAT, np.zeros(0), FLAT), "test", 1), 9, FACTS) == Counts((5, 0, 4))
    assert share_out_evenly(9, FACTS) == Counts((5, 0, 4))
    assert share_out_evenly(99, FACTS) == Counts((8, 0, 8))


def test_a_total_below_one_tokens_picks_is_refused() -> None:
    scores = RoutingScores((PEAKED, np.zeros(0), FLAT), "test", 1)
    with pytest.raises(PoolTooSmall, match=r"3 routed experts in all layers together are fewer than the 4 .* least 4"):
        share_out(scores, 3, FACTS)
    for use in (lambda size: pick_pool(scores, size, FACTS), lambda size: largest_counts(size, FACTS)):
        with pytest.raises(
            PoolTooSmall, match=r"95\.0 KiB hold 3 routed experts of 24\.0 KiB .* give at least 98304"
        ) as caught:
            use(Bytes(95 * 1024))
        assert caught.value.field == "pool.size.bytes"


def test_bytes_of_experts_of_unknown_size_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="give a count or a share"):
        largest_counts(Bytes(1 << 30), RoutingFacts((9,), (1,), (2,)))


@pytest.mark.parametrize("size", [Count(3), Share(0.5), Mass(0.5), Counts((3, 0, 4))])
def test_every_other_size_is_as_it_was(size: PoolSize) -> None:
    assert resolve_size(size, RoutingScores((PEAKED, np.zeros(0), FLAT), "test", 1), FACTS) is size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", Bytes(64 * 2**20)),
        ("1.5 gb", Bytes(1_500_000_000)),
        ("4096B", Bytes(4096)),
        ("16,0,32", Counts((16, 0, 32))),
        ("16, 24", Counts((16, 24))),
    ],
)
def test_what_people_write(text: str, size: PoolSize) -> None:
    assert parse_pool_size(text) == size


@pytest.mark.parametrize("text", ["0MiB", "MiB", "-1KiB", "64 mobs", "nanb", "1,,2", ",", "1,a"])
def test_no_size_at_all(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a pool size; write") as caught:
        parse_pool_size(text)
    assert repr(text) in caught.value.message


@pytest.mark.parametrize(("text", "named"), [("4,-1", "(4, -1)"), ("-2,-2", "(-2, -2)")])
def test_a_layers_count_is_not_negative(text: str, named: str) -> None:
    with pytest.raises(InvalidRequest, match="a number of experts for every layer") as caught:
        parse_pool_size(text)
    assert named in caught.value.message


def test_counts_of_another_model_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="names 2 layers and the model has 3"):
        largest_counts(Counts((4, 4)), FACTS)
    with pytest.raises(PoolTooSmall, match="a pool of 1 routed experts in layer 2"):
        largest_counts(Counts((4, 0, 1)), FACTS)
    assert largest_counts(Counts((4, 3, 99)), FACTS) == (4, 0, 8)


def test_scores_without_any_mass() -> None:
    """They still make a pool, the lower ids first."""
    empty = RoutingScores((np.zeros(8), np.zeros(0), np.zeros(8)), "test", 1)
    pool = pick_pool(empty, Bytes(6 * 24 * 1024), FACTS)
    assert pool.experts == ((0, 1, 2), (), (0, 1, 2))
    assert pool.covered_mass is not None
    assert math.isfinite(pool.covered_mass)
