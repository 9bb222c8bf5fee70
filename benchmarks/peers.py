"""How fast others run the same model on this machine: llama.cpp, vLLM on a CPU, plain transformers, fastllm.

make peers                                installs them, each beside this environment
python -m benchmarks.peers                20 minutes on 2 cores, as root for the memory caps; 25 GB in build/benchmarks
python -m benchmarks.peers --groups bf16  some of the tables; the others keep the figures of earlier runs
python -m benchmarks.peers --quick        a smoke run on toy shapes that writes no file
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.checkpoints import WORK, checkpoints, quantised
from benchmarks.llama_cpp import LIBRARIES, Libraries, Unusable
from benchmarks.measure import alternate
from benchmarks.memory_cap import NoCap, memory_cap
from benchmarks.page_cache import drop
from benchmarks.peer_engines import Taken
from benchmarks.peer_files import with_tokenizer, write_compressed
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten
from benchmarks.shapes import SHAPES
from pager.cli.options import print_error
from pager.errors import PagerError
from pager.models.open_model import OpenModel

PEERS = Path(sys.prefix) / "peers"
PROMPT_TOKENS, PREFILL_TOKENS, CHECKED_TOKENS = 16, 512, 64
NUM_TOP, LEAST_COMMON = 20, 10
ANSWER_TIMEOUT_S = 900
SLOW_S = 30.0  # a first run that took longer is not repeated
SPARE_BYTES = 512 * 2**20
RESIDENT = 0.25
POOL = 0.125
BASE, THIS = "engine", "this"
BITS = {"bf16": "bf16", "int8": "8 bits", "int4": "4 bits"}
GROUPS = tuple(f"{kind}{capped}" for kind in (*BITS, "qwen3") for capped in ("", "-capped"))
NOT_INSTALLED = "not installed: make peers"
CELLS = {"decode, batch 1": 1, "decode, batch 8": 8, f"prefill of {PREFILL_TOKENS}": 0}
"""What is measured, and the rows of its batch; 0 is a prefill."""


@dataclass(frozen=True, slots=True)
class Way:
    """One engine with the file that it reads. `missing` says why it cannot be had."""

    name: str
    kind: str
    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    python: Path = Path(sys.executable)
    missing: str = ""

    @property
    def command(self) -> list[str]:
        options = json.dumps(dict(self.options))
        threads = str(torch.get_num_threads())
        return [str(self.python), "-m", "benchmarks.peer_engines", self.kind, str(self.path), threads, options]


class Gone(Exception):
    """Why an engine answers no more."""


class Process:
    """An engine's process, which is stopped while others are asked. Mutable."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("w") as stderr:
            environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT, env=environment
            )
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None, "it is a pipe"
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def ask(self, *question: Any) -> Any:
        """Raises Gone."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None, "it is a pipe"
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Gone(self._why()) from None
        return self.answer()

    def answer(self) -> Any:
        """Raises Gone."""
        assert self._process.stdout is not None, "it is a pipe"
        if not self._selector.select(ANSWER_TIMEOUT_S):
            self.close()
            raise Gone(f"no answer within {ANSWER_TIMEOUT_S} s")
        line = self._process.stdout.readline()
        if not line:
            raise Gone(self._why())
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None, "it is a pipe"
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _why(self) -> str:
        if self._process.wait() == -signal.SIGKILL:
            return "killed: it needs more memory"
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "Unusable" in line]
        return (errors or lines or [f"ended with {self._process.returncode}"])[-1][-200:]


@dataclass(frozen=True, slots=True)
class Group:
    """Ways that are compared, with equal bits and in equal memory."""

    name: str
    title: str
    ways: Sequence[Way]
    capped: bool = False

    def only(self, part: str) -> Group:
        """Our engine, and those of the others that have `part` in their names."""
        base, *others = self.ways
        return replace(self, ways=[base, *(way for way in others if part in way.name)])


@dataclass(frozen=True, slots=True)
class Effort:
    num_rounds: int
    num_steps: Mapping[int, int]

    def halved(self) -> Effort:
        return Effort(
            max(1, self.num_rounds // 2), {rows: max(2, steps // 3) for rows, steps in self.num_steps.items()}
        )


Measured = dict[str, Any]
"""Of a way: `reason`, or `common` (tokens of NUM_TOP) and by cell `cells`: tokens a second of each repeat of our engine
and of this one, by the clock and of processor time. `failed` says why cells are missing.
"""


def main(
    groups: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(GROUPS)}.")] = None,
    ways: Annotated[str, typer.Option(help="Only the engines that have this in their names, beside ours.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 5,
    threads: Annotated[int, typer.Option(help="Of every engine.")] = torch.get_num_threads(),
    work: Annotated[Path, typer.Option(help="Where checkpoints and figures are kept.")] = WORK,
    results: Annotated[Path, typer.Option(help="Directory for the tables.")] = RESULTS,
    prepare: Annotated[bool, typer.Option("--prepare", help="Write the checkpoints and measure nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shapes, one repeat, no file is written.")] = False,
) -> None:
    """Measure decode and prefill of the same model by engines that take turns."""
    if unknown := {*(groups or ())} - {*GROUPS}:
        raise typer.BadParameter(f"there is no group {', '.join(sorted(unknown))}; groups are {', '.join(GROUPS)}")
    quieten()
    torch.set_num_threads(threads)
    effort = Effort(1, {1: 4, 8: 2}) if quick else Effort(rounds, {1: 32, 8: 12})
    shapes = (("olmoe-micro", 2), ("qwen3-micro", 2)) if quick else (("olmoe-1b7b", 4), ("qwen3-30b-a3b", 3))
    figures = work / ("peers-quick.json" if quick else "peers.json")
    work.mkdir(parents=True, exist_ok=True)
    try:
        found = [group_of(name, work, shapes).only(ways) for name in groups or GROUPS]
        if prepare:
            return
        report = Report(
            "peers",
            ", ".join(f"{shape} with {layers} of {SHAPES[shape].num_layers} layers" for shape, layers in shapes)
            + ", random weights",
            conditions(threads=f"{threads} of each engine"),
        )
        report.start()
        known: dict[str, dict[str, Measured]] = {}
        if figures.exists() and not quick:
            known = json.loads(figures.read_text())
        for group in found:
            of_group = known.setdefault(group.name, {})
            for name, figures_of_way in measured(group, effort.halved() if group.capped else effort, work):
                of_group[name] = figures_of_way
                figures.write_text(json.dumps(known, indent=1))
            report.add(table(group, of_group))
    except PagerError as error:
        print_error(error.message)
        raise typer.Exit(1) from None
    except Gone as reason:
        print_error(f"the engine itself did not run: {reason}")
        raise typer.Exit(1) from None
    if not quick:
        report.tables[:] = [table(group_of(name, work, shapes), known[name]) for name in GROUPS if name in known]
        report.write(results)


# --- what is compared -------------------------------------------------------------------------------------------------


def group_of(name: str, work: Path, shapes: Sequence[tuple[str, int]]) -> Group:
    """Writes what is missing of the files that its engines read. Raises PagerError."""
    kind, _, capped = name.partition("-")
    (olmoe, qwen), where = shapes, f"in trunk + {RESIDENT:.0%} of the experts + 0.5 GiB" if capped else "all in memory"
    if kind == "qwen3":
        plain, packed = checkpoints(work, *qwen)
        ways = [*ours(packed, capped=bool(capped)), *fastllm_ways(plain, packed, capped=bool(capped))]
        return Group(name, f"Qwen3-30B-A3B's shape, experts in 16 bits, {where}", ways, bool(capped))
    plain, packed = checkpoints(work, *olmoe)
    if kind != "bf16":
        packed = quantised(plain, plain.with_name(f"{plain.name}-{kind}"), kind, torch.bfloat16)
    ways = [*ours(packed, capped=bool(capped)), *llama_ways(plain, kind), *torch_ways(plain, kind)]
    return Group(name, f"OLMoE-1B-7B's shape, experts in {BITS[kind]}, {where}", ways, bool(capped))


def fastllm_ways(plain: Path, packed: Path, *, capped: bool) -> list[Way]:
    python = PEERS / "fastllm" / "bin" / "python"
    missing = "" if python.exists() else NOT_INSTALLED
    all_bytes = expert_bytes(packed)
    sizes: dict[str, int | None] = {} if capped else {"fastllm float16, experts in memory": None}
    sizes["fastllm float16, experts on disk"] = int(RESIDENT * all_bytes) if capped else all_bytes
    return [
        Way(name, "fastllm", with_tokenizer(plain), {"cache_bytes": size}, python, missing)
        for name, size in sizes.items()
    ]


def ours(packed: Path, *, capped: bool) -> list[Way]:
    memory = {"memory": None if capped else "100%"}
    ways = [Way("engine", "engine", packed, memory), Way("load_model", "load_model", packed, memory)]
    if capped:
        ways.append(Way(f"engine, a pool of {POOL:.1%}", "engine", packed, {**memory, "pool": POOL}))
    return ways


def llama_ways(plain: Path, kind: str) -> list[Way]:
    """Its usual file, in which the trunk is quantised too; and one with a trunk in bf16, as ours is."""
    folder = PEERS / "llama.cpp" / LIBRARIES
    file_type = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_k_m"}[kind]
    names = {"": f"llama.cpp {file_type}"}
    if kind != "bf16":
        names = {"-experts": f"llama.cpp {file_type}, trunk bf16", "": f"llama.cpp {file_type}, trunk too"}
    ways = []
    for suffix, name in names.items():
        out, missing = plain.with_name(f"{plain.name}-{file_type}{suffix}.gguf"), ""
        if not out.exists():
            missing = written(plain, out, file_type, folder, plain_trunk=bool(suffix))
        ways.append(Way(name, "llama.cpp", out, {"folder": str(folder)}, missing=missing))
    return ways


def written(plain: Path, out: Path, file_type: str, folder: Path, *, plain_trunk: bool) -> str:
    """Writes a GGUF file. Returns why it cannot be, if so."""
    try:
        from benchmarks.gguf_file import write_gguf
    except ImportError:
        return "the package gguf is not installed"
    try:
        with console.status(f"writing {out.name}"):
            write_gguf(plain, out, file_type, Libraries(folder).quantise, plain_trunk=plain_trunk)
    except Unusable as reason:
        return str(reason)
    return ""


def torch_ways(plain: Path, kind: str) -> list[Way]:
    python = PEERS / "vllm" / "bin" / "python"
    missing = "" if python.exists() else NOT_INSTALLED
    if kind == "bf16":
        return [
            Way("plain transformers bf16", "transformers", plain, {"memory": None}),
            Way("vLLM-CPU bf16", "vllm", plain, {}, python, missing),
        ]
    out = plain.with_name(f"{plain.name}-vllm-{kind}")
    if not out.exists():
        with console.status(f"writing {out.name}"):
            write_compressed(plain, out, kind)
    return [
        Way(f"plain transformers {kind}", "transformers", plain, missing=NO_TRANSFORMERS),
        Way(f"vLLM-CPU {VLLM_NAMES[kind]}", "vllm", out, {}, python, missing),
    ]


VLLM_NAMES = {"int8": "int8, activations too", "int4": "int4, a scale for 32"}
NO_TRANSFORMERS = "its quantisers take linear layers; the experts of a layer are one parameter"


def expert_bytes(packed: Path) -> int:
    with OpenModel.open(packed, torch.bfloat16).checkpoint as checkpoint:
        assert checkpoint.pack is not None, "it is packed"
        return checkpoint.pack.extents_nbytes


def cap_bytes(packed: Path) -> int:
    """The trunk, a quarter of the experts and half a GiB."""
    trunk = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    return trunk + int(RESIDENT * expert_bytes(packed)) + SPARE_BYTES


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(group: Group, effort: Effort, work: Path) -> Iterator[tuple[str, Measured]]:
    """Each way but our engine, which takes turns with one of them after the other: two models are in memory at a time.

    Raises Gone where our engine itself does not run.
    """
    base, *others = group.ways
    prompts = prompts_of(base.path, 8, PROMPT_TOKENS)
    (long_prompt,) = prompts_of(base.path, 1, PREFILL_TOKENS, seed=1)
    with ExitStack() as opened:
        ours = start(base, group, opened, work)
        expected = ours.ask("top", long_prompt[:CHECKED_TOKENS])
        for way in others:
            with ExitStack() as beside:
                try:
                    process = start(way, group, beside, work)
                    common = len({*expected} & {*process.ask("top", long_prompt[:CHECKED_TOKENS])})
                except Gone as reason:
                    yield way.name, {"reason": str(reason)}
                    continue
                if common < LEAST_COMMON and "pool" not in way.options:
                    yield (
                        way.name,
                        {"reason": f"another model: {common} of the {NUM_TOP} likeliest tokens are the same"},
                    )
                    continue
                found: Measured = {"common": common, "cells": {}}
                for cell, rows in CELLS.items():
                    steps = effort.num_steps.get(rows, 1)
                    question = ("decode", prompts[:rows], steps) if rows else ("prefill", long_prompt)
                    num_tokens = rows * steps if rows else len(long_prompt)
                    try:
                        runs = turns(ours, process, question, effort.num_rounds)
                    except Gone as reason:
                        if not ours.is_running:
                            raise
                        found["failed"] = str(reason)
                        break
                    found["cells"][cell] = {name: rates(taken, num_tokens) for name, taken in runs.items()}
                yield way.name, found


def rates(runs: Sequence[Taken], num_tokens: int) -> list[list[float]]:
    """Tokens a second by the clock and of processor time, of each repeat."""
    return [[num_tokens / max(1e-9, each) for each in taken] for taken in runs]


def turns(ours: Process, process: Process, question: Sequence[Any], num_rounds: int) -> dict[str, list[Taken]]:
    """What each repeat took. Raises Gone."""
    first = {name: each.ask(*question) for name, each in ((BASE, ours), (THIS, process))}
    if first[THIS][0] > SLOW_S:
        return {BASE: [ours.ask(*question)], THIS: [first[THIS]]}
    # The first run has chosen kernels, and read what then stays.
    return alternate({BASE: partial(ours.ask, *question), THIS: partial(process.ask, *question)}, num_rounds)


def start(way: Way, group: Group, opened: ExitStack, work: Path) -> Process:
    """Raises Gone."""
    if way.missing:
        raise Gone(way.missing)
    command = way.command
    if group.capped:
        drop([path for path in (way.path.rglob("*") if way.path.is_dir() else [way.path]) if path.is_file()])
        try:
            command = opened.enter_context(memory_cap(cap_bytes(group.ways[0].path))).inside(command)
        except NoCap as reason:
            raise Gone(f"not measured: {reason}") from None
    log = work / f"peers-{group.name}-{way.name.replace(' ', '-').replace(',', '')}.log"
    process = Process(command, log)
    opened.callback(process.close)
    with console.status(f"{group.name}: {way.name} loads"):
        process.answer()
    return process


# --- the table --------------------------------------------------------------------------------------------------------


def table(group: Group, found: Mapping[str, Measured]) -> Table:
    """A row for each way: tokens a second, and how many times as many our engine has beside it."""
    rows = [(BASE, f"{NUM_TOP} of {NUM_TOP}", *cells_of(own_rates(found)))] if own_rates(found) else []
    for way in group.ways[1:]:
        measured = found.get(way.name, {"reason": "not measured"})
        if "reason" in measured:
            rows.append((way.name, measured["reason"], *[""] * (2 * len(CELLS))))
            continue
        rows.append(
            (way.name, f"{measured['common']} of {NUM_TOP}", *cells_of(measured["cells"], measured.get("failed")))
        )
    columns = [name for cell in CELLS for name in (f"{cell}, tokens/s", "engine / this")]
    return Table(group.title, ("", "same tokens", *columns), rows, NOTES)


def own_rates(found: Mapping[str, Measured]) -> dict[str, dict[str, list[list[float]]]]:
    """Our engine's, beside all others together."""
    own: dict[str, list[list[float]]] = {}
    for measured in found.values():
        for cell, runs in measured.get("cells", {}).items():
            own.setdefault(cell, []).extend(runs[BASE])
    return {cell: {BASE: runs, THIS: runs} for cell, runs in own.items()}


def cells_of(measured: Mapping[str, Mapping[str, list[list[float]]]], failed: str | None = None) -> list[str]:
    shown = []
    for cell in CELLS:
        if cell not in measured:
            shown += [failed or "", ""]
            continue
        own, this = measured[cell][BASE], measured[cell][THIS]
        shown.append(figure([by_clock for by_clock, _ in this]))
        by_clock, by_processor = (median_of(own, which) / median_of(this, which) for which in (0, 1))
        shown.append(f"{by_clock:.2f} ({by_processor:.2f})")
    return shown


def median_of(runs: Sequence[Sequence[float]], which: int) -> float:
    return statistics.median(run[which] for run in runs)


NOTES = (
    "Tokens a second of all rows together. Each engine takes turns with ours, in a process of its own that stands "
    "still while the other runs. Medians; brackets: smallest and largest. A run of another engine that takes more than "
    f"{SLOW_S:g} s is not repeated.",
    "Engine / this: tokens a second of our engine beside this one's, by the clock; in brackets of the processor time "
    "of all threads, which says something on a machine that others use as well, most with --threads 1.",
    f"Same tokens: how many of the {NUM_TOP} likeliest after a prompt of {CHECKED_TOKENS} tokens are our engine's; "
    f"where a pool runs, the model is another one. Prompts of {PROMPT_TOKENS} tokens before a decode are not in its "
    "time.",
)


if __name__ == "__main__":
    typer.run(main)
