"""The miss curve of a recorded trace as metrics: a file for node-exporter's textfile collector, or for a push."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from pager.errors import ConfigError
from pager.metrics.families import Family, Instruments, Kind, Labels

_BY_POLICY = Labels(("policy", "budget"), ())

REPLAY_FAMILIES = (
    Family(
        "replay_capacity_bytes", Kind.GAUGE, "What a budget is in bytes.", "Where on the curve is a worker?",
        Labels(("budget",), ()),
    ),
    Family(
        "replay_hits_ratio", Kind.GAUGE, "Share of the trace's accesses that would have hit.",
        "Which budget is enough?", _BY_POLICY,
    ),
    Family(
        "replay_missed_bytes", Kind.GAUGE, "Bytes that the trace would have waited for.",
        "What would another budget or policy have read?", _BY_POLICY,
    ),
    Family(
        "replay_more_missed_bytes", Kind.GAUGE, "The same with a gibibyte more than the budget.",
        "What would another gibibyte of experts buy?", _BY_POLICY,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One budget under one policy. `more_missed_bytes` is with a gibibyte more."""

    policy: str
    budget: str
    capacity_bytes: int
    hit_rate: float
    missed_bytes: int
    more_missed_bytes: int


def write_curve(points: Iterable[CurvePoint], path: Path) -> None:
    """Replaces the file in one step: a collector never reads half of it. Raises ConfigError."""
    registry = CollectorRegistry()
    made = Instruments(REPLAY_FAMILIES, registry)
    for point in points:
        made.gauge("replay_capacity_bytes").labels(point.budget).set(point.capacity_bytes)
        for name, value in (
            ("replay_hits_ratio", point.hit_rate),
            ("replay_missed_bytes", point.missed_bytes),
            ("replay_more_missed_bytes", point.more_missed_bytes),
        ):
            made.gauge(name).labels(point.policy, point.budget).set(value)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(generate_latest(registry))
            os.fchmod(file.fileno(), 0o644)  # who collects it is somebody else
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"the curve can not be written to {path}: {error.strerror}") from None
