"""`docs/metrics.md`, from the code: `python -m docs.metrics_catalogue > docs/metrics.md`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pager.lab.replay import REPLAY_FAMILIES
from pager.observe.metrics import Kind, Metric
from pager.observe.worker_metrics import WORKER_FAMILIES
from router_service.admission import OTHER_TENANTS
from router_service.metrics import router_families

_INTRO = """\
# Metrics

Made by `make docs` from the code; a test compares. Workers and routers answer on `/metrics` of their own ports
(`workers.metrics_port`, `router.metrics_port`), and also report on their process (`process_*`, `python_info`).

Every series is there from the start, at zero. No request, prompt or expert id is ever a label. `tenant` has the
names that `router.metric_tenants` lists, and `other` for everybody else. `model` and `version` are labels of the two
info metrics: join them with `* on (instance) group_left (model) expert_pager_model_info`. The tier `host` belongs to
all workers of a node, each of which reports the same bytes: take the maximum, not the sum.

For endpoint pickers, routers also report under the names that the Kubernetes gateway inference extension expects of
model servers, with the label `model_name`: `vllm:num_requests_waiting` and `vllm:num_requests_running` (sums over the
ready workers) and `vllm:kv_cache_usage_perc` (0 to 1, the mean over them). With
`router.pools_as_adapters`, `vllm:lora_requests_info` shows named pools as adapters (`MODEL:POOL`, as requests name
them): those that requests of this router run with in `running_lora_adapters`, those that they wait for in
`waiting_lora_adapters`, and in `max_lora` how many pools of the default size fit into the slots of all workers; its
value is the time in seconds. Without it no pool is named in metrics: the names are their tenants' own.

Alerts and what to do about them: `docs/runbook.md`. Dashboards and rules: `deploy/monitoring`.
"""
_IDENTITIES = """\
Counters agree with each other. The following holds whenever nothing is in flight, after answers, failures, refusals and
cancellations alike, over any time in which no worker and no router was lost: a process takes its counts with it. A test
holds it after a storm of all of these. Names are without their prefix and `_total`, and stand for sums over all labels
that are not named, and over all routers and workers.

- Calls: `router_calls` of a method = its `router_requests` of all codes. While calls are open, that many fewer have
  ended.
- Answers: `router_requests` of all methods that generate (`Generate`, `Complete`, `ModelInfer`, `ModelStreamInfer`,
  `Completions`, `ChatCompletions`, `Responses`, `Messages`) with a code = `router_answers` with that code.
- Refusals: `router_admission_rejections` counts a refused call once, whether a router or a worker refused it. It is at
  most `router_requests` with `RESOURCE_EXHAUSTED`, `UNAVAILABLE` or `DEADLINE_EXCEEDED`; the others of these failed
  after they had begun.
- On the way: `router_sent` = `requests_received`.
- At workers: `requests_received` = `requests_refused` + `requests` of all outcomes. While some are in flight, also
  `requests_waiting` + `requests_running`.
- Ends: `requests` with `stop` or `length` is at least `router_answers` with `OK`; the others ended as their client
  left.
- Waits: `router_queue_seconds` = `queue_seconds`, in number and sum: the requests that were admitted.
- Tokens: `router_prompt_tokens` = `prompt_tokens`, and `router_generated_tokens` = `completion_tokens`.
- Work: `step_tokens` = `prompt_tokens` - `cached_prompt_tokens` + `completion_tokens` - the number of
  `time_to_first_token_seconds`, because a prompt's forward gives the first token.
- Bytes: `router_paged_bytes` = `charged_bytes`, by source; and `transfer_bytes` to `device` = `charged_bytes` +
  `uncharged_bytes`.
"""
_REPLAY = """\
These come from a file, not a process: `expert-pager replay TRACE --prometheus FILE` writes what a recorded trace
(`workers.trace`) would have cost with other budgets and eviction policies. Put it where the textfile
collector of node-exporter looks, or push it; the dashboard *Capacity* shows it. The file has only what was replayed.

"""
_HEADER = "| name | type | unit | labels | meaning | the question it answers |\n|---|---|---|---|---|---|"
_MOST_VALUES = 6


def _unwrapped(text: str) -> str:
    """Returns Markdown with one line per paragraph and per item of a list."""
    return re.sub(r"(?<!\n)\n *(?=[^\n|#-])", " ", text)


def catalogue() -> str:
    """Returns the whole page."""
    router = router_families(("those configured", OTHER_TENANTS), ("those of the codebook",))
    parts = (("Worker", "", WORKER_FAMILIES), ("Router", "", router), ("Replay", _unwrapped(_REPLAY), REPLAY_FAMILIES))
    tables = "".join(f"\n## {title}\n\n{text}{_table(families)}\n" for title, text, families in parts)
    return f"{_unwrapped(_INTRO)}{tables}\n## Identities between counters\n\n{_unwrapped(_IDENTITIES)}"


def _table(families: Iterable[Metric]) -> str:
    return "\n".join([_HEADER, *map(_row, families)])


def _row(family: Metric) -> str:
    unit = "" if family.kind is Kind.INFO else family.unit
    cells = (f"`{family.exposed}`", family.kind.value, unit, _labels(family), family.meaning, family.question)
    return f"| {' | '.join(cells)} |"


def _labels(family: Metric) -> str:
    if not family.labels.series:
        return ", ".join(f"`{name}`" for name in family.labels.names)
    return "; ".join(f"`{name}`: {_values(family.labels.values(name))}" for name in family.labels.names)


def _values(values: list[str]) -> str:
    shown = ", ".join(values[:_MOST_VALUES])
    return shown if len(values) <= _MOST_VALUES else f"{shown}, ... ({len(values)})"


if __name__ == "__main__":
    print(catalogue(), end="")
