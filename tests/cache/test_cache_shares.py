"""Of the slots that a tenant is guaranteed, no stranger takes one: a model of the ledger, and what users see of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pager.cache.index import CacheIndex, make_policy
from pager.cache.ledger import Holding, Ledger
from pager.cache.stats import Cause, NoObserver, Tier, UsageMeter
from pager.cache.tiers import Fetched
from pager.errors import ExpertUnavailable, PoolTooLarge, SlotsExhausted
from pager.types import ExpertKey
from tests.cache.conftest import CheckWeights, GatedSource, MakePager
from tests.support.values import some

TENANTS = ("gold", "silver", "a", "b")


def key(number: int) -> ExpertKey:
    return ExpertKey(number // 4, number % 4)


class NoTransfer:
    """Moves nothing: the ledger alone is looked at."""

    is_in_place = True

    def __getattr__(self, _: str) -> Any:
        return lambda *_: ()


class SharesMachine(RuleBasedStateMachine):
    """Tenants that reserve, bind, let go, prefetch and fail in any order. Two of them are guaranteed slots.

    What the model knows of a guaranteed tenant: the distinct experts that it holds, what was promised to it, what of
    its is still being read for nobody, and in which order it let go of experts.
    """

    NUM_SLOTS = 6

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(
            CacheIndex(self.NUM_SLOTS, make_policy("lru")),
            NoTransfer(),
            NoObserver(),
            lambda _, keys: self.queued.extend(keys),
        )
        self.queued: list[ExpertKey] = []
        self.reading: list[ExpertKey] = []
        self.holdings: list[tuple[str, Holding]] = []
        self.guaranteed: dict[str, int] = {}
        self.let_go: dict[str, list[ExpertKey]] = {tenant: [] for tenant in TENANTS}
        self.arriving: dict[ExpertKey, str] = {}
        self.wanted: dict[ExpertKey, str] = {}  # prefetches that no reader has come to
        self.before: dict[str, list[ExpertKey]] = {}

    @initialize(gold=st.integers(1, 3), silver=st.integers(0, 2))
    def guarantee(self, gold: int, silver: int) -> None:
        for tenant, slots in (("gold", gold), ("silver", silver)):
            self.ledger.guarantee(tenant, slots)
            self.guaranteed[tenant] = slots

    # What the model says.

    def used(self, tenant: str) -> int:
        own = [holding for owner, holding in self.holdings if owner == tenant]
        held = {each for holding in own for each in holding.keys}
        arriving = sum(owner == tenant for owner in self.arriving.values())
        return len(held) + sum(holding.reserved for holding in own) + arriving

    def kept(self, tenant: str) -> list[ExpertKey]:
        """What the tenant let go of last, as far as its guarantee has room for it."""
        idle = [each for each in self.let_go[tenant] if self.ledger.index.is_evictable(each)]
        most = max(0, self.guaranteed.get(tenant, 0) - self.used(tenant))
        return idle[len(idle) - min(most, len(idle)) :]

    def begin(self) -> None:
        self.before = {tenant: self.kept(tenant) for tenant in self.guaranteed}

    def end(self, actor: str) -> None:
        index = self.ledger.index
        for tenant, order in self.let_go.items():
            self.let_go[tenant] = [each for each in order if index.is_loaded(each) or index.is_loading(each)]
        for each in list(self.arriving):
            if not index.is_loading(each) or index.pins(each):
                del self.arriving[each]
        for tenant, kept in self.before.items():
            if tenant != actor:
                assert all(index.is_loaded(each) for each in kept), f"{actor} evicted what is {tenant}'s"

    def note_let_go(self, tenant: str, keys: Sequence[ExpertKey]) -> None:
        held = {each for owner, holding in self.holdings if owner == tenant for each in holding.keys}
        for each in keys:
            if each in held:
                continue  # by another holding of the tenant's
            if each in self.let_go[tenant]:
                self.let_go[tenant].remove(each)
            self.let_go[tenant].append(each)
            if self.ledger.index.is_loading(each) and not self.ledger.index.pins(each):
                self.arriving[each] = tenant

    # What tenants do.

    def open(self, tenant: str) -> Holding:
        holding = self.ledger.open(Cause.LEASE, UsageMeter(tenant))
        self.holdings.append((tenant, holding))
        return holding

    @rule(tenant=st.sampled_from(TENANTS), num_slots=st.integers(0, NUM_SLOTS))
    def reserve(self, tenant: str, num_slots: int) -> None:
        self.begin()
        holding = self.open(tenant)
        if not self.ledger.reserve(holding, num_slots):
            self.release_holding(len(self.holdings) - 1)
        self.end(tenant)

    @rule(tenant=st.sampled_from(TENANTS), numbers=st.sets(st.integers(0, 7), min_size=1, max_size=5))
    def hold_pool(self, tenant: str, numbers: set[int]) -> None:
        self.begin()
        holding = self.open(tenant)
        if not self.ledger.bind(holding, [key(number) for number in sorted(numbers)]):
            self.release_holding(len(self.holdings) - 1)
        self.end(tenant)

    @precondition(lambda self: any(holding.reserved for _, holding in self.holdings))
    @rule(data=st.data(), numbers=st.sets(st.integers(0, 7), min_size=1, max_size=5))
    def bind_what_was_promised(self, data: st.DataObject, numbers: set[int]) -> None:
        tenant, holding = data.draw(st.sampled_from([each for each in self.holdings if each[1].reserved]))
        self.begin()
        new = [key(number) for number in sorted(numbers) if key(number) not in holding.keys][: holding.reserved]
        assert self.ledger.bind(holding, new), "a promise is kept, whoever is guaranteed what"
        self.end(tenant)

    @precondition(lambda self: any(holding.keys for _, holding in self.holdings))
    @rule(data=st.data())
    def let_go_and_keep_the_slots(self, data: st.DataObject) -> None:
        tenant, holding = data.draw(st.sampled_from([each for each in self.holdings if each[1].keys]))
        keys = data.draw(st.lists(st.sampled_from(sorted(holding.keys)), min_size=1, unique=True))
        self.begin()
        self.ledger.let_go_of_experts(holding, keys)
        self.note_let_go(tenant, keys)
        self.end(tenant)

    @precondition(lambda self: self.holdings)
    @rule(data=st.data(), numbers=st.sets(st.integers(0, 7), max_size=5), num_slots=st.integers(0, 3))
    def become(self, data: st.DataObject, numbers: set[int], num_slots: int) -> None:
        tenant, holding = data.draw(st.sampled_from(self.holdings))
        wanted = [key(number) for number in sorted(numbers)]
        gone = [each for each in holding.keys if each not in wanted]
        self.begin()
        if self.ledger.become(holding, wanted, num_slots):
            assert holding.reserved == num_slots
            self.note_let_go(tenant, gone)
        self.end(tenant)

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.holdings) - 1))
        self.begin()
        self.end(self.release_holding(number))

    def release_holding(self, number: int) -> str:
        tenant, holding = self.holdings.pop(number)
        keys = list(holding.keys)
        self.ledger.release(holding)
        self.note_let_go(tenant, keys)
        return tenant

    @rule(tenant=st.sampled_from(TENANTS), numbers=st.sets(st.integers(0, 7), min_size=1, max_size=4))
    def prefetch(self, tenant: str, numbers: set[int]) -> None:
        self.begin()
        keys = [key(number) for number in sorted(numbers)]
        for each in keys:
            if self.ledger.index.pins(each) == 0 and not self.ledger.prefetch_pending([each]):
                self.wanted[each] = tenant
        self.ledger.prefetch(keys, UsageMeter(tenant))
        self.end(tenant)

    # What reader threads do.

    @precondition(lambda self: self.queued or self.reading)
    @rule()
    def read_everything(self) -> None:
        """As often as anything else, so that most experts are there to be evicted."""
        for each in list(self.queued):
            self.read(each)
        for each in list(self.reading):
            self.finish(each, succeeds=True)

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def begin_read(self, data: st.DataObject) -> None:
        self.read(data.draw(st.sampled_from(self.queued)))

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), succeeds=st.booleans())
    def end_read(self, data: st.DataObject, succeeds: bool) -> None:
        self.finish(data.draw(st.sampled_from(self.reading)), succeeds=succeeds)

    def read(self, each: ExpertKey) -> None:
        self.queued.remove(each)
        self.begin()
        if self.ledger.begin(each) is not None:
            self.reading.append(each)
            owner = None if self.ledger.index.pins(each) else self.wanted.pop(each, None)
            if owner is not None:
                self.arriving[each] = owner
                self.note_let_go(owner, [each])
        self.end(self.arriving.get(each, ""))

    def finish(self, each: ExpertKey, *, succeeds: bool) -> None:
        self.reading.remove(each)
        self.begin()
        if succeeds:
            self.ledger.finish(each, Fetched(Tier.DISK, 1, 0.0))
        else:
            self.ledger.fail(each, ExpertUnavailable("gone", each))
        self.end("")

    @invariant()
    def what_is_guaranteed_can_be_had_at_once(self) -> None:
        self.ledger.check_integrity()
        for tenant, slots in self.guaranteed.items():
            probe = self.ledger.open(Cause.LEASE, UsageMeter(tenant))
            assert self.ledger.reserve(probe, max(0, slots - self.used(tenant))), f"a stranger has what is {tenant}'s"
            self.ledger.release(probe)


SharesMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestSharesMachine = SharesMachine.TestCase


class LateSharesMachine(SharesMachine):
    """Guarantees that come and go while others have the slots: what was promised before is still kept."""

    @initialize(gold=st.just(0), silver=st.just(0))
    def guarantee(self, gold: int, silver: int) -> None:
        pass

    @rule(tenant=st.sampled_from(TENANTS), num_slots=st.integers(0, 6))
    def change(self, tenant: str, num_slots: int) -> None:
        self.ledger.guarantee(tenant, num_slots)


LateSharesMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLateSharesMachine = LateSharesMachine.TestCase


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def test_strangers_evict_each_others_experts_and_not_those_in_a_guaranteed_share(
    make_pager: MakePager, source: GatedSource, check_weights: CheckWeights
) -> None:
    pager = make_pager(6)
    pager.guarantee("gold", 0.5)
    with some(pager.reserve_pool(keys(0, 0, 1, 2), UsageMeter("gold"))) as lease:
        lease.wait(0)
    for number in range(4):
        with some(pager.reserve_pool(keys(1, 2 * number, 2 * number + 1), UsageMeter(f"t{number}"))) as lease:
            lease.wait(1)
    check_weights(pager, keys(0, 0, 1, 2))
    with some(pager.reserve_pool(keys(0, 0, 1, 2), UsageMeter("gold"))) as lease:
        assert (lease.usage.experts_hit, lease.usage.experts_missed) == (3, 0)


def test_what_a_stranger_holds_of_a_tenants_experts_is_paid_for_twice(make_pager: MakePager) -> None:
    pager = make_pager(6)
    pager.guarantee("gold", 0.5)
    gold = some(pager.reserve_pool(keys(0, 0, 1, 2), UsageMeter("gold")))
    with some(pager.reserve_pool(keys(0, 0, 1), UsageMeter("t0"))):
        gold.release()
        assert pager.reserve(2, UsageMeter("t1")) is None, "two slots more would be gold's"
        with some(pager.reserve_pool(keys(2, 0, 1, 2), UsageMeter("gold"))):
            pass


def test_a_refusal_says_whose_slots_they_are(make_pager: MakePager) -> None:
    pager = make_pager(6)
    pager.guarantee("gold", 0.5)
    with pytest.raises(PoolTooLarge, match="has 3 beside 3 that other tenants are guaranteed"):
        pager.reserve(4, UsageMeter("t0"))
    with pytest.raises(PoolTooLarge, match="has 6;"):
        pager.reserve(7, UsageMeter("gold"))
    with some(pager.reserve(3, UsageMeter("t0"))), pytest.raises(SlotsExhausted, match="another tenant is guaranteed"):
        list(pager.demand(0, [1], UsageMeter("t1")))
    with some(pager.reserve(6, UsageMeter("gold"))):
        pass


def test_a_guarantee_that_comes_late_takes_nothing_that_was_promised(make_pager: MakePager) -> None:
    pager = make_pager(6)
    leases = [some(pager.reserve(2, UsageMeter(f"t{number}"))) for number in range(3)]
    pager.guarantee("gold", 0.5)
    for layer, lease in enumerate(leases):
        lease.bind(layer, [0, 1])
        lease.wait(layer)
    assert pager.reserve(1, UsageMeter("gold")) is None
    leases[0].release()
    assert pager.reserve(1, UsageMeter("t0")) is None, "what is freed is gold's first"
    gold = some(pager.reserve(2, UsageMeter("gold")))
    leases[1].release()
    assert pager.reserve(2, UsageMeter("t0")) is None
    some(pager.reserve(1, UsageMeter("t0"))).release()
    gold.release()
    leases[2].release()


def test_all_tenants_together_are_guaranteed_no_more_than_others_can_spare(make_pager: MakePager) -> None:
    pager = make_pager(10)
    for tenant in ("gold", "silver"):
        pager.guarantee(tenant, 0.8)
    some(pager.reserve(1, UsageMeter("t0"))).release()
    assert pager.reserve(9, UsageMeter("gold")) is not None


def test_exact_forwards_page_in_the_slots_of_their_account(make_pager: MakePager) -> None:
    pager = make_pager(4)
    pager.guarantee("gold", 0.5)
    with some(pager.reserve_pool(keys(0, 0, 1), UsageMeter("gold"))) as lease:
        lease.wait(0)
    with some(pager.reserve(2, UsageMeter("t0"))) as lease:
        for layer in (1, 2, 3, 1):
            waves = list(pager.demand(layer, range(6), UsageMeter("t0"), lease=lease))
            assert sorted(itertools.chain.from_iterable(waves)) == list(range(6))
    assert set(keys(0, 0, 1)) <= {ExpertKey(0, expert) for expert in pager.resident_experts()[0]}


def test_a_guarantee_grows_to_what_was_asked_when_another_one_shrinks(make_pager: MakePager) -> None:
    pager = make_pager(10)
    pager.guarantee("gold", 0.8)
    pager.guarantee("silver", 0.5)  # of which one is left
    with some(pager.reserve(1, UsageMeter("t0"))), some(pager.reserve(1, UsageMeter("silver"))):
        assert pager.reserve(1, UsageMeter("silver")) is None
    pager.guarantee("gold", 0.1)
    with some(pager.reserve(4, UsageMeter("t0"))):
        assert pager.reserve(1, UsageMeter("t1")) is None, "the rest is guaranteed to others"
        some(pager.reserve(5, UsageMeter("silver"))).release()
    pager.guarantee("silver", 0.0)
    some(pager.reserve(9, UsageMeter("t0"))).release()
