"""The host tier: one segment, several workers, bad records, dead owners."""

from __future__ import annotations

import os
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from pager.cache.host_index import HostIndex, HostState
from pager.cache.tiers import HostTier, record_bytes
from pager.errors import BudgetError, ChecksumMismatch, ConfigError
from pager.types import ExpertKey, ExpertShape
from tests.cache.conftest import CheckWeights, GatedSource, MakePager
from tests.support.experts import arrange, load
from tests.support.values import some

SHAPE = ExpertShape(hidden=4, intermediate=2)  # what the source of conftest serves
RECORD_BYTES = 3 * 4 * 2 * 4
ROOT = Path(__file__).parents[2]


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def budget_for(num_records: int) -> int:
    return num_records * RECORD_BYTES


@pytest.fixture
def host() -> Iterator[HostTier]:
    tier = HostTier.create(budget_for(6), SHAPE, torch.float32)
    yield tier
    tier.close()
    assert not tier.path.exists()


def test_what_one_worker_read_from_disk_another_finds_in_the_host_tier(
    make_pager: MakePager, source: GatedSource, host: HostTier, check_weights: CheckWeights
) -> None:
    first = make_pager(4, host=host)
    load(first, keys(0, 0, 1, 2))
    neighbour = HostTier.attach(host.name, host.num_records, SHAPE, torch.float32)
    second = make_pager(4, host=neighbour)
    with some(second.reserve_pool(keys(0, 0, 1, 2, 3))) as lease:
        lease.wait(0)
        check_weights(second, keys(0, 0, 1, 2, 3))
        record = second.slots.record_bytes
        assert (lease.usage.bytes_from_host, lease.usage.bytes_from_disk) == (3 * record, record)
    assert sorted(source.started) == keys(0, 0, 1, 2, 3)
    host.index.check_integrity()
    neighbour.close()
    assert host.path.exists()


def test_an_expert_evicted_from_the_device_comes_back_from_the_host(
    make_pager: MakePager, source: GatedSource, host: HostTier
) -> None:
    pager = make_pager(2, host=host)
    for _ in range(3):
        load(pager, keys(0, 0, 1))
        load(pager, keys(1, 0, 1))
    assert len(source.started) == 4
    assert pager.stats().paging.bytes_from_host == 8 * pager.slots.record_bytes
    assert pager.stats().paging.bytes_from_disk == 4 * pager.slots.record_bytes


def wait_until_let_go(host: HostTier) -> None:
    """A reader wakes whoever waits for an expert before it gives the record back."""
    end_s = time.monotonic() + 60
    while host.index.num_pinned:
        assert time.monotonic() < end_s, "a record stays pinned"
        time.sleep(0.005)


def test_a_full_host_tier_evicts_and_the_disk_serves_when_it_can_not(
    make_pager: MakePager, source: GatedSource, host: HostTier
) -> None:
    pager = make_pager(8, host=host)
    for layer in range(2):
        load(pager, keys(layer, *range(8)))
    wait_until_let_go(host)
    assert host.index.num_resident == 6
    host.index.check_integrity()
    somebody = HostIndex(host.name, host.num_records)
    pinned = somebody.lookup_or_claim(keys(3, *range(6)))
    assert {grant.state for grant in pinned} == {HostState.CLAIMED}
    assert host.acquire(keys(2, 0))[0].state is HostState.FULL
    assert host.acquire(keys(3, 0))[0].state is HostState.BUSY
    load(pager, keys(2, 0))  # full
    load(pager, keys(3, 0))  # being filled by somebody else
    somebody.close()
    assert source.reads_of(ExpertKey(2, 0)) == source.reads_of(ExpertKey(3, 0)) == 1


def test_an_expert_whose_disk_copy_went_bad_is_served_from_the_host(
    make_pager: MakePager, source: GatedSource, host: HostTier, check_weights: CheckWeights
) -> None:
    pager = make_pager(1, host=host)
    arrange(pager, device=keys(0, 1), host=keys(0, 0))
    source.bad.update(keys(0, 0))
    with some(pager.reserve_pool(keys(0, 0))) as lease:
        lease.wait(0)
        check_weights(pager, keys(0, 0))


def test_a_claim_that_fails_is_given_up(make_pager: MakePager, source: GatedSource, host: HostTier) -> None:
    pager = make_pager(2, host=host, retry_after_s=0.0)
    source.bad.update(keys(0, 0))
    with some(pager.reserve_pool(keys(0, 0))) as lease, pytest.raises(ChecksumMismatch):
        lease.wait(0)
    assert host.index.num_resident == 0
    source.bad.clear()
    load(pager, keys(0, 0))
    assert host.index.num_resident == 1


def test_what_an_owner_held_when_it_left_is_void(host: HostTier) -> None:
    leaver, other = (HostIndex(host.name, host.num_records) for _ in range(2))
    read, *_ = leaver.lookup_or_claim(keys(0, *range(6)))
    leaver.publish([read])
    assert {grant.state for grant in other.lookup_or_claim(keys(1, 0))} == {HostState.FULL}
    assert other.lookup_or_claim(keys(0, 5))[0].state is HostState.BUSY
    leaver.close()
    assert (other.num_resident, other.num_pinned) == (1, 0)
    assert other.lookup_or_claim([read.key])[0].state is HostState.HIT
    assert {grant.state for grant in other.lookup_or_claim(keys(0, *range(1, 6)))} == {HostState.CLAIMED}
    other.check_integrity()
    other.close()


def test_the_record_let_go_of_longest_ago_is_evicted_and_free_ones_before_it(host: HostTier) -> None:
    index = host.index
    grants = index.lookup_or_claim(keys(0, *range(5)))
    index.publish(grants)
    for number in (3, 0, 2, 1, 4):
        index.unpin([grants[number]])
    (free,) = index.lookup_or_claim(keys(1, 0))
    assert free.record not in {grant.record for grant in grants}
    first, second = index.lookup_or_claim(keys(1, 1, 2))
    assert [first.record, second.record] == [grants[3].record, grants[0].record]
    (hit,) = index.lookup_or_claim(keys(0, 2))
    assert (hit.state, hit.record) == (HostState.HIT, grants[2].record)
    index.unpin([hit])  # now the one let go of last
    order = [index.lookup_or_claim(keys(2, number))[0].record for number in range(3)]
    assert order == [grants[1].record, grants[4].record, grants[2].record]
    assert index.lookup_or_claim(keys(2, 3))[0].state is HostState.FULL
    index.check_integrity()


def test_a_look_up_does_without_the_tier_while_somebody_is_stopped_in_the_middle_of_a_change(
    host: HostTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pager.cache.host_index.LOCK_TIMEOUT_S", 0.05)
    stopped = HostIndex(host.name, host.num_records)
    with stopped._locked():
        assert {grant.state for grant in host.acquire(keys(0, 0, 1))} == {HostState.FULL}
    assert {grant.state for grant in host.acquire(keys(0, 0, 1))} == {HostState.CLAIMED}
    stopped.close()


def test_the_segment_stays_within_its_budget_and_is_private(host: HostTier) -> None:
    assert host.num_records == 6
    assert host.nbytes == budget_for(6)
    status = os.stat(host.path)
    assert status.st_size == host.nbytes
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert record_bytes(SHAPE, torch.float32) == RECORD_BYTES
    smaller = HostTier.create(budget_for(6) - 1, SHAPE, torch.float32)
    smaller.close()
    assert smaller.num_records == 5


def test_a_tier_for_all_experts_reads_each_from_disk_once(make_pager: MakePager, source: GatedSource) -> None:
    """In a circle, as an exact forward does: with one record too few LRU would never hit."""
    everything = [ExpertKey(layer, expert) for layer in range(2) for expert in range(8)]
    host = HostTier.create(budget_for(len(everything)), SHAPE, torch.float32)
    pager = make_pager(2, host=host)
    for _ in range(3):
        for key in everything:
            load(pager, [key])
    assert sorted(source.started) == everything
    wait_until_let_go(host)
    pager.close()
    host.close()


def test_bad_budgets_and_names_are_refused(host: HostTier) -> None:
    with pytest.raises(BudgetError, match="holds no expert"):
        HostTier.create(RECORD_BYTES - 1, SHAPE, torch.float32)
    with pytest.raises(BudgetError, match="shared memory"):
        HostTier.create(1 << 50, SHAPE, torch.float32, name=f"expert-pager-{secrets.token_hex(6)}")
    with pytest.raises(ConfigError, match="exists"):
        HostTier.create(budget_for(1), SHAPE, torch.float32, name=host.name)
    with pytest.raises(ConfigError, match="no host tier"):
        HostTier.attach("expert-pager-nowhere", 6, SHAPE, torch.float32)
    with pytest.raises(ConfigError, match="another model"):
        HostTier.attach(host.name, 7, SHAPE, torch.float32)


WORKER = """
import os, sys
import torch
from pager.cache.tiers import HostTier
from pager.cache.pager import ExpertPager
from pager.cache.device import DeviceSlots
from pager.store.reads import FileRange
from pager.types import ExpertKey, ExpertShape

name, num_records = sys.argv[1], int(sys.argv[2])
shape = ExpertShape(hidden=4, intermediate=2)
host = HostTier.attach(name, num_records, shape, torch.float32)

class Source:
    shape = shape
    stored_dtype = torch.float32
    stored_bytes = 96
    bytes_read = 0

    def read_all(self, destinations, on_most=None):
        for key, (gate_up, down) in destinations:
            gate_up.fill_(1.0 + key.expert)
            down.fill_(-1.0 - key.expert)
        return [96 for _ in destinations]

    def place_of(self, key):
        return FileRange(0, 96 * key.expert, 96 * key.expert + 96)

    def bypass_page_cache(self, dtype):
        return "there is no file"

    def keys_per_layer(self):
        return (8,)

slots = DeviceSlots(4, shape, torch.float32, "cpu", num_layers=1, max_experts=8)
pager = ExpertPager(Source(), slots, host=host)
"""

READS = """
with pager.reserve_pool([ExpertKey(0, expert) for expert in range(4)]) as lease:
    lease.wait(0)
    for expert in range(4):
        slot = slots.slot_of_LE[0, expert]
        assert (slots.gate_up[slot] == 1.0 + expert).all() and (slots.down[slot] == -1.0 - expert).all()
    usage = lease.usage
print(usage.bytes_from_disk // slots.record_bytes, usage.bytes_from_host // slots.record_bytes)
pager.close()
host.close()
"""

DIES = """
host.acquire([ExpertKey(0, 0), ExpertKey(0, 5)])
print("holds", flush=True)
os.kill(os.getpid(), 9)
"""


def worker(host: HostTier, what_it_does: str, *more: object) -> subprocess.CompletedProcess[str]:
    """Runs a worker in a process of its own, to its end."""
    command = [sys.executable, "-c", WORKER + what_it_does, host.name, str(host.num_records), *map(str, more)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_two_processes_share_one_segment(host: HostTier) -> None:
    first, second = worker(host, READS), worker(host, READS)
    assert (first.returncode, first.stdout.split()) == (0, ["4", "0"]), first.stderr
    assert (second.returncode, second.stdout.split()) == (0, ["0", "4"]), second.stderr
    assert host.path.exists(), "only the creator removes the segment"
    host.index.check_integrity()
    (grant,) = host.acquire(keys(0, 3))
    assert (host.tensors(grant.record)[0] == 4.0).all()
    host.unpin([grant])


@pytest.mark.slow
def test_a_look_up_takes_back_what_a_killed_process_held(host: HostTier) -> None:
    """Nobody else does: there is no control actor here."""
    assert worker(host, READS).returncode == 0
    killed = worker(host, DIES)
    assert (killed.returncode, killed.stdout.split()) == (-9, ["holds"])
    assert host.index.num_pinned == 2
    assert {grant.state for grant in host.acquire(keys(1, *range(6)))} == {HostState.CLAIMED}
    host.index.check_integrity()


class DiesAtStore:
    """A field of the table. The process is killed before a store into any of them, the one with a given number."""

    left = 0

    def __init__(self, field: Any) -> None:
        self._field = field

    def __setitem__(self, at: Any, value: Any) -> None:
        if DiesAtStore.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        DiesAtStore.left -= 1
        self._field[at] = value

    def __getitem__(self, at: Any) -> Any:
        return self._field[at]

    def __eq__(self, other: object) -> Any:
        return self._field == other

    __hash__ = None  # type: ignore[assignment]

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self._field


def use_the_tier(host: HostTier, num_stores: int) -> None:
    """In a process of its own: everything that can be done with records, until the store after `num_stores`."""
    index = HostIndex(host.name, host.num_records)
    for name in ("header", "key_R", "stamp_R", "filler_R", "pins_OR", "is_owned_O"):
        setattr(index._table, name, DiesAtStore(getattr(index._table, name)))
    DiesAtStore.left = num_stores
    hit, claimed, given_up = index.lookup_or_claim([ExpertKey(0, 0), *keys(1, 0, 1)])
    assert [each.state for each in (hit, claimed, given_up)] == [HostState.HIT, HostState.CLAIMED, HostState.CLAIMED]
    for tensor in host.tensors(claimed.record):
        tensor.fill_(100.0)
    index.publish([claimed])
    index.unpin([claimed])
    index.abandon([given_up])
    index.unpin([hit])
    index.close()


def fill(host: HostTier, wanted: list[ExpertKey]) -> None:
    for grant in host.acquire(wanted):
        if grant.state is HostState.CLAIMED:
            for tensor in host.tensors(grant.record):
                tensor.fill_(1.0 + grant.key.expert)
            host.publish([grant])
        host.unpin([grant])


def test_a_process_killed_between_any_two_stores_leaves_nothing_that_it_held(host: HostTier) -> None:
    """And every record that is complete has the bytes of its expert."""
    for number in range(100):
        fill(host, keys(0, *range(4)))
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                use_the_tier(host, number)
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(pid, 0)
        host.index.clear_dead()
        host.index.check_integrity()
        assert host.index.num_pinned == 0, number
        for key, value in [*((ExpertKey(0, expert), 1.0 + expert) for expert in range(4)), (ExpertKey(1, 0), 100.0)]:
            (grant,) = host.acquire([key])
            if grant.state is HostState.HIT:
                assert all((tensor == value).all() for tensor in host.tensors(grant.record)), (number, key)
                host.unpin([grant])
            else:
                assert grant.state is HostState.CLAIMED, number
                host.abandon([grant])
        if os.waitstatus_to_exitcode(status) == 0:
            assert number > 15, "it was killed at every store before"
            return
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, number
        (grant,) = host.acquire(keys(1, 0))  # not there at the next turn
        if grant.state is HostState.HIT:
            host.unpin([grant])
            fill(host, keys(5, *range(6)))
        else:
            host.abandon([grant])
    raise AssertionError("there are more stores than were tried")
