from hypothesis import given
from hypothesis import strategies as st

from pager.engine.scheduler import WaitingLine


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
    arrived, step, admitted = 0, 0, []
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
