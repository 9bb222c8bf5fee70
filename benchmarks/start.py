"""How long the whole service takes to start, and what it holds while it idles: `expert-pager serve` until it is ready,
and its first answers.

python -m benchmarks.start [MODEL]  about a minute on 2 cores
python -m benchmarks.start --quick  a smoke run that writes no file
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.process_memory import proportional_bytes
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, figure, quieten
from benchmarks.service import Client, serving

MODEL = ROOT / "models" / "emo-tiny"
GOAL_S = 4.0
OPTIONS = ("--expert-memory", "25%", "--pool", "12.5%", "--log-format", "json")
PROMPT_TOKENS, ANSWER_TOKENS, NUM_ANSWERS = 64, 2, 3
# Of the processes, by a word of their command lines; the first that fits. A worker calls itself as Ray's actors do.
KINDS = {
    "ray::WorkerActor": "worker",
    "gcs_server": "Ray's GCS",
    "raylet/raylet": "Ray's raylet",
    "cat": "stand-ins for Ray's agents",
    "pager.cluster.ray_process": "connected to Ray",
    "router_service.trunk": "trunk, from the first prompt on",
    "pager.cli": "router",
}
# Of log lines, by how their messages begin.
LINES = {"embedded Ray at": "Ray has started", "threads 1: a step took": "model loaded", "ready after": "worker ready"}


@dataclass
class Start:
    """One start: seconds from the command until each event, in milliseconds the first tokens, bytes by process."""

    at_s: dict[str, float] = field(default_factory=dict)
    first_token_ms: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    processor_s: dict[str, float] = field(default_factory=dict)


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint.")] = MODEL,
    starts: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 5,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short, and no file is written.")] = False,
) -> None:
    """Measure how the service starts."""
    quieten()
    report = Report("start", f"{model.name}, serve {' '.join(OPTIONS)}, one worker", conditions())
    report.start()
    prompts = prompts_of(model, NUM_ANSWERS, PROMPT_TOKENS)
    found = [_start(model, prompts) for _ in range(1 if quick else starts)]
    for table in (_times(found), _processes(found)):
        report.add(table)
    if not quick:
        report.write(results)


def _start(model: Path, prompts: Sequence[Sequence[int]]) -> Start:
    found = Start()
    with tempfile.TemporaryDirectory() as folder, console.status("a start"):
        began_s = time.time()
        with serving([str(model), *OPTIONS], Path(folder)) as (process, ready):
            ready_s = time.time() - began_s
            with closing(Client(ready["address"])) as client:
                for prompt in prompts:
                    found.first_token_ms += [1e3 * each for each in client.wave([prompt], ANSWER_TOKENS).first_token_s]
            router = psutil.Process(process.pid)
            for each in (router, *router.children(recursive=True)):
                command = " ".join(each.cmdline())
                kind = next((name for word, name in KINDS.items() if word in command), command[:40])
                found.at_s[f"process: {kind}"] = each.create_time() - router.create_time()
                found.memory[kind] = found.memory.get(kind, 0) + proportional_bytes(each.pid)
                times = each.cpu_times()
                found.processor_s[kind] = found.processor_s.get(kind, 0.0) + times.user + times.system
        for line in (Path(folder) / "log").read_text().splitlines():
            said: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
            for begins, event in LINES.items():
                if str(said.get("message", "")).startswith(begins):
                    found.at_s.setdefault(event, datetime.fromisoformat(said["time"]).timestamp() - began_s)
        found.at_s["ready"] = ready_s
    return found


def _times(found: Sequence[Start]) -> Table:
    seconds = {event: [each.at_s[event] for each in found if event in each.at_s] for event in found[0].at_s}
    rows = [
        (event, figure(times, 2), "", "")
        if event != "ready"
        else (event, figure(times, 2), f"{GOAL_S:g}", "ok" if statistics.median(times) <= GOAL_S else "more")
        for event, times in sorted(seconds.items(), key=lambda item: statistics.median(item[1]))
    ]
    for number in range(NUM_ANSWERS):
        times = [each.first_token_ms[number] / 1e3 for each in found]
        rows.append((f"first token of request {number + 1}, from its sending", figure(times, 3), "", ""))
    notes = (
        f"Seconds from the command to each event; {len(found)} starts, medians.",
        f"Requests of {PROMPT_TOKENS} tokens, one after the other once the service is ready. The first one starts the "
        "process of the trunk, where the model has a codebook.",
    )
    return Table("From the command to the first answers", ("event", "s", "goal", "reached"), rows, notes)


def _processes(found: Sequence[Start]) -> Table:
    rows = [
        (
            kind,
            figure([each.memory.get(kind, 0) / 2**20 for each in found], 0),
            figure([each.processor_s.get(kind, 0.0) for each in found], 2),
        )
        for kind in found[0].memory
    ]
    totals = ([sum(each.memory.values()) / 2**20 for each in found], [sum(each.processor_s.values()) for each in found])
    rows.append(("all", figure(totals[0], 0), figure(totals[1], 2)))
    notes = (
        f"After {NUM_ANSWERS} requests: memory that is not of files, that of several processes divided among them.",
    )
    return Table("What the idle service holds", ("process", "MiB", "processor s"), rows, notes)


if __name__ == "__main__":
    typer.run(main)
