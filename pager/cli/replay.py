"""`expert-pager replay`: a recorded trace under every eviction policy and several budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pager.cli.options import AsJson
from pager.cli.output import err, out, print_json, print_table
from pager.errors import ConfigError
from pager.lab.replay import CurvePoint, write_curve
from pager.memory.units import format_bytes, parse_bytes_or_share

if TYPE_CHECKING:
    from pager.cache.trace import Trace
    from pager.lab.replay import ReplayResult


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="File in the folder of `serve --trace`.")],
    budgets: Annotated[
        str, typer.Option("--budgets", help="Comma-separated: bytes ('64MiB') or shares of all routed experts ('25%').")
    ] = "12.5%,25%,50%,75%",
    prometheus: Annotated[
        Path | None,
        typer.Option(
            "--prometheus", metavar="FILE", help="Also write the curve as metrics, with what 1 GiB more buys."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a recorded run would have read with another eviction policy or another budget.

    The optimum is Belady's rule, which knows the future. Record a trace under a budget that holds all experts: what was
    held, and for how long, then depends on the requests alone.

    Example: `expert-pager replay trace.jsonl.gz --budgets 25%,50%`
    """
    from pager.cache.trace import read_trace
    from pager.lab.replay import replay_all

    recorded = read_trace(trace)
    header = recorded.header
    if recorded.is_cut:
        err.print(f"{trace} is cut: it is replayed up to where it is whole", markup=False)
    if recorded.num_lost:
        err.print(f"{recorded.num_lost} events of {trace} were lost while it was recorded", markup=False)
    tables = []
    for budget in budgets.split(","):
        asked = parse_bytes_or_share(budget.strip(), header.num_experts * header.expert_bytes)
        num_slots = min(asked // header.expert_bytes, header.num_experts)
        if num_slots < 1:
            raise ConfigError(f"budget {budget.strip()!r} holds no expert of {format_bytes(header.expert_bytes)}")
        tables.append((budget.strip(), num_slots, replay_all(recorded, num_slots)))
    if prometheus is not None:
        write_curve(_curve(recorded, tables), prometheus)
    if as_json:
        rows = [
            {
                "budget": budget, "slots": num_slots, "policy": result.policy, "hits": result.hits,
                "misses": result.misses, "bytes": result.misses * header.expert_bytes,
            }
            for budget, num_slots, results in tables
            for result in results
        ]  # fmt: skip
        facts = {"lost_events": recorded.num_lost, "cut": recorded.is_cut}
        print_json({"trace": str(trace), "model_fingerprint": header.fingerprint, **facts, "results": rows})
        return
    for budget, num_slots, results in tables:
        best = results[-1].misses
        print_table(
            f"{budget}: {num_slots} of {header.num_experts} experts, {format_bytes(num_slots * header.expert_bytes)}",
            ("policy", "hits", "bytes waited for", "over the optimum"),
            [
                (
                    result.policy,
                    f"{result.hit_rate:.1%}",
                    format_bytes(result.misses * header.expert_bytes),
                    f"{result.misses / best - 1:+.1%}" if best else "-",
                )
                for result in results
            ],
        )
    out.print(f"{len(recorded.accesses)} events of model {header.fingerprint[:16]}", markup=False)


def _curve(trace: Trace, tables: Sequence[tuple[str, int, Sequence[ReplayResult]]]) -> Iterator[CurvePoint]:
    """Replays every budget once more, with a gibibyte added and at most room for all experts."""
    from pager.lab.replay import replay_all

    expert_bytes, num_experts = trace.header.expert_bytes, trace.header.num_experts
    for budget, num_slots, results in tables:
        more = min(num_experts, num_slots + 2**30 // expert_bytes)
        fewer_misses = {result.policy: result.misses for result in replay_all(trace, more)}
        for result in results:
            yield CurvePoint(
                result.policy,
                budget,
                num_slots * expert_bytes,
                result.hit_rate,
                result.misses * expert_bytes,
                fewer_misses[result.policy] * expert_bytes,
            )
