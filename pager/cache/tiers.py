"""The tiers that an expert's bytes come from, the host tier among them, and the threads that read them."""

from __future__ import annotations

import heapq
import logging
import math
import mmap
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from pager import threads
from pager.cache.device import Transfer
from pager.cache.host_index import HostGrant, HostIndex, HostSegment, HostState
from pager.cache.stats import Lookup, PagerObserver, Tier
from pager.errors import BudgetError, ConfigError, ExpertUnavailable
from pager.memory import NUM_CHECKERS, format_bytes
from pager.store.appearing import SHM
from pager.store.expert_source import Destination, ExpertSource
from pager.store.reads import MOST_BYTES, FileRange
from pager.types import ExpertKey, ExpertShape

log = logging.getLogger(__name__)

# --- the host tier ----------------------------------------------------------------------------------------------------
#
# The host tier: a shared-memory segment of expert records that every worker of a node maps.
#
# A record is an expert's parameters one after the other, in the dtype they are served in. The segment consists of
# records only, so that a budget for all experts holds all of them; the index, a file beside it, says which expert a
# record holds. Bytes are checked once, when they come from the disk: a record is trusted from then on.


__all__ = ["HostGrant", "HostIndex", "HostState", "HostTier"]


class HostTier:
    """One process's view of the segment. `create` makes it (and owns the files), `attach` maps an existing one.

    Thread-safe: a record is written by its claimer and read by those that pinned it. Never larger than the budget it
    was created with.
    """

    def __init__(self, name: str, num_records: int, shape: ExpertShape, dtype: torch.dtype) -> None:
        """Not for callers; use `create` or `attach`."""
        self.path = SHM / name
        self.num_records = num_records
        self.nbytes = num_records * record_bytes(shape, dtype)
        self._segment: HostSegment | None = None
        file = self._open()
        try:
            self._mapping: mmap.mmap | None = mmap.mmap(file, self.nbytes)
        finally:
            os.close(file)
        records = torch.frombuffer(self._mapping, dtype=dtype).view(num_records, shape.num_elements)
        parts = records.split([math.prod(part) for part in shape.shapes], dim=1)
        self._tensors: tuple[Tensor, ...] | None = tuple(
            part.unflatten(1, of_one) for part, of_one in zip(parts, shape.shapes, strict=True)
        )
        self.index = HostIndex(name, num_records)
        self._unlock = _page_lock(records.view(-1))

    def _open(self) -> int:
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ConfigError(f"there is no host tier at {self.path}; is the node's control actor running?") from None
        found = os.fstat(file).st_size
        if found != self.nbytes:
            os.close(file)
            raise ConfigError(
                f"the host tier at {self.path} has {found} bytes instead of {self.nbytes}: it is another model's"
            )
        return file

    @classmethod
    def create(cls, budget_bytes: int, shape: ExpertShape, dtype: torch.dtype, *, name: str | None = None) -> Self:
        """Makes a new segment of as many records as `budget_bytes` hold, readable by this user alone.

        All its memory is taken now. Raises BudgetError when the budget holds no record or the machine has not enough
        shared memory, ConfigError when the name is taken.
        """
        name = name or f"expert-pager-{uuid.uuid4().hex[:12]}"
        segment = HostSegment.within(budget_bytes, name, record_bytes(shape, dtype))
        try:
            tier = cls(segment.name, segment.num_records, shape, dtype)
        except BaseException:
            segment.close()
            raise
        tier._segment = segment
        return tier

    @classmethod
    def attach(cls, name: str, num_records: int, shape: ExpertShape, dtype: torch.dtype) -> Self:
        """Maps the segment that another process created. Raises ConfigError when it is missing or of another size."""
        return cls(name, num_records, shape, dtype)

    def used_bytes(self) -> tuple[int, int]:
        """Returns the bytes of the records in use by any process, and how many of these are pinned."""
        record = self.nbytes // self.num_records
        return self.index.num_resident * record, self.index.num_pinned * record

    @property
    def name(self) -> str:
        return self.path.name

    def acquire(self, keys: Sequence[ExpertKey]) -> list[HostGrant]:
        """Looks the experts up, or claims a record for each. HIT and CLAIMED grants end with `unpin` or `abandon`."""
        return self.index.lookup_or_claim(keys)

    def tensors(self, record: int) -> tuple[Tensor, ...]:
        """Returns the parameters in a record, in place."""
        assert self._tensors is not None, "the host tier is closed"
        return tuple(part[record] for part in self._tensors)

    def publish(self, grants: Sequence[HostGrant]) -> None:
        """Lets others read the claimed records, which are filled."""
        if grants:
            self.index.publish(grants)

    def abandon(self, grants: Sequence[HostGrant]) -> None:
        if grants:
            self.index.abandon(grants)

    def unpin(self, grants: Sequence[HostGrant]) -> None:
        if grants:
            self.index.unpin(grants)

    def close(self) -> None:
        """Unmaps the segment; its creator removes it. Idempotent. No thread may be reading."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        self._unlock()
        self._tensors = None
        self.index.close()
        with suppress(BufferError):  # a view of it is still alive; the mapping goes with it
            mapping.close()
        if self._segment is not None:
            self._segment.close()


def record_bytes(shape: ExpertShape, dtype: torch.dtype) -> int:
    """The bytes of one expert in the segment."""
    return shape.num_elements * dtype.itemsize


def _page_lock(data: Tensor) -> Callable[[], None]:
    """Page-locks the memory where there is a GPU, so that copies from it are asynchronous; returns a function that
    undoes it.
    """
    if not torch.cuda.is_available():
        return lambda: None
    runtime: Any = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(data.data_ptr(), data.nbytes, 0))
    if status != 0:
        raise BudgetError(f"{data.nbytes} bytes cannot be page-locked (CUDA error {status}); lower host_memory")

    def unlock() -> None:
        runtime.cudaHostUnregister(data.data_ptr())

    return unlock


# --- the tiers --------------------------------------------------------------------------------------------------------


def why_bypass(*, experts_bytes: int, slots_bytes: int, has_host_tier: bool, free_bytes: int) -> str:
    """Returns why experts should be read past the page cache; an empty text where the page cache helps.

    It helps where it can keep all experts beside the slots, at no cost: what leaves a slot returns at the speed of
    memory. Otherwise it costs processor time for every byte, and memory that others need, and under a cyclic scan of
    more than it holds it keeps nothing.
    """
    if has_host_tier:
        return "the host tier keeps what was read"
    if experts_bytes + slots_bytes > free_bytes:
        return (
            f"{format_bytes(experts_bytes)} of experts and {format_bytes(slots_bytes)} of slots do not fit together "
            f"into the {format_bytes(free_bytes)} of memory that are free"
        )
    return ""


Priority = tuple[int, int]
"""(urgency, order): the lower is read first. Ties are broken by layer, then by place in the files."""


class Turn:
    """A thread's permission to read, over when `end` is called or, at the latest, with the thread's work."""

    def __init__(self, pass_on: Callable[[], None]) -> None:
        self._pass_on = pass_on
        self.is_over = False

    def end(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._pass_on()


class Readers:
    """A priority queue of keys and the threads that call `work(keys, turn)` on them.

    `num_readers` of them have a turn at a time. There are NUM_CHECKERS threads more: `work` may end its turn when it
    has read most, and while it reads the rest and checks it another thread prepares the next read. So a disk never has
    to wait for a processor, and whatever is most urgent when a turn is free still comes first.

    A thread takes a run of keys at a time: neighbours in a file, of one layer and one priority, MOST_BYTES or a single
    expert, and not more than leaves as much for every other turn. Knows no slots: a key may be queued twice or be
    obsolete, which `work` finds out. `work` must not raise.
    """

    def __init__(
        self,
        num_readers: int,
        work: Callable[[Sequence[ExpertKey], Turn], None],
        place_of: Callable[[ExpertKey], FileRange],
    ) -> None:
        """Starts the threads. `work` is a bound method and held weakly: threads do not keep a forgotten pager's memory
        alive.
        """
        self._num_readers = num_readers
        self._free_turns = num_readers
        self._work = weakref.WeakMethod(work)
        self._place_of = place_of
        self._queue: list[tuple[Priority, int, FileRange, ExpertKey]] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{number}", daemon=True)
            for number in range(num_readers + NUM_CHECKERS)
        ]
        for thread in self._threads:
            thread.start()
        threads.call(self, Readers.end)

    def push(self, priority: Priority, keys: Sequence[ExpertKey]) -> None:
        """Queues `keys` at once, so that no thread takes the last before it sees the first."""
        with self._changed:
            for key in keys:
                heapq.heappush(self._queue, (priority, key.layer, self._place_of(key), key))
            self._changed.notify(min(len(keys), self._free_turns))

    def stop(self) -> None:
        """Drops what is queued; threads end after their current read. Idempotent, safe in a finalizer."""
        with self._changed:
            self._stopped = True
            self._queue.clear()
            self._changed.notify_all()

    def join(self, timeout_s: float | None = None) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    def end(self) -> None:
        """Stops, and waits for a bounded time."""
        self.stop()
        self.join(threads.TIMEOUT_S)

    def _run(self) -> None:
        turn: Turn | None = None
        while run := self._next_run(turn):
            work = self._work()
            if work is None:
                return
            turn = Turn(self._pass_on_turn)
            work(run, turn)
            del work  # otherwise this thread, waiting for its next run, would keep the pager alive

    def _pass_on_turn(self) -> None:
        with self._changed:
            self._free_turns += 1
            self._changed.notify()

    def _next_run(self, turn: Turn | None) -> list[ExpertKey]:
        """Returns the keys of the next turn; `turn` was this thread's last. Empty when it is time to stop."""
        with self._changed:
            if turn is not None and not turn.is_over:
                self._free_turns += 1  # no thread is woken for it: this thread takes it, if any
            while not (self._queue and self._free_turns) and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return []
            self._free_turns -= 1
            share = -(-len(self._queue) // self._num_readers)
            priority, layer, first, key = heapq.heappop(self._queue)
            run, last = [key], first
            while self._queue and len(run) < share:
                next_priority, next_layer, place, key = self._queue[0]
                if (next_priority, next_layer) != (priority, layer) or not last.is_followed_by(place):
                    break
                if place.end - first.start > MOST_BYTES:
                    break
                heapq.heappop(self._queue)
                run.append(key)
                last = place
            return run


_LOOKUPS = {
    HostState.HIT: Lookup.HIT,
    HostState.BUSY: Lookup.HIT_IN_FLIGHT,
    HostState.CLAIMED: Lookup.MISS,
    HostState.FULL: Lookup.MISS,
}


@dataclass(frozen=True, slots=True)
class Fetched:
    """A slot that was filled with `nbytes` from `source`, in `seconds`: for a read of several experts, its part of
    them.
    """

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
        """Returns the seconds until another try; 0 for an expert that may be tried."""
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
        """The bytes read from the disk; the number also grows during a read."""
        return self._source.bytes_read

    def fetch(self, slots: Mapping[ExpertKey, int], on_most: Callable[[], None] | None = None) -> Outcomes:
        """Puts each expert into its slot and the map; yields each once it is there, or why no tier has it.

        The iterator must be exhausted: experts that were not yielded have neither failed nor arrived. `on_most` may be
        called when most of what comes from the disk has arrived.
        """
        rest = slots
        if self._host is not None:
            held, rest = self._acquire(self._host, slots)
            yield from self._through_host(self._host, held, slots, None if rest else on_most)
        together = [rest] if self._transfer.is_in_place else [{key: slot} for key, slot in rest.items()]
        for part in together:
            yield from self.fetch_from_disk(part, on_most if part is together[-1] else None)

    def fetch_from_disk(self, slots: Mapping[ExpertKey, int], on_most: Callable[[], None] | None = None) -> Outcomes:
        """Fetches past the host tier, all in one go: each expert holds one of the transfer's buffers meanwhile."""
        wanted = [Destination(key, self._transfer.buffers(slot)) for key, slot in slots.items()]
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
        """Returns the grants with a record, and the slots of the experts without. There is no wait for a process that
        fills a record, because it may be dead.
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
        """Ends every grant in `held`, whatever happens: those of a kind together, since each change of the index has a
        cost.
        """
        hits = [grant for grant in held.values() if grant.state is HostState.HIT]
        claimed = {key: grant for key, grant in held.items() if grant.state is HostState.CLAIMED}
        try:
            yield from self._from_records(host, hits, slots)
            wanted = [Destination(key, host.tensors(grant.record)) for key, grant in claimed.items()]
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
                tensors = host.tensors(grant.record)
                self._transfer.install_from(grant.key, slots[grant.key], tensors)
                nbytes, seconds = sum(each.nbytes for each in tensors), time.perf_counter() - started_s
                self._observer.transferred(Tier.HOST, Tier.DEVICE, nbytes, seconds)
                yield grant.key, Fetched(Tier.HOST, nbytes, seconds)
        finally:
            host.unpin(grants)

    def _read_disk(self, wanted: Sequence[Destination], tier: Tier, on_most: Callable[[], None] | None) -> Outcomes:
        """Reads experts from the disk; each one's part of the time is in proportion to its bytes."""
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
