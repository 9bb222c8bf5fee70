"""A record of which experts were held and let go of, in order: keys only, nothing of any prompt.

A trace is JSON lines, gzipped when its name ends in `.gz`: a header, then one event a line.

    {"format": "expert-pager-trace", "version": 1, "fingerprint": "…", "expert_bytes": 24576, "routed_per_layer": [127]}
    ["lease", 0, 5, 0, 17]      held for a lease: layer 0, expert 5 and layer 0, expert 17
    ["let_go", 0, 5]
"""

from __future__ import annotations

import gzip
import itertools
import json
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pager import at_exit
from pager.cache.usage import Cause
from pager.errors import ConfigError
from pager.types import ExpertKey

FORMAT, VERSION = "expert-pager-trace", 1
LET_GO = "let_go"


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """Whose experts these are. `expert_bytes` is what reading one costs."""

    fingerprint: str
    expert_bytes: int
    routed_per_layer: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return sum(self.routed_per_layer)


@dataclass(frozen=True, slots=True)
class Access:
    """Experts held together for a lease or an exact forward, or (`cause` None) let go of together."""

    cause: Cause | None
    keys: tuple[ExpertKey, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    header: TraceHeader
    accesses: tuple[Access, ...]


class TraceRecorder:
    """Writes a trace in a thread of its own, so that who tells of an access only queues it. Thread-safe."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Begins a new file. Raises ConfigError when it can not be written."""
        self._path = path
        self._events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        try:
            self._file = _open(path, "wt")
        except OSError as error:
            raise ConfigError(f"the trace {path} can not be written: {error.strerror or error}") from None
        self._thread = threading.Thread(target=self._write, name="trace", daemon=True)
        self._events.put(json.dumps({"format": FORMAT, "version": VERSION, **asdict(header)}))
        self._thread.start()
        at_exit.call(self, TraceRecorder.close)

    def held(self, cause: Cause, keys: Sequence[ExpertKey]) -> None:
        if keys:
            self._put(cause.value, keys)

    def let_go(self, keys: Sequence[ExpertKey]) -> None:
        if keys:
            self._put(LET_GO, keys)

    def close(self) -> None:
        """Writes what is queued. Idempotent."""
        if self._thread.is_alive():
            self._events.put(None)
            self._thread.join()

    def _put(self, what: str, keys: Sequence[ExpertKey]) -> None:
        self._events.put(json.dumps([what, *itertools.chain.from_iterable(keys)], separators=(",", ":")))

    def _write(self) -> None:
        with self._file:
            while (line := self._events.get()) is not None:
                self._file.write(line + "\n")


def read_trace(path: Path) -> Trace:
    """Raises ConfigError for a file that is no trace, naming the line."""
    try:
        with _open(path, "rt") as file:
            lines = iter(file)
            header = _header(next(lines, ""), path)
            return Trace(header, tuple(_accesses(lines, path)))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {path} can not be read: {getattr(error, 'strerror', None) or error}") from None


def _header(line: str, path: Path) -> TraceHeader:
    value = _json(line)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ConfigError(f"{path} is no trace: its first line is not the header of one")
    if value.get("version") != VERSION:
        raise ConfigError(f"{path} has trace version {value.get('version')!r}; this program reads version {VERSION}")
    try:
        routed = tuple(int(count) for count in value["routed_per_layer"])
        return TraceHeader(str(value["fingerprint"]), int(value["expert_bytes"]), routed)
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path} is no trace: its header lacks a field") from None


def _accesses(lines: Iterator[str], path: Path) -> Iterator[Access]:
    causes: dict[str, Cause | None] = {LET_GO: None, **{cause.value: cause for cause in Cause}}
    for number, line in enumerate(lines, start=2):
        value = _json(line)
        flat = value[1:] if isinstance(value, list) else []
        if not isinstance(value, list) or len(flat) % 2 or not all(type(part) is int for part in flat):
            raise ConfigError(f"line {number} of {path} is no event of a trace")
        if not value or value[0] not in causes:
            raise ConfigError(f"line {number} of {path} is no event of a trace")
        keys = tuple(map(ExpertKey, flat[::2], flat[1::2]))
        yield Access(causes[value[0]], keys)


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _open(path: Path, mode: str) -> IO[str]:
    kind: Any = gzip.open if path.suffix == ".gz" else open
    opened: IO[str] = kind(path, mode, encoding="utf-8")
    return opened
