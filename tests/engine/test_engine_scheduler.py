from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pager.engine.scheduler import LineClock
from pager.engine.turns import Prices, Spent, TenantCounters, WaitingLine, Want, by_overlap
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
    """Ten units of memory and a crowd of requests: each gets in, and is passed a bounded number of times by those who
    came when the first in line did not fit any more.
    """
    capacity, lifetime = 10, 3
    line: WaitingLine[int] = WaitingLine(max_overtakes)
    running: dict[int, int] = {}  # item → the step at which it ends
    passed = dict.fromkeys(range(len(sizes)), 0)
    rounds: dict[int, int] = {}
    arrived, step = 0, 0
    admitted: list[int] = []
    while len(admitted) < len(sizes):
        for _ in range(arrivals_a_step):
            if arrived < len(sizes):
                rounds[arrived] = 1 + rounds[next(iter(line))] if len(line) else 0
                line.add(arrived)
                arrived += 1
        running = {item: end for item, end in running.items() if end > step}
        for item in line.candidates():
            if sum(sizes[other] for other in running) + sizes[item] <= capacity:
                for earlier in line:
                    if earlier == item:
                        break
                    passed[earlier] += rounds[item] > rounds[earlier]
                line.admit(item)
                admitted.append(item)
                running[item] = step + lifetime
        step += 1
        assert step < 10 * len(sizes) * lifetime, "somebody starves"
    assert sorted(admitted) == list(range(len(sizes)))
    assert max(passed.values()) <= max_overtakes


def test_those_who_came_together_go_in_any_order_before_those_who_came_later() -> None:
    """Eight wait behind one that does not fit, and the last of them is always preferred; then more come than may pass.

    With a bound on how often each is passed, whoever came, the eight would go in the order in which they came.
    """
    line: WaitingLine[int] = WaitingLine(max_overtakes=2)
    line.add(0)
    for item in range(1, 9):
        line.add(item)
    line.admit(0)
    for late in range(9, 20):
        line.add(late)
    order: list[int] = []
    while len(order) < 10:
        item = next(iter(line.candidates(ordered=reversed)))
        line.admit(item)
        order.append(item)
    assert order[:2] == [19, 18], "as many as may pass"
    assert order[2:] == [8, 7, 6, 5, 4, 3, 2, 1]


def test_one_that_does_not_fit_is_not_passed_for_ever_by_its_own_round() -> None:
    """The round of one that waits takes no more once it was passed often enough: those who come wait behind it."""
    line: WaitingLine[str] = WaitingLine(max_overtakes=2)
    for name in ("poor", "rich", "richer"):
        line.add(name)
    claims = {"poor": 1, "rich": 0, "richer": 0}  # the first has been given much: it keeps its round, and waits
    for number in range(20):
        name = f"rich {number}"
        claims[name] = 0
        line.add(name)
        others = [item for item in line.candidates(claim=claims.__getitem__) if item != "rich"]
        if not others:
            break
        line.admit(others[0])
    assert number < 8, "the one that does not fit is passed again and again"


def test_a_group_passes_the_others_as_one() -> None:
    """Four requests of one pool share its slots: whoever waits for slots waits for all of them at once."""
    line: WaitingLine[str] = WaitingLine(max_overtakes=2)
    for name in ("a", "x1", "x2", "y1", "x3", "y2"):
        line.add(name)
    for _ in range(2):
        admitted: list[str] = []
        for name in line.candidates(group=lambda name: name[0] if name != "a" else None):
            if name == "a" or (admitted and name[0] != admitted[0][0]):
                continue  # no room
            line.admit(name, name[0])
            admitted.append(name)
    assert list(line) == ["a"]
    line.add("z")
    assert list(line.candidates()) == ["a"], "it was passed by two groups"


def test_others_of_a_pool_ride_along_whatever_their_tenant_has_had() -> None:
    line: WaitingLine[tuple[str, str]] = WaitingLine(max_overtakes=8)
    for item in (("rich", "x"), ("poor", "y"), ("rich", "y")):
        line.add(item)
    seen = []
    for item in line.candidates(claim=lambda item: item[0] == "rich", group=lambda item: item[1]):
        seen.append(item)
        line.admit(item, item[1])
    assert seen == [("poor", "y"), ("rich", "y"), ("rich", "x")]


@given(
    pools=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    max_overtakes=st.integers(0, 4),
    arrivals_a_step=st.integers(1, 5),
)
def test_none_starves_behind_groups(pools: list[int], max_overtakes: int, arrivals_a_step: int) -> None:
    """One pool fits at a time, and the last one is always preferred: still each request has its turn.

    A request is passed by at most `max_overtakes` groups, and by those that ride with one that came before it.
    """
    line: WaitingLine[int] = WaitingLine(max_overtakes)
    running: dict[int, int] = {}
    arrived, step, admitted = 0, 0, 0
    while admitted < len(pools):
        for _ in range(arrivals_a_step):
            if arrived < len(pools):
                line.add(arrived)
                arrived += 1
        running = {item: end for item, end in running.items() if end > step}
        ahead = list(line)
        passed_by: dict[int, set[int]] = {item: set() for item in ahead}
        for item in line.candidates(ordered=reversed, group=pools.__getitem__):
            if all(pools[other] == pools[item] for other in running):
                line.admit(item, pools[item])
                admitted += 1
                running[item] = step + 3
                for earlier in ahead[: ahead.index(item)]:
                    passed_by[earlier].add(pools[item])
        assert all(len(groups) <= 1 for groups in passed_by.values())
        step += 1
        assert step < 10 * len(pools) * (max_overtakes + 1), "somebody starves"


WANTS = st.lists(st.builds(Want, st.just(8), st.integers(1, 200), st.integers(1, 255)), min_size=1, max_size=6)


def waited_for(wants: Sequence[Want], order: Sequence[int], loaded: int) -> int:
    """What all tokens together wait for: experts that are paged for their request or for one before it."""
    total = paged = 0
    for index in order:
        experts = wants[index].experts
        assert experts is not None
        paged += (experts & ~loaded).bit_count()
        loaded |= experts
        total += paged * wants[index].num_tokens
    return total


@given(wants=WANTS, loaded=st.integers(0, 255))
@settings(max_examples=200)
def test_the_order_is_near_the_best_of_all_orders(wants: list[Want], loaded: int) -> None:
    order = list(by_overlap(wants, loaded, loaded))
    assert sorted(order) == list(range(len(wants)))
    assert order == list(by_overlap(wants, loaded, loaded)), "the same again from the same facts"
    best = min(waited_for(wants, other, loaded) for other in permutations(range(len(wants))))
    assert waited_for(wants, order, loaded) <= 2 * best


@given(
    tokens=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 4), min_size=6, max_size=6),
    loaded=st.integers(0, 2**24 - 1),
)
@settings(max_examples=200)
def test_the_order_is_the_best_where_pools_are_apart(tokens: list[int], sizes: list[int], loaded: int) -> None:
    wants = [Want(4, tokens[n], ((1 << sizes[n]) - 1) << 4 * n) for n in range(len(tokens))]
    order = list(by_overlap(wants, loaded, loaded))
    best = min(waited_for(wants, other, loaded) for other in permutations(range(len(wants))))
    assert waited_for(wants, order, loaded) == best


def test_requests_of_one_pool_come_together_and_what_is_there_comes_first() -> None:
    wants = [Want(2, 100, 0b0011), Want(2, 100, 0b1100), Want(2, 100, 0b0011), Want(2, 100, 0b1100)]
    assert list(by_overlap(wants, loaded=0, held=0)) == [0, 2, 1, 3]
    assert list(by_overlap(wants, loaded=0b1100, held=0)) == [1, 3, 0, 2]
    assert list(by_overlap(wants, loaded=0b1111, held=0b1100)) == [1, 3, 0, 2]


def test_a_pool_that_is_not_known_costs_what_it_reserves() -> None:
    wants = [Want(4, 100), Want(4, 100, 0b0111), Want(4, 200), Want(2, 50)]
    assert list(by_overlap(wants, loaded=0, held=0)) == [3, 0, 2, 1]
    assert list(by_overlap(wants, loaded=0b0111, held=0)) == [1, 3, 0, 2]


def test_tenants_are_served_by_weight_whoever_asks_for_more() -> None:
    counters = TenantCounters()
    for tenant, weight, num_requests in (("flood", 1.0, 400), ("small", 1.0, 400), ("double", 2.0, 400)):
        for _ in range(num_requests):
            counters.arrived(tenant, weight)
    given_to = dict.fromkeys(("flood", "small", "double"), 0)
    entitled = dict.fromkeys(given_to, 0.0)
    for _ in range(200):
        claim = counters.claims()
        tenant = min(given_to, key=lambda name: (claim(name), name))
        counters.admitted(tenant)
        cost = Spent(64, 64).cost(Spent(), Prices())
        for name, (_, due) in counters.charge({tenant: cost}).items():
            entitled[name] += due
        given_to[tenant] += 1
    assert given_to["double"] == pytest.approx(100, abs=8)
    assert given_to["small"] == pytest.approx(50, abs=8)
    assert entitled["double"] == pytest.approx(2 * entitled["small"])


def test_a_tenant_that_comes_back_has_saved_nothing_up() -> None:
    counters = TenantCounters()
    counters.arrived("late")
    counters.admitted("late")
    counters.ended("late", was_admitted=True)
    counters.arrived("busy")
    counters.admitted("busy")
    counters.charge({"busy": 1e6})
    counters.arrived("late")
    assert counters.counter("late") == counters.counter("busy") == 1e6


def test_a_tenant_cannot_shed_what_it_was_given_by_leaving() -> None:
    counters = TenantCounters()
    for tenant in ("one", "other"):
        counters.arrived(tenant)
        counters.admitted(tenant)
    counters.charge({"one": 1e6})
    counters.ended("one", was_admitted=True)
    counters.arrived("one")
    assert counters.counter("one") == 1e6
    assert counters.claims()("one")[0] == 0.0, "nobody else waits"
    counters.arrived("other")
    assert counters.claims()("one") > counters.claims()("other")


def test_of_tenants_alike_the_one_of_which_nothing_runs_comes_first() -> None:
    counters = TenantCounters()
    for tenant in ("flood", "flood", "small"):
        counters.arrived(tenant)
    counters.admitted("flood")
    assert counters.claims()("small") < counters.claims()("flood")
    counters.charge({"flood": counters.SLACK + 1})
    counters.admitted("small")
    counters.arrived("small")
    assert counters.claims()("small") < counters.claims()("flood")


def test_of_tenants_alike_one_that_comes_goes_before_one_of_which_nothing_runs_just_now() -> None:
    counters = TenantCounters()
    for tenant in ("flood", "flood"):
        counters.arrived(tenant)
    counters.admitted("flood")
    counters.arrived("small")
    counters.ended("flood", was_admitted=True)
    assert counters.claims()("small") < counters.claims()("flood")


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1e4)), max_size=60))
def test_tenants_that_left_are_forgotten_once_that_changes_nothing(calls: list[tuple[int, float]]) -> None:
    counters = TenantCounters()
    for number, cost in calls:
        tenant = str(number)
        counters.arrived(tenant)
        counters.admitted(tenant)
        counters.charge({tenant: cost})
        counters.ended(tenant, was_admitted=True)
        assert len(counters) == 0, "nobody is active: the next one starts where the last one stopped"


def test_paging_and_slots_are_charged_beside_tokens() -> None:
    prices = Prices(output_token=2, paged_expert=0.5, all_slots_second=10)
    spent = Spent(prompt_tokens=10, output_tokens=5, paged_experts=4, slot_s=0.5)
    assert spent.cost(Spent(), prices) == 10 + 10 + 2 + 5
    assert spent.cost(spent, prices) == 0


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
