"""Files whose lock shows that their owner is alive, so that what a killed process left behind can be removed.

An owner holds a shared lock (flock) on a file for as long as it lives; the kernel drops it with the process, however
that ends. No process number is compared: numbers are used again, and mean nothing in another container.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

log = logging.getLogger(__name__)


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
