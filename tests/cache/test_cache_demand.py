"""Exact forwards and prefetches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from itertools import product
from typing import Any

import pytest

from pager.cache import lease
from pager.cache.pager import ExpertPager
from pager.cache.stats import UsageMeter
from pager.errors import ChecksumMismatch, SlotsExhausted
from pager.types import ExpertKey
from tests.cache.conftest import CheckWeights, GatedSource, MakePager
from tests.support.experts import load
from tests.support.values import some


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def finish_reads(pager: ExpertPager, wanted: Sequence[ExpertKey]) -> None:
    while pager.prefetch_pending(wanted):
        pass


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 8])
def test_every_expert_comes_once_whatever_the_number_of_slots(
    make_pager: MakePager, source: GatedSource, check_weights: CheckWeights, num_slots: int
) -> None:
    pager = make_pager(num_slots)
    load(pager, keys(0, *range(min(num_slots, 2))))
    meter = UsageMeter()
    seen: list[int] = []
    for wave in pager.demand(0, range(8), meter):
        check_weights(pager, keys(0, *wave))
        assert len(wave) <= num_slots
        seen += wave
        pager.check_integrity()
    assert sorted(seen) == list(range(8))
    assert [source.reads_of(key) for key in keys(0, *range(8))] == [1] * 8
    assert (meter.counts.experts_hit, meter.counts.experts_missed) == (min(num_slots, 2), 8 - min(num_slots, 2))
    assert meter.counts.bytes_from_disk == meter.counts.experts_missed * pager.slots.record_bytes
    assert pager.stats().held_bytes == pager.stats().reserved_bytes == 0


def test_hits_come_first_and_the_missing_ones_are_read_meanwhile(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(6)
    load(pager, keys(0, 4, 6))
    with closing(pager.demand(0, [1, 4, 2, 6])) as waves:
        source.hold(*keys(0, 1, 2))
        assert next(waves) == (4, 6)
        source.wait_until_started(ExpertKey(0, 2))
        source.let_through()
        assert next(waves) == (1, 2)
        assert next(waves, None) is None


def test_while_one_half_is_computed_the_other_half_is_read(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(4)
    with closing(pager.demand(0, range(8))) as waves:
        assert next(waves) == (0, 1)
        source.wait_until_started(ExpertKey(0, 3))
        assert next(waves) == (2, 3)
        source.wait_until_started(ExpertKey(0, 5))
        assert source.reads_of(ExpertKey(0, 6)) == 0
        assert [next(waves), next(waves)] == [(4, 5), (6, 7)]


def test_always_resident_experts_are_in_the_first_wave(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(4, resident=(ExpertKey(0, 7),))
    assert list(pager.demand(0, [7])) == [(7,)]
    assert list(pager.demand(0, [0, 7, 1])) == [(7,), (0, 1)]
    assert list(pager.demand(0, [0, 7, 1])) == [(7, 0, 1)]
    assert list(pager.demand(0, [])) == []


def test_waves_are_the_same_however_fast_reads_are(make_pager: MakePager, monkeypatch: pytest.MonkeyPatch) -> None:
    pager = make_pager(4, resident=(ExpertKey(0, 7),))
    bind_some = lease._bind_some

    def bind_and_let_read(*args: Any) -> Any:
        wave = bind_some(*args)
        finish_reads(pager, keys(0, *range(8)))
        return wave

    monkeypatch.setattr(lease, "_bind_some", bind_and_let_read)
    assert list(pager.demand(0, [0, 7, 1])) == [(7,), (0, 1)]
    assert list(pager.demand(0, [0, 7, 1])) == [(7, 0, 1)]


def test_a_lease_lends_its_reservation_to_an_exact_forward(make_pager: MakePager) -> None:
    pager = make_pager(4)
    with some(pager.reserve(2)) as lease, some(pager.reserve(2)):
        with pytest.raises(SlotsExhausted), closing(pager.demand(0, range(4))) as waves:
            next(waves)
        for layer in range(3):
            assert list(pager.demand(layer, range(4), lease=lease)) == [(0,), (1,), (2,), (3,)]
            assert lease.num_reserved == 2
            pager.check_integrity()


def test_leaving_early_gives_everything_back(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(4)
    with some(pager.reserve(2)) as lease:
        with closing(pager.demand(0, range(8), lease=lease)) as waves:
            next(waves)
        assert lease.num_reserved == 2
        pager.check_integrity()
        lease.bind(1, [0, 1])
        lease.wait(1)


def test_a_failed_read_ends_the_forward_and_holds_nothing(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(4)
    source.bad.add(ExpertKey(0, 3))
    waves = pager.demand(0, range(8))
    with pytest.raises(ChecksumMismatch):
        list(waves)
    pager.check_integrity()
    finish_reads(pager, keys(0, *range(8)))  # those that ran when the forward failed
    assert pager.stats().held_bytes == pager.stats().reserved_bytes == 0
    assert sorted(wave for waves in pager.demand(1, range(4)) for wave in waves) == [0, 1, 2, 3]


def test_an_exact_forward_waits_out_a_prefetch_that_holds_the_only_slot(
    make_pager: MakePager, source: GatedSource
) -> None:
    pager = make_pager(1, num_readers=2)
    source.hold(ExpertKey(0, 0))
    pager.prefetch(keys(0, 0))
    source.wait_until_started(ExpertKey(0, 0))
    waves = pager.demand(1, [5])
    assert pager.reserve(1) is None
    source.let_through()
    assert list(waves) == [(5,)]


def test_a_prefetch_makes_hits_of_misses(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(6)
    meter = UsageMeter()
    wanted = [*keys(0, 1, 2), *keys(1, 3)]
    pager.prefetch(wanted, meter)
    finish_reads(pager, wanted)
    assert pager.resident_experts() == ((1, 2), (3,), (), ())
    assert meter.counts.bytes_from_disk == 3 * pager.slots.record_bytes
    pager.prefetch(wanted, meter)
    assert not pager.prefetch_pending(wanted)
    with some(pager.reserve_pool(wanted)) as lease:
        assert lease.ready()
        assert lease.usage.experts_hit == 3
    assert len(source.started) == 3


def test_a_lease_joins_a_prefetch_in_flight_and_takes_over_a_queued_one(
    make_pager: MakePager, source: GatedSource
) -> None:
    pager = make_pager(6, num_readers=1)
    wanted = keys(0, 0, 1)
    source.hold(*wanted)
    pager.prefetch(wanted)
    source.wait_until_started(wanted[0])
    with some(pager.reserve_pool(wanted)) as lease:
        assert (lease.usage.experts_hit, lease.usage.experts_missed) == (1, 1)
        source.let_through()
        lease.wait(0)
    finish_reads(pager, wanted)
    assert source.started == wanted


def test_a_prefetch_evicts_what_was_let_go_of_and_nothing_that_a_prefetch_brought(
    make_pager: MakePager, source: GatedSource
) -> None:
    pager = make_pager(4, num_readers=1, policy="lru")
    load(pager, keys(3, 0, 1))
    first, second = keys(0, 0, 1, 2), keys(1, 0, 1)
    pager.prefetch(first)
    pager.prefetch(second)
    finish_reads(pager, [*first, *second])
    assert pager.resident_experts() == ((0, 1, 2), (0,), (), ())
    assert source.reads_of(ExpertKey(1, 1)) == 0
    load(pager, keys(2, 0))  # a lease may evict them
    assert pager.resident_experts() == ((1, 2), (0,), (0,), ())


def test_a_prefetch_takes_no_promised_slot(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(4, num_readers=1)
    load(pager, keys(3, 0, 1))
    with some(pager.reserve(4)) as lease:
        pager.prefetch(keys(0, 0))
        finish_reads(pager, keys(0, 0))
        assert pager.resident_experts() == ((), (), (), (0, 1))
        lease.bind(1, range(4))
        lease.wait(1)


def test_protection_from_other_prefetches_lapses(make_pager: MakePager) -> None:
    pager = make_pager(2, num_readers=1)
    abandoned = keys(0, 0, 1)
    pager.prefetch(abandoned)
    finish_reads(pager, abandoned)
    for expert in range(8):
        pager.prefetch(keys(1, expert))
        finish_reads(pager, keys(1, expert))
    assert pager.resident_experts() == ((0, 1), (), (), ())
    for layer, expert in product((1, 2), range(8)):
        pager.prefetch(keys(layer, expert))
        finish_reads(pager, keys(layer, expert))
    assert pager.resident_experts()[0] == ()


def test_a_failed_prefetch_fails_nobody(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(2, retry_after_s=0.0)
    source.bad.add(ExpertKey(0, 0))
    pager.prefetch(keys(0, 0))
    finish_reads(pager, keys(0, 0))
    source.bad.clear()
    with some(pager.reserve_pool(keys(0, 0))) as lease:
        lease.wait(0)
    assert pager.stats().failed_loads == 1


def test_with_a_slot_for_every_expert_what_was_loaded_needs_no_demand_again(
    make_pager: MakePager, source: GatedSource
) -> None:
    pager = make_pager(4 * 8)
    meter = UsageMeter()
    assert not pager.hit_for_good(0, [1, 2], meter)
    assert not pager.hit_for_good(0, [1], meter)
    assert (meter.counts.experts_hit, meter.counts.experts_missed) == (0, 0)
    load(pager, keys(0, 1, 2))
    assert not pager.hit_for_good(0, [1, 2, 3], meter)
    assert pager.hit_for_good(0, [1, 2], meter)
    assert meter.counts.experts_hit == pager.stats().paging.experts_hit == 2
    pager.check_integrity()
    pager.close()
    assert not pager.hit_for_good(0, [1, 2], meter)


def test_where_experts_may_be_evicted_a_hit_is_never_for_good(make_pager: MakePager) -> None:
    pager = make_pager(4 * 8 - 1)
    load(pager, keys(0, 1, 2))
    assert not pager.hit_for_good(0, [1, 2])
