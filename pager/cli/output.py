"""How the commands print, and the check for the extras that some of them need."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from pager.errors import ConfigError
from pager.memory.units import format_bytes
from pager.types import DriftReport, ExpertPool, Usage

_SERVE = ("ray", "grpc", "grpc_health", "grpc_reflection", "grpc_status", "google", "redis", "expert_pager", "jwt",
          "limits", "pydantic")  # fmt: skip
_LAB = ("sklearn", "scipy", "matplotlib")


@contextmanager
def serve_extra(purpose: str) -> Iterator[None]:
    """Goes around imports: ConfigError, with what to install, where a package of the `serve` extra is missing."""
    with _extra(purpose, "serve", _SERVE):
        yield


@contextmanager
def lab_extra(purpose: str) -> Iterator[None]:
    """Goes around imports in the same way for the `lab` extra."""
    with _extra(purpose, "lab", _LAB):
        yield


@contextmanager
def _extra(purpose: str, extra: str, packages: tuple[str, ...]) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in packages:
            raise
        raise ConfigError(
            f"{purpose} needs the package {missing!r}, which is not installed; run: pip install 'expert-pager[{extra}]'"
        ) from None


out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_error(message: str) -> None:
    err.print(f"error: {message}", markup=False)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Prints one JSON document. JSON has no infinities; where a number is none, it is null."""
    print(json.dumps(_finite(value), indent=indent, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Prints names and values in two columns."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        out.print(f"{name:<{width}}  {value}", markup=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table whose first column is text, the others figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    out.print(table, soft_wrap=False)


@contextmanager
def bytes_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on stderr, driven by (bytes done, bytes in all). Silent where stderr is no terminal."""
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def steps_progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a progress bar on stderr, driven by a call after each of `total` steps. Silent without a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Shows a spinner on stderr while something without a measure goes on."""
    if not err.is_terminal:
        yield
        return
    with err.status(what):
        yield


def pool_dict(pool: ExpertPool | None) -> dict[str, Any] | None:
    if pool is None:
        return None
    return {
        "digest": pool.digest,
        "num_experts": pool.num_experts,
        "covered_mass": pool.covered_mass,
        "layers": [list(layer) for layer in pool.experts],
    }


def usage_dict(usage: Usage) -> dict[str, Any]:
    return {
        "mode": usage.mode,
        "finish_reason": str(usage.finish_reason),
        "prompt_tokens": usage.prompt_tokens,
        "cached_prompt_tokens": usage.cached_prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "pool": pool_dict(usage.pool),
        "codeword": usage.codeword or None,
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
    lookups = usage.paging.num_lookups
    hits = f"{usage.experts_hit / lookups:.1%} of {lookups} expert look-ups" if lookups else "no expert look-ups"
    paged = f"{format_bytes(usage.bytes_from_disk)} from disk, {format_bytes(usage.bytes_from_host)} from host memory"
    return [
        f"{usage.mode}: {pool_text(usage.pool)}{f', codeword {usage.codeword}' if usage.codeword else ''}",
        *([drift_text(usage.drift)] if usage.drift else []),
        f"hit {hits}; paged {paged}; stalled {usage.stall_s * 1000:.0f} ms",
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens ({usage.finish_reason}) in {elapsed_s:.2f} s, "
        f"first after {usage.time_to_first_token_s * 1000:.0f} ms",
    ]


def pool_text(pool: ExpertPool | None) -> str:
    if pool is None:
        return "all experts"
    mass = "" if pool.covered_mass is None else f", {pool.covered_mass:.1%} of the gate's mass"
    return f"{pool.num_experts} experts in pool {pool.digest}{mass}"


def drift_text(drift: DriftReport) -> str:
    parts = [f"drift: at most {drift.peak_mass:.1%} of the gate's mass outside of the pool"]
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
