"""The files that users hand over: what is no regular file, too large, too deep or no text is refused at once."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pager import reading
from pager.errors import InvalidRequest
from pager.reading import (
    check_text,
    open_regular,
    parse_json,
    read_bounded,
    read_documents,
    read_lines,
    replace_file,
)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.mkdir, "it is a directory"),
        (os.mkfifo, "it is a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (_socket, "No such device or address"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_regular_file_is_refused_without_a_wait(
    tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "file"
    make(path)
    before = os.listdir("/proc/self/fd")
    for read in (open_regular, lambda path: read_bounded(path, 10), lambda path: list(read_lines(path))):
        with pytest.raises(OSError, match=said):
            read(path)
    assert os.listdir("/proc/self/fd") == before


def test_a_pipe_that_a_shell_hands_over_is_read() -> None:
    own, others = os.pipe()
    with subprocess.Popen(["echo", "hello"], stdout=others):
        os.close(others)
        assert read_bounded(f"/dev/fd/{own}", 10) == b"hello\n"
    os.close(own)


def test_no_more_than_the_bound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_bounded(path, 10) == b"x" * 10
    with pytest.raises(OSError, match="more than the 9 bytes"):
        read_bounded(path, 9)
    os.truncate(path, 1 << 40)  # a hole: it takes no disk, and would take all memory
    with pytest.raises(OSError, match="more than the 1000 bytes"):
        read_bounded(path, 1000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "too deep"),
        ('{"a":' * 100_000, "too deep"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' occurs twice"),
        ('{"a": NaN}', "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("1" * 5000, "4300 digits"),
        ("{", "Expecting"),
        (b"\xff\xfe{}", "utf-8"),
    ],
)
def test_json_that_is_none_is_a_value_error(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


@given(st.recursive(st.none() | st.booleans() | st.text() | st.integers(), st.lists, max_leaves=20))
def test_json_of_others_reads_as_ever(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


def test_lines_are_numbered_and_those_before_a_cut_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.gz"
    whole = gzip.compress(b"one\ntwo\r\n")
    path.write_bytes(whole + gzip.compress(b"three\n" * 1000)[:-12])
    lines = read_lines(path)
    assert [next(lines), next(lines)] == [(1, "one\n"), (2, "two\r\n")]
    with pytest.raises(EOFError):
        list(lines)


def test_a_line_without_an_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n" + b" " * (1 << 20)))
    with pytest.raises(ValueError, match="line 2 has more than 1000 bytes"):
        list(read_lines(path))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "\\ud800 abc"}', "line 2 of .*half of a pair"),
        (b'{"text": "abc\xff"}', "line 2 is not UTF-8: byte 13"),
        (b"[" * 1_000_000, "line 2 of .*too deep"),
        (b'{"words": 1}', 'line 2 of .*no "text"'),
        (b'"text"', 'line 2 of .*no "text"'),
    ],
)
def test_a_document_that_is_none_is_named_by_its_line(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(InvalidRequest, match=said):
        list(read_documents(path))


def test_a_byte_of_a_command_line_that_is_no_text_is_refused() -> None:
    assert check_text("ä€😀", "the prompt") == "ä€😀"
    with pytest.raises(InvalidRequest, match="character 1 is half of a pair"):
        check_text(os.fsdecode(b"a\xff b"), "the prompt")


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"first")
    replace_file(path, b"second", 0o644, is_durable=True)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"second", 0o644)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(folder, b"third")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]
