"""Every metric of a router."""

from __future__ import annotations

from collections.abc import Sequence

from expert_pager.v1 import expert_pager_pb2 as pb

from pager.metrics import buckets
from pager.metrics.families import Family, Kind, Labels, every
from router_service.redis_client import REASONS
from router_service.status import CODES

METHODS = tuple(method.name for method in pb.DESCRIPTOR.services_by_name["ExpertPager"].methods)
STATUSES = ("OK", *sorted({code.name for code in CODES.values()}))
SOURCES = ("hint", "lexical", "trunk", "fitted", "prefill")  # of a predicted pool
PASSES = ("lexical", "trunk", "fitted", "prefill")
REJECTIONS = ("OVERLOADED", "TENANT_OVERLOADED", "SLOTS_EXHAUSTED", "NOT_READY", "DEADLINE_EXCEEDED")
DROPS = ("no_message", "unknown_method", "unseen")
WORKER_STATES = ("starting", "ready", "draining", "hung", "dead")
RAY_DAEMONS = ("gcs_server", "raylet")
INFO_LABELS = ("version", "model", "fingerprint")

_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM


def router_families(tenants: Sequence[str]) -> tuple[Family, ...]:
    """`tenants` are the values that the label `tenant` can have."""
    return (*_calls(), *_answers(every(tenant=tenants), tenants), *_pools(), *_surroundings())


def _calls() -> tuple[Family, ...]:
    return (
        Family("router_calls", _COUNTER, "Calls that arrived, by method.", "What is asked?", every(method=METHODS)),
        Family(
            "router_requests", _COUNTER, "Calls that ended, by method and gRPC status code.",
            "Which calls fail, and how?", every(method=METHODS, code=STATUSES),
        ),
        Family("router_requests_in_flight", _GAUGE, "Admitted requests that have not ended.", "How busy is it?"),
        Family(
            "router_tokens_in_flight", _GAUGE, "Prompt plus max_tokens of the admitted requests.",
            "How much work is promised?",
        ),
        Family(
            "router_in_flight_bytes", _GAUGE, "Of the messages of admitted requests.",
            "How much memory do requests take?",
        ),
        Family(
            "router_admission_rejections", _COUNTER,
            "Calls turned away before any work, by a router or a worker, by reason.",
            "What is refused, and why?", every(reason=REJECTIONS),
        ),
        Family(
            "router_dropped_calls", _COUNTER,
            "Calls that came to no method: without a message that gRPC can receive (too large, or in an unknown "
            "compression), of an unknown method, or ended by gRPC before the router saw them.",
            "Does gRPC refuse calls that nobody else counts?", every(reason=DROPS),
        ),
        Family(
            "router_loop_lag_seconds", _HISTOGRAM, "By how much a task of the event loop woke up too late.",
            "Does something keep everybody waiting?", buckets=buckets.LOOP_LAG_S,
        ),
    )  # fmt: skip


def _answers(by_tenant: Labels, tenants: Sequence[str]) -> tuple[Family, ...]:
    return (
        Family(
            "router_answers", _COUNTER, "Calls of Generate that ended, by gRPC status code.",
            "Who gets answers, and who errors?", every(tenant=tenants, code=STATUSES),
        ),
        Family(
            "router_time_to_first_token_seconds", _HISTOGRAM, "From the call's arrival to its first token.",
            "How long do people wait?", by_tenant, buckets.FIRST_TOKEN_S,
        ),
        Family(
            "router_time_per_output_token_seconds", _HISTOGRAM, "Mean gap between the tokens of an answer.",
            "How fast can people read?", by_tenant, buckets.OUTPUT_TOKEN_S,
        ),
        Family(
            "router_queue_seconds", _HISTOGRAM,
            "Of requests that their worker is done with, the wait in its line until they were admitted.",
            "Whose requests wait for memory?", by_tenant, buckets.FIRST_TOKEN_S,
        ),
        Family(
            "router_prompt_tokens", _COUNTER, "Prompt tokens that workers have run, however answers ended.",
            "Who sends what?", by_tenant,
        ),
        Family(
            "router_generated_tokens", _COUNTER, "Tokens that workers have generated, however answers ended.",
            "Who gets what?", by_tenant,
        ),
        Family(
            "router_paged_bytes", _COUNTER,
            "Bytes of experts that workers have read for requests, however these ended, by where from.",
            "Whose requests cause paging?", every(tenant=tenants, source=("disk", "host")),
        ),
    )  # fmt: skip


def _pools() -> tuple[Family, ...]:
    escalations = tuple((was, is_) for at, was in enumerate(PASSES) for is_ in PASSES[at + 1 :])
    return (
        Family(
            "router_route_seconds", _HISTOGRAM, "Time to predict a pool, by what predicted it.",
            "What does routing cost?", every(source=SOURCES), buckets.ROUTE_S,
        ),
        Family(
            "router_recall_ratio", _HISTOGRAM, "Share of the prefill's pool that was predicted, by what predicted it.",
            "How good is each source?", every(source=SOURCES), buckets.RATIO,
        ),
        Family(
            "router_predicted_experts", _COUNTER,
            "Experts of predicted and actual pools: in both, in the actual one alone, in the predicted one alone.",
            "How far are predicted pools from actual ones, in experts?", every(result=("right", "missing", "surplus")),
        ),
        Family(
            "router_escalations", _COUNTER, "Prompts for which a source was expected to recall too little.",
            "Is the cheap pass good enough?", Labels(("from", "to"), escalations),
        ),
        Family(
            "router_hint_lookups", _COUNTER, "Look-ups of an observed pool by prompt prefix.",
            "Are prompts alike?", every(result=("hit", "miss")),
        ),
    )  # fmt: skip


def _surroundings() -> tuple[Family, ...]:
    return (
        Family(
            "router_sent", _COUNTER, "Requests sent to workers; one that is placed again counts again.",
            "What do workers get from this router?",
        ),
        Family(
            "router_replacements", _COUNTER, "Requests placed again because their worker was lost.",
            "What do lost workers cost?",
        ),
        Family(
            "router_redis_degraded", _GAUGE, "1 while Redis is configured and does not answer, or takes no writes.",
            "Are hints and named pools shared?",
        ),
        Family(
            "router_redis_failures", _COUNTER, "Commands that Redis failed or refused, by reason.",
            "What is wrong with Redis?", every(reason=REASONS),
        ),
        Family(
            "router_ray_lost", _COUNTER, "Daemons that the embedded Ray has lost; the router drains and exits then.",
            "Why does this router start again?", every(daemon=RAY_DAEMONS),
        ),
        Family("router_workers", _GAUGE, "Workers by state.", "Who can answer?", every(state=WORKER_STATES)),
        Family(
            "router_worker_restarts", _COUNTER, "Times that a worker was started again, as this router saw it.",
            "Does a worker keep dying?",
        ),
        Family(
            "router", Kind.INFO, "What this router serves.",
            "Which version and model run here?", Labels(INFO_LABELS, ()),
        ),
    )  # fmt: skip
