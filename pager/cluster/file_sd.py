"""The file in which Prometheus finds what to scrape (`file_sd_configs`)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROUTER_JOB = "expert-pager-router"
WORKER_JOB = "expert-pager-worker"


def write_targets(path: Path, router: str | None, workers: Mapping[str, str]) -> None:
    """Replaces the file in one step; `workers` maps a worker's id to the address of its metrics."""
    groups = [
        {"targets": [address], "labels": {"job": WORKER_JOB, "worker": worker}}
        for worker, address in sorted(workers.items())
    ]
    if router is not None:
        groups.insert(0, {"targets": [router], "labels": {"job": ROUTER_JOB}})
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(groups, file, indent=2)
        os.fchmod(file.fileno(), 0o644)  # Prometheus runs as somebody else
    os.replace(temporary, path)
