"""What Ray passes on of its workers' output, and what Ray says itself, as everything else is logged.

Ray would print it on standard output, which is for what a command was asked for, with a name and colours before each
line.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.ray_logging import global_worker_stdstream_dispatcher

from pager import logs

log = logging.getLogger("expert_pager.ray")

HANDLER = "ray_print_logs"  # the name of Ray's own
DAEMONS = ("raylet", "gcs_server", "autoscaler")  # in the place of a process number
END_OF_A_WORKER = "A worker died or was killed"  # whoever supervises the worker says it, and whether it was meant to
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def pass_on(kind: str) -> None:
    """As log lines of `kind` ("json" or "text") on standard error. Before `ray.init`, and again after it.

    It puts its own way there when it connects, but for errors of its daemons, which have none: a function prints them.
    """
    own = logging.getLogger("ray")
    own.handlers.clear()
    own.propagate = True
    handler = functools.partial(_pass_on, kind)
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: handler(data)
    global_worker_stdstream_dispatcher.remove_handler(HANDLER)
    global_worker_stdstream_dispatcher.add_handler(HANDLER, handler)


def _pass_on(kind: str, batch: Mapping[str, Any]) -> None:
    for coloured in batch["lines"]:
        line = _COLOURS.sub("", coloured)
        if batch.get("pid") in DAEMONS:
            level = logging.DEBUG if line.startswith(END_OF_A_WORKER) else logging.WARNING
            log.log(level, "Ray's %s: %s", batch["pid"], " ".join(line.split()))
        elif kind == "text" or is_object(line):
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
    except (ValueError, RecursionError):
        return False
