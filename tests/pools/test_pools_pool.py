"""Pool sizes as people write them, and the choice of a pool from router scores: literal cases and properties."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pager.errors import InvalidRequest, PoolTooSmall
from pager.pools.pick import (
    check_pool,
    covered_mass,
    largest_counts,
    parse_pool_size,
    pick_layer,
    pick_pool,
    write_pool_size,
)
from pager.types import Bytes, Count, Counts, ExpertPool, Full, Mass, PoolSize, RoutingFacts, RoutingScores, Share

# The released model's layers: 127 routed experts and a shared one, seven routed picks a token.
RELEASED = RoutingFacts((128, 128), (1, 1), (7, 7))
# A sparse layer with two shared experts, a dense one, a small one without any.
MIXED = RoutingFacts((16, 0, 4), (2, 0, 0), (3, 0, 2))


class TestParse:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            (None, Full()),
            ("full", Full()),
            ("Full ", Full()),
            ("100%", Full()),
            (32, Count(32)),
            ("32", Count(32)),
            (" 7 ", Count(7)),
            ("12.5%", Share(0.125)),
            ("50 %", Share(0.5)),
            ("mass:0.9", Mass(0.9)),
            ("mass:0.9:48", Mass(0.9, 48)),
            ("MASS:1", Mass(1.0)),
        ],
    )
    def test_what_people_write(self, text: str | int | None, size: PoolSize) -> None:
        assert parse_pool_size(text) == size

    @pytest.mark.parametrize(
        "size", [Full(), Count(7), Share(0.0625), Mass(0.9), Mass(0.5, 9), Counts((0, 3, 4)), Bytes(4096)]
    )
    def test_what_is_written_is_read_as_the_same(self, size: PoolSize) -> None:
        assert parse_pool_size(write_pool_size(size)) == size

    @pytest.mark.parametrize(
        "text", ["", "many", "3.5", "32 experts", "%", "ten%", "mass:", "mass:a", "mass:1:b", "x:1"]
    )
    def test_no_size_at_all(self, text: str) -> None:
        with pytest.raises(InvalidRequest, match="write a number of routed experts") as caught:
            parse_pool_size(text)
        assert repr(text) in caught.value.message
        assert caught.value.field == "pool.size"

    @pytest.mark.parametrize(
        ("text", "field", "named"),
        [
            (0, "pool.size.count", "0"),
            ("-3", "pool.size.count", "-3"),
            ("0%", "pool.size.share", "0.0"),
            ("101%", "pool.size.share", "1.01"),
            ("-5%", "pool.size.share", "-0.05"),
            ("nan%", "pool.size.share", "nan"),
            ("inf%", "pool.size.share", "inf"),
            ("mass:0", "pool.size.mass", "0.0"),
            ("mass:1.5", "pool.size.mass", "1.5"),
            ("mass:nan", "pool.size.mass", "nan"),
            ("mass:0.9:0", "pool.size.cap", "0"),
            ("mass:0.9:-1", "pool.size.cap", "-1"),
        ],
    )
    def test_a_number_out_of_range_is_named(self, text: str | int, field: str, named: str) -> None:
        with pytest.raises(InvalidRequest, match=r"pool's|pool has") as caught:
            parse_pool_size(text)
        assert caught.value.field == field
        assert caught.value.message.endswith(named)


class TestLargestCounts:
    @pytest.mark.parametrize(
        ("size", "counts"),
        [
            (Full(), (14, 0, 4)),
            (Count(3), (3, 0, 3)),
            (Count(8), (8, 0, 4)),
            (Count(99), (14, 0, 4)),
            (Share(0.5), (6, 0, 2)),  # 8 of 16, two of them shared; 2 of 4
            (Share(1.0), (14, 0, 4)),
            (Mass(0.9), (7, 0, 2)),  # half of the routed ones
            (Mass(0.9, 5), (5, 0, 4)),
            (Mass(0.1, 99), (14, 0, 4)),
        ],
    )
    def test_of_a_mixed_model(self, size: PoolSize, counts: tuple[int, ...]) -> None:
        assert largest_counts(size, MIXED) == counts

    @pytest.mark.parametrize(
        ("share", "routed"), [(1.0, 127), (0.5, 63), (0.25, 31), (0.125, 15), (0.0625, 7), (0.13, 15)]
    )
    def test_shares_count_as_the_paper_does(self, share: float, routed: int) -> None:
        assert largest_counts(Share(share), RELEASED) == (routed, routed)

    @pytest.mark.parametrize(
        ("share", "routed"), [("29%", 28), ("57%", 56), ("58%", 57), ("70%", 69), ("7%", 6), ("28%", 27)]
    )
    def test_a_share_that_binary_fractions_miss_is_not_rounded_down(self, share: str, routed: int) -> None:
        """0.29 * 100 is 28.999999999999996."""
        facts = RoutingFacts((100,), (1,), (3,))
        assert largest_counts(parse_pool_size(share), facts) == (routed,)

    @pytest.mark.parametrize(
        ("size", "count", "layer", "top_k"),
        [(Count(2), 2, 0, 3), (Share(0.25), 2, 0, 3), (Share(0.32), 1, 2, 2), (Mass(0.5, 2), 2, 0, 3)],
    )
    def test_fewer_than_a_token_needs_is_refused(self, size: PoolSize, count: int, layer: int, top_k: int) -> None:
        with pytest.raises(
            PoolTooSmall, match=f"a pool of {count} routed experts in layer {layer} .* the {top_k} .* at least {top_k}"
        ):
            largest_counts(size, MIXED)

    def test_a_mass_without_a_cap_can_always_be_had(self) -> None:
        assert largest_counts(Mass(0.9), RoutingFacts((8,), (0,), (6,))) == (6,)


class TestPickLayer:
    def test_the_largest_in_ascending_order(self) -> None:
        assert pick_layer(np.array([0.1, 0.4, 0.2, 0.3]), Count(2), 2, 1) == (1, 3)

    def test_equal_mass_goes_to_the_lower_id(self) -> None:
        assert pick_layer(np.array([0.2, 0.3, 0.2, 0.3, 0.2]), Count(3), 3, 1) == (0, 1, 3)
        assert pick_layer(np.zeros(6), Count(2), 2, 2) == (0, 1)

    def test_a_mass_takes_the_fewest_experts(self) -> None:
        mass = np.array([0.05, 0.5, 0.15, 0.3])
        picked = [pick_layer(mass, Mass(share), 4, 1) for share in (0.5, 0.51, 0.8, 0.95, 1.0)]
        assert picked == [(1,), (1, 3), (1, 3), (1, 2, 3), (0, 1, 2, 3)]

    def test_a_mass_is_a_share_whatever_the_unit(self) -> None:
        assert pick_layer(np.array([5.0, 50.0, 15.0, 30.0]), Mass(0.8), 4, 1) == (1, 3)

    def test_a_mass_keeps_what_a_token_picks(self) -> None:
        assert pick_layer(np.array([0.97, 0.01, 0.02]), Mass(0.9), 3, 2) == (0, 2)

    def test_a_mass_stops_at_its_cap(self) -> None:
        assert pick_layer(np.full(10, 0.1), Mass(0.9, 4), 4, 2) == (0, 1, 2, 3)

    def test_a_dense_layer_has_none(self) -> None:
        assert pick_layer(np.zeros(0), Mass(0.9), 0, 0) == pick_layer(np.zeros(0), Count(4), 0, 0) == ()


@st.composite
def cases(draw: st.DrawFn) -> tuple[RoutingFacts, RoutingScores, PoolSize]:
    """A model, scores for it and any size."""
    experts, shared, top_k, means = [], [], [], []
    for _ in range(draw(st.integers(1, 4))):
        routed = draw(st.integers(0, 12))
        num_shared = draw(st.integers(0, 2)) if routed else 0
        experts.append(routed + num_shared)
        shared.append(num_shared)
        top_k.append(draw(st.integers(1, routed)) if routed else 0)
        # Few distinct values, so that ties are common.
        weights = draw(st.lists(st.integers(0, 5), min_size=routed, max_size=routed))
        means.append(np.array(weights, dtype=np.float64) / max(sum(weights), 1))
    size = draw(
        st.one_of(
            st.just(Full()),
            st.integers(1, 14).map(Count),
            st.floats(0.01, 1.0).map(Share),
            st.builds(Mass, st.floats(0.01, 1.0), st.none() | st.integers(1, 14)),
            st.tuples(*(st.integers(num, 14) for num in top_k)).map(Counts),
        )
    )
    return RoutingFacts(tuple(experts), tuple(shared), tuple(top_k)), RoutingScores(tuple(means), "test", 1), size


class TestProperties:
    @given(cases())
    def test_a_pool_is_legal_and_never_larger_than_was_reserved(
        self, case: tuple[RoutingFacts, RoutingScores, PoolSize]
    ) -> None:
        facts, scores, size = case
        try:
            counts = largest_counts(size, facts)
        except PoolTooSmall:
            with pytest.raises(PoolTooSmall):
                pick_pool(scores, size, facts)
            return
        pool = pick_pool(scores, size, facts)
        assert check_pool(pool, facts) is pool
        for experts, count, routed in zip(pool.experts, counts, facts.routed_per_layer, strict=True):
            assert len(experts) <= count <= routed
            if not isinstance(size, Mass):
                assert len(experts) == count

    @given(cases())
    def test_nothing_outside_has_more_mass_or_the_same_and_a_lower_id(
        self, case: tuple[RoutingFacts, RoutingScores, PoolSize]
    ) -> None:
        facts, scores, size = case
        try:
            pool = pick_pool(scores, size, facts)
        except PoolTooSmall:
            return
        for experts, mean in zip(pool.experts, scores.mean_LR, strict=True):
            outside = set(range(len(mean))) - set(experts)
            assert all((-mean[kept], kept) < (-mean[left], left) for kept in experts for left in outside)

    @given(cases())
    def test_a_mass_is_reached_with_the_fewest_experts_unless_capped(
        self, case: tuple[RoutingFacts, RoutingScores, PoolSize]
    ) -> None:
        facts, scores, size = case
        if not isinstance(size, Mass):
            return
        try:
            counts = largest_counts(size, facts)
        except PoolTooSmall:
            return
        pool = pick_pool(scores, size, facts)
        layers = zip(pool.experts, scores.mean_LR, counts, facts.top_k_per_layer, strict=True)
        for experts, mean, count, top_k in layers:
            inside, total = mean[list(experts)], mean.sum()
            if len(experts) < count:
                assert inside.sum() >= (size.mass - 1e-9) * total
            if len(experts) > top_k:
                assert inside.sum() - inside.min() < (size.mass + 1e-9) * total

    @given(cases())
    def test_covered_mass_is_the_mean_share_of_the_sparse_layers(
        self, case: tuple[RoutingFacts, RoutingScores, PoolSize]
    ) -> None:
        facts, scores, size = case
        try:
            pool = pick_pool(scores, size, facts)
        except PoolTooSmall:
            return
        shares = [
            sum(mean[expert] for expert in experts) / (mean.sum() or 1)
            for experts, mean in zip(pool.experts, scores.mean_LR, strict=True)
            if len(mean)
        ]
        if shares:
            assert pool.covered_mass == pytest.approx(sum(shares) / len(shares))
        else:
            assert pool.covered_mass is None

    @given(st.text(max_size=12) | st.integers() | st.floats().map(str))
    def test_whatever_is_written_is_a_size_or_refused(self, text: str | int) -> None:
        with suppress(InvalidRequest):
            assert isinstance(parse_pool_size(text), PoolSize)


class TestCheckPool:
    def test_a_pool_that_fits(self) -> None:
        pool = ExpertPool(((0, 5, 13), (), (1, 3)))
        assert check_pool(pool, MIXED) is pool

    @pytest.mark.parametrize(
        ("experts", "message"),
        [
            (((0, 1, 2), ()), "has 2 layers and the model 3"),
            (((0, 1, 2), (0,), (0, 1)), "layer 1 .* below 0"),
            (((0, 1, 14), (), (0, 1)), "layer 0 .* below 14"),  # 14 and 15 are shared
            (((-1, 1, 2), (), (0, 1)), "layer 0 .* below 14"),
            (((2, 1, 0), (), (0, 1)), "layer 0 .* ascending"),
            (((0, 1, 2), (), (1, 1)), "layer 2 .* distinct"),
        ],
    )
    def test_one_that_does_not_names_its_layer(self, experts: tuple[tuple[int, ...], ...], message: str) -> None:
        with pytest.raises(InvalidRequest, match=message) as caught:
            check_pool(ExpertPool(experts), MIXED)
        assert caught.value.field == "pool.fixed"

    def test_one_with_fewer_than_a_token_needs(self) -> None:
        with pytest.raises(PoolTooSmall, match=r"layer 2 of the pool has 1 routed experts.* its router picks 2"):
            check_pool(ExpertPool(((0, 1, 2), (), (3,))), MIXED)


def test_covered_mass_of_scores_that_are_not_normalised() -> None:
    assert covered_mass([np.array([3.0, 1.0]), np.zeros(0), np.array([1.0, 1.0])], [(0,), (), (1,)]) == 0.625
