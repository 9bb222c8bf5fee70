"""The expert pager: brings experts into device slots and keeps the recently used ones there.

One engine thread reserves, binds, waits and demands; prefetches and releases may come from any thread. Reader threads
fill the slots. The state is in `Ledger`, the reading in `Tiers`; this module connects them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

from pager.cache.device import DeviceSlots
from pager.cache.index import DEFAULT_POLICY, CacheIndex, make_policy
from pager.cache.lease import NO_SLOT, Lease, demand_waves
from pager.cache.ledger import Holding, Ledger, Meanwhile
from pager.cache.stats import CacheStats, Cause, NoObserver, PagerObserver, UsageMeter
from pager.cache.tiers import Fetched, HostTier, Readers, Tiers, Turn, why_bypass
from pager.cache.trace import TraceRecorder
from pager.errors import ExpertUnavailable, PoolTooLarge, SlotsExhausted
from pager.memory import NUM_READERS, Machine
from pager.store.expert_source import ExpertSource, InPlace, SideBySide
from pager.types import ExpertKey

log = logging.getLogger(__name__)

IN_PLACE_BYTES = 1 << 20
"""From this size on the copy of an expert into a slot costs as much as its computation."""

__all__ = ["CacheOptions", "CacheStats", "ExpertPager", "Lease", "PagerObserver", "UsageMeter"]


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The options of a cache: how it evicts, and how it reads.

    Reads bypass the page cache where the source supports that and `bypass_page_cache` is true or, where it is None,
    `why_bypass` finds a reason. An expert that could not be read is tried again after `retry_after_s` at the earliest.

    With `in_place`, experts for which there is no slot are computed where the page cache has them, on a CPU without a
    host tier; where it is None, those of IN_PLACE_BYTES and more.
    """

    policy: str = DEFAULT_POLICY
    num_readers: int = NUM_READERS
    bypass_page_cache: bool | None = None
    in_place: bool | None = None
    retry_after_s: float = 30.0


class ExpertPager:
    """Leases, demands and prefetches over one slab. Memory never exceeds the slab, whatever is asked for."""

    def __init__(
        self,
        source: ExpertSource,
        slots: DeviceSlots,
        *,
        resident: Sequence[ExpertKey] = (),
        host: HostTier | None = None,
        options: CacheOptions | None = None,
        observer: PagerObserver | None = None,
        trace: TraceRecorder | None = None,
    ) -> None:
        """Reads `resident` (always-active experts) into the pinned slots before it returns.

        The caller closes source, host tier and trace after this. Raises ExpertUnavailable for a resident expert,
        ConfigError for the policy.
        """
        if len(resident) != slots.num_pinned:
            raise ValueError(f"{len(resident)} resident experts for {slots.num_pinned} pinned slots")
        self.slots = slots
        options, observer = options or CacheOptions(), observer or NoObserver()
        self._resident = frozenset(resident)
        self._paged_keys = [
            {expert: key for expert in range(count) if (key := ExpertKey(layer, expert)) not in self._resident}
            for layer, count in enumerate(source.keys_per_layer())
        ]
        self._room_for_all = slots.num_slots >= sum(source.keys_per_layer()) - len(resident)
        self._read_past_page_cache(source, host, options.bypass_page_cache)
        self._source = source
        is_asked = options.in_place if options.in_place is not None else slots.record_bytes >= IN_PLACE_BYTES
        self.may_use_in_place = (
            is_asked and slots.device.type == "cpu" and host is None and source.stored_dtype == slots.dtype
        )
        self._tiers = Tiers(source, slots.transfer, observer, host=host, retry_after_s=options.retry_after_s)
        for number, key in enumerate(resident):
            for _, result in self._tiers.fetch_from_disk({key: slots.num_slots + number}):
                if isinstance(result, ExpertUnavailable):
                    raise result
                observer.uncharged(result.source, result.nbytes)
        slots.transfer.await_installed(range(slots.num_slots, slots.num_slots + len(resident)))
        self._readers = Readers(options.num_readers, self._read, source.place_of)
        index = CacheIndex(slots.num_slots, make_policy(options.policy))
        self._ledger = Ledger(index, slots.transfer, observer, self._readers.push, trace)
        weakref.finalize(self, self._readers.stop)

    @property
    def num_slots(self) -> int:
        """The budget: slots for paged experts. Always-resident ones have their own."""
        return self.slots.num_slots

    @property
    def num_unreserved(self) -> int:
        """Slots that can be had now: free or evictable ones that are not promised to anybody."""
        with self._ledger.lock:
            return self._ledger.index.num_unreserved

    @property
    def num_guarantees(self) -> int:
        """The number of times that a tenant was given a guarantee or had it changed."""
        return self._ledger.num_guarantees

    @property
    def is_any_guaranteed(self) -> bool:
        """Tells whether any tenant is guaranteed slots."""
        return self._ledger.is_any_guaranteed

    @property
    def progress(self) -> int:
        """A number that grows while bytes arrive in slots, and stays the same while none do."""
        return self._tiers.bytes_read + self._ledger.counts.bytes_from_host

    def guarantee(self, tenant: str, share: float) -> None:
        """Guarantees the tenant that share of all slots, whatever others ask for; 0 ends it."""
        self._ledger.guarantee(tenant, int(share * self.num_slots))

    def account(self, tenant: str) -> str:
        """The tenant's name where it is guaranteed slots, else the one name of all others: who share their slots."""
        return self._ledger.account(tenant)

    def check_size(self, num_slots: int, tenant: str = "") -> None:
        """Raises PoolTooLarge for more slots than the tenant can ever have: all that no other is guaranteed."""
        within_reach = self._ledger.within_reach(tenant)
        if num_slots > within_reach:
            raise PoolTooLarge(num_slots, within_reach, num_guaranteed=self.num_slots - within_reach)

    def reserve(self, num_slots: int, usage: UsageMeter | None = None) -> Lease | None:
        """Promises slots for experts that are not known yet, all or nothing; None when they are not free now.

        Raises PoolTooLarge when they never will be.
        """
        usage = usage or UsageMeter()
        self.check_size(num_slots, usage.tenant)
        holding = self._ledger.open(Cause.LEASE, usage)
        return self._lease_if(self._ledger.reserve(holding, num_slots), holding)

    def reserve_pool(
        self, keys: Sequence[ExpertKey], usage: UsageMeter | None = None, *, evicts: bool = True
    ) -> Lease | None:
        """Returns a lease with all of `keys` bound and their reads started; None, with nothing done, when they do not
        fit now or, unless it `evicts`, when others would have to go.

        Experts that other leases hold take no slot of their own, so overlapping pools fit together.
        Raises PoolTooLarge when the pool alone has more experts than there are slots for its tenant.
        """
        paged = [key for key in dict.fromkeys(keys) if key not in self._resident]
        usage = usage or UsageMeter()
        self.check_size(len(paged), usage.tenant)
        if not (evicts or self._ledger.has_free_slots(paged)):
            return None
        holding = self._ledger.open(Cause.LEASE, usage)
        return self._lease_if(self._ledger.bind(holding, paged), holding)

    def prefetch(self, keys: Sequence[ExpertKey], usage: UsageMeter | None = None) -> None:
        """Queues experts to read ahead of their use, best effort: after all leases, into slots that are neither needed
        nor reserved.

        Never blocks, and evicts nothing that was prefetched and not used yet. At most `num_readers` of its reads run at
        a time.
        """
        paged = [key for key in dict.fromkeys(keys) if key not in self._resident]
        self._ledger.prefetch(paged, usage or UsageMeter(is_closed=True))

    def close_account(self, usage: UsageMeter) -> None:
        """Closes an account: later reads are not charged to it any more."""
        with self._ledger.lock:
            usage.is_closed = True

    def prefetch_pending(self, keys: Sequence[ExpertKey]) -> bool:
        """Tells whether any of these are still to be read, for any request."""
        return self._ledger.prefetch_pending(keys)

    def in_place(self, layer: int, experts: Collection[int], usage: UsageMeter | None = None) -> dict[int, InPlace]:
        """Returns the parameters of those of `experts` that would evict others and that the page cache holds: they can
        be computed with where they are, until the layer is done.

        Counts a miss of each.
        """
        if not self.may_use_in_place:
            return {}
        keys = self._paged_keys[layer]
        absent = self._ledger.absent([keys[expert] for expert in experts if expert in keys])
        found = self._source.in_place(absent)
        if found:
            self._ledger.used_in_place(list(found), usage or UsageMeter())
        return {key.expert: tensors for key, tensors in found.items()}

    def lease_in_place(self, keys: Sequence[ExpertKey], usage: UsageMeter | None = None) -> Lease | None:
        """Returns a lease without slots, for a request whose pool is `keys`, or an exact one, which has none.

        None where the page cache lacks some that no lease holds. Counts a miss of each of `keys` that is not loaded,
        and a hit of each other.
        """
        usage = usage or UsageMeter()
        if not self.may_use_in_place or not self.has_in_place(keys):
            return None
        paged = [key for key in keys if key not in self._resident]
        missing = self._ledger.not_loaded(paged)
        self._ledger.used_in_place(missing, usage, num_hits=len(paged) - len(missing))
        holding = self._ledger.open(Cause.LEASE, usage)
        return Lease(self._ledger, holding, self._resident, self, is_in_place=True)

    def has_in_place(self, keys: Sequence[ExpertKey]) -> bool:
        """Tells whether each of `keys` is in a slot that a lease holds, or in the page cache."""
        layers: dict[int, list[ExpertKey]] = {}
        for key in keys:
            if key not in self._resident:
                layers.setdefault(key.layer, []).append(key)
        return all(self._has_beside_leases(paged) for paged in layers.values())

    def _has_beside_leases(self, keys: Sequence[ExpertKey]) -> bool:
        pinned = self._ledger.pinned(keys)
        missing = [key for key in keys if key not in pinned]
        return len(self._source.in_page_cache(missing)) == len(missing)

    def beside_leases(self, layer: int, experts: Collection[int]) -> tuple[dict[int, int], dict[int, InPlace]]:
        """Returns where `experts` are until the layer is done: the slots of those that are in one for good or that
        leases hold, and the parameters of the others, in the page cache.

        Raises SlotsExhausted where the page cache has not all of these.
        """
        paged = self._paged_keys[layer]
        pinned = self._ledger.pinned([paged[expert] for expert in experts if expert in paged])
        slots = {key.expert: slot for key, slot in pinned.items()}
        if len(paged) < len(self.slots.slot_of_LE[layer]):
            slots |= {each: int(self.slots.slot_of_LE[layer, each]) for each in experts if each not in paged}
        missing = [paged[expert] for expert in experts if expert not in slots]
        found = self._source.in_place(missing)
        if len(found) < len(missing):
            raise SlotsExhausted(NO_SLOT)
        return slots, {key.expert: tensors for key, tensors in found.items()}

    def layer_in_place(self, layer: int) -> SideBySide | None:
        """Returns all experts of the layer where the page cache has them side by side, for requests without slots;
        valid until the layer is done.
        """
        return self._source.layer_in_place(layer)

    def demand(
        self,
        layer: int,
        experts: Sequence[int],
        usage: UsageMeter | None = None,
        *,
        lease: Lease | None = None,
        in_place: Collection[int] = (),
    ) -> Generator[tuple[int, ...], None, None]:
        """Yields waves: disjoint subsets of `experts`, together all of them, each in its slots until the next step, or
        among those that `in_place` found.

        Every missing expert is read once; the next wave is read while the current one is computed. Uses the unbound
        reservation of `lease` where one is given (so that progress is certain), and unreserved slots. Raises
        ExpertUnavailable, or SlotsExhausted when no slot can be had. Close the iterator if you leave it early.
        """
        keys = [ExpertKey(layer, expert) for expert in dict.fromkeys(experts)]
        holding = self._ledger.open(Cause.DEMAND, usage or UsageMeter())
        try:
            if lease is not None:
                lease.lend_reservation(holding)
            unpaged = {key for key in keys if key in self._resident or key.expert in in_place}
            yield from demand_waves(
                self._ledger,
                holding,
                [key for key in keys if key not in unpaged],
                [key for key in keys if key in unpaged],
            )
        finally:
            self._ledger.let_go_of_experts(holding, list(holding.keys))
            if lease is not None:
                lease.take_back_reservation(holding)
            self._ledger.release(holding)

    def hit_for_good(self, layer: int, experts: Collection[int], usage: UsageMeter | None = None) -> bool:
        """Tells whether `experts` are in slots that they never leave, as there is one for every expert: no lease, no
        demand.

        Counts a hit of each where that is so, and nothing otherwise.
        """
        if not self._room_for_all:
            return False
        keys = self._paged_keys[layer]
        return self._ledger.hit([keys[expert] for expert in experts if expert in keys], usage or UsageMeter())

    @property
    def is_nearly_full(self) -> bool:
        """Tells whether there is a slot for every expert, and at least seven of eight have come; none is read twice."""
        return self._room_for_all and 8 * self._ledger.index.num_resident >= 7 * sum(map(len, self._paged_keys))

    def stats(self) -> CacheStats:
        ledger, record = self._ledger, self.slots.record_bytes
        with ledger.lock:
            index = ledger.index
            return CacheStats(
                paging=ledger.counts,
                hits_in_flight=ledger.num_hits_in_flight,
                evictions=ledger.num_evictions,
                failed_loads=ledger.num_failed_loads,
                capacity_bytes=index.num_slots * record,
                resident_bytes=index.num_resident * record,
                held_bytes=index.num_held * record,
                reserved_bytes=index.num_reserved * record,
            )

    def resident_experts(self) -> tuple[tuple[int, ...], ...]:
        """Returns per layer the paged experts whose weights are in a slot, ascending: a hint for placement."""
        layers: list[list[int]] = [[] for _ in range(self.slots.slot_of_LE.shape[0])]
        with self._ledger.lock:
            for key in self._ledger.index.loaded():
                layers[key.layer].append(key.expert)
        return tuple(tuple(sorted(layer)) for layer in layers)

    def check_integrity(self) -> None:
        """Asserts that the ledger is consistent, and that the map on the device matches its index."""
        with self._ledger.lock:
            self._ledger.check_integrity()
            index = self._ledger.index
            in_map = {
                ExpertKey(layer, expert): slot
                for layer, row in enumerate(self.slots.slot_of_LE.tolist())
                for expert, slot in enumerate(row)
                if slot >= 0
            }
            loaded = {key: index.slot_of(key) for key in index.loaded()}
            # entered in the map, not yet reported
            unknown = {*self._resident, *(key for key in in_map if index.is_loading(key))}
            paged = {key: slot for key, slot in in_map.items() if key not in unknown}
            assert paged == loaded, "the map and the index disagree"

    def close(self) -> None:
        """Cancels what is queued, fails what waits for it, and joins the readers. Idempotent."""
        self._readers.stop()
        self._ledger.close()
        self._readers.join()

    def call_while_waiting(self, meanwhile: Meanwhile) -> None:
        """Registers a function that a thread calls first when it waits for a read, and again after the time that it
        returns.
        """
        self._ledger.meanwhile = meanwhile

    def _read_past_page_cache(self, source: ExpertSource, host: HostTier | None, asked: bool | None) -> None:
        why = why_bypass(
            experts_bytes=sum(source.keys_per_layer()) * source.stored_bytes,
            slots_bytes=self.slots.nbytes if self.slots.device.type == "cpu" else 0,
            has_host_tier=host is not None,
            free_bytes=Machine.detect().memory_bytes,
        )
        if asked is False or not (asked or why):
            log.info("experts are read through the page cache%s", "" if asked is None else ", as requested")
            return
        why_not = source.bypass_page_cache(self.slots.dtype)
        if why_not:
            log.info("experts are read through the page cache: %s", why_not)
        else:
            log.info("experts are read past the page cache: %s", why if asked is None else "as requested")

    def _lease_if(self, fits: bool, holding: Holding) -> Lease | None:
        if fits:
            return Lease(self._ledger, holding, self._resident, self)
        self._ledger.release(holding)
        return None

    def _read(self, keys: Sequence[ExpertKey], turn: Turn) -> None:
        """Reads one queued run of experts, on a reader thread."""
        begun = {key: self._ledger.begin(key) for key in keys}
        slots = {key: slot for key, slot in begun.items() if slot is not None}
        waiting = set(slots)
        try:
            for key, result in self._tiers.fetch(slots, turn.end):
                waiting.remove(key)
                if isinstance(result, Fetched):
                    self._ledger.finish(key, result)
                else:
                    self._ledger.fail(key, result)
        except Exception as error:  # a dead reader would leave its waiters waiting forever
            for key in waiting:
                wrapped = ExpertUnavailable(f"reading expert {key.expert} of layer {key.layer} failed: {error!r}", key)
                wrapped.__cause__ = error
                self._ledger.fail(key, wrapped)
