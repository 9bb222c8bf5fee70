"""A record of which experts were held and released, in order: keys only, nothing of any prompt.

A trace is JSON lines, gzipped when its name ends in `.gz`: a header, then one event a line.

    {"format": "expert-pager-trace", "version": 1, "fingerprint": "…", "expert_bytes": 24576, "routed_per_layer": [127]}
    ["lease", 0, 5, 0, 17]      held for a lease: layer 0, expert 5 and layer 0, expert 17
    ["let_go", 0, 5]
    ["lost", 12]                12 events could not be kept here; everything held counts as released

It is written a block of lines at a time, each a gzip member of its own, so that the file is complete up to the last
block whatever ends the process or fills the disk.
"""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pager import threads
from pager.cache.stats import Cause
from pager.errors import ConfigError, PagerError
from pager.reading import parse_json, read_lines, reason_of
from pager.types import ExpertKey

log = logging.getLogger(__name__)

FORMAT, VERSION = "expert-pager-trace", 1
LET_GO, LOST = "let_go", "lost"
FLUSH_EVERY_S = 2.0
"""The time whose events a killed process may lose, and the pause before a full disk is tried again."""
BLOCK_BYTES = 1 << 20
"""A block of this size is written at once."""
MAX_QUEUED_BYTES = 1 << 24
"""The most that waits for a full or slow disk; further events are counted and lost."""
MAX_EXPERTS = 1 << 24
"""The most experts in a header: far more than any model has."""
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)

Counted = Callable[[int, int], None]
"""Called with the events that were written and those that were lost since the last call."""


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """The model whose experts these are. `expert_bytes` is the cost of reading one."""

    fingerprint: str
    expert_bytes: int
    routed_per_layer: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return sum(self.routed_per_layer)


@dataclass(frozen=True, slots=True)
class Access:
    """Experts held together for a lease or an exact forward, or (`cause` None) released together."""

    cause: Cause | None
    keys: tuple[ExpertKey, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace that was read. `num_lost` events were not recorded; `is_cut` where the file ends in the middle of one,
    which is left out.
    """

    header: TraceHeader
    accesses: tuple[Access, ...]
    num_lost: int = 0
    is_cut: bool = False


class TraceRecorder:
    """Writes a trace in a thread of its own, so that reporting an access only queues it. Thread-safe.

    The queue is bounded. While the disk is full or does not answer, events wait, and those that do not fit are lost;
    both are counted. Recording continues when there is space again.
    """

    def __init__(self, path: Path, header: TraceHeader, counted: Counted = lambda written, lost: None) -> None:
        """Begins a new file. Raises ConfigError when it cannot be written, unless its disk is merely full."""
        self._path = path
        self._counted = counted
        self._changed = threading.Condition()
        self._queued = _Queued([_line({"format": FORMAT, "version": VERSION, **asdict(header)})])
        self._num_lost = 0  # since the last line of the queue
        self._is_closing = False
        self._file: int | None = None
        self._size = 0  # of what was written completely
        self._block: tuple[bytes, int] | None = None  # the block to be written next, and the number of its events
        self._is_failing = False
        try:
            self._write_block()
        except OSError as error:
            if error.errno not in _DISK_IS_FULL:
                raise ConfigError(f"the trace {path} cannot be written: {reason_of(error)}") from None
            self._failed(error)
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()
        threads.call(self, TraceRecorder.close)

    def held(self, cause: Cause, keys: Sequence[ExpertKey]) -> None:
        if keys:
            self._put(cause.value, keys)

    def let_go(self, keys: Sequence[ExpertKey]) -> None:
        if keys:
            self._put(LET_GO, keys)

    def close(self) -> None:
        """Writes what is queued, as far as the disk accepts it within a bounded time. Idempotent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(threads.TIMEOUT_S)

    def _put(self, what: str, keys: Sequence[ExpertKey]) -> None:
        line = _line([what, *itertools.chain.from_iterable(keys)])
        with self._changed:
            if self._is_closing or self._queued.num_bytes + len(line) > MAX_QUEUED_BYTES:
                self._num_lost += 1
                self._counted(0, 1)
                return
            if self._num_lost:
                self._queued.lines.append(_line([LOST, self._num_lost]))
                self._num_lost = 0
            self._queued.add_event(line)
            if self._queued.num_bytes >= BLOCK_BYTES:
                self._changed.notify()

    def _run(self) -> None:
        is_closing = False
        while not is_closing:
            with self._changed:
                self._changed.wait_for(self._has_to_write, FLUSH_EVERY_S)
                is_closing = self._is_closing
            try:
                while self._write_block():
                    pass
            except OSError as error:
                self._failed(error)
            else:
                self._succeeded()
        self._give_up_the_rest()
        if self._file is not None:
            os.close(self._file)

    def _has_to_write(self) -> bool:
        return self._is_closing or (self._queued.num_bytes >= BLOCK_BYTES and not self._is_failing)

    def _write_block(self) -> bool:
        """Appends what is queued; returns False when that is nothing. Raises OSError, and then leaves the file as it
        was.
        """
        if self._block is None:
            with self._changed:
                taken, self._queued = self._queued, _Queued([])
            if not taken.lines:
                return False
            data = "".join(taken.lines).encode()
            self._block = (gzip.compress(data, mtime=0) if self._path.suffix == ".gz" else data, taken.num_events)
        data, num_events = self._block
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file, data[done:], self._size + done)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)
        self._block = None
        self._counted(num_events, 0)
        return True

    def _failed(self, error: OSError) -> None:
        if not self._is_failing:
            self._is_failing = True
            log.warning(
                "the trace %s cannot be written: %s; the write will be retried, and events beyond %d MiB are lost",
                self._path, reason_of(error), MAX_QUEUED_BYTES >> 20,
            )  # fmt: skip

    def _succeeded(self) -> None:
        if self._is_failing:
            self._is_failing = False
            log.info("the trace %s is written again", self._path)

    def _give_up_the_rest(self) -> None:
        num_events = self._queued.num_events + (self._block[1] if self._block else 0)
        if num_events:
            self._counted(0, num_events)
            log.warning("the last %d events of the trace %s were not written", num_events, self._path)


@dataclass(slots=True)
class _Queued:
    """Lines that wait to be written; those that are not events do not count."""

    lines: list[str]
    num_events: int = 0
    num_bytes: int = 0  # of memory

    def add_event(self, line: str) -> None:
        self.lines.append(line)
        self.num_events += 1
        self.num_bytes += sys.getsizeof(line)


def read_trace(path: Path) -> Trace:
    """Reads a trace; a cut file up to its last complete event. Raises ConfigError for a file that is not a trace."""
    lines = read_lines(path)
    try:
        header = _header(next(lines, (1, ""))[1], path)
        reader = _EventReader(path)
        accesses: list[Access] = []
        is_cut = False
        try:
            for number, line in lines:
                if not line.endswith("\n"):
                    is_cut = True
                    break
                accesses += reader.read(number, line)
        except EOFError:
            is_cut = True
        return Trace(header, tuple(accesses), reader.num_lost, is_cut)
    except PagerError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"the trace {path} cannot be read: {reason_of(error)}") from None


def _header(line: str, path: Path) -> TraceHeader:
    value = _json(line)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ConfigError(f"{path} is not a trace: its first line is not the header of one")
    if value.get("version") != VERSION:
        raise ConfigError(f"{path} has trace version {value.get('version')!r}; this program reads version {VERSION}")
    fingerprint, nbytes, routed = (value.get(name) for name in ("fingerprint", "expert_bytes", "routed_per_layer"))
    if fingerprint is None or nbytes is None or routed is None:
        raise ConfigError(f"{path} is not a trace: its header lacks a field")
    if type(nbytes) is not int or not 0 < nbytes < 2**50:
        raise ConfigError(f"{path} is not a trace: one of its experts has {nbytes!r} bytes")
    if not isinstance(routed, list) or not all(type(count) is int and count >= 0 for count in routed):
        raise ConfigError(f"{path} is not a trace: its routed_per_layer is not a list of numbers of experts")
    if not 0 < sum(routed) <= MAX_EXPERTS:
        raise ConfigError(
            f"{path} is not a trace: its model has {sum(routed)} experts; 1 to {MAX_EXPERTS} are possible"
        )
    return TraceHeader(str(fingerprint), nbytes, tuple(routed))


class _EventReader:
    """Turns lines into accesses. Where events were lost, it releases everything that was held until then."""

    _CAUSES: ClassVar[dict[str, Cause | None]] = {LET_GO: None, **{cause.value: cause for cause in Cause}}

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: Counter[ExpertKey] = Counter()
        self.num_lost = 0

    def read(self, number: int, line: str) -> list[Access]:
        """Reads a line. Raises ConfigError, naming the line."""
        value = _json(line)
        if not isinstance(value, list) or not value or not all(type(part) is int and part >= 0 for part in value[1:]):
            raise self._no_event(number)
        what, flat = value[0], value[1:]
        if what == LOST and len(flat) == 1:
            self.num_lost += flat[0]
            let_go = tuple(self._held.elements())
            self._held.clear()
            return [Access(None, let_go)] if let_go else []
        if not isinstance(what, str) or what not in self._CAUSES or len(flat) % 2:
            raise self._no_event(number)
        keys = tuple(map(ExpertKey, flat[::2], flat[1::2]))
        cause = self._CAUSES[what]
        for key in keys:
            self._held[key] = max(0, self._held[key] + (1 if cause else -1))
        return [Access(cause, keys)]

    def _no_event(self, number: int) -> ConfigError:
        return ConfigError(f"line {number} of {self._path} is not an event of a trace")


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"


def _json(line: str) -> Any:
    try:
        return parse_json(line.strip())
    except ValueError:
        return None
