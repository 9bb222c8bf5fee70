"""Many threads at once: no deadlock, no wrong weights, never a byte beyond the budget."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import closing

import pytest

from pager.cache.pager import ExpertPager, Lease
from pager.errors import Cancelled, ExpertUnavailable
from pager.types import ExpertKey
from tests.cache.conftest import CheckWeights, GatedSource, MakePager
from tests.support.values import some

NUM_SLOTS = 12


def random_pool(chance: random.Random) -> list[ExpertKey]:
    return sorted(ExpertKey(layer, expert) for layer in range(4) for expert in chance.sample(range(8), 2))


class Traffic:
    """Sequences on one engine thread, prefetches and releases from others, and a watcher of the books."""

    def __init__(self, pager: ExpertPager, source: GatedSource, check_weights: CheckWeights) -> None:
        self.pager, self.source, self.check_weights = pager, source, check_weights
        self.failures: list[BaseException] = []
        self.done = threading.Event()
        self.num_failed = self.num_served = 0

    def guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.failures.append(error)

    def engine(self) -> None:
        chance = random.Random(0)
        leases = []
        for step in range(400):
            self.source.bad = {ExpertKey(chance.randrange(4), chance.randrange(8))} if step % 4 == 0 else set()
            lease = self.pager.reserve_pool(random_pool(chance)) if chance.random() < 0.6 else self.fused(chance)
            if lease is not None:
                leases.append(lease)
            if leases and (lease is None or chance.random() < 0.5):
                self.serve(leases.pop(chance.randrange(len(leases))))
            self.exact(chance)
        for lease in leases:
            self.serve(lease)

    def fused(self, chance: random.Random) -> Lease | None:
        lease = self.pager.reserve(8)
        if lease is not None:
            for layer in range(4):
                lease.bind(layer, chance.sample(range(8), 2))
            lease.shrink()
        return lease

    def serve(self, lease: Lease) -> None:
        releaser = threading.Thread(target=lease.release)
        try:
            for layer in range(4):
                lease.wait(layer)
                self.check_weights(self.pager, [key for key in list(lease._holding.keys) if key.layer == layer])
            self.num_served += 1
        except ExpertUnavailable:
            self.num_failed += 1
        releaser.start()
        releaser.join()

    def exact(self, chance: random.Random) -> None:
        layer = chance.randrange(4)
        lease = self.pager.reserve(1)
        if lease is None:
            return
        with lease, closing(self.pager.demand(layer, chance.sample(range(8), 5), lease=lease)) as waves:
            try:
                for wave in waves:
                    self.check_weights(self.pager, [ExpertKey(layer, expert) for expert in wave])
            except ExpertUnavailable:
                self.num_failed += 1

    def prefetcher(self) -> None:
        chance = random.Random(1)
        while not self.done.wait(0.001):
            self.pager.prefetch(random_pool(chance))

    def watcher(self) -> None:
        while not self.done.wait(0.001):
            self.pager.check_integrity()
            stats = self.pager.stats()
            assert stats.held_bytes + stats.reserved_bytes <= stats.capacity_bytes
            assert stats.resident_bytes <= stats.capacity_bytes


def test_traffic_from_many_threads(make_pager: MakePager, source: GatedSource, check_weights: CheckWeights) -> None:
    source.side_by_side = True
    pager = make_pager(NUM_SLOTS, num_readers=4, retry_after_s=0.0)
    traffic = Traffic(pager, source, check_weights)
    others = [
        threading.Thread(target=traffic.guarded, args=(work,))
        for work in (traffic.prefetcher, traffic.prefetcher, traffic.watcher)
    ]
    for thread in others:
        thread.start()
    traffic.guarded(traffic.engine)
    traffic.done.set()
    for thread in others:
        thread.join()
    while pager.prefetch_pending([ExpertKey(layer, expert) for layer in range(4) for expert in range(8)]):
        pass
    assert traffic.failures == []
    assert traffic.num_served > 100
    assert traffic.num_failed > 0
    assert pager.stats().evictions > 100
    assert pager.stats().held_bytes == pager.stats().reserved_bytes == 0


def test_the_slab_is_all_there_ever_is(make_pager: MakePager) -> None:
    """Pools change; the tensors stay the same memory of the same size."""
    pager = make_pager(5)
    slots = pager.slots
    before = slots.gate_up.data_ptr(), slots.down.data_ptr()
    assert slots.gate_up.nbytes + slots.down.nbytes == slots.nbytes == 5 * slots.record_bytes
    chance = random.Random(2)
    for _ in range(50):
        with some(pager.reserve_pool(random_pool(chance)[:5])) as lease:
            for layer in range(4):
                lease.wait(layer)
    assert (slots.gate_up.data_ptr(), slots.down.data_ptr()) == before


def test_cancelled_while_binding_on_another_thread(make_pager: MakePager, source: GatedSource) -> None:
    pager = make_pager(8)
    source.hold(ExpertKey(0, 0))
    lease = some(pager.reserve(8))
    lease.bind(0, [0])
    source.wait_until_started(ExpertKey(0, 0))
    lease.release()
    with pytest.raises(Cancelled):
        lease.bind(1, [0])
    with some(pager.reserve_pool([ExpertKey(0, 0)])) as again:  # joins the read that the first lease left behind
        source.let_through()
        again.wait(0)
    assert source.reads_of(ExpertKey(0, 0)) == 1


@pytest.mark.slow
def test_a_process_that_exits_in_the_middle_of_a_read_is_not_aborted() -> None:
    program = """
        import threading
        import torch
        from pager.cache.tiers import Readers
        from pager.store.reads import FileRange
        from pager.types import ExpertKey

        begun = threading.Event()

        class Reads:
            def read(self, keys, turn):
                begun.set()
                for _ in range(3):
                    torch.mm(torch.ones(1000, 1000), torch.ones(1000, 1000))

        reads = Reads()
        readers = Readers(2, reads.read, lambda key: FileRange(0, 9999 * key.expert, 0))
        readers.push((0, 0), [ExpertKey(0, expert) for expert in range(100)])
        begun.wait()
        print("leaving")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
