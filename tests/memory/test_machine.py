from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pager.errors import ConfigError
from pager.memory import Machine, cgroup_free_bytes


def write_group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


def test_v2_limit_of_a_parent_counts_and_page_cache_is_free(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    write_group(root / "outer" / "inner", V2, "max", 600, "inactive_file 0\nactive_file 0\n")
    write_group(root / "outer", V2, "1000", 700, "anon 1\ninactive_file 100\nactive_file 50\n")
    assert cgroup_free_bytes(root, own) == 1000 - (700 - 150)


def test_v1_limit(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    write_group(root / "memory" / "job", V1, "1000", 400, "total_inactive_file 30\ntotal_active_file 0\n")
    assert cgroup_free_bytes(root, own) == 630


def test_a_group_used_beyond_its_limit_has_nothing_free(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/\n")
    write_group(root, V2, "1000", 1200, "inactive_file 0\n")
    assert cgroup_free_bytes(root, own) == 0


def test_no_group_means_no_limit(tmp_path: Path) -> None:
    assert cgroup_free_bytes(tmp_path, tmp_path / "absent") is None
    (tmp_path / "own").write_text("0::/\n")
    assert cgroup_free_bytes(tmp_path, tmp_path / "own") is None


def test_this_machine_is_found() -> None:
    found = Machine.detect("cpu")
    assert 0 < found.memory_bytes <= psutil.virtual_memory().total
    assert 0 <= found.host_bytes <= found.memory_bytes


def test_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device must be 'cpu' or 'cuda', not 'tpu'"):
        Machine.detect("tpu")
