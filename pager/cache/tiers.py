"""Where an expert's bytes come from: the host tier if it has them, else the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pager.cache.host import HostGrant, HostState, HostTier
from pager.cache.transfer import Transfer
from pager.cache.usage import Lookup, PagerObserver, Tier
from pager.errors import ExpertUnavailable
from pager.store.experts import ExpertSource
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
    """A slot was filled with `nbytes` read from `source`."""

    source: Tier
    nbytes: int
    seconds: float


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
        self._bad_on_host = Quarantine(retry_after_s, clock)

    def fetch(self, key: ExpertKey, slot: int) -> Fetched:
        """Puts the expert into the slot and the map. Raises ExpertUnavailable when no tier has it."""
        started = time.perf_counter()
        if self._host is None or self._bad_on_host.remaining_s(key) > 0:
            source, nbytes = Tier.DISK, self.fetch_from_disk(key, slot)
        else:
            source, nbytes = self._through_host(self._host, key, slot)
        return Fetched(source, nbytes, time.perf_counter() - started)

    def _through_host(self, host: HostTier, key: ExpertKey, slot: int) -> tuple[Tier, int]:
        grant = host.acquire(key)
        self._observer.lookups(Tier.HOST, _LOOKUPS[grant.state], 1)
        if grant.state is HostState.CLAIMED:
            return Tier.DISK, self._fill_record(host, grant, slot)
        if grant.state is HostState.HIT:
            nbytes = self._from_record(host, grant, slot)
            if nbytes is not None:
                return Tier.HOST, nbytes
        # Somebody else is filling the record, or there is none: never wait for another process, it may be dead.
        return Tier.DISK, self.fetch_from_disk(key, slot)

    def _fill_record(self, host: HostTier, grant: HostGrant, slot: int) -> int:
        gate_up, down = host.tensors(grant.record)
        try:
            nbytes = self._read_disk(grant.key, gate_up, down, Tier.HOST)
        except BaseException:
            host.abandon(grant)
            raise
        host.publish(grant)
        try:
            self._install(grant.key, slot, gate_up, down)
        finally:
            host.unpin(grant)
        return nbytes

    def _from_record(self, host: HostTier, grant: HostGrant, slot: int) -> int | None:
        """Bytes copied from the host tier; None when the record turned out to be bad."""
        try:
            if host.is_intact(grant):
                return self._install(grant.key, slot, *host.tensors(grant.record))
        finally:
            host.unpin(grant)
        self._bad_on_host.put(grant.key)
        self._observer.quarantined(Tier.HOST)
        return None

    def _install(self, key: ExpertKey, slot: int, gate_up: Tensor, down: Tensor) -> int:
        started = time.perf_counter()
        self._transfer.install_from(key, slot, gate_up, down)
        nbytes = gate_up.nbytes + down.nbytes
        self._observer.transferred(Tier.HOST, Tier.DEVICE, nbytes, time.perf_counter() - started)
        return nbytes

    def fetch_from_disk(self, key: ExpertKey, slot: int) -> int:
        """`fetch` past the host tier; returns the bytes read."""
        gate_up, down = self._transfer.buffers(slot)
        try:
            nbytes = self._read_disk(key, gate_up, down, Tier.DEVICE)
        except BaseException:
            self._transfer.discard(slot)
            raise
        self._transfer.install(key, slot)
        return nbytes

    def _read_disk(self, key: ExpertKey, gate_up: Tensor, down: Tensor, destination: Tier) -> int:
        remaining_s = self._bad_on_disk.remaining_s(key)
        if remaining_s > 0:
            error = ExpertUnavailable(
                f"expert {key.expert} of layer {key.layer} could not be read and is not tried again for "
                f"{remaining_s:.0f} s; check the model with `expert-pager verify`",
                key,
            )
            error.retry_after_s = remaining_s
            raise error
        started = time.perf_counter()
        try:
            nbytes = self._source.read(key, gate_up, down)
        except ExpertUnavailable as error:
            log.error("%s", error)  # with its place, which the message for clients leaves out
            self._bad_on_disk.put(key)
            self._observer.quarantined(Tier.DISK)
            raise
        self._observer.transferred(Tier.DISK, destination, nbytes, time.perf_counter() - started)
        return nbytes
