"""The memory that this process may use: the device's free memory, or what host and control group leave."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from pager.errors import ConfigError

_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Machine:
    """The memory that a plan may spend.

    `memory_bytes` is free on `device`; `host_bytes` is free for a shared-memory host tier.

    On a CPU both come out of the same main memory.
    """

    memory_bytes: int
    device: str = "cpu"
    host_bytes: int = 0

    @property
    def is_cpu(self) -> bool:
        return self.device.split(":")[0] == "cpu"

    @property
    def where(self) -> str:
        return "main memory" if self.is_cpu else f"memory of {self.device}"

    def shared_by(self, num_workers: int) -> Machine:
        """Returns the part of this machine that one of `num_workers` equal workers may plan with.

        Workers that own a GPU each have its memory to themselves; the host tier belongs to all of them already.
        """
        return replace(self, memory_bytes=self.memory_bytes // num_workers) if self.is_cpu else self

    @classmethod
    def detect(cls, device: str = "cpu") -> Machine:
        """Measures what is free now. Raises ConfigError when `device` is a GPU that is not there."""
        free = _free_main_memory()
        shared = min(free, _free_shared_memory())
        kind, _, index = device.partition(":")
        if kind == "cpu":
            return cls(free, device, shared)
        if kind != "cuda" or not (index.isdecimal() or device == kind):
            raise ConfigError(
                f"device must be 'cpu' or 'cuda', not {device!r}; 'cuda:1' is the second GPU, 'auto' one if it is there"
            )
        return cls(_free_gpu_memory(device, int(index or 0)), device, shared)


def resolve_device(device: object) -> str:
    """Returns the device's name, from a name or a `torch.device`; "auto" is a GPU where there is one."""
    if device != "auto":
        return str(device)
    import torch  # slow to import, and not needed for a device that is named

    return "cuda" if torch.cuda.is_available() else "cpu"


def cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Returns what this process's control group (v1 or v2) and its parents still allow; None without a limit.

    Page cache counts as free: the kernel gives it back before it kills anybody.
    """
    found = [_free_in(folder) for hierarchy, path in _memory_groups(root, own) for folder in _upwards(hierarchy, path)]
    limits = [free for free in found if free is not None]
    return min(limits) if limits else None


def _memory_groups(root: Path, own: Path) -> list[tuple[Path, str]]:
    """Yields pairs of the memory controller's mount point and this process's path in it; v2 is the line `0::/path`."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            groups.append((root, path))
        elif "memory" in controllers.split(","):
            groups.append((root / "memory", path))
    return groups


def _upwards(hierarchy: Path, path: str) -> list[Path]:
    folder = hierarchy / path.lstrip("/")
    inside = [folder, *folder.parents]
    return inside[: inside.index(hierarchy) + 1] if hierarchy in inside else [hierarchy]


def _free_in(folder: Path) -> int | None:
    for limit_name, used_name in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, used = (folder / limit_name).read_text().strip(), int((folder / used_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit == "max":
            return None
        prefix = "" if limit_name == "memory.max" else "total_"
        cache = sum(int(stat.get(prefix + name, 0)) for name in ("inactive_file", "active_file"))
        return max(0, int(limit) - max(0, used - cache))
    return None


def _free_main_memory() -> int:
    available = int(psutil.virtual_memory().available)
    limit = cgroup_free_bytes()
    return available if limit is None else min(available, limit)


def _free_shared_memory() -> int:
    try:
        stats = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return 0
    return stats.f_bavail * stats.f_frsize


def _free_gpu_memory(device: str, index: int) -> int:
    import torch  # slow to import, and not needed to plan for a CPU

    if not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but torch finds no GPU here; use device 'cpu'")
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r} was asked for, but torch finds {torch.cuda.device_count()} GPUs here")
    free, _ = torch.cuda.mem_get_info(index)
    return int(free)
