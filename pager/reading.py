"""Reads the files that a user hands over: regular ones only, and bounded before they cost anything. Replaces files that
others read.

What is wrong is raised as OSError or ValueError with a reason that fits into a message; the callers know what kind of
file it was meant to be, name it and say what to do.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from pager.errors import InvalidRequest, PagerError

MAX_JSON_BYTES = 100_000_000
"""Of a file that is one JSON value: as large as the header of a safetensors file may be."""

MAX_PEM_BYTES = 1 << 20
"""Of certificates and keys: some hundreds of them."""

MAX_LINE_BYTES = 1 << 26
"""Of a file of lines: far beyond any context, and far below what a few kilobytes of gzip can become."""

LFS_POINTER = b"version https://git-lfs"
"""The beginning of what git-lfs has in the place of a file that it did not fetch."""

A_POINTER = "a pointer of git-lfs and not the file itself, which `git lfs pull` fetches"

_HANDED_OVER = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # `<(command)` of a shell: another process writes into it
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path) -> int:
    """Opens a regular file and returns a descriptor. Raises OSError; never waits for the writer of a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')}, not a regular file", str(path))
    return descriptor


def read_bounded(path: str | Path, max_bytes: int) -> bytes:
    """Returns the whole of a file of at most `max_bytes`. Of pipes it takes only those of a shell's `<(command)`.

    Raises OSError.
    """
    with _open(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than the {max_bytes} bytes that are read of such a file", str(path))
    return data


def replace_file(path: Path, data: bytes, mode: int = 0o600, *, is_durable: bool = False) -> None:
    """Replaces a file in one step, so that nobody reads half of it; a failure leaves nothing behind. Raises OSError."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(handle, mode)
            if is_durable:
                file.flush()
                os.fsync(handle)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


def parse_json(data: bytes | str) -> Any:
    """Returns the one value in `data`. Raises ValueError, also for what most JSON parsers let pass.

    That is: a name that occurs twice in an object, NaN and infinities, and arrays or objects nested hundreds deep.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json_file(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Returns the one value of a JSON file of at most `max_bytes`. Raises OSError, ValueError."""
    return parse_json(not_a_pointer(read_bounded(path, max_bytes)))


def not_a_pointer(data: bytes) -> bytes:
    """Returns what a file holds. Raises ValueError for what git-lfs has in the place of a file that it did not
    fetch.
    """
    if data.startswith(LFS_POINTER):
        raise ValueError(f"it is {A_POINTER}")
    return data


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields every line with its number from 1 on, the line end included; unzipped where the file's name ends in `.gz`.

    Raises OSError; EOFError where a gzip file is cut, after its last whole line; ValueError for a line that is too long
    or not UTF-8, or where a gzip file is damaged.
    """
    number = 0
    with _open(path) as raw:
        lines: Any = gzip.GzipFile(fileobj=raw) if str(path).endswith(".gz") else raw
        try:
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"line {number} has more than {MAX_LINE_BYTES} bytes")
                yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} is not UTF-8: byte {error.start} ({error.reason})") from None
        except zlib.error as error:
            raise ValueError(f"it is damaged after line {number}: {error}") from None


def read_documents(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a JSON lines file with their line numbers; each has a "text". Empty lines are skipped.

    Raises InvalidRequest, which names file and line.
    """
    try:
        for number, line in read_lines(path):
            if line.strip():
                yield number, document_of(line, f"line {number} of {path}")
    except PagerError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read: {reason_of(error)}") from None


def document_of(line: str, where: str) -> dict[str, Any]:
    """Parses one line. Raises InvalidRequest unless it is a JSON object with a "text" that a tokenizer can take."""
    try:
        value = parse_json(line.strip())
    except ValueError as error:
        raise InvalidRequest(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InvalidRequest(f'{where} has no "text"; a line is a JSON object with one')
    return {**value, "text": check_text(value["text"], where)}


def check_text(text: str, where: str) -> str:
    """Returns `text`. Raises InvalidRequest for half of a surrogate pair, which is not a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where} is not text: character {error.start} is half of a pair ({text[error.start]!a}) or a byte "
            "that is not UTF-8; leave it out or repair it"
        ) from None
    return text


def reason_of(error: Exception) -> str:
    """Says why a file could not be read, without the file's name and the number of the error."""
    return str(getattr(error, "strerror", None) or error)


def shown(value: object, most: int = 80) -> str:
    """Returns `value` shortened for a message: what a file contains can be longer than anybody reads."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def one_line(error: Exception) -> str:
    """Returns the message of another library's error on one line; it may have several, or be the name of a key only."""
    text = " ".join(str(error).split())
    return text if text and not isinstance(error, LookupError) else repr(error)


def _open(path: str | Path) -> IO[bytes]:
    if str(path).startswith(_HANDED_OVER):
        return open(path, "rb")
    return os.fdopen(open_regular(path), "rb")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice!a} occurs twice in an object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
