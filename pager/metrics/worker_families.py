"""Every metric of a worker."""

from __future__ import annotations

from pager.errors import PagerError
from pager.metrics import buckets
from pager.metrics.families import Family, Kind, Labels, every
from pager.types import FinishReason

CACHE_TIERS = ("host", "device")
CAUSES = ("lease", "demand", "prefetch")
MODEL_LABELS = ("version", "model", "dtype", "device", "fingerprint", "plan")


def _reasons(kind: type[PagerError]) -> set[str]:
    return {kind.reason.lower()}.union(*(_reasons(child) for child in kind.__subclasses__()))


REASONS: frozenset[str] = frozenset(_reasons(PagerError))
OUTCOMES: frozenset[str] = frozenset(reason.value for reason in FinishReason) | REASONS

_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

PAGING = (
    Family(
        "lookups", _COUNTER, "Experts asked for, by tier and what was met there.",
        "Which share of experts is there already, tier by tier?",
        every(tier=CACHE_TIERS, result=("hit", "hit_in_flight", "miss")),
    ),
    Family(
        "transfer_bytes", _COUNTER, "Bytes of experts moved.", "What does paging take of disk and bus?",
        Labels(("source", "destination"), (("disk", "host"), ("disk", "device"), ("host", "device"))),
    ),
    Family(
        "charged_bytes", _COUNTER, "Bytes of experts read for requests that ended, by where from.",
        "What do requests cost in paging?", every(source=("disk", "host")),
    ),
    Family(
        "uncharged_bytes", _COUNTER, "Bytes of experts read at the start, or for a request that had ended.",
        "What is read that nobody used?", every(source=("disk", "host")),
    ),
    Family(
        "page_in_seconds", _HISTOGRAM, "One expert's way into a slot.", "Are disk and bus as fast as they should be?",
        every(source=("disk", "host")), buckets.PAGE_IN_S,
    ),
    Family(
        "page_ins", _COUNTER, "Experts that were given a slot to be read into, by what wanted them.",
        "Who causes reads: pools, exact forwards or prefetches?", every(cause=CAUSES),
    ),
    Family(
        "paged_again", _COUNTER, "Of the page-ins, those of experts evicted less than a minute before.",
        "Does the cache thrash?", every(cause=CAUSES),
    ),
    Family(
        "evictions", _COUNTER, "Experts evicted, by what needed the slot.", "Who drives experts out?",
        every(cause=CAUSES),
    ),
    Family(
        "prefetches", _COUNTER, "Prefetched experts that were used, or evicted without use.",
        "How much of prefetching is wasted?", every(result=("used", "wasted")),
    ),
    Family(
        "stall_seconds", _HISTOGRAM, "Waits of a forward for experts.", "How long do forwards stand, and for what?",
        every(cause=CAUSES), buckets.STALL_S,
    ),
    Family(
        "quarantined", _COUNTER, "Reads that failed or had a wrong checksum.", "Are weights damaged?",
        every(tier=("disk",)),
    ),
    Family(
        "trace_events", _COUNTER, "Events of the trace that were written, or lost while its disk was full or slow.",
        "Is the trace whole?", every(result=("written", "lost")),
    ),
)  # fmt: skip

ENGINE = (
    Family("requests_received", _COUNTER, "Requests that routers have sent.", "How much is asked of the worker?"),
    Family(
        "requests_refused", _COUNTER, "Of the requests received, those that were not taken, by error.",
        "What does the worker turn away?", every(reason=sorted(REASONS)),
    ),
    Family(
        "requests", _COUNTER, "Of the requests taken, those that ended, by finish reason or error.",
        "How do answers end?", every(outcome=sorted(OUTCOMES)),
    ),
    Family(
        "prompt_tokens", _COUNTER, "Prompt tokens that were run for requests that ended, however.", "How much is read?",
    ),
    Family(
        "completion_tokens", _COUNTER, "Tokens generated for requests that ended, however.", "How much is written?",
    ),
    Family(
        "queue_seconds", _HISTOGRAM, "Wait for KV and slots before admission.", "Is memory too little for the load?",
        buckets=buckets.FIRST_TOKEN_S,
    ),
    Family(
        "time_to_first_token_seconds", _HISTOGRAM, "From submission to the first token.",
        "How long do answers take to begin, without the router's part?", buckets=buckets.FIRST_TOKEN_S,
    ),
    Family(
        "time_per_output_token_seconds", _HISTOGRAM, "Mean gap between an answer's tokens.", "How fast is an answer?",
        buckets=buckets.OUTPUT_TOKEN_S,
    ),
    Family(
        "step_seconds", _HISTOGRAM, "One engine step.", "How long may a token of everybody take?",
        buckets=buckets.STEP_S,
    ),
    Family(
        "forward_seconds", _HISTOGRAM, "The model's forwards in one step.", "Which part of a step is computing?",
        buckets=buckets.STEP_S,
    ),
    Family(
        "step_tokens", _COUNTER, "Tokens of prompts and answers that forwards have run to an end.",
        "What does the worker get through?",
    ),
    Family(
        "pool_experts", _HISTOGRAM, "Routed experts a layer in an answer's pool, mean.", "How large are pools?",
        buckets=buckets.POOL_EXPERTS,
    ),
    Family(
        "out_of_pool_mass_ratio", _HISTOGRAM, "Router mass outside the pool while decoding.",
        "Do pools hold what answers want?", buckets=buckets.RATIO,
    ),
    Family(
        "predicted_recall_ratio", _HISTOGRAM, "Share of the prefill's pool that was predicted.",
        "How far is the predicted pool from the actual one?", buckets=buckets.RATIO,
    ),
    Family("drift_widenings", _COUNTER, "Times that an answer's pool was widened.", "Do answers leave their pools?"),
    Family("drift_experts", _COUNTER, "Experts that were added to pools by widening them.", "What does widening cost?"),
    Family("drift_exact", _COUNTER, "Answers that went on with all experts.", "How often is a pool given up?"),
    Family("requests_running", _GAUGE, "Requests that hold KV and slots.", "How many answers are written at a time?"),
    Family("requests_waiting", _GAUGE, "Requests in line.", "Is another worker needed?"),
    Family(
        "loop_lag_seconds", _HISTOGRAM, "By how much a task of the token stream's event loop woke up too late.",
        "Does something keep the streams of all answers waiting?", buckets=buckets.LOOP_LAG_S,
    ),
    Family("kv_used_bytes", _GAUGE, "KV cache reserved by running requests.", "Is KV the bottleneck?"),
    Family("kv_capacity_bytes", _GAUGE, "KV cache as planned.", "What is KV's budget?"),
)  # fmt: skip

# Read at every scrape. The host tier belongs to all workers of a node: each reports the same bytes, so take the
# maximum, not the sum.
TIERS = (
    Family("capacity_bytes", _GAUGE, "The tier's budget.", "What may the tier hold?", every(tier=CACHE_TIERS)),
    Family("resident_bytes", _GAUGE, "Loaded or loading.", "What does the tier hold?", every(tier=CACHE_TIERS)),
    Family(
        "pinned_bytes", _GAUGE, "Of the resident bytes, what can not be evicted now.", "What is in use?",
        every(tier=CACHE_TIERS),
    ),
    Family(
        "reserved_bytes", _GAUGE, "Promised to requests and not bound yet.", "What is spoken for?",
        every(tier=("device",)),
    ),
)  # fmt: skip

MODEL = Family(
    "model", Kind.INFO, "The model that this worker serves, and its plan.", "Which version, model and plan run here?",
    Labels(MODEL_LABELS, ()),
)  # fmt: skip

WORKER_FAMILIES = (*PAGING, *ENGINE, *TIERS, MODEL)
