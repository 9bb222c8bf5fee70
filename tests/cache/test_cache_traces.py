"""Traces, recorded and read back: on a disk that is full for a while, and from files that are cut or no traces."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pager.cache import trace as traces
from pager.cache.stats import Cause
from pager.cache.trace import Access, Trace, TraceHeader, TraceRecorder, read_trace
from pager.errors import ConfigError
from pager.lab.replay import replay_all
from pager.types import ExpertKey
from tests.support.waiting import until

HEADER = TraceHeader("f" * 32, 24576, (4, 4, 4))
HEADER_LINE = json.dumps(
    {
        "format": "expert-pager-trace",
        "version": 1,
        "fingerprint": "f",
        "expert_bytes": 24576,
        "routed_per_layer": [4, 4, 4],
    }
)


def key(number: int) -> ExpertKey:
    return ExpertKey(number // 4, number % 4)


class Counts:
    def __init__(self) -> None:
        self.written = self.lost = 0
        self._lock = threading.Lock()

    def __call__(self, written: int, lost: int) -> None:
        with self._lock:
            self.written += written
            self.lost += lost


@contextmanager
def no_more_than(path: Path, num_bytes: int) -> Iterator[None]:
    """No file of this process grows past so many bytes: to the recorder as if its disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_trace_reads_back_as_it_was_recorded(tmp_path: Path, name: str) -> None:
    counts = Counts()
    recorder = TraceRecorder(tmp_path / name, HEADER, counts)
    recorder.held(Cause.LEASE, [key(0), key(5)])
    recorder.held(Cause.DEMAND, [])
    recorder.let_go([key(5)])
    recorder.close()
    recorder.close()
    assert read_trace(tmp_path / name) == Trace(
        HEADER, (Access(Cause.LEASE, (key(0), key(5))), Access(None, (key(5),)))
    )
    assert (counts.written, counts.lost) == (2, 0)


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_what_is_recorded_is_in_the_file_seconds_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(traces, "FLUSH_EVERY_S", 0.05)
    recorder = TraceRecorder(tmp_path / name, HEADER)
    for number in range(3):
        recorder.held(Cause.LEASE, [key(number)])
        until(lambda: len(read_trace(tmp_path / name).accesses) == number + 1)  # noqa: B023
    recorder.close()


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_full_disk_loses_what_finds_no_room_and_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(traces, "FLUSH_EVERY_S", 0.02)
    monkeypatch.setattr(traces, "MAX_QUEUED_BYTES", 1 << 16)
    path, counts = tmp_path / name, Counts()
    recorder = TraceRecorder(path, HEADER, counts)
    recorder.held(Cause.LEASE, [key(0)])
    until(lambda: counts.written == 1)
    whole = path.stat().st_size
    with no_more_than(path, whole + 10):
        recorder.held(Cause.LEASE, [key(1)])
        until(lambda: "cannot be written" in caplog.text)
        assert path.stat().st_size == whole, "half a line is not left there"
        while counts.lost < 1000:
            recorder.held(Cause.DEMAND, [key(2)])
        assert recorder._queued.num_bytes <= 1 << 16
        lost = counts.lost
        assert read_trace(path).accesses == (Access(Cause.LEASE, (key(0),)),)
    until(lambda: "is written again" in caplog.text)
    assert caplog.text.count("cannot be written") == 1, "said once, not at every try"
    recorder.held(Cause.LEASE, [key(3)])
    recorder.close()
    found = read_trace(path)
    assert (found.num_lost, found.is_cut) == (lost, False)
    held = [Access(Cause.DEMAND, (key(2),))] * (counts.written - 3)
    let_go = Access(None, (key(0), key(1), *[key(2)] * len(held)))
    events = (Access(Cause.LEASE, (key(0),)), Access(Cause.LEASE, (key(1),)), *held)
    assert found.accesses == (*events, let_go, Access(Cause.LEASE, (key(3),)))
    assert counts.lost == lost
    assert replay_all(found, 4)[0].misses == 4


def test_a_disk_that_is_full_from_the_start_does_not_keep_a_worker_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts()
    recorder = TraceRecorder(Path("/dev/full"), HEADER, counts)
    recorder.held(Cause.LEASE, [key(1)])
    recorder.close()
    assert (counts.written, counts.lost) == (0, 1)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        TraceRecorder(tmp_path / "nowhere" / "trace.jsonl", HEADER)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "first line"),
        ('{"format": "another"}', "first line"),
        ('{"format": "expert-pager-trace", "version": 9}', "version 9"),
        ('{"format": "expert-pager-trace", "version": 1, "fingerprint": "f"}', "lacks a field"),
        ('["lease", 0, 1]', "first line"),
        ("\udcff\udcfe", "cannot be read"),
        ("[" * 1_000_000, "first line"),
        (HEADER_LINE.replace("24576", "0"), "0 bytes"),
        (HEADER_LINE.replace("24576", "-5"), "-5 bytes"),
        (HEADER_LINE.replace("24576", "1" + "0" * 30), "bytes"),
        (HEADER_LINE.replace("24576", "true"), "True bytes"),
        (HEADER_LINE.replace("[4, 4, 4]", "[]"), "0 experts"),
        (HEADER_LINE.replace("[4, 4, 4]", "[-3]"), "list of numbers"),
        (HEADER_LINE.replace("[4, 4, 4]", "[1000000000000000000]"), "experts"),
        (HEADER_LINE.replace("[4, 4, 4]", "4"), "list of numbers"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "trace.jsonl").write_bytes(os.fsencode(content) + b"\n" * bool(content))
    with pytest.raises(ConfigError, match=said):
        read_trace(tmp_path / "trace.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        "[]", "{}", '["lease", 0]', '["lease", 0, "1"]', '["stolen", 0, 1]', "not json", '["lease", 0, -1]',
        '["lost"]', '["lost", -1]', "[[], 0, 1]",
    ],
)  # fmt: skip
def test_a_damaged_event_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(HEADER_LINE + '\n["lease", 0, 1]\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 3 of"):
        read_trace(path)


@given(events=st.lists(st.tuples(st.sampled_from(["held", "let_go"]), st.integers(0, 11)), max_size=20), data=st.data())
@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_file_that_is_cut_anywhere_is_read_up_to_there(
    tmp_path_factory: pytest.TempPathFactory, name: str, events: list[tuple[str, int]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / name
    lines = [HEADER_LINE, *(f'["{"lease" if what == "held" else what}",{n // 4},{n % 4}]' for what, n in events)]
    blocks = ["\n".join(lines[:1]) + "\n", "".join(f"{line}\n" for line in lines[1:])]
    encoded = [block.encode() for block in blocks if block]
    members = [gzip.compress(block) for block in encoded] if name.endswith("gz") else encoded
    content = b"".join(members)
    cut = data.draw(st.integers(len(members[0]), len(content)))
    path.write_bytes(content[:cut])
    found = read_trace(path)
    expected = [Access(Cause.LEASE if what == "held" else None, (key(number),)) for what, number in events]
    assert list(found.accesses) == expected[: len(found.accesses)]
    if name.endswith("jsonl"):
        assert len(found.accesses) == content[len(members[0]) : cut].count(b"\n")
    at_an_end = cut in itertools.accumulate(map(len, members)) or (content[:cut].endswith(b"\n") and name.endswith("l"))
    assert found.is_cut is not at_an_end


def test_a_file_that_is_cut_in_its_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(path)
