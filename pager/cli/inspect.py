"""`expert-pager inspect`: what a checkpoint holds, and what a budget would buy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pager.cli.options import AsJson, Device, Dtype, ExpertMemory, HostMemory, KvMemory, ModelPath
from pager.cli.output import out, print_facts, print_json, print_table
from pager.errors import PoolTooSmall
from pager.memory.machine import resolve_device
from pager.memory.needs import Needs
from pager.memory.plan import Budgets, Machine, Plan, describe
from pager.memory.plan import plan as make_plan
from pager.memory.units import format_bytes

if TYPE_CHECKING:
    from pager.models.open_model import OpenModel

POOL_SIZES = ("12.5%", "25%", "50%", "full")


def inspect(
    model: ModelPath,
    expert_memory: ExpertMemory = None,
    host_memory: HostMemory = None,
    kv_memory: KvMemory = None,
    max_running: Annotated[int, typer.Option(help="Requests that may run at once.", min=1)] = 32,
    device: Device = "auto",
    dtype: Dtype = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the plan for this machine even without a budget.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds and what a memory budget would buy. Reads headers only, no weights.

    Examples:

    `expert-pager inspect ./model`

    `expert-pager inspect ./model --expert-memory 25%`

    `expert-pager inspect ./model --expert-memory 8GiB --dtype auto --device cuda --json`
    """
    from pager.engine.paged_model import needs_of
    from pager.models.open_model import OpenModel

    resolved = resolve_device(device)
    found = OpenModel.open(model, dtype)
    with found.checkpoint:
        needs = needs_of(found, resolved)
        facts = _facts(found, needs)
    made = None
    if plan or any(budget is not None for budget in (expert_memory, host_memory, kv_memory)):
        budgets = Budgets(expert_memory, host_memory, kv_memory, max_running)
        made = make_plan(needs, budgets, Machine.detect(resolved))
    pools = _pools(needs, made)
    if as_json:
        print_json({**facts, "pools": pools, "plan": made.to_dict() if made else None})
        return
    print_facts(_lines(facts))
    out.print()
    _print_pools(pools, made)
    if made:
        out.print()
        out.print("plan", style="bold")
        for line in describe(made):
            out.print(line, markup=False)


def _facts(found: OpenModel, needs: Needs) -> dict[str, Any]:
    facts, checkpoint = found.facts, found.checkpoint
    pack_bytes = checkpoint.pack.extents_nbytes if checkpoint.pack else 0
    return {
        "path": str(checkpoint.path),
        "family": found.family.model_type,
        "packed": checkpoint.is_packed,
        "checksums": all(spec.checksum for spec in checkpoint.specs.values()),
        "fingerprint": checkpoint.fingerprint,
        "stored_dtypes": sorted({str(spec.dtype).removeprefix("torch.") for spec in checkpoint.specs.values()}),
        "stored_bytes": sum(checkpoint.file_nbytes.values()) + pack_bytes,
        "serving_dtype": str(found.dtype).removeprefix("torch."),
        "layers": facts.num_layers,
        "dense_layers": sum(count == 0 for count in facts.experts_per_layer),
        "experts_per_layer": list(facts.experts_per_layer),
        "shared_per_layer": list(facts.shared_per_layer),
        "top_k_per_layer": list(facts.top_k_per_layer),
        "context_tokens": needs.context_tokens,
        "trunk_bytes": needs.trunk_bytes,
        "expert_bytes": needs.expert_bytes,
        "resident_bytes": needs.resident_bytes,
        "routed_experts": needs.num_routed,
        "routed_bytes": needs.routed_bytes,
        "kv_bytes_per_token": needs.kv_bytes_per_token,
        "smallest_expert_memory": needs.smallest_num_slots * needs.expert_bytes,
    }


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    checked = "packed, with checksums" if facts["packed"] else "as downloaded"
    if facts["checksums"] and not facts["packed"]:
        checked += ", checksums recorded"
    dense = f", {facts['dense_layers']} of them dense" if facts["dense_layers"] else ""
    experts = f"{_range(facts['experts_per_layer'])} a layer, {_range(facts['shared_per_layer'])} of them shared"
    return [
        ("model", f"{facts['path']} ({facts['family']}, {checked})"),
        (
            "weights",
            f"{format_bytes(facts['stored_bytes'])} on disk as {', '.join(facts['stored_dtypes'])}; "
            f"served as {facts['serving_dtype']}",
        ),
        ("fingerprint", facts["fingerprint"]),
        ("layers", f"{facts['layers']}{dense}"),
        ("experts", f"{experts}; a token picks {_range(facts['top_k_per_layer'])} routed ones"),
        ("context", f"{facts['context_tokens']} tokens, {format_bytes(facts['kv_bytes_per_token'])} of KV each"),
        ("trunk", f"{format_bytes(facts['trunk_bytes'])}, always in memory"),
        ("shared", f"{format_bytes(facts['resident_bytes'])}, always in memory"),
        (
            "routed",
            f"{format_bytes(facts['routed_bytes'])} in {facts['routed_experts']} experts of "
            f"{format_bytes(facts['expert_bytes'])}",
        ),
        ("smallest", f"--expert-memory {facts['smallest_expert_memory']} runs one token"),
    ]


def _range(counts: list[int]) -> str:
    """'32', or '8 to 32' where layers differ; dense layers don't count."""
    sparse = [count for count in counts if count] or [0]
    return str(sparse[0]) if min(sparse) == max(sparse) else f"{min(sparse)} to {max(sparse)}"


def _pools(needs: Needs, made: Plan | None) -> list[dict[str, Any]]:
    from pager.pools.pick import largest_counts, parse_pool_size

    rows = []
    for size in POOL_SIZES:
        try:
            counts = largest_counts(parse_pool_size(size), needs.facts)
        except PoolTooSmall:
            continue
        slots = sum(counts)
        row = {"size": size, "routed_per_layer": list(counts), "slots": slots, "bytes": slots * needs.expert_bytes}
        if made:
            row["fit_at_once"] = made.num_slots // slots if slots else None
        rows.append(row)
    return rows


def _print_pools(pools: list[dict[str, Any]], made: Plan | None) -> None:
    columns = ["pool", "routed a layer", "slots", "memory"] + (["disjoint ones that fit"] if made else [])
    rows = []
    for pool in pools:
        row = [pool["size"], _range(pool["routed_per_layer"]), str(pool["slots"]), format_bytes(pool["bytes"])]
        rows.append(row + ([str(pool["fit_at_once"])] if made else []))
    print_table("pools", columns, rows)
