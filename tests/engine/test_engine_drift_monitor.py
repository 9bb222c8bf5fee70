"""When the monitor speaks up, and what it asks for. Integers and small arrays only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pager.pools.drift import GOAL_SHARE, LARGEST_GROWTH, THRESHOLD_FALL, TRIAL_WINDOWS, DriftMonitor
from pager.types import DriftPolicy, ExpertKey

LAYERS, ROUTED = 2, 8
IN_POOL = 6  # of 16, in all layers together


def spread(mass: float, tokens: int = 1) -> list[np.ndarray]:
    """So much mass outside for each token, in equal parts for five experts of each layer."""
    mass_R = np.zeros(ROUTED)
    mass_R[3:] = mass * tokens / 5
    return [mass_R.copy() for _ in range(LAYERS)]


def monitor(threshold: float = 0.5, window: int = 4) -> DriftMonitor:
    return DriftMonitor(DriftPolicy(threshold, window=window), LAYERS * ROUTED)


def feed(watched: DriftMonitor, mass: float, tokens: int) -> bool:
    """Token by token, as decoding does; what the last look said."""
    said = False
    for _ in range(tokens):
        watched.add(1, spread(mass))
        if watched.is_due(0):
            said = watched.look(IN_POOL)
    return said


def test_it_speaks_up_once_the_window_is_full_and_its_mean_past_the_threshold() -> None:
    watched = monitor(threshold=0.5, window=4)
    assert not feed(watched, 0.9, 3), "three tokens are no window"
    assert feed(watched, 0.9, 1)
    assert watched.report().peak_mass == pytest.approx(0.9)


def test_old_tokens_leave_the_window() -> None:
    watched = monitor(threshold=0.5, window=4)
    assert not feed(watched, 0.1, 100)
    assert not feed(watched, 0.9, 2)  # mean 0.5
    assert feed(watched, 0.9, 1)  # 0.7


def test_mass_below_the_threshold_is_no_drift() -> None:
    watched = monitor(threshold=0.5)
    assert not feed(watched, 0.49, 64)
    assert watched.report().peak_mass == pytest.approx(0.49)
    assert watched.report().widenings == 0


@given(st.lists(st.floats(0, 1), min_size=8, max_size=40), st.data())
def test_how_tokens_are_split_into_calls_makes_no_difference(masses: list[float], data: st.DataObject) -> None:
    """Other requests join and leave the batch, and each time what was measured so far is handed over."""
    one_by_one, split = monitor(0.5, 8), monitor(0.5, 8)
    said = []
    for mass in masses:
        one_by_one.add(1, spread(mass))
        if one_by_one.is_due(0):
            said.append(one_by_one.look(IN_POOL))
    unread: list[float] = []
    said_split = []
    for mass in masses:
        unread.append(mass)
        due = split.is_due(len(unread))
        if due or data.draw(st.booleans()):
            split.add(len(unread), [np.sum(parts, axis=0) for parts in zip(*map(spread, unread), strict=True)])
            unread = []
        if due:
            said_split.append(split.look(IN_POOL))
    assert said_split == said


def test_what_it_wants_brings_the_window_down_to_the_goal() -> None:
    watched = monitor(threshold=0.5, window=4)
    masses = [np.array([0, 0, 0, 0.4, 0.2, 0.1, 0, 0]), np.array([0, 0, 0, 0.3, 0.1, 0.1, 0, 0])]
    for _ in range(4):
        watched.add(1, masses)
        watched.look(IN_POOL)
    # Outside are 1.2 over two layers, and no more than 0.25 may stay: three experts would leave 0.3.
    assert GOAL_SHARE * 0.5 * LAYERS == 0.25
    assert watched.wanted(IN_POOL) == (ExpertKey(0, 3), ExpertKey(1, 3), ExpertKey(0, 4), ExpertKey(0, 5))


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=ROUTED, max_size=ROUTED), min_size=LAYERS, max_size=LAYERS),
    st.integers(1, 16),
)
def test_it_wants_distinct_experts_with_mass_and_at_most_twice_what_the_pool_has(
    masses: list[list[float]], num_in_pool: int
) -> None:
    watched = monitor(threshold=0.01, window=1)
    arrays = [np.array(mass_R) for mass_R in masses]
    watched.add(1, arrays)
    watched.look(num_in_pool)
    wanted = watched.wanted(num_in_pool)
    assert len(set(wanted)) == len(wanted) <= LARGEST_GROWTH * num_in_pool
    found = [arrays[key.layer][key.expert] for key in wanted]
    assert all(mass > 0 for mass in found)
    assert found == sorted(found, reverse=True)


def test_a_trial_says_what_is_wanted_and_a_new_window_whether_it_was_enough() -> None:
    watched = monitor(threshold=0.5, window=8)
    assert feed(watched, 0.9, 8)
    watched.begin_trial()
    assert not feed(watched, 0.3, TRIAL_WINDOWS * 8 - 2), "the trial is not over"
    assert feed(watched, 0.3, 2)
    assert watched.report().peak_mass == pytest.approx(0.9), "of tokens that ran in the pool"
    watched.widened(watched.wanted(IN_POOL))
    assert not watched.is_on_trial
    assert not feed(watched, 0.9, 6), "no full window under the wider pool"
    assert feed(watched, 0.9, 2)
    report = watched.report()
    assert (report.widenings, report.exact_from) == (1, None)
    assert report.experts_added > 0


def test_without_room_it_rests_longer_and_longer() -> None:
    watched = monitor(threshold=0.5, window=4)
    spoke_up = []
    for token in range(1, 100):
        watched.add(1, spread(0.9))
        if watched.look(IN_POOL):
            watched.widened(())
            spoke_up.append(token)
    assert spoke_up == [4, 12, 28, 60]
    assert watched.report().widenings == 0


def test_a_wider_pool_has_a_lower_threshold() -> None:
    watched = monitor(threshold=0.5)
    assert watched.threshold(6) == pytest.approx(0.5)  # 10 of 16 experts are outside
    assert watched.threshold(11) == pytest.approx(0.5 * 0.5**THRESHOLD_FALL)
    assert watched.threshold(16) == 0


def test_an_exact_answer_is_not_looked_at_again() -> None:
    watched = monitor(window=4)
    assert feed(watched, 0.9, 4)
    watched.became_exact()
    watched.add(1, spread(0.9))
    assert not watched.is_due(1000)
    assert watched.report().exact_from == 5


def test_an_answer_shorter_than_the_window_reports_its_mean() -> None:
    watched = monitor(window=64)
    feed(watched, 0.3, 5)
    assert watched.report().peak_mass == pytest.approx(0.3)
    assert monitor().report().peak_mass == 0
