"""The record of which requests hold which experts, which experts are being read and for whom, and which are
prefetched.
"""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from pager.cache.device import Transfer
from pager.cache.index import CacheIndex, SlotPlan
from pager.cache.shares import COMMON, Shares
from pager.cache.stats import Cause, Lookup, PagerObserver, Regrets, Tier, UsageMeter, read_from
from pager.cache.tiers import Fetched, Priority
from pager.cache.trace import TraceRecorder
from pager.errors import Cancelled, ExpertUnavailable
from pager.types import ExpertKey, PagingCounts


class PrefetchList:
    """The experts to prefetch that no reader has taken yet, and the protected ones that a prefetch may not evict.

    An expert that was prefetched is protected from other prefetches until it is used or evicted by a lease, and for
    PROTECTED_BATCHES at most: the prefetches of a request that never came must not block the list forever.
    """

    PROTECTED_BATCHES = 16

    def __init__(self) -> None:
        self._wanted: dict[ExpertKey, UsageMeter] = {}
        self._protected: dict[ExpertKey, int] = {}  # in the order of their batches
        self._batch = 0

    def start_batch(self) -> int:
        """Returns the number of the batch that begins now; the protection of old ones lapses."""
        self._batch += 1
        oldest = self._batch - self.PROTECTED_BATCHES
        for key in [key for key, batch in self._protected.items() if batch <= oldest]:
            del self._protected[key]
        return self._batch

    def want(self, key: ExpertKey, meter: UsageMeter) -> bool:
        """Adds a key. Returns False when it was on the list already."""
        if key in self._wanted:
            return False
        self._wanted[key] = meter
        return True

    def take(self, key: ExpertKey) -> UsageMeter | None:
        """Takes a key off the list and returns the meter to charge; None when it was not on it."""
        return self._wanted.pop(key, None)

    def is_wanted(self, key: ExpertKey) -> bool:
        return key in self._wanted

    def protect(self, key: ExpertKey) -> None:
        self._protected[key] = self._batch

    @property
    def protected(self) -> dict[ExpertKey, int]:
        return self._protected

    def forget(self, key: ExpertKey) -> None:
        """Drops an expert that is in use, or evicted: neither wanted nor protected."""
        self._wanted.pop(key, None)
        self._protected.pop(key, None)


Meanwhile = Callable[[], float | None]
"""Called by a thread that waits for a read, with no lock held: work for the meantime. Returns the seconds until it is
to be called again, or None where there is nothing to do. What it raises ends the wait."""


@dataclass(slots=True, eq=False)
class Holding:
    """The experts and slots that one lease or one exact forward holds. Changed by the ledger alone, under its lock."""

    cause: Cause
    order: int
    meter: UsageMeter
    reserved: int = 0  # promised slots without a bound expert
    keys: dict[ExpertKey, None] = field(default_factory=dict)  # pinned, in the order of binding
    pending: set[ExpertKey] = field(default_factory=set)  # the pinned experts that are not read yet
    failed: ExpertUnavailable | None = None
    released: bool = False

    @property
    def ready(self) -> bool:
        return not self.pending and self.failed is None


@dataclass(slots=True, eq=False)
class Load:
    """A read that is queued or running. `payer` is charged for it."""

    slot: int
    payer: UsageMeter
    waiters: list[Holding]
    reading: bool = False


def _nothing_meanwhile() -> None:
    """Returns at once: there is no other work while a read is waited for."""


_URGENCY = {Cause.DEMAND: 0, Cause.LEASE: 1, Cause.PREFETCH: 2}


class Ledger:
    """The one owner of index, loads and holdings. Thread-safe."""

    def __init__(
        self,
        index: CacheIndex,
        transfer: Transfer,
        observer: PagerObserver,
        queue_reads: Callable[[Priority, Sequence[ExpertKey]], None],
        trace: TraceRecorder | None = None,
    ) -> None:
        self.index = index  # read it under `lock`
        self.counts = PagingCounts()  # since the start, like the next three
        self.num_hits_in_flight = 0
        self.num_evictions = 0
        self.num_failed_loads = 0
        self.num_guarantees = 0  # how often one was given or changed
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._transfer = transfer
        self._observer = observer
        self._queue_reads = queue_reads
        self._trace = trace
        self._shares = Shares(index.num_slots)
        self._loads: dict[ExpertKey, Load] = {}
        self._holdings: set[Holding] = set()
        self._prefetches = PrefetchList()
        self._regrets = Regrets()
        self._order = itertools.count()
        self._closed = False
        self.meanwhile: Meanwhile = _nothing_meanwhile

    # Methods for leases and exact forwards.

    def open(self, cause: Cause, meter: UsageMeter) -> Holding:
        """Returns an empty holding. The caller has to `release` it."""
        with self.lock:
            if self._closed:
                raise Cancelled("the pager is closed")
            holding = Holding(cause, next(self._order), meter)
            self._holdings.add(holding)
            return holding

    def guarantee(self, tenant: str, num_slots: int) -> None:
        """Guarantees the tenant `num_slots` slots that no other tenant can take; 0 ends the guarantee."""
        with self._changed:
            if tenant == COMMON or num_slots == self._shares.asked(tenant):
                return
            held = ((each.meter.tenant, each.keys.keys(), each.reserved) for each in self._holdings)
            self._shares.guarantee(tenant, num_slots, held)
            self.num_guarantees += 1
            self._changed.notify_all()

    @property
    def is_any_guaranteed(self) -> bool:
        with self.lock:
            return self._shares.is_any_guaranteed

    def account(self, tenant: str) -> str:
        """Returns the account whose slots the tenant uses: its own name where it is guaranteed some, and one name for
        all others.
        """
        with self.lock:
            return self._shares.account(tenant)

    def within_reach(self, tenant: str) -> int:
        """The slots that the tenant could have if it were alone: all but those that others are guaranteed."""
        with self.lock:
            return self._shares.within_reach(tenant)

    def room(self, holding: Holding) -> int:
        """The unreserved slots that the holding can have now."""
        return max(0, self._room(holding.meter))

    def slots_needed(self, holding: Holding, keys: Collection[ExpertKey]) -> int:
        """Returns how many slots holding `keys` takes: an expert that its account pins already takes none."""
        account = self._account(holding.meter)
        with self.lock:
            return sum(self._shares.pays_for(account, key, is_loading=self.index.is_loading(key)) for key in keys)

    def reserve(self, holding: Holding, num_slots: int) -> bool:
        """Promises `num_slots` more to the holding, all or nothing."""
        with self.lock:
            if num_slots > self.room(holding):
                return False
            self._promise(holding, num_slots)
            return True

    def unreserve(self, holding: Holding) -> None:
        """Gives back the slots that are promised to the holding and not bound."""
        with self._changed:
            self._promise(holding, -holding.reserved)
            self._changed.notify_all()

    def move_reservation(self, giver: Holding, taker: Holding, at_most: int) -> None:
        """Moves promised slots between holdings; none to or from a released one."""
        with self.lock:
            if giver.released or taker.released:
                return
            assert self._account(giver.meter) == self._account(taker.meter), "promises stay in their account"
            count = min(giver.reserved, at_most)
            giver.reserved -= count
            taker.reserved += count

    def bind(self, holding: Holding, keys: Sequence[ExpertKey]) -> bool:
        """Pins `keys` and queues the reads they need; returns False, with nothing changed, when they do not fit now.

        Pays with the holding's promised slots, then with unreserved ones. Keys
        that it holds already are skipped. Raises Cancelled for a released holding.
        """
        with self.lock:
            if holding.released or self._closed:
                raise Cancelled("the lease was released, or the pager closed, before its experts were bound")
            new = [key for key in dict.fromkeys(keys) if key not in holding.keys]
            available = holding.reserved
            needed = self.slots_needed(holding, new)
            if needed > available + self.room(holding):
                return False
            plan = self._plan(new, holding.meter, available)
            if plan is None:
                return False
            self._carry_out(plan, holding.cause, holding.meter)
            self._promise(holding, -min(available, needed), paid=plan.paid)
            for key in new:
                self._shares.pin(self._account(holding.meter), key)
            holding.keys.update(dict.fromkeys(new))
            coming = [*plan.in_flight, *(load.key for load in plan.loads)]
            for key in coming:
                holding.pending.add(key)
                self._loads[key].waiters.append(holding)
            self._queue_reads((_URGENCY[holding.cause], holding.order), coming)
            self._count_lookups(
                holding.meter, hits=len(plan.hits), in_flight=len(plan.in_flight), misses=len(plan.loads)
            )
            self._count_use(new)
            for key in new:
                self._prefetches.forget(key)
            if self._trace is not None:
                self._trace.held(holding.cause, new)
            return True

    def hit(self, keys: Sequence[ExpertKey], meter: UsageMeter) -> bool:
        """Counts a hit of each key and returns True if all are loaded, without pinning any: for caches that never
        evict.
        """
        with self.lock:
            if self._closed or self._trace is not None or not all(map(self.index.is_loaded, keys)):
                return False
            self._count_lookups(meter, hits=len(keys))
            self._count_use(keys)
            slots = [self.index.slot_of(key) for key in keys]
        self._transfer.await_installed(slots)
        return True

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Returns those of `keys` that could only be read into slots of others, which would be evicted."""
        with self.lock:
            return [] if self.index.num_free else self.not_loaded(keys)

    def has_free_slots(self, keys: Sequence[ExpertKey]) -> bool:
        """Tells whether there is a free slot for each of `keys` that is in none."""
        with self.lock:
            return len(self.not_loaded(keys)) <= self.index.num_free

    def not_loaded(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Returns those of `keys` that are in no slot, nor on their way into one."""
        with self.lock:
            return [key for key in keys if not (self.index.is_loaded(key) or self.index.is_loading(key))]

    def pinned(self, keys: Sequence[ExpertKey]) -> dict[ExpertKey, int]:
        """Returns the slots of those of `keys` that are loaded and that some holding keeps there."""
        with self.lock:
            index = self.index
            return {key: index.slot_of(key) for key in keys if index.is_loaded(key) and index.pins(key)}

    def used_in_place(self, keys: Sequence[ExpertKey], meter: UsageMeter, *, num_hits: int = 0) -> None:
        """Counts a miss of each key, which is found in the host's memory and gets no slot, and hits of others."""
        with self.lock:
            self._count_lookups(meter, hits=num_hits, misses=len(keys))
            self._observer.lookups(Tier.HOST, Lookup.HIT, len(keys))
            if self._trace is not None:
                self._trace.held(Cause.DEMAND, keys)
                self._trace.let_go(keys)

    def let_go_of_experts(self, holding: Holding, keys: Sequence[ExpertKey]) -> None:
        """Unpins `keys` and keeps their slots reserved, where other holdings do not hold them too.

        A queued read that no holding waits for any more is cancelled.
        """
        with self._changed:
            self._transfer.mark_released([self.index.slot_of(key) for key in keys])
            account, room = self._account(holding.meter), self._room(holding.meter)
            for key in keys:
                del holding.keys[key]
                self.index.unpin(key)
                self._shares.unpin(account, key, is_loading=self.index.is_loading(key))
                self._stop_waiting(holding, key)
            self._promise(holding, min(self._room(holding.meter) - room, self.index.num_unreserved))
            if self._trace is not None:
                self._trace.let_go(keys)
            self._changed.notify_all()

    def become(self, holding: Holding, keys: Sequence[ExpertKey], num_slots: int) -> bool:
        """Makes the holding hold `keys` and `num_slots` promised slots, and nothing else.

        Returns False, with nothing changed, when that does not fit now. Raises Cancelled for a released holding.
        """
        with self._changed:
            wanted = dict.fromkeys(keys)
            new = [key for key in wanted if key not in holding.keys]
            gone = [key for key in holding.keys if key not in wanted]
            freed = sum(self.index.is_loaded(key) and self.index.pins(key) == 1 for key in gone)
            if self.slots_needed(holding, new) + num_slots > holding.reserved + freed + self.room(holding):
                return False
            self.let_go_of_experts(holding, gone)
            fits = self.bind(holding, new)
            self._promise(holding, -max(0, holding.reserved - num_slots))
            fits = fits and self.reserve(holding, num_slots - holding.reserved)
            assert fits, "it was counted before"
            self._changed.notify_all()
            return True

    def release(self, holding: Holding) -> None:
        """Unpins and unreserves everything. Idempotent."""
        with self.lock:
            if not holding.released:
                self.let_go_of_experts(holding, list(holding.keys))
                self.unreserve(holding)
                self._holdings.discard(holding)
                holding.released = True

    def wait(self, holding: Holding, keys: Collection[ExpertKey]) -> None:
        """Waits until `keys`, which the holding holds, can be computed with.

        Raises the holding's ExpertUnavailable as soon as any of its reads has failed, Cancelled when it is released.
        """
        with self.lock:
            must_wait = self._must_wait(holding, keys)
        if must_wait:
            started = time.perf_counter()
            try:
                self._wait_until(lambda: not self._must_wait(holding, keys))
            finally:
                stalled_s = time.perf_counter() - started
                self._count(holding.meter, PagingCounts(stall_s=stalled_s))
                self._observer.stalled(stalled_s, holding.cause)
        with self.lock:
            if holding.failed is not None:
                raise holding.failed
            if holding.released:
                raise Cancelled("the lease was released while its experts were being read")
            slots = [self.index.slot_of(key) for key in keys]
        self._transfer.await_installed(slots)

    def wait_for_room(self, holding: Holding) -> bool:
        """Waits out reads that only hold a slot because nobody waits for them any more, or not yet.

        Returns False when there is no free slot even after them.
        """

        def has_room() -> bool:
            return self.room(holding) > 0

        self._wait_until(lambda: has_room() or all(load.waiters for load in self._loads.values()))
        with self.lock:
            return has_room()

    def _wait_until(self, is_over: Callable[[], bool]) -> None:
        """Returns when `is_over`, which is called under the lock; `meanwhile` is called until then, and may raise."""
        while True:
            with self.lock:
                if is_over():
                    return
            due_s = self.meanwhile()
            with self._changed:
                self._changed.wait_for(is_over, due_s)

    @staticmethod
    def _must_wait(holding: Holding, keys: Collection[ExpertKey]) -> bool:
        return holding.failed is None and not holding.released and not holding.pending.isdisjoint(keys)

    # Methods for prefetches.

    def prefetch(self, keys: Sequence[ExpertKey], meter: UsageMeter) -> None:
        with self.lock:
            if self._closed:
                return
            batch = self._prefetches.start_batch()
            missing = []
            for key in keys:
                if key in self._loads or self.index.pins(key) > 0:
                    continue
                self._prefetches.protect(key)
                if self.index.is_evictable(key):
                    self.index.refresh(key)
                elif self._prefetches.want(key, meter):
                    missing.append(key)
            self._queue_reads((_URGENCY[Cause.PREFETCH], batch), missing)

    def prefetch_pending(self, keys: Sequence[ExpertKey]) -> bool:
        with self.lock:
            return any(self._prefetches.is_wanted(key) or key in self._loads for key in keys)

    # Methods for reader threads.

    def begin(self, key: ExpertKey) -> int | None:
        """Returns the slot to read `key` into; None when the read is not needed any more. A prefetch gets its slot
        here.
        """
        with self.lock:
            load = self._loads.get(key)
            if load is None:
                meter = self._prefetches.take(key)
                plan = None if meter is None else self._plan_prefetch(key, meter)
                if meter is None or plan is None or self._closed:
                    return None
                self._carry_out(plan, Cause.PREFETCH, meter)
                account = self._account(meter)
                self._shares.pin(account, key)
                self.index.unpin(key)
                self._shares.unpin(account, key, is_loading=True)
                load = self._loads[key]
            if load.reading:
                return None
            load.reading = True
            return load.slot

    def finish(self, key: ExpertKey, fetched: Fetched) -> None:
        """Records that the expert is in its slot, and wakes everything that waits for it."""
        with self._changed:
            load = self._loads.pop(key)
            self.index.installed(key)
            self._shares.arrived(key)
            now_s = time.monotonic()
            if load.payer.is_closed:
                self._observer.uncharged(fetched.source, fetched.nbytes)
            else:
                load.payer.add_read(key, fetched.source, fetched.nbytes, now_s - fetched.seconds, now_s)
            self.counts += read_from(fetched.source, fetched.nbytes)
            for holding in load.waiters:
                holding.pending.discard(key)
            self._changed.notify_all()

    def fail(self, key: ExpertKey, error: ExpertUnavailable) -> None:
        """Records that the read failed: exactly the holdings that bound the expert fail, and its slot is free."""
        with self._changed:
            load = self._loads.pop(key)
            self.index.abandon(key)
            self._shares.gone(key)
            self._regrets.lost(key)
            self.num_failed_loads += 1
            for holding in load.waiters:
                del holding.keys[key]
                holding.pending.discard(key)
                if holding.failed is None:
                    holding.failed = copy.copy(error)  # each raises its own copy, with its own traceback
                    holding.failed.__cause__ = error.__cause__
            self._changed.notify_all()

    def close(self) -> None:
        """Fails what still waits and cancels what is queued; running reads finish. Idempotent."""
        with self._changed:
            self._closed = True
            self._prefetches = PrefetchList()
            queued = [key for key, load in self._loads.items() if not load.reading]
            for key in queued:
                self.fail(key, ExpertUnavailable("the pager was closed before the expert was read", key))
            self._changed.notify_all()

    def check_integrity(self) -> None:
        """Asserts that index, loads and holdings agree."""
        with self.lock:
            self.index.check_integrity()
            self._shares.check_integrity(self.index.num_unreserved)
            assert self.index.num_reserved == sum(holding.reserved for holding in self._holdings)
            for key in {*self.index.loaded(), *self._loads}:
                assert self.index.pins(key) == sum(key in holding.keys for holding in self._holdings), key
            for key, load in self._loads.items():
                assert self.index.is_loading(key), key
                assert self.index.slot_of(key) == load.slot, key
                assert set(load.waiters) == {holding for holding in self._holdings if key in holding.keys}, key
            for holding in self._holdings:
                assert holding.pending == {key for key in holding.keys if key in self._loads}

    def _account(self, meter: UsageMeter) -> str:
        return self._shares.account(meter.tenant)

    def _room(self, meter: UsageMeter) -> int:
        with self.lock:
            return self._shares.room(self._account(meter), self.index.num_unreserved)

    def _promise(self, holding: Holding, num_slots: int, *, paid: int = 0) -> None:
        """Promises slots to the holding, or takes promised ones back, of which the index has taken `paid` already."""
        holding.reserved += num_slots
        self._shares.promise(self._account(holding.meter), num_slots)
        if num_slots > 0:
            fits = self.index.reserve(num_slots)
            assert fits, "what an account has room for, there is"
        else:
            self.index.unreserve(-num_slots - paid)

    def _plan(self, keys: Sequence[ExpertKey], meter: UsageMeter, reservation: int) -> SlotPlan | None:
        """A plan that evicts nothing that is in another's guaranteed share.

        While that share came after promises that are older, it may have to: these are kept first.
        """
        if self._shares.is_any_guaranteed and self.index.num_free < len(keys):
            plan = self.index.plan(keys, reservation=reservation, spare=self._shares.protected(self._account(meter)))
            if plan is not None:
                return plan
        return self.index.plan(keys, reservation=reservation)

    def _plan_prefetch(self, key: ExpertKey, meter: UsageMeter) -> SlotPlan | None:
        spare: Collection[ExpertKey] = self._prefetches.protected
        if self._shares.is_any_guaranteed:
            if self._room(meter) <= 0:
                return None
            spare = {*spare, *self._shares.protected(self._account(meter))}
        return self.index.plan([key], spare=spare)

    def _carry_out(self, plan: SlotPlan, cause: Cause, payer: UsageMeter) -> None:
        for key in plan.victims:
            self._transfer.evict(key, self.index.slot_of(key))
            self._prefetches.forget(key)
            self._shares.gone(key)
        self.index.commit(plan)
        for load in plan.loads:
            self._loads[load.key] = Load(load.slot, payer, [])
        if plan.loads:
            again = self._regrets.loaded([load.key for load in plan.loads], ahead=cause is Cause.PREFETCH)
            self._observer.paged(cause, len(plan.loads), again)
        if plan.victims:
            wasted = self._regrets.evicted(plan.victims)
            if wasted:
                self._observer.prefetched(used=0, wasted=wasted)
            self.num_evictions += len(plan.victims)
            self._observer.evicted(cause, len(plan.victims))

    def _count_use(self, keys: Sequence[ExpertKey]) -> None:
        used = self._regrets.used(keys)
        if used:
            self._observer.prefetched(used=used, wasted=0)

    def _stop_waiting(self, holding: Holding, key: ExpertKey) -> None:
        load = self._loads.get(key)
        if load is None:
            return
        load.waiters.remove(holding)
        holding.pending.discard(key)
        if not load.waiters and not load.reading:
            del self._loads[key]
            self.index.abandon(key)
            self._shares.gone(key)

    def _count_lookups(self, meter: UsageMeter, *, hits: int, in_flight: int = 0, misses: int = 0) -> None:
        self._count(meter, PagingCounts(experts_hit=hits + in_flight, experts_missed=misses))
        self.num_hits_in_flight += in_flight
        for result, count in ((Lookup.HIT, hits), (Lookup.HIT_IN_FLIGHT, in_flight), (Lookup.MISS, misses)):
            if count:
                self._observer.lookups(Tier.DEVICE, result, count)

    def _count(self, meter: UsageMeter, counts: PagingCounts) -> None:
        with self.lock:
            meter.counts += counts
            self.counts += counts
