"""What an answer was and what it cost: for scripts and for people."""

from __future__ import annotations

from typing import Any

from pager.cli.output import pool_dict
from pager.types import DriftReport, ExpertPool, Usage
from pager.units import format_bytes


def usage_dict(usage: Usage) -> dict[str, Any]:
    return {
        "mode": usage.mode,
        "finish_reason": str(usage.finish_reason),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "pool": pool_dict(usage.pool),
        "bytes_from_disk": usage.bytes_from_disk,
        "bytes_from_host": usage.bytes_from_host,
        "experts_hit": usage.experts_hit,
        "experts_missed": usage.experts_missed,
        "stall_s": usage.stall_s,
        "out_of_pool_mass": usage.out_of_pool_mass,
        "predicted_recall": usage.predicted_recall,
        "queue_s": usage.queue_s,
        "time_to_first_token_s": usage.time_to_first_token_s,
        "model_fingerprint": usage.model_fingerprint,
        "drift": usage.drift and _drift_dict(usage.drift),
    }


def usage_lines(usage: Usage, elapsed_s: float) -> list[str]:
    lookups = usage.experts_hit + usage.experts_missed
    hits = f"{usage.experts_hit / lookups:.1%} of {lookups} expert look-ups" if lookups else "no expert look-ups"
    paged = f"{format_bytes(usage.bytes_from_disk)} from disk, {format_bytes(usage.bytes_from_host)} from host memory"
    return [
        f"{usage.mode}: {pool_text(usage.pool)}",
        *([drift_text(usage.drift)] if usage.drift else []),
        f"hit {hits}; paged {paged}; stalled {usage.stall_s * 1000:.0f} ms",
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens ({usage.finish_reason}) in {elapsed_s:.2f} s, "
        f"first after {usage.time_to_first_token_s * 1000:.0f} ms",
    ]


def pool_text(pool: ExpertPool | None) -> str:
    if pool is None:
        return "all experts"
    mass = "" if pool.covered_mass is None else f", {pool.covered_mass:.1%} of the router's mass"
    return f"{pool.num_experts} experts in pool {pool.digest}{mass}"


def drift_text(drift: DriftReport) -> str:
    parts = [f"drift: at most {drift.peak_mass:.1%} of the router's mass outside of the pool"]
    if drift.widenings:
        times = "once" if drift.widenings == 1 else f"{drift.widenings} times"
        parts.append(f"widened {times} by {drift.experts_added} experts in all")
    if drift.experts_left_out:
        parts.append(f"{drift.experts_left_out} experts left out, for which there are no slots")
    if drift.exact_from is not None:
        parts.append(f"all experts from token {drift.exact_from} on")
    return "; ".join(parts)


def _drift_dict(drift: DriftReport) -> dict[str, Any]:
    return {
        "peak_mass": drift.peak_mass,
        "widenings": drift.widenings,
        "experts_added": drift.experts_added,
        "exact_from": drift.exact_from,
        "experts_left_out": drift.experts_left_out,
    }
