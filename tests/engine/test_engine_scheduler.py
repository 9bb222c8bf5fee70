import pytest
from hypothesis import given
from hypothesis import strategies as st

from pager.engine.scheduler import LineClock, WaitingLine
from pager.errors import DeadlineExceeded


def test_the_first_in_line_is_tried_first() -> None:
    line: WaitingLine[str] = WaitingLine(max_overtakes=2)
    for name in "abc":
        line.add(name)
    assert list(line.candidates()) == ["a", "b", "c"]
    line.admit("a")
    assert list(line.candidates()) == ["b", "c"]


def test_whoever_was_passed_often_enough_stops_everybody_behind() -> None:
    line: WaitingLine[str] = WaitingLine(max_overtakes=2)
    for name in "abcd":
        line.add(name)
    line.admit("b")
    line.admit("c")
    assert list(line.candidates()) == ["a"]
    line.admit("a")
    assert list(line.candidates()) == ["d"]


def test_leaving_without_admission_passes_nobody() -> None:
    line: WaitingLine[str] = WaitingLine(max_overtakes=1)
    for name in "abc":
        line.add(name)
    line.remove("b")
    assert list(line.candidates()) == ["a", "c"]


def test_no_overtaking_at_all_is_plain_first_in_first_out() -> None:
    line: WaitingLine[str] = WaitingLine(max_overtakes=0)
    for name in "abc":
        line.add(name)
    assert list(line.candidates()) == ["a"]


@given(
    sizes=st.lists(st.integers(1, 10), min_size=1, max_size=40),
    max_overtakes=st.integers(0, 4),
    arrivals_a_step=st.integers(1, 5),
)
def test_none_starves(sizes: list[int], max_overtakes: int, arrivals_a_step: int) -> None:
    """Ten units of memory and a crowd of requests: each is passed a bounded number of times, and gets in."""
    capacity, lifetime = 10, 3
    line: WaitingLine[int] = WaitingLine(max_overtakes)
    running: dict[int, int] = {}  # item → the step at which it ends
    passed = dict.fromkeys(range(len(sizes)), 0)
    arrived, step = 0, 0
    admitted: list[int] = []
    while len(admitted) < len(sizes):
        for _ in range(arrivals_a_step):
            if arrived < len(sizes):
                line.add(arrived)
                arrived += 1
        running = {item: end for item, end in running.items() if end > step}
        for item in line.candidates():
            if sum(sizes[other] for other in running) + sizes[item] <= capacity:
                for earlier in line:
                    if earlier == item:
                        break
                    passed[earlier] += 1
                line.admit(item)
                admitted.append(item)
                running[item] = step + lifetime
        step += 1
        assert step < 10 * len(sizes) * lifetime, "somebody starves"
    assert sorted(admitted) == list(range(len(sizes)))
    assert max(passed.values()) <= max_overtakes


def test_a_place_lasts_as_long_as_those_who_had_one_waited() -> None:
    """256 came at once and each is admitted 0.08 s after the one before: the last one's turn comes after 21 s."""
    clock = LineClock()
    clock.check(256, 0.001)  # nothing is known yet
    for place in range(1, 257):
        clock.admitted(place, 0.08 * place)
        clock.check(256, 21.0)
        with pytest.raises(DeadlineExceeded, match=r"256 requests are in line, .* 0\.08 s, .* 20\.00 s"):
            clock.check(256, 20.0)


def test_one_who_passes_others_or_waits_long_is_not_the_rule() -> None:
    clock = LineClock()
    for place in range(1, 11):
        clock.admitted(place, 1.0 * place)
    clock.admitted(200, 0.01)
    clock.admitted(1, 90.0)
    assert clock.place_s == pytest.approx(1.0)


def test_another_line_begins_without_an_estimate() -> None:
    clock = LineClock()
    clock.admitted(1, 30.0)
    clock.forget()
    assert clock.place_s is None
    clock.check(256, 0.001)
