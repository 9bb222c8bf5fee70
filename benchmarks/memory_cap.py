"""A control group that caps a process's memory, its page cache included. Linux, as root; version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_NUMBERS = count()


class NoCap(Exception):
    """Why no group can be made here."""


@dataclass(frozen=True, slots=True)
class MemoryCap:
    """What runs in `folder` gets no more than its limit: the kernel takes page cache back first, then kills."""

    folder: Path
    version: int

    def run(self, command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Runs a command in the group to its end."""
        return subprocess.run(self.inside(command), stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=False)

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command whose process is in the group before it starts, so that nothing it takes is missed."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    @property
    def peak_bytes(self) -> int | None:
        """The most that the group had at a time, page cache included; None where the kernel does not say."""
        file = self.folder / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")
        return int(file.read_text()) if file.exists() else None


@contextmanager
def memory_cap(limit_bytes: int) -> Iterator[MemoryCap]:
    """A group beside or below this process's own, gone afterwards. Raises NoCap."""
    version, parent = _parent()
    folder = parent / f"expert-pager-{os.getpid()}-{next(_NUMBERS)}"
    limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
    try:
        folder.mkdir()
    except OSError as error:
        raise NoCap(f"{folder} cannot be made: {error.strerror}") from None
    try:
        try:
            (folder / limit).write_text(str(limit_bytes))
        except OSError as error:
            raise NoCap(f"{folder / limit} cannot be written: {error.strerror}") from None
        _forbid_swap(folder, version, limit_bytes)
        yield MemoryCap(folder, version)
    finally:
        _remove(folder)


def _parent() -> tuple[int, Path]:
    """Where groups with a memory limit can be made."""
    lines = OWN.read_text().splitlines() if OWN.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            hierarchy = ROOT / "memory"
            own = hierarchy / path.lstrip("/")
            return 1, own if own.is_dir() else hierarchy
    subtree = ROOT / "cgroup.subtree_control"
    if not subtree.exists():
        raise NoCap("no control groups are mounted at /sys/fs/cgroup")
    if "memory" not in subtree.read_text().split():
        raise NoCap("the memory controller is not passed on to groups below /sys/fs/cgroup")
    return 2, ROOT  # not below our own: a group with processes of its own passes nothing on


def _forbid_swap(folder: Path, version: int, limit_bytes: int) -> None:
    name, value = ("memory.swap.max", "0") if version == 2 else ("memory.memsw.limit_in_bytes", str(limit_bytes))
    with contextlib.suppress(OSError):  # a kernel that does not count swap
        (folder / name).write_text(value)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / "memory.force_empty").write_text("0")
    for _ in range(50):
        try:
            folder.rmdir()
        except OSError:  # its last process is still going
            time.sleep(0.1)
        else:
            return
