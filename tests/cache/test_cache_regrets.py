"""Evictions and prefetches that were for nothing, as metrics learn of them."""

from __future__ import annotations

from pager.cache.stats import REGRETTED_WITHIN_S, Regrets
from pager.types import ExpertKey

A, B, C = (ExpertKey(0, expert) for expert in range(3))


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_an_expert_read_again_within_the_window_is_regretted_once() -> None:
    clock = Clock()
    regrets = Regrets(clock)
    assert regrets.loaded([A, B], ahead=False) == 0
    regrets.evicted([A, B])
    clock.now_s += REGRETTED_WITHIN_S
    assert regrets.loaded([A], ahead=False) == 1
    assert regrets.loaded([A], ahead=False) == 0
    clock.now_s += 1
    assert regrets.loaded([B], ahead=False) == 0


def test_a_prefetch_is_used_once_or_wasted_once() -> None:
    regrets = Regrets(Clock())
    regrets.loaded([A, B, C], ahead=True)
    assert regrets.used([A]) == 1
    assert regrets.used([A]) == 0
    regrets.lost(C)
    assert regrets.evicted([A, B, C]) == 1
    assert regrets.used([A, B, C]) == 0


def test_what_somebody_asked_for_is_no_prefetch() -> None:
    regrets = Regrets(Clock())
    regrets.loaded([A], ahead=False)
    assert regrets.used([A]) == regrets.evicted([A]) == 0
