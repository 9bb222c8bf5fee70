"""Files and directories that appear whole or not at all, and the removal of what a killed process left behind."""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pager.errors import ConfigError, InsufficientDisk, PagerError
from pager.memory import format_bytes

log = logging.getLogger(__name__)

_PARTIAL = ".partial-"
SHM = Path("/dev/shm")  # the files that are memory


@contextmanager
def appearing(out: Path, needed: int, doing: str, or_else: str | None = None) -> Iterator[Path]:
    """Yields a directory to fill, which becomes `out` at the end; any failure or interrupt removes it.

    `needed` is the bytes to be written; `doing`, such as "packing", and `or_else`, a way to need fewer, go into
    messages. Raises ConfigError if `out` exists or another process writes it, InsufficientDisk before anything is
    written or when the disk runs full.
    """
    partial = out.with_name(f"{out.name}{_PARTIAL}{secrets.token_hex(8)}")
    lock = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_absent(out)
        lock = _begin(out, partial, doing)
        free = shutil.disk_usage(partial).free
        if free < needed:
            remedies = "free some space or choose another disk"
            if or_else is not None:
                remedies = f"free some space, choose another disk, or {or_else}"
            raise InsufficientDisk(
                f"{doing} into {out} needs {format_bytes(needed)} and {format_bytes(free)} are free there; {remedies}"
            )
        yield partial
        _sync_directory(partial)
        partial.rename(out)
        _sync_directory(out.parent)
    except PagerError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _write_error(out, error, doing) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def check_absent(out: Path) -> None:
    """Checks that `out` is free.

    Raises ConfigError if it exists, even as a broken link, whose place a directory cannot take.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out} already exists; choose another directory or remove it")


def sync(stream: BinaryIO) -> None:
    """Has the disk hold what was written to the stream."""
    stream.flush()
    os.fsync(stream.fileno())


def _begin(out: Path, partial: Path, doing: str) -> int | None:
    """Makes `partial` and locks it, so that other processes see that it is in use while this one lives.

    What was left for `out` by a process that was killed is removed. Raises ConfigError where another process is at it.
    """
    # Locked for this moment, so that a directory that is not locked yet is not mistaken for one left behind.
    parent = _try_lock(out.parent)
    try:
        for left in out.parent.glob(f"{glob.escape(out.name + _PARTIAL)}*") if parent is not None else ():
            lock = _try_lock(left)
            if lock is None:
                raise ConfigError(f"another process is {doing} into {out}; wait for it, or choose another directory")
            log.warning("removing %s, left by a process that was killed while it wrote %s", left, out.name)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
        partial.mkdir()
        return _try_lock(partial)
    finally:
        if parent is not None:
            os.close(parent)


def _try_lock(directory: Path) -> int | None:
    """Locks the directory and returns the descriptor that holds the lock until it or the process ends.

    None where another process has it, or the file system has no such locks: then nothing there can be recognised as
    left behind.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


def _write_error(out: Path, error: OSError, doing: str) -> InsufficientDisk | ConfigError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientDisk(f"the disk ran full while {doing} into {out}; nothing was kept")
    return ConfigError(f"cannot write {out}: {error}")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- what a killed process left behind --------------------------------------------------------------------------------
#
# Files whose lock shows that their owner is alive, so that what a killed process left behind can be removed.
#
# An owner holds a shared lock (flock) on a file for as long as it lives; the kernel drops it with the process, however
# that ends. No process number is compared: numbers are used again, and mean nothing in another container.


def create_owned(path: Path, mode: int = 0o600) -> int:
    """Creates a file, locks it and returns a descriptor, which holds the lock until it is closed.

    On a file system without locks nothing is locked, and nothing there can be recognised as left behind. Raises
    FileExistsError, and OSError as `open` does.
    """
    while True:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink:
                return file
        except BlockingIOError:
            pass
        except OSError:
            return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # a clean-up elsewhere was faster than the lock, and removes the file


def remove_abandoned(locks: Iterable[Path], remove: Callable[[Path], object]) -> None:
    """Calls `remove` on each of these files that belongs to this user and that nobody holds the lock of."""
    for path in locks:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(file).st_uid != os.geteuid():
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.warning("removing what a process that was killed has left behind: %s", path)
            remove(path)
        except BlockingIOError:
            continue
        except OSError as error:
            log.warning("%s cannot be removed: %s", path, error.strerror or error)
        finally:
            os.close(file)
