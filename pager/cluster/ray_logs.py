"""What Ray passes on of its workers' output, and what Ray says itself, as JSON like everything else that is logged."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher

from pager import logs

log = logging.getLogger("expert_pager.ray")

HANDLER = "ray_print_logs"  # the name of Ray's own


def pass_on_as_json() -> None:
    """In the place of Ray's way, which puts a name and colours before each line. After `ray.init`."""
    own = logging.getLogger("ray")
    own.handlers.clear()
    own.propagate = True
    global_worker_stdstream_dispatcher.remove_handler(HANDLER)
    global_worker_stdstream_dispatcher.add_handler(HANDLER, _pass_on)


def _pass_on(batch: Mapping[str, Any]) -> None:
    for line in batch["lines"]:
        if is_object(line):
            sys.stderr.write(f"{line}\n")  # at once: between the two writes of `print` another thread may log a line
            sys.stderr.flush()
        elif line.strip():
            named = batch.get("actor_name") or batch.get("task_name") or ""
            log.info("%s", line, extra=logs.facts(actor=named or None, pid=batch.get("pid")))


def is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
