"""Where an expert's bytes come from: the host tier if it has them, else the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pager.cache.host import HostGrant, HostState, HostTier
from pager.cache.transfer import Transfer
from pager.cache.usage import Lookup, PagerObserver, Tier
from pager.errors import ExpertUnavailable
from pager.store.experts import Destination, ExpertSource
from pager.types import ExpertKey

log = logging.getLogger(__name__)

_LOOKUPS = {
    HostState.HIT: Lookup.HIT,
    HostState.BUSY: Lookup.HIT_IN_FLIGHT,
    HostState.CLAIMED: Lookup.MISS,
    HostState.FULL: Lookup.MISS,
}


@dataclass(frozen=True, slots=True)
class Fetched:
    """A slot was filled with `nbytes` read from `source`, in `seconds` or, of a read of several, its part of them."""

    source: Tier
    nbytes: int
    seconds: float


Outcomes = Iterator[tuple[ExpertKey, Fetched | ExpertUnavailable]]


class Quarantine:
    """Experts that a tier failed to deliver, each until its time for another try has come. Thread-safe."""

    def __init__(self, retry_after_s: float, clock: Callable[[], float]) -> None:
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._until: dict[ExpertKey, float] = {}
        self._lock = threading.Lock()

    def put(self, key: ExpertKey) -> None:
        with self._lock:
            self._until[key] = self._clock() + self._retry_after_s

    def remaining_s(self, key: ExpertKey) -> float:
        """Seconds until another try; 0 for an expert that may be tried."""
        with self._lock:
            remaining = self._until.get(key, 0.0) - self._clock()
            if remaining <= 0:
                self._until.pop(key, None)
            return max(0.0, remaining)


class Tiers:
    """Fills slots. Holds no lock while it reads; called by all reader threads."""

    def __init__(
        self,
        source: ExpertSource,
        transfer: Transfer,
        observer: PagerObserver,
        *,
        host: HostTier | None,
        retry_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._transfer = transfer
        self._observer = observer
        self._host = host
        self._bad_on_disk = Quarantine(retry_after_s, clock)

    @property
    def bytes_read(self) -> int:
        """From the disk; grows in the middle of a read too."""
        return self._source.bytes_read

    def fetch(self, slots: Mapping[ExpertKey, int], on_most: Callable[[], None] | None = None) -> Outcomes:
        """Puts each expert into its slot and the map; yields each as it is there, or why no tier has it.

        Must be taken to its end: what was not yielded has neither failed nor arrived. `on_most` may be called when
        most of what comes from the disk is there.
        """
        rest = slots
        if self._host is not None:
            held, rest = self._acquire(self._host, slots)
            yield from self._through_host(self._host, held, slots, None if rest else on_most)
        together = [rest] if self._transfer.is_in_place else [{key: slot} for key, slot in rest.items()]
        for part in together:
            yield from self.fetch_from_disk(part, on_most if part is together[-1] else None)

    def fetch_from_disk(self, slots: Mapping[ExpertKey, int], on_most: Callable[[], None] | None = None) -> Outcomes:
        """`fetch` past the host tier, all in one go: each expert holds one of the transfer's buffers meanwhile."""
        wanted = [Destination(key, *self._transfer.buffers(slot)) for key, slot in slots.items()]
        waiting = dict(slots)
        try:
            for key, result in self._read_disk(wanted, Tier.DEVICE, on_most):
                slot = waiting.pop(key)
                if isinstance(result, Fetched):
                    self._transfer.install(key, slot)
                else:
                    self._transfer.discard(slot)
                yield key, result
        finally:
            for slot in waiting.values():
                self._transfer.discard(slot)

    def _acquire(
        self, host: HostTier, slots: Mapping[ExpertKey, int]
    ) -> tuple[dict[ExpertKey, HostGrant], dict[ExpertKey, int]]:
        """The grants with a record, and the slots of the experts without: nobody waits for another process to fill
        one, it may be dead.
        """
        held, rest = {}, {}
        for grant in host.acquire(list(slots)):
            self._observer.lookups(Tier.HOST, _LOOKUPS[grant.state], 1)
            if grant.state in (HostState.HIT, HostState.CLAIMED):
                held[grant.key] = grant
            else:
                rest[grant.key] = slots[grant.key]
        return held, rest

    def _through_host(
        self,
        host: HostTier,
        held: dict[ExpertKey, HostGrant],
        slots: Mapping[ExpertKey, int],
        on_most: Callable[[], None] | None,
    ) -> Outcomes:
        """Ends every grant in `held`, whatever happens: those of a kind together, as each change of the index costs."""
        hits = [grant for grant in held.values() if grant.state is HostState.HIT]
        claimed = {key: grant for key, grant in held.items() if grant.state is HostState.CLAIMED}
        try:
            yield from self._from_records(host, hits, slots)
            wanted = [Destination(key, *host.tensors(grant.record)) for key, grant in claimed.items()]
            results = dict(self._read_disk(wanted, Tier.HOST, on_most))
            filled = [claimed.pop(key) for key, result in results.items() if isinstance(result, Fetched)]
            host.publish(filled)
        finally:
            host.abandon(list(claimed.values()))
        for key, _ in self._from_records(host, filled, slots):
            yield key, results[key]
        for key, result in results.items():
            if isinstance(result, ExpertUnavailable):
                yield key, result

    def _from_records(
        self, host: HostTier, grants: Sequence[HostGrant], slots: Mapping[ExpertKey, int]
    ) -> Iterator[tuple[ExpertKey, Fetched]]:
        """Copies complete records into slots; they are unpinned at the end."""
        try:
            for grant in grants:
                started_s = time.perf_counter()
                gate_up, down = host.tensors(grant.record)
                self._transfer.install_from(grant.key, slots[grant.key], gate_up, down)
                nbytes, seconds = gate_up.nbytes + down.nbytes, time.perf_counter() - started_s
                self._observer.transferred(Tier.HOST, Tier.DEVICE, nbytes, seconds)
                yield grant.key, Fetched(Tier.HOST, nbytes, seconds)
        finally:
            host.unpin(grants)

    def _read_disk(self, wanted: Sequence[Destination], tier: Tier, on_most: Callable[[], None] | None) -> Outcomes:
        """Each expert's part of the time is that of its bytes."""
        fit = []
        for each in wanted:
            error = self._quarantined(each.key)
            if error is None:
                fit.append(each)
            else:
                yield each.key, error
        if not fit:
            return
        started_s = time.perf_counter()
        results = self._source.read_all(fit, on_most)
        seconds = (time.perf_counter() - started_s) / len(fit)
        for each, result in zip(fit, results, strict=True):
            if isinstance(result, ExpertUnavailable):
                log.error("%s", result)  # with its place, which the message for clients leaves out
                self._bad_on_disk.put(each.key)
                self._observer.quarantined(Tier.DISK)
                yield each.key, result
            else:
                self._observer.transferred(Tier.DISK, tier, result, seconds)
                yield each.key, Fetched(Tier.DISK, result, seconds)

    def _quarantined(self, key: ExpertKey) -> ExpertUnavailable | None:
        remaining_s = self._bad_on_disk.remaining_s(key)
        if remaining_s == 0:
            return None
        error = ExpertUnavailable(
            f"expert {key.expert} of layer {key.layer} could not be read and is not tried again for "
            f"{remaining_s:.0f} s; check the model with `expert-pager verify`",
            key,
        )
        error.retry_after_s = remaining_s
        return error
