"""The right to read or write each record of the host tier: a table in shared memory, beside the records.

Every process of a node that maps the segment maps the table too, and changes it under one lock, without a call to
another process. When a process is killed, at whatever point, the kernel keeps the table consistent by dropping the dead
process's locks:

- A lock on one byte of the table's file is the *mutex* of all changes.
- Each process has a *row* of its own, and a lock on the byte of that row for as long as it lives. The claims and pins
  of a row without a lock are void: a process that they keep from a record clears that row.

A record is free (no key), being filled (its `filler` is a row), or complete. The three fields and the pins are the
whole state. Each is written in one store, and in an order that leaves nothing but a claim of the writer's when it is
killed in between; that is undone with its row. A process that is stopped, not dead, inside a change (microseconds)
delays the others until it continues or is killed; a look-up does without the host tier after LOCK_TIMEOUT_S.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import numpy as np

from pager.errors import BudgetError, ConfigError
from pager.store.appearing import SHM, create_owned
from pager.types import ExpertKey

INDEX_SUFFIX = ".index"
MAX_OWNERS = 96  # processes that map one segment at a time: a node's workers and its control actor
LOCK_TIMEOUT_S = 1.0

_VERSION = 1
_FREE = -1
_FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length, pid of `struct flock`
_ROWS_AT, _MUTEX_AT = 1 << 40, 1 << 41  # bytes to lock, beyond the end of any file
_RETRY_S = 0.0002
_NEVER = np.iinfo(np.int64).max


class HostState(StrEnum):
    HIT = "hit"  # the record holds the expert; pinned for the caller until `unpin`
    CLAIMED = "claimed"  # the caller fills the record, then publishes or abandons it; pinned as well
    BUSY = "busy"  # another caller is filling it; nothing is pinned
    FULL = "full"  # no record is free now; nothing is pinned


@dataclass(frozen=True, slots=True)
class HostGrant:
    """The right of the caller to use an expert. `record` is meaningful for HIT and CLAIMED only."""

    key: ExpertKey
    state: HostState
    record: int = -1


class HostSegment:
    """The files of a host tier, made and removed by one process: the records, and the table of their use.

    It holds a lock on both, which shows that they are not leftovers (`pager.store.appearing`).
    """

    def __init__(self, name: str, num_records: int, record_bytes: int) -> None:
        """Makes the files. All memory is taken now, readable by this user alone.

        Raises BudgetError when the machine has not enough shared memory, ConfigError when the name is taken.
        """
        self.name, self.num_records, self.nbytes = name, num_records, num_records * record_bytes
        self._paths = (SHM / name, SHM / f"{name}{INDEX_SUFFIX}")
        self._files: list[int] = []
        try:
            for path, nbytes in zip(self._paths, (self.nbytes, _Table.nbytes(num_records)), strict=True):
                self._files.append(create_owned(path))
                # a sparse file would kill the process when memory runs out
                os.posix_fallocate(self._files[-1], 0, nbytes)
            with mmap.mmap(self._files[1], _Table.nbytes(num_records)) as mapping:
                _Table.format(mapping, num_records)
        except FileExistsError:
            raise ConfigError(f"{path} exists: another service uses the name; stop it or remove the file") from None
        except OSError as error:
            self.close()
            raise BudgetError(
                f"{self.nbytes} bytes of shared memory for host_memory cannot be allocated ({error.strerror}); lower "
                f"it, or make {SHM} larger"
            ) from error

    @classmethod
    def within(cls, budget_bytes: int, name: str, record_bytes: int) -> Self:
        """Makes as many records as `budget_bytes` hold. Raises BudgetError where that is none, and as the
        constructor.
        """
        if budget_bytes < record_bytes:
            raise BudgetError(f"host_memory of {budget_bytes} bytes holds no expert; the least is {record_bytes} bytes")
        return cls(name, budget_bytes // record_bytes, record_bytes)

    def close(self) -> None:
        """Removes the files; processes that have mapped them keep the memory. Idempotent."""
        for path, file in zip(self._paths, self._files, strict=False):
            path.unlink(missing_ok=True)
            os.close(file)
        self._files = []


class _Table:
    """The fields of all records, in a mapping. `pins_OR` counts those of each owner's row."""

    def __init__(self, mapping: mmap.mmap, num_records: int) -> None:
        parts = self._parts(num_records)
        fields: list[Any] = []
        offset = 0
        for dtype, shape in parts:
            count = int(np.prod(shape))
            fields.append(np.frombuffer(mapping, dtype, count, offset).reshape(shape))
            offset += count * np.dtype(dtype).itemsize
        self.header, self.key_R, self.stamp_R, self.filler_R, self.pins_OR, self.is_owned_O = fields

    @staticmethod
    def _parts(num_records: int) -> list[tuple[type, tuple[int, ...]]]:
        header = (np.int64, (4,))  # version, number of records, last stamp, rows ever used
        of_records = [(np.int64, (num_records,)), (np.int64, (num_records,)), (np.int32, (num_records,))]
        return [header, *of_records, (np.int32, (MAX_OWNERS, num_records)), (np.uint8, (MAX_OWNERS,))]

    @classmethod
    def nbytes(cls, num_records: int) -> int:
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in cls._parts(num_records))

    @classmethod
    def format(cls, mapping: mmap.mmap, num_records: int) -> None:
        table = cls(mapping, num_records)
        table.key_R[:] = _FREE
        table.header[:] = (_VERSION, num_records, 0, 0)
        del table  # drops its views, since the mapping could not be closed otherwise


class HostIndex:
    """One process's access to the table. Thread-safe, and safe beside other processes."""

    def __init__(self, name: str, num_records: int) -> None:
        """Attaches to the table of a segment and takes a row. Raises ConfigError when that is not possible."""
        path, nbytes = SHM / f"{name}{INDEX_SUFFIX}", _Table.nbytes(num_records)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ConfigError(f"there is no host tier at {path}; is the node's control actor running?") from None
        self._thread = threading.Lock()  # threads share the locks of a file
        self._row = -1
        try:
            if os.fstat(self._file).st_size != nbytes:
                raise ConfigError(f"the host tier at {path} is another model's")
            self._mapping = mmap.mmap(self._file, nbytes)
            self._table = _Table(self._mapping, num_records)
            if tuple(self._table.header[:2]) != (_VERSION, num_records):
                raise ConfigError(f"the host tier at {path} is another version's")
            self._take_row()
        except BaseException:
            os.close(self._file)
            raise

    @property
    def num_resident(self) -> int:
        """The number of records in use."""
        return int(np.count_nonzero(self._table.key_R != _FREE)) if self._file >= 0 else 0

    @property
    def num_pinned(self) -> int:
        """The number of records in use that are being read or filled."""
        return int(np.count_nonzero(self._table.pins_OR.any(axis=0))) if self._file >= 0 else 0

    def lookup_or_claim(self, keys: Sequence[ExpertKey]) -> list[HostGrant]:
        """Returns a grant for each key, in order. Never waits long."""
        with self._locked(LOCK_TIMEOUT_S) as is_locked:
            if not is_locked:
                return [HostGrant(key, HostState.FULL) for key in keys]
            grants = self._grant_all(keys)
            if any(grant.state in (HostState.BUSY, HostState.FULL) for grant in grants) and self._clear_dead():
                again = iter(self._grant_all([each.key for each in grants if each.record < 0]))
                grants = [grant if grant.record >= 0 else next(again) for grant in grants]
            return grants

    def publish(self, grants: Sequence[HostGrant]) -> None:
        """Marks the claimed records as complete, readable by all; their pins stay."""
        with self._locked():
            for each in grants:
                assert self._table.filler_R[each.record] == self._row + 1, f"{each} is not claimed here"
                self._table.stamp_R[each.record] = self._tick()
                self._table.filler_R[each.record] = 0

    def abandon(self, grants: Sequence[HostGrant]) -> None:
        """Frees the claimed records, which could not be filled."""
        with self._locked():
            for each in grants:
                assert self._table.filler_R[each.record] == self._row + 1, f"{each} is not claimed here"
                self._free(each.record)
                self._table.pins_OR[self._row, each.record] = 0

    def unpin(self, grants: Sequence[HostGrant]) -> None:
        """Unpins records that have been read, or filled and published."""
        with self._locked():
            for each in grants:
                assert self._table.pins_OR[self._row, each.record] > 0, f"{each} is not pinned"
                self._table.stamp_R[each.record] = self._tick()
                self._table.pins_OR[self._row, each.record] -= 1

    def clear_dead(self) -> None:
        """Takes back the claims and pins of processes that have ended, as a look-up does where they keep it from a
        record.
        """
        with self._locked():
            self._clear_dead()

    def close(self) -> None:
        """Gives up this process's row, with its claims and pins. Idempotent."""
        if self._file < 0:
            return
        with self._locked():
            self._clear(self._row)
        file, self._file = self._file, -1
        del self._table
        with suppress(BufferError):
            self._mapping.close()
        os.close(file)

    def check_integrity(self) -> None:
        """Asserts every invariant in the docstring of this module, provided that no process is killed."""
        with self._locked():
            table = self._table
            used = table.key_R[table.key_R != _FREE]
            assert len(np.unique(used)) == len(used), "an expert has one record"
            pins_R = table.pins_OR.sum(axis=0)
            assert (table.pins_OR >= 0).all()
            assert (pins_R[table.key_R == _FREE] == 0).all(), "a free record has no pins"
            assert (table.stamp_R[table.key_R == _FREE] == 0).all(), "a free record is taken first"
            filled = np.flatnonzero(table.filler_R)
            assert (pins_R[filled] == 1).all(), "a claim is pinned, once"
            assert (table.pins_OR[table.filler_R[filled] - 1, filled] == 1).all(), "by its filler"
            assert (table.pins_OR[table.is_owned_O == 0] == 0).all(), "only a process pins"

    # --- changes, under the lock ------------------------------------------------------------------------------------

    def _grant_all(self, keys: Sequence[ExpertKey]) -> list[HostGrant]:
        table = self._table
        pins_OR = table.pins_OR[: int(table.header[3])]
        # The record evicted next has the lowest stamp: a free one (0), then the least recently released.
        order_R = np.where(pins_OR.any(axis=0), _NEVER, table.stamp_R)
        return [self._grant(key, order_R) for key in keys]

    def _grant(self, key: ExpertKey, order_R: Any) -> HostGrant:
        table, code = self._table, key.layer << 32 | key.expert
        found = np.flatnonzero(table.key_R == code)
        if len(found) and table.filler_R[found].any():
            return HostGrant(key, HostState.BUSY)
        if len(found):
            record, state = int(found[0]), HostState.HIT
            table.pins_OR[self._row, record] += 1
        else:
            record, state = int(order_R.argmin()), HostState.CLAIMED
            if order_R[record] == _NEVER:
                return HostGrant(key, HostState.FULL)
            table.pins_OR[self._row, record] = 1
            table.filler_R[record] = self._row + 1
            table.key_R[record] = code
        order_R[record] = _NEVER
        return HostGrant(key, state, record)

    def _free(self, record: int | Any) -> None:
        """Frees a record, in this order: until the last store it is a claim of a row."""
        self._table.key_R[record] = _FREE
        self._table.stamp_R[record] = 0
        self._table.filler_R[record] = 0

    def _clear(self, row: int) -> None:
        """Clears a row. It can be repeated from its beginning when the process that does it is killed."""
        self._free(self._table.filler_R == row + 1)
        self._table.pins_OR[row] = 0
        self._table.is_owned_O[row] = 0

    def _clear_dead(self) -> bool:
        """Clears the rows of dead processes. Returns whether there was one."""
        owned = (int(row) for row in np.flatnonzero(self._table.is_owned_O))
        dead = [row for row in owned if row != self._row and not _is_held(self._file, _ROWS_AT + row)]
        for row in dead:
            self._clear(row)
        return bool(dead)

    def _take_row(self) -> None:
        with self._locked():
            self._clear_dead()
            for row in range(MAX_OWNERS):
                if not self._table.is_owned_O[row] and _try_hold(self._file, _ROWS_AT + row):
                    self._table.header[3] = max(self._table.header[3], row + 1)
                    self._table.is_owned_O[row] = 1
                    self._row = row
                    return
        raise ConfigError(f"{MAX_OWNERS} processes share this node's host tier already; start fewer workers")

    def _tick(self) -> int:
        self._table.header[2] += 1
        return int(self._table.header[2])

    @contextmanager
    def _locked(self, timeout_s: float = -1) -> Iterator[bool]:
        """Holds the mutex. Yields False when it could not be had within `timeout_s`; then nothing may be changed."""
        if not self._thread.acquire(timeout=timeout_s):
            yield False
            return
        try:
            if not self._wait_for_mutex(timeout_s):
                yield False
                return
            try:
                yield True
            finally:
                _set_lock(self._file, fcntl.F_UNLCK, _MUTEX_AT)
        finally:
            self._thread.release()

    def _wait_for_mutex(self, timeout_s: float) -> bool:
        if timeout_s < 0:
            _set_lock(self._file, fcntl.F_WRLCK, _MUTEX_AT, wait=True)
            return True
        end_s = time.monotonic() + timeout_s
        while not _try_hold(self._file, _MUTEX_AT):
            if time.monotonic() > end_s:
                return False
            time.sleep(_RETRY_S)
        return True


def _try_hold(file: int, byte: int) -> bool:
    try:
        _set_lock(file, fcntl.F_WRLCK, byte)
    except BlockingIOError:
        return False
    return True


def _set_lock(file: int, kind: int, byte: int, *, wait: bool = False) -> None:
    """Sets a lock of the open file (OFD), not of the process: several in one process are independent, and it ends with
    the file.
    """
    fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _is_held(file: int, byte: int) -> bool:
    """Tells whether another open file than this one holds the lock."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
    return bool(answer[0] != fcntl.F_UNLCK)
