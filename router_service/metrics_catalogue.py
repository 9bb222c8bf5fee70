"""`docs/metrics.md`, from the code: `python -m router_service.metrics_catalogue > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterable

from pager.metrics.families import Family, Kind
from pager.metrics.replay import REPLAY_FAMILIES
from pager.metrics.worker_families import WORKER_FAMILIES
from router_service.metric_families import router_families
from router_service.tenants import OTHER_TENANTS

_INTRO = """\
# Metrics

Made by `make docs` from the code; a test compares. Workers and routers answer on `/metrics` of their own ports
(`workers.metrics_port`, `router.metrics_port`), and also say how their process is (`process_*`, `python_info`).

Every series is there from the start, at zero. No request, prompt or expert id is ever a label. `tenant` has the
names that `router.metric_tenants` lists, and `other` for everybody else. `model` and `version` are labels of the two
info metrics: join them with `* on (instance) group_left (model) expert_pager_model_info`. The tier `host` belongs to
all workers of a node, each of which reports the same bytes: take the maximum, not the sum.

Alerts and what to do about them: `docs/runbook.md`. Dashboards and rules: `deploy/monitoring`.
"""
_REPLAY = """\
Of no process, but of a file: `expert-pager replay TRACE --prometheus FILE` writes what a recorded trace
(`workers.trace`) would have cost with other budgets and policies. Put it where node-exporter's textfile collector
looks, or push it; the dashboard *Capacity* shows it. Only what was replayed is there.

"""
_HEADER = "| name | type | unit | labels | meaning | the question it answers |\n|---|---|---|---|---|---|"
_MOST_VALUES = 6


def catalogue() -> str:
    """The whole page."""
    router = router_families(("those configured", OTHER_TENANTS))
    parts = (("Worker", "", WORKER_FAMILIES), ("Router", "", router), ("Replay", _REPLAY, REPLAY_FAMILIES))
    return _INTRO + "".join(f"\n## {title}\n\n{text}{_table(families)}\n" for title, text, families in parts)


def _table(families: Iterable[Family]) -> str:
    return "\n".join([_HEADER, *map(_row, families)])


def _row(family: Family) -> str:
    unit = "" if family.kind is Kind.INFO else family.unit
    cells = (f"`{family.exposed}`", family.kind.value, unit, _labels(family), family.meaning, family.question)
    return f"| {' | '.join(cells)} |"


def _labels(family: Family) -> str:
    if not family.labels.series:
        return ", ".join(f"`{name}`" for name in family.labels.names)
    return "; ".join(f"`{name}`: {_values(family.labels.values(name))}" for name in family.labels.names)


def _values(values: list[str]) -> str:
    shown = ", ".join(values[:_MOST_VALUES])
    return shown if len(values) <= _MOST_VALUES else f"{shown}, ... ({len(values)})"


if __name__ == "__main__":
    print(catalogue(), end="")
