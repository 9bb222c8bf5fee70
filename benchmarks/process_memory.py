"""What a process takes of memory: its proportional set size, looked at from outside while it works. Linux only."""

from __future__ import annotations

import multiprocessing
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SAMPLE_S = 0.02


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes. `pss` was sampled; `rss`, which counts shared pages whole, is the kernel's own peak. `value`: as sent."""

    pss: int
    rss: int
    value: Any


def peak_of(work: Callable[..., Any], *arguments: Any) -> Peak:
    """Runs `work(*arguments)` in a new process; its value must be picklable. Raises RuntimeError where it fails."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_run, args=(there, work, arguments))
    process.start()
    there.close()
    assert process.pid is not None
    samples: list[int] = []
    done = threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, samples, done))
    sampler.start()
    try:
        value = here.recv()
        samples.append(proportional_bytes(process.pid))
        rss = _status_bytes(process.pid, "VmHWM")
        here.send(None)
    except EOFError:
        raise RuntimeError(f"the measured process {process.pid} ended early; what it said is above") from None
    finally:
        done.set()
        sampler.join()
        process.join()
    return Peak(max(samples), rss, value)


def proportional_bytes(pid: int) -> int:
    """Each page counts as one part of as many as there are processes that map it; those of files, which the system
    takes back, do not. Raises OSError when there is no such process.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE)) * 1024


def _run(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(work(*arguments))
    pipe.recv()  # stays until it was looked at


def _sample(pid: int, samples: list[int], done: threading.Event) -> None:
    while not done.wait(SAMPLE_S):
        try:
            samples.append(proportional_bytes(pid))
        except OSError:
            return


def _status_bytes(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
