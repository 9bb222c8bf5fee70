"""The host tier: one segment, several workers, bad records, dead owners."""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.managers import BaseManager
from pathlib import Path

import pytest
import torch

from pager.cache.host import HostState, HostTier, LocalHostIndex, record_bytes
from pager.errors import BudgetError, ChecksumMismatch, ConfigError
from pager.types import ExpertKey, ExpertShape

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


def read_through(pager, wanted) -> None:
    with pager.reserve_pool(wanted) as lease:
        for layer in {key.layer for key in wanted}:
            lease.wait(layer)


def test_what_one_worker_read_from_disk_another_finds_in_the_host_tier(make_pager, source, host, check_weights):
    first = make_pager(4, host=host)
    read_through(first, keys(0, 0, 1, 2))
    neighbour = HostTier.attach(host.name, host.num_records, SHAPE, torch.float32, index=host.index, owner="b")
    second = make_pager(4, host=neighbour)
    with second.reserve_pool(keys(0, 0, 1, 2, 3)) as lease:
        lease.wait(0)
        check_weights(second, keys(0, 0, 1, 2, 3))
        record = second.slots.record_bytes
        assert (lease.usage.bytes_from_host, lease.usage.bytes_from_disk) == (3 * record, record)
    assert sorted(source.started) == keys(0, 0, 1, 2, 3)
    host.index.check_integrity()
    neighbour.close()
    assert host.path.exists()


def test_an_expert_evicted_from_the_device_comes_back_from_the_host(make_pager, source, host):
    pager = make_pager(2, host=host)
    for _ in range(3):
        read_through(pager, keys(0, 0, 1))
        read_through(pager, keys(1, 0, 1))
    assert len(source.started) == 4
    assert pager.stats().bytes_from_host == 8 * pager.slots.record_bytes
    assert pager.stats().bytes_from_disk == 4 * pager.slots.record_bytes


def test_a_full_host_tier_evicts_and_the_disk_serves_when_it_can_not(make_pager, source, host):
    pager = make_pager(8, host=host)
    for layer in range(2):
        read_through(pager, keys(layer, *range(8)))
    assert host.index.num_resident == 6
    host.index.check_integrity()
    pinned = host.index.lookup_or_claim(keys(3, *range(6)), "somebody")
    assert {grant.state for grant in pinned} == {HostState.CLAIMED}
    assert host.acquire(keys(2, 0))[0].state is HostState.FULL
    assert host.acquire(keys(3, 0))[0].state is HostState.BUSY
    read_through(pager, keys(2, 0))  # full
    read_through(pager, keys(3, 0))  # being filled by somebody who may be dead
    assert source.reads_of(ExpertKey(2, 0)) == source.reads_of(ExpertKey(3, 0)) == 1


def test_an_expert_whose_disk_copy_went_bad_is_served_from_the_host(make_pager, source, host, check_weights):
    pager = make_pager(1, host=host)
    read_through(pager, keys(0, 0))
    read_through(pager, keys(0, 1))
    source.bad.update(keys(0, 0))
    with pager.reserve_pool(keys(0, 0)) as lease:
        lease.wait(0)
        check_weights(pager, keys(0, 0))


def test_a_claim_that_fails_is_given_up(make_pager, source, host):
    pager = make_pager(2, host=host, retry_after_s=0.0)
    source.bad.update(keys(0, 0))
    with pager.reserve_pool(keys(0, 0)) as lease, pytest.raises(ChecksumMismatch):
        lease.wait(0)
    assert host.index.num_resident == 0
    source.bad.clear()
    read_through(pager, keys(0, 0))
    assert host.index.num_resident == 1


def test_a_dead_owner_loses_its_claims_and_pins_and_is_not_listened_to():
    index = LocalHostIndex(2)
    read, claimed = keys(0, 0, 1)
    index.lookup_or_claim([read], "dead")
    index.publish([read], "dead")
    index.lookup_or_claim([claimed], "dead")
    assert [grant.state for grant in index.lookup_or_claim(keys(1, 0), "alive")] == [HostState.FULL]
    index.drop_owner("dead")
    index.check_integrity()
    (grant,) = index.lookup_or_claim([claimed], "alive")
    assert grant.state is HostState.CLAIMED
    index.publish([claimed], "dead")
    index.unpin([claimed], "dead")
    index.abandon([claimed], "dead")
    assert index.lookup_or_claim([claimed], "third")[0].state is HostState.BUSY
    index.publish([claimed], "alive")
    assert index.lookup_or_claim([claimed], "third")[0].state is HostState.HIT
    index.check_integrity()


def test_the_segment_stays_within_its_budget_and_is_private(host):
    assert host.num_records == 6
    assert host.nbytes == budget_for(6)
    status = os.stat(host.path)
    assert status.st_size == host.nbytes
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert record_bytes(SHAPE, torch.float32) == RECORD_BYTES
    smaller = HostTier.create(budget_for(6) - 1, SHAPE, torch.float32)
    smaller.close()
    assert smaller.num_records == 5


def test_a_tier_for_all_experts_reads_each_from_disk_once(make_pager, source):
    """In a circle, as an exact forward does: with one record too few LRU would never hit."""
    everything = [ExpertKey(layer, expert) for layer in range(2) for expert in range(8)]
    host = HostTier.create(budget_for(len(everything)), SHAPE, torch.float32)
    pager = make_pager(2, host=host)
    for _ in range(3):
        for key in everything:
            read_through(pager, [key])
    assert sorted(source.started) == everything
    assert host.index.num_pinned == 0
    pager.close()
    host.close()


def test_bad_budgets_and_names_are_refused(host):
    with pytest.raises(BudgetError, match="holds no expert"):
        HostTier.create(RECORD_BYTES - 1, SHAPE, torch.float32)
    with pytest.raises(BudgetError, match="shared memory"):
        HostTier.create(1 << 50, SHAPE, torch.float32, name=f"expert-pager-{secrets.token_hex(6)}")
    with pytest.raises(ConfigError, match="exists"):
        HostTier.create(budget_for(1), SHAPE, torch.float32, name=host.name)
    with pytest.raises(ConfigError, match="no host tier"):
        HostTier.attach("expert-pager-nowhere", 6, SHAPE, torch.float32, index=host.index, owner="b")
    with pytest.raises(ConfigError, match="another model"):
        HostTier.attach(host.name, 7, SHAPE, torch.float32, index=host.index, owner="b")


class IndexServer(BaseManager):
    """Serves one LocalHostIndex to other processes."""


@pytest.fixture
def serve_index() -> Callable[[LocalHostIndex], str]:
    """serve_index(index): the socket and key with which workers find it."""

    def serve(index: LocalHostIndex) -> str:
        IndexServer.register("index", callable=lambda: index)
        key = secrets.token_hex(16)
        server = IndexServer(("127.0.0.1", 0), bytes.fromhex(key)).get_server()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"{server.address[1]}:{key}"

    return serve


WORKER = """
import os, sys
from multiprocessing.managers import BaseManager
import torch
from pager.cache.host import HostTier
from pager.cache.pager import ExpertPager
from pager.cache.slots import DeviceSlots
from pager.store.reads import Place
from pager.types import ExpertKey, ExpertShape

name, num_records, where, owner = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
port, key = where.split(":")
shape = ExpertShape(hidden=4, intermediate=2)

class Server(BaseManager):
    pass

Server.register("index")
server = Server(("127.0.0.1", int(port)), bytes.fromhex(key))
server.connect()
host = HostTier.attach(name, num_records, shape, torch.float32, index=server.index(), owner=owner)

class Source:
    shape = shape
    stored_dtype = torch.float32
    bytes_read = 0

    def read_all(self, destinations, on_most=None):
        for key, gate_up, down in destinations:
            gate_up.fill_(1.0 + key.expert)
            down.fill_(-1.0 - key.expert)
        return [96 for _ in destinations]

    def place_of(self, key):
        return Place(0, 96 * key.expert, 96 * key.expert + 96)

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


def worker(host: HostTier, where: str, owner: str, what_it_does: str) -> subprocess.CompletedProcess[str]:
    """Runs a worker in a process of its own, to its end."""
    command = [sys.executable, "-c", WORKER + what_it_does, host.name, str(host.num_records), where, owner]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_two_processes_share_one_segment(host, serve_index):
    where = serve_index(host.index)
    first, second = worker(host, where, "a", READS), worker(host, where, "b", READS)
    assert (first.returncode, first.stdout.split()) == (0, ["4", "0"]), first.stderr
    assert (second.returncode, second.stdout.split()) == (0, ["0", "4"]), second.stderr
    assert host.path.exists(), "only the creator removes the segment"
    host.index.check_integrity()
    (grant,) = host.acquire(keys(0, 3))
    assert (host.tensors(grant.record)[0] == 4.0).all()
    host.unpin(grant)


def test_what_a_killed_process_held_is_taken_back(host, serve_index):
    where = serve_index(host.index)
    assert worker(host, where, "a", READS).returncode == 0
    killed = worker(host, where, "b", DIES)
    assert (killed.returncode, killed.stdout.split()) == (-9, ["holds"])
    wanted = keys(1, *range(6))
    assert HostState.FULL in {grant.state for grant in host.index.lookup_or_claim(wanted, "c")}
    host.index.drop_owner("c")
    host.index.drop_owner("b")
    assert {grant.state for grant in host.index.lookup_or_claim(wanted, "c")} == {HostState.CLAIMED}
    host.index.check_integrity()
