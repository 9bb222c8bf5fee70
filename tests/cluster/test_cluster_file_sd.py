"""The file that Prometheus reads its targets from."""

import json
from pathlib import Path

import pytest

from pager.cluster.cluster import write_targets


def test_the_file_is_replaced_as_a_whole_and_others_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "targets.json"
    write_targets(path, None, {"worker-1": "127.0.0.1:2", "worker-0": "127.0.0.1:1"})
    first = path.stat().st_ino
    write_targets(path, "127.0.0.1:9464", {"worker-0": "127.0.0.1:3"})
    assert json.loads(path.read_text()) == [
        {"targets": ["127.0.0.1:9464"], "labels": {"job": "expert-pager-router"}},
        {"targets": ["127.0.0.1:3"], "labels": {"job": "expert-pager-worker", "worker": "worker-0"}},
    ]
    assert path.stat().st_ino != first
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_targets(path, None, {})
    assert list(tmp_path.iterdir()) == [path]
