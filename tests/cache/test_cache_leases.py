"""Reserve, bind, wait, release: what leases promise to sequences."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from pager.cache.device import DeviceSlots
from pager.cache.pager import CacheOptions, ExpertPager
from pager.cache.stats import UsageMeter
from pager.errors import Cancelled, ChecksumMismatch, ConfigError, ExpertUnavailable, PoolTooLarge, SlotsExhausted
from pager.types import ExpertKey
from tests.cache.conftest import CheckWeights, GatedSource, MakePager, weights_of
from tests.support.values import some


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def test_a_lease_brings_its_experts_into_slots(
    make_pager: MakePager, source: GatedSource, check_weights: CheckWeights
) -> None:
    pager = make_pager(6)
    with some(pager.reserve(4)) as lease:
        lease.bind(0, [3, 1])
        lease.bind(2, [7])
        lease.wait(0)
        lease.wait(2)
        check_weights(pager, [*keys(0, 3, 1), *keys(2, 7)])
        assert lease.ready()
        assert (lease.num_bound, lease.num_reserved) == (3, 1)
        assert lease.usage.experts_missed == 3
        record = pager.slots.record_bytes
        assert lease.usage.bytes_from_disk == 3 * record
        assert pager.stats().held_bytes == 3 * record
        assert pager.stats().reserved_bytes == record
        lease.shrink()
        assert pager.stats().reserved_bytes == 0
    assert pager.stats().held_bytes == 0
    assert pager.resident_experts() == ((1, 3), (), (7,), ())


def test_always_resident_experts_have_their_own_slots_and_cost_nothing(
    make_pager: MakePager, check_weights: CheckWeights
) -> None:
    shared = (ExpertKey(0, 7), ExpertKey(1, 7))
    pager = make_pager(2, resident=shared)
    assert pager.num_slots == 2
    check_weights(pager, list(shared))
    with some(pager.reserve_pool([*keys(0, 1, 7), *keys(1, 7)])) as lease:
        lease.wait(0)
        assert (lease.num_bound, lease.usage.experts_hit, lease.usage.experts_missed) == (1, 0, 1)
    with some(pager.reserve_pool([*keys(2, 0, 1)])) as lease:
        lease.wait(2)
        check_weights(pager, list(shared))


def test_reservations_are_all_or_nothing(make_pager: MakePager) -> None:
    pager = make_pager(4)
    with some(pager.reserve(3)):
        assert pager.reserve(2) is None
        assert pager.reserve_pool(keys(0, 0, 1)) is None
        with some(pager.reserve(1)):
            assert pager.reserve(1) is None
    with some(pager.reserve(4)):
        pass


def test_a_pool_that_never_fits_is_refused(make_pager: MakePager) -> None:
    pager = make_pager(4)
    with pytest.raises(PoolTooLarge) as refused:
        pager.reserve(5)
    assert (refused.value.needed, refused.value.slots) == (5, 4)
    with pytest.raises(PoolTooLarge):
        pager.reserve_pool(keys(0, 0, 1, 2, 3, 4))


def test_binding_beyond_the_reservation_is_refused(make_pager: MakePager) -> None:
    pager = make_pager(4)
    with some(pager.reserve(1)) as lease:
        lease.bind(0, [1])
        lease.bind(0, [1, 1])  # held already
        with pytest.raises(ValueError, match="exceed the lease"):
            lease.bind(1, [1])
        lease.wait(0)


def test_overlapping_pools_fit_where_disjoint_ones_do_not(
    make_pager: MakePager, source: GatedSource, check_weights: CheckWeights
) -> None:
    pager = make_pager(6)
    with some(pager.reserve_pool(keys(0, 0, 1, 2, 3))) as first:
        assert pager.reserve_pool(keys(1, 0, 1, 2, 3)) is None
        with some(pager.reserve_pool(keys(0, 2, 3, 4, 5))) as second:
            first.wait(0)
            second.wait(0)
            first.release()
            check_weights(pager, keys(0, 2, 3, 4, 5))
            assert pager.reserve_pool(keys(1, 0, 1, 2)) is None
            assert second.usage.experts_hit == 2
    assert sorted(source.started) == keys(0, 0, 1, 2, 3, 4, 5)


def test_lru_evicts_the_experts_of_the_lease_released_first(make_pager: MakePager) -> None:
    pager = make_pager(4, policy="lru")
    first, second = some(pager.reserve_pool(keys(0, 0, 1))), some(pager.reserve_pool(keys(1, 0, 1)))
    first.wait(0)
    second.wait(1)
    second.release()
    first.release()
    with some(pager.reserve_pool(keys(2, 0))) as lease:
        lease.wait(2)
        assert pager.resident_experts() == ((0, 1), (1,), (0,), ())
    with some(pager.reserve_pool([*keys(1, 1), *keys(2, 5, 6)])) as lease:
        lease.wait(2)
        assert pager.resident_experts() == ((), (1,), (0, 5, 6), ())
    assert pager.stats().evictions == 3


def test_an_expert_is_read_once_however_many_leases_want_it(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(6)
    wanted = keys(0, 0, 1)
    source.hold(*wanted)
    leases = [some(pager.reserve_pool(wanted)) for _ in range(5)]
    source.wait_until_started(wanted[0])
    assert not any(lease.ready() for lease in leases)
    source.let_through()
    for lease in leases:
        lease.wait(0)
    assert [source.reads_of(key) for key in wanted] == [1, 1]
    assert [lease.usage.experts_missed for lease in leases] == [2, 0, 0, 0, 0]
    stats = pager.stats()
    assert (stats.paging.experts_missed, stats.hits_in_flight, stats.paging.experts_hit) == (2, 8, 8)
    assert [lease.usage.bytes_from_disk > 0 for lease in leases] == [True, False, False, False, False]


def test_layer_0_can_run_while_layer_1_is_on_the_wire(
    make_pager: MakePager, source: GatedSource, check_weights: CheckWeights
) -> None:
    pager = make_pager(4, num_readers=1)
    source.hold(*keys(1, 0, 1))
    with some(pager.reserve_pool([*keys(1, 0, 1), *keys(0, 0, 1)])) as lease:
        lease.wait(0)
        check_weights(pager, keys(0, 0, 1))
        assert not lease.ready()
        source.let_through()
        lease.wait(1)
        check_weights(pager, [*keys(0, 0, 1), *keys(1, 0, 1)])


def test_reads_start_in_the_order_of_leases_and_then_of_layers(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(8, num_readers=1)
    blocker = ExpertKey(3, 7)
    source.hold(blocker)
    with some(pager.reserve_pool([blocker])) as lease:
        source.wait_until_started(blocker)
        pager.prefetch(keys(0, 6))
        with some(pager.reserve(3)) as first, some(pager.reserve_pool(keys(0, 5))) as second:
            first.bind(2, [1])
            first.bind(1, [4, 3])
            source.let_through()
            for layer in (1, 2):
                first.wait(layer)
            second.wait(0)
            lease.wait(3)
        source.wait_until_started(ExpertKey(0, 6))
    assert source.started == [blocker, *keys(1, 3, 4), *keys(2, 1), *keys(0, 5), *keys(0, 6)]


def test_a_failed_read_fails_those_who_bound_it_and_nobody_else(
    make_pager: MakePager, source: GatedSource, check_weights: CheckWeights
) -> None:
    pager = make_pager(6)
    source.bad.add(ExpertKey(0, 1))
    with (
        some(pager.reserve_pool(keys(0, 0, 1))) as broken,
        some(pager.reserve_pool(keys(0, 1))) as broken_too,
        some(pager.reserve_pool(keys(0, 0, 2))) as fine,
    ):
        for lease in (broken, broken_too):
            with pytest.raises(ExpertUnavailable) as failure:
                lease.wait(0)
            assert failure.value.key == ExpertKey(0, 1)
            assert isinstance(lease.failed, ExpertUnavailable)
            assert not lease.ready()
        fine.wait(0)
        check_weights(pager, keys(0, 0, 2))
        pager.check_integrity()
    assert pager.stats().resident_bytes == 2 * pager.slots.record_bytes
    assert pager.stats().failed_loads >= 1


def test_a_bad_expert_is_quarantined_until_its_time_has_come(
    make_pager: MakePager, source: GatedSource, check_weights: CheckWeights
) -> None:
    pager = make_pager(2, retry_after_s=3600.0)
    bad = ExpertKey(0, 1)
    source.bad.add(bad)
    with some(pager.reserve_pool([bad])) as lease, pytest.raises(ChecksumMismatch):
        lease.wait(0)
    source.bad.clear()
    with some(pager.reserve_pool([bad])) as lease, pytest.raises(ExpertUnavailable, match="not tried again") as refused:
        lease.wait(0)
    assert some(refused.value.retry_after_s) > 3000
    assert source.reads_of(bad) == 1

    forgiving = make_pager(2, retry_after_s=0.0)
    source.bad.add(bad)
    with some(forgiving.reserve_pool([bad])) as lease, pytest.raises(ChecksumMismatch):
        lease.wait(0)
    source.bad.clear()
    with some(forgiving.reserve_pool([bad])) as lease:
        lease.wait(0)
        check_weights(forgiving, [bad])


def test_a_reader_survives_an_error_that_nobody_foresaw(
    make_pager: MakePager, source: GatedSource, check_weights: CheckWeights
) -> None:
    pager = make_pager(2, num_readers=1)
    source.crash.add(ExpertKey(0, 1))
    with some(pager.reserve_pool(keys(0, 1))) as lease, pytest.raises(ExpertUnavailable, match="itself is broken"):
        lease.wait(0)
    with some(pager.reserve_pool(keys(0, 2))) as lease:
        lease.wait(0)
        check_weights(pager, keys(0, 2))


def test_release_cancels_queued_reads_and_lets_running_ones_finish(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(4, num_readers=1)
    running, shared, queued = keys(0, 0, 1, 2)
    source.hold(running)
    lease = some(pager.reserve_pool([running, shared, queued]))
    other = some(pager.reserve_pool([shared]))
    source.wait_until_started(running)
    lease.release()
    lease.release()
    pager.check_integrity()
    assert pager.stats().resident_bytes == 2 * pager.slots.record_bytes
    source.let_through()
    other.wait(0)
    other.release()
    assert source.started == [running, shared]
    assert pager.resident_experts()[0] == (0, 1)
    assert pager.stats().held_bytes == 0


def test_release_from_another_thread_wakes_the_one_that_waits(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(4)
    source.hold(*keys(0, 0))
    lease = some(pager.reserve_pool(keys(0, 0)))
    source.wait_until_started(ExpertKey(0, 0))
    threading.Timer(0.05, lease.release).start()
    with pytest.raises(Cancelled):
        lease.wait(0)
    with pytest.raises(Cancelled):
        lease.bind(0, [0])


def test_a_lease_becomes_larger_all_or_nothing(make_pager: MakePager, check_weights: CheckWeights) -> None:
    pager = make_pager(5)
    with some(pager.reserve_pool(keys(0, 0))) as lease, some(pager.reserve(1)):
        assert lease.capacity == 5
        assert not lease.become([*keys(0, 0, 1), *keys(1, 0, 1, 2)])
        assert not lease.become(keys(0, 0, 1), 3)
        assert (lease.num_bound, lease.num_reserved) == (1, 0)
        assert lease.become([*keys(0, 0, 1), *keys(1, 0)], 1)
        assert (lease.num_bound, lease.num_reserved) == (3, 1)
        pager.check_integrity()
        lease.bind(0, [2])
        lease.wait(0)
        lease.wait(1)
        check_weights(pager, [*keys(0, 0, 1, 2), *keys(1, 0)])
        assert lease.become(keys(1, 0))
        assert (lease.num_bound, lease.num_reserved) == (1, 0)
        pager.check_integrity()
        with some(pager.reserve(3)):
            assert pager.reserve(1) is None
    assert (pager.stats().held_bytes, pager.stats().reserved_bytes) == (0, 0)


def test_a_lease_trades_its_experts_for_a_reservation_all_or_nothing(make_pager: MakePager) -> None:
    pager = make_pager(4)
    with some(pager.reserve_pool(keys(0, 0, 1, 2))) as lease, some(pager.reserve_pool(keys(0, 1, 2, 3))) as other:
        lease.wait(0)
        other.wait(0)
        assert not lease.become((), 2), "the other keeps two of its three, and no slot is free"
        assert (lease.num_bound, lease.num_reserved) == (3, 0)
        pager.check_integrity()
        assert lease.become((), 1)
        assert (lease.num_bound, lease.num_reserved) == (0, 1)
        assert list(pager.demand(0, [4, 5], lease=lease)) == [(4,), (5,)], "one slot at a time, and it comes back"
        assert (other.num_bound, lease.num_reserved) == (3, 1)
        pager.check_integrity()
    assert (pager.stats().held_bytes, pager.stats().reserved_bytes) == (0, 0)


def test_what_a_trade_does_not_need_is_given_back(make_pager: MakePager) -> None:
    pager = make_pager(6)
    with some(pager.reserve_pool(keys(0, 0, 1, 2))) as lease:
        lease.wait(0)
        assert lease.become((), 2)
        assert (lease.num_bound, lease.num_reserved) == (0, 2)
        with some(pager.reserve(4)):
            assert pager.reserve(1) is None
            assert not lease.become((), 3)
        assert lease.become((), 3)
        assert lease.num_reserved == 3
        assert sorted(expert for wave in pager.demand(1, range(8), lease=lease) for expert in wave) == list(range(8))
        assert lease.num_reserved == 3
        pager.check_integrity()


def test_a_lease_that_let_go_gets_its_experts_back_when_there_is_room(
    make_pager: MakePager, source: GatedSource, check_weights: CheckWeights
) -> None:
    pager = make_pager(4)
    with some(pager.reserve_pool(keys(0, 0, 1))) as lease:
        lease.wait(0)
        assert lease.become(())
        with some(pager.reserve_pool(keys(1, 0, 1, 2))) as other:
            other.wait(1)
            assert not lease.become(keys(0, 0, 1))
            pager.check_integrity()
        assert lease.become(keys(0, 0, 1))
        lease.wait(0)
        check_weights(pager, keys(0, 0, 1))
        pager.check_integrity()
    assert max(source.reads_of(key) for key in keys(0, 0, 1)) == 2, "one had to make room"


def test_a_meter_of_the_sequence_collects_what_its_leases_cost(make_pager: MakePager) -> None:
    pager = make_pager(4)
    meter = UsageMeter()
    with some(pager.reserve_pool(keys(0, 0), meter)) as lease:
        lease.wait(0)
    with some(pager.reserve_pool(keys(0, 0, 1), meter)) as lease:
        lease.wait(0)
        assert lease.usage == meter.counts
    assert (meter.counts.experts_hit, meter.counts.experts_missed) == (1, 2)
    assert meter.counts.bytes_from_disk == 2 * pager.slots.record_bytes


def test_close_fails_who_waits_for_queued_reads_and_is_idempotent(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(4, num_readers=1)
    source.hold(ExpertKey(0, 0))
    lease = some(pager.reserve_pool(keys(0, 0, 1)))
    source.wait_until_started(ExpertKey(0, 0))
    closing = threading.Thread(target=pager.close)
    closing.start()
    with pytest.raises(ExpertUnavailable, match="closed"):
        lease.wait(0)
    pager.prefetch(keys(1, 0))
    source.let_through()
    closing.join()
    assert not pager.prefetch_pending(keys(1, 0))
    pager.close()
    with pytest.raises(Cancelled):
        pager.reserve(1)


def test_a_forgotten_pager_ends_its_threads_and_frees_its_slots(make_pager: MakePager, source: GatedSource) -> None:
    slots = DeviceSlots(2, source.shape, source.stored_dtype, "cpu", num_layers=4, max_experts=8)
    slab = weakref.ref(slots)
    before = set(threading.enumerate())
    pager = ExpertPager(source, slots, options=CacheOptions(num_readers=2))
    lease = some(pager.reserve_pool(keys(0, 0)))
    del pager, slots
    lease.wait(0)  # a lease keeps its pager going
    threads = {thread for thread in set(threading.enumerate()) - before if "expert-reader" in thread.name}
    assert len(threads) == 4, "two that read, two that check"
    lease.release()
    del lease
    gc.collect()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert slab() is None


def test_resident_experts_must_match_the_pinned_slots(make_pager: MakePager, source: GatedSource) -> None:
    slots = DeviceSlots(2, source.shape, source.stored_dtype, "cpu", num_layers=4, max_experts=8, num_pinned=1)
    with pytest.raises(ValueError, match="0 resident experts for 1 pinned"):
        ExpertPager(source, slots)
    with pytest.raises(ConfigError, match="'mru'"):
        make_pager(2, policy="mru")


def test_a_lease_without_slots_takes_its_experts_from_others_slots_and_the_page_cache(
    make_pager: MakePager, source: GatedSource, check_weights: CheckWeights
) -> None:
    pager = make_pager(3, in_place=True)
    shared, *own = pool = [ExpertKey(0, expert) for expert in (2, 4, 5)]
    source.cached = {key: ((torch.full((4, 4), weights_of(key)),), (torch.zeros(4, 2),)) for key in own}
    assert pager.lease_in_place(pool) is None, "one is neither in a slot nor in the page cache"
    other = some(pager.reserve_pool([shared, ExpertKey(0, 0), ExpertKey(0, 1)]))
    other.wait(0)
    lease = some(pager.lease_in_place(pool))
    assert (lease.is_in_place, lease.num_bound, lease.num_reserved) == (True, 0, 0)
    assert (lease.usage.experts_hit, lease.usage.experts_missed, lease.usage.bytes_paged) == (1, 2, 0)
    slots, found = pager.beside_leases(0, [2, 4])
    assert slots == {2: pager.slots.slot_of_LE[0, 2]}
    assert found == {4: source.cached[ExpertKey(0, 4)]}
    del source.cached[own[0]]
    with pytest.raises(SlotsExhausted):
        pager.beside_leases(0, [2, 4])
    assert not lease.become(pool), "the other has the slots"
    assert lease.is_in_place
    other.release()
    assert lease.become(pool)
    assert (lease.is_in_place, lease.num_bound) == (False, 3)
    lease.wait(0)
    check_weights(pager, pool)
    lease.release()
