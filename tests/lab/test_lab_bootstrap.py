"""Intervals over documents, resampled within their domains."""

from __future__ import annotations

import numpy as np
import pytest

from pager.lab.report import Bootstrap, Interval

DOMAINS = ["a"] * 40 + ["b"] * 10
TOKENS = np.array([100.0] * 40 + [10.0] * 10)


def test_what_is_the_same_for_all_is_a_point() -> None:
    interval = Bootstrap(DOMAINS).mean_over_domains(0.5 * TOKENS, TOKENS)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_mean_weighs_tokens_within_a_domain_and_domains_alike() -> None:
    values = np.concatenate([np.full(40, 200.0), np.full(10, 10.0)])
    uneven = TOKENS.copy()
    uneven[0], values[0] = 900.0, 0.0
    expected_a = values[:40].sum() / uneven[:40].sum()
    bootstrap = Bootstrap(DOMAINS)
    assert bootstrap.of_domain("a", values, uneven).mean == pytest.approx(expected_a)
    assert bootstrap.mean_over_domains(values, uneven).mean == pytest.approx((expected_a + 1.0) / 2)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        values = random.normal(1.0, 1.0, 60)
        interval = Bootstrap(["a"] * 60, resamples=300, seed=seed).mean_over_domains(values, np.ones(60))
        covered += interval.low <= 1.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_two_quantities_are_resampled_together() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(3.0, 1.0, 50) * TOKENS
    easier = hard - 0.1 * TOKENS
    bootstrap = Bootstrap(DOMAINS)
    alone, difference = bootstrap.mean_over_domains(hard, TOKENS), bootstrap.mean_over_domains(hard - easier, TOKENS)
    assert alone.high - alone.low > 0.2
    assert difference.high - difference.low < 1e-9
    _, first = bootstrap.replicates(hard, TOKENS)
    _, second = bootstrap.replicates(easier, TOKENS)
    assert np.allclose(first - second, 0.1)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(1).normal(size=50)
    first, again, other = (Bootstrap(DOMAINS, seed=seed).mean_over_domains(values, TOKENS) for seed in (5, 5, 6))
    assert first == again
    assert first.low != other.low
    assert first.to_dict() == {"mean": first.mean, "low": first.low, "high": first.high}
    assert isinstance(first, Interval)
