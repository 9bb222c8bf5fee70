"""The slot table: literal eviction orders, and a state machine that compares it with a model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pager.cache.index import LRU, CacheIndex, SlotPlan, make_policy
from pager.errors import ConfigError
from pager.types import ExpertKey
from tests.support.values import some


def key(number: int) -> ExpertKey:
    return ExpertKey(number // 4, number % 4)


def keys(*numbers: int) -> tuple[ExpertKey, ...]:
    return tuple(key(number) for number in numbers)


def hold(index: CacheIndex, *numbers: int, reservation: int = 0) -> SlotPlan:
    """Plans, commits and installs."""
    plan = index.plan(keys(*numbers), reservation=reservation)
    assert plan is not None
    index.commit(plan)
    for load in plan.loads:
        index.installed(load.key)
    return plan


def let_go(index: CacheIndex, *numbers: int) -> None:
    for each in keys(*numbers):
        index.unpin(each)


def test_evicts_in_the_order_in_which_experts_were_let_go() -> None:
    index = CacheIndex(4, LRU())
    hold(index, 0, 1, 2, 3)
    let_go(index, 2, 0, 3, 1)
    assert hold(index, 4).victims == keys(2)
    assert hold(index, 0, 5).victims == keys(3)  # 0 is a hit of the same plan and is passed over
    let_go(index, 4, 0)
    assert hold(index, 6, 7).victims == keys(1, 4)
    assert hold(index, 6).hits == keys(6)
    assert sorted(index.loaded()) == sorted(keys(0, 5, 6, 7))


def test_loads_go_to_free_slots_first_and_then_to_the_victims_slots() -> None:
    index = CacheIndex(3, LRU())
    first = hold(index, 0, 1)
    assert [load.slot for load in first.loads] == [0, 1]
    let_go(index, 1, 0)
    second = hold(index, 2, 3)
    assert [(load.key, load.slot) for load in second.loads] == [(key(2), 2), (key(3), 1)]


def test_pinned_and_loading_experts_are_no_victims() -> None:
    index = CacheIndex(2, LRU())
    hold(index, 0)
    loading = index.plan(keys(1))
    assert loading is not None
    index.commit(loading)
    index.unpin(key(1))  # nobody waits for it, and still it cannot be evicted
    assert index.plan(keys(2)) is None
    index.installed(key(1))
    plan = index.plan(keys(2))
    assert plan is not None
    assert plan.victims == keys(1)


def test_reserved_slots_are_kept_for_their_owner() -> None:
    index = CacheIndex(4, LRU())
    hold(index, 0, 1, 2, 3)
    let_go(index, 0, 1, 2, 3)
    assert index.reserve(3)
    assert not some(index.reserve(2))
    assert index.plan(keys(4, 5)) is None
    assert index.plan(keys(0, 1)) is None  # hits that would be pinned take slots from the promise too
    assert hold(index, 0, 5, reservation=3).paid == 2
    assert index.num_reserved == 1
    assert index.num_unreserved == 1


def test_an_expert_that_somebody_holds_costs_no_slot() -> None:
    index = CacheIndex(4, LRU())
    hold(index, 0, 1, 2)
    assert index.slots_needed(keys(1, 2, 3)) == 1
    assert hold(index, 1, 2, 3).hits == keys(1, 2)
    let_go(index, 0, 1, 2)
    assert [index.pins(each) for each in keys(0, 1, 2, 3)] == [0, 1, 1, 1]
    assert index.num_unreserved == 1


def test_spared_experts_are_passed_over() -> None:
    index = CacheIndex(2, LRU())
    hold(index, 0, 1)
    let_go(index, 0, 1)
    plan = index.plan(keys(2), spare=keys(0))
    assert plan is not None
    assert plan.victims == keys(1)
    assert index.plan(keys(2), spare=keys(0, 1)) is None


def test_an_abandoned_load_frees_its_slot_and_voids_its_pins() -> None:
    index = CacheIndex(1, LRU())
    for _ in range(2):
        plan = index.plan(keys(0))
        assert plan is not None
        index.commit(plan)
    index.abandon(key(0))
    assert index.pins(key(0)) == 0
    assert hold(index, 1).loads[0].slot == 0


def test_a_stale_plan_is_refused() -> None:
    index = CacheIndex(2, LRU())
    plan = index.plan(keys(0))
    assert plan is not None
    index.commit(plan)
    with pytest.raises(AssertionError, match="changed between"):
        index.commit(plan)


def test_refresh_moves_an_expert_to_the_end_of_the_order() -> None:
    index = CacheIndex(3, LRU())
    hold(index, 0, 1, 2)
    let_go(index, 0, 1, 2)
    index.refresh(key(0))
    assert hold(index, 3, 4).victims == keys(1, 2)


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'mru'.*lru"):
        make_policy("mru")


class IndexMachine(RuleBasedStateMachine):
    """Leases that reserve, bind, release, fail and cancel in any order, against a model that only counts."""

    NUM_SLOTS = 6

    def __init__(self) -> None:
        super().__init__()
        self.index = CacheIndex(self.NUM_SLOTS, LRU())
        self.leases: dict[int, list[ExpertKey]] = {}
        self.reserved: dict[int, int] = {}
        self.loading: list[ExpertKey] = []
        self.next_lease = 0

    def open_lease(self, held: tuple[ExpertKey, ...], reserved: int) -> None:
        self.leases[self.next_lease] = list(held)
        self.reserved[self.next_lease] = reserved
        self.next_lease += 1

    def carry_out(self, plan: SlotPlan) -> None:
        assert not set(plan.victims) & {each for lease in self.leases.values() for each in lease}
        assert not set(plan.victims) & set(self.loading)
        self.index.commit(plan)
        self.loading += [load.key for load in plan.loads]

    @rule(num_slots=st.integers(0, NUM_SLOTS + 1))
    def reserve(self, num_slots: int) -> None:
        fits = num_slots <= self.index.num_unreserved
        assert self.index.reserve(num_slots) == fits
        if fits:
            self.open_lease((), num_slots)

    @rule(numbers=st.sets(st.integers(0, 15), max_size=NUM_SLOTS))
    def hold_pool(self, numbers: set[int]) -> None:
        wanted = keys(*sorted(numbers))
        fits = self.index.slots_needed(wanted) <= self.index.num_unreserved
        plan = self.index.plan(wanted)
        assert (plan is not None) == fits
        if plan is not None:
            self.carry_out(plan)
            self.open_lease(wanted, 0)

    @precondition(lambda self: any(self.reserved.values()))
    @rule(data=st.data(), numbers=st.sets(st.integers(0, 15), min_size=1))
    def bind(self, data: st.DataObject, numbers: set[int]) -> None:
        """What was promised is always to be had."""
        lease = data.draw(st.sampled_from([each for each, left in self.reserved.items() if left]))
        new = [each for each in keys(*sorted(numbers)) if each not in self.leases[lease]]
        new = new[: self.reserved[lease]]
        plan = self.index.plan(new, reservation=self.reserved[lease])
        assert plan is not None
        self.carry_out(plan)
        self.leases[lease] += new
        self.reserved[lease] -= plan.paid

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        for each in self.leases.pop(lease):
            self.index.unpin(each)
        self.index.unreserve(self.reserved.pop(lease))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), succeeds=st.booleans())
    def finish_load(self, data: st.DataObject, succeeds: bool) -> None:
        done = data.draw(st.sampled_from(self.loading))
        self.loading.remove(done)
        if succeeds:
            self.index.installed(done)
            return
        self.index.abandon(done)
        for held in self.leases.values():
            if done in held:
                held.remove(done)

    @rule(number=st.integers(0, 15))
    def refresh(self, number: int) -> None:
        self.index.refresh(key(number))

    @invariant()
    def holds_together(self) -> None:
        self.index.check_integrity()
        assert self.index.num_reserved == sum(self.reserved.values())
        for each in keys(*range(16)):
            assert self.index.pins(each) == sum(each in held for held in self.leases.values())
            assert self.index.is_loading(each) == (each in self.loading)
        assert self.index.num_resident <= self.NUM_SLOTS


IndexMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestIndexMachine = IndexMachine.TestCase
