"""What a benchmark says: where and how it was measured, then its tables. The same on the terminal and in Markdown."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table as RichTable

from pager.memory import format_bytes

ROOT = Path(__file__).resolve().parents[1]
BUSY_PERCENT = 10
RESULTS = Path(__file__).resolve().parent / "results"
# Where the output goes to a file or a log, tables keep their columns whole.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True, slots=True)
class Table:
    """The first column is text, the others are figures. `notes` say what a reader must know to trust them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def print(self) -> None:
        table = RichTable(title=self.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print()
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", style="dim")

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", _row(self.columns), _row(["---"] + ["---:"] * (len(self.columns) - 1))]
        lines += [_row(row) for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


@dataclass(slots=True)
class Report:
    """Collects one run's tables. Mutable; conditions are taken at the start, so that the commit is the one that ran."""

    name: str
    summary: str
    conditions: Mapping[str, str]
    tables: list[Table] = field(default_factory=list)

    def start(self) -> None:
        console.print(f"[bold]{self.name}[/bold]: {self.summary}")
        for name, value in self.conditions.items():
            console.print(f"  {name:<12} {value}", markup=False)

    def add(self, table: Table) -> None:
        """Prints the table at once."""
        self.tables.append(table)
        table.print()

    def markdown(self) -> str:
        facts = [f"| {name} | {value} |" for name, value in self.conditions.items()]
        head = [f"# {self.name}", "", self.summary, "", "| condition | |", "|---|---|", *facts]
        return "\n".join(head) + "".join(f"\n\n{table.markdown()}" for table in self.tables) + "\n"

    def write(self, directory: Path) -> Path:
        """`NAME_HARDWARE_DATE.md` in `directory`; a second run of the same day replaces the first."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}_{hardware_slug()}_{datetime.now(UTC):%Y-%m-%d}.md"
        path.write_text(self.markdown())
        console.print(f"\nwrote {path}")
        return path


def conditions(*, timed: bool = True, **more: str) -> dict[str, str]:
    """Machine, software, commit, date and what else runs, then what the caller adds. Sleeps a second to see that.

    Not `timed`: the tables are counts, which no load changes.
    """
    others = psutil.cpu_percent(interval=1.0)
    warning = "; NOT ALONE: do not quote these" if timed else "; these are counts, which it does not change"
    return {
        "machine": f"{cpu_name()}, {os.cpu_count()} CPUs, {format_bytes(psutil.virtual_memory().total)} of memory",
        "GPU": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none; nothing here was measured on one",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.system()} {platform.release()}",
        "commit": commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "other load": f"{others:.0f} % of all CPUs{warning if others > BUSY_PERCENT else ''}",
        **more,
    }


def quieten() -> None:
    """Keeps transformers' progress bars and advice out of the tables."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def commit() -> str:
    """The checked-out commit, and whether the code in the working tree differs from it."""
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "pager", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
    return revision + (" with uncommitted changes" if changed else "")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def hardware_slug() -> str:
    """A short name of the hardware for file names: `intel-xeon-2cpu`."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{cpu_name()} {os.cpu_count()}cpu"
    plain = re.sub(r"\((R|TM)\)|@.*Hz|\b(CPU|Processor)\b", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def figure(values: Sequence[float], digits: int = 1) -> str:
    """The median, and in brackets the smallest and largest."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """Of the medians."""
    return f"{statistics.median(numerators) / statistics.median(denominators):.2f}"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
