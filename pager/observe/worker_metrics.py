"""All metrics of a worker and the object that records them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pager.errors import PagerError
from pager.observe import metrics
from pager.observe.metrics import Instruments, Kind, Labels, Metric, every
from pager.types import Account, FinishReason, Usage

OTHER_TENANTS = "other"
CACHE_TIERS = ("host", "device")
CAUSES = ("lease", "demand", "prefetch")
MODEL_LABELS = ("version", "model", "dtype", "device", "fingerprint", "plan")


def _reasons(kind: type[PagerError]) -> set[str]:
    return {kind.reason.lower()}.union(*(_reasons(child) for child in kind.__subclasses__()))


REASONS: frozenset[str] = frozenset(_reasons(PagerError))
OUTCOMES: frozenset[str] = frozenset(reason.value for reason in FinishReason) | REASONS

_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

PAGING = (
    Metric(
        "lookups", _COUNTER, "Lookups of experts, by tier and result.",
        "What is the hit rate of each tier?",
        every(tier=CACHE_TIERS, result=("hit", "hit_in_flight", "miss")),
    ),
    Metric(
        "transfer_bytes", _COUNTER, "Bytes of experts transferred between tiers.",
        "How much bandwidth does paging use?",
        Labels(("source", "destination"), (("disk", "host"), ("disk", "device"), ("host", "device"))),
    ),
    Metric(
        "charged_bytes", _COUNTER, "Bytes of experts read for requests that ended, by tier.",
        "What do requests cost in paging?", every(source=("disk", "host")),
    ),
    Metric(
        "uncharged_bytes", _COUNTER, "Bytes of experts read at the start, or for a request that had ended.",
        "What is read for no request?", every(source=("disk", "host")),
    ),
    Metric(
        "page_in_seconds", _HISTOGRAM, "Time to page in one expert.", "Are disk and bus as fast as they should be?",
        every(source=("disk", "host")), metrics.PAGE_IN_S,
    ),
    Metric(
        "page_ins", _COUNTER, "Experts paged in, by cause.",
        "Who causes reads: pools, exact forwards or prefetches?", every(cause=CAUSES),
    ),
    Metric(
        "paged_again", _COUNTER, "Page-ins of experts that were evicted less than a minute before.",
        "Does the cache thrash?", every(cause=CAUSES),
    ),
    Metric(
        "evictions", _COUNTER, "Experts evicted, by the cause that needed the slot.", "What causes evictions?",
        every(cause=CAUSES),
    ),
    Metric(
        "prefetches", _COUNTER, "Prefetched experts that were used, or evicted without use.",
        "How much of prefetching is wasted?", every(result=("used", "wasted")),
    ),
    Metric(
        "stall_seconds", _HISTOGRAM, "Time that a forward waited for experts.", "How long do forwards wait, and why?",
        every(cause=CAUSES), metrics.STALL_S,
    ),
    Metric(
        "quarantined", _COUNTER, "Reads that failed or had a wrong checksum.", "Are weights damaged?",
        every(tier=("disk",)),
    ),
    Metric(
        "trace_events", _COUNTER, "Events of the trace that were written, or lost while its disk was full or slow.",
        "Is the trace whole?", every(result=("written", "lost")),
    ),
)  # fmt: skip

ENGINE = (
    Metric("requests_received", _COUNTER, "Requests received from routers.", "How many requests does the worker get?"),
    Metric(
        "requests_refused", _COUNTER, "Received requests that were refused, by error.",
        "What does the worker refuse?", every(reason=sorted(REASONS)),
    ),
    Metric(
        "requests", _COUNTER, "Accepted requests that ended, by finish reason or error.",
        "How do answers end?", every(outcome=sorted(OUTCOMES)),
    ),
    Metric(
        "prompt_tokens", _COUNTER, "Prompt tokens run, or found in the prefix cache, for requests that ended.",
        "How many prompt tokens are processed?",
    ),
    Metric(
        "cached_prompt_tokens", _COUNTER, "Prompt tokens found in the prefix cache for requests that ended.",
        "Which share of prompts need not run again?",
    ),
    Metric(
        "prefix_hits", _COUNTER, "Requests that ended and whose prompt began in the prefix cache.",
        "How many requests begin as earlier ones did?",
    ),
    Metric(
        "completion_tokens", _COUNTER, "Tokens generated for requests that ended, whatever the outcome.",
        "How many tokens are generated?",
    ),
    Metric(
        "queue_seconds", _HISTOGRAM, "Time that a request waited for KV memory and slots.",
        "Is memory too little for the load?",
        buckets=metrics.FIRST_TOKEN_S,
    ),
    Metric(
        "time_to_first_token_seconds", _HISTOGRAM, "Time from a request's arrival at the worker to its first token.",
        "How late is the first token, without the router's part?", buckets=metrics.FIRST_TOKEN_S,
    ),
    Metric(
        "time_per_output_token_seconds", _HISTOGRAM, "Mean gap between the tokens of an answer.",
        "How fast is an answer?",
        buckets=metrics.OUTPUT_TOKEN_S,
    ),
    Metric(
        "step_seconds", _HISTOGRAM, "Duration of one engine step.",
        "How long does one token of every running request take?",
        buckets=metrics.STEP_S,
    ),
    Metric(
        "forward_seconds", _HISTOGRAM, "Time of the model's forwards in one step.", "How much of a step is computing?",
        buckets=metrics.STEP_S,
    ),
    Metric(
        "step_tokens", _COUNTER, "Tokens of prompts and answers in completed forwards.",
        "What is the worker's throughput?",
    ),
    Metric(
        "pool_experts", _HISTOGRAM, "Mean number of routed experts per layer in an answer's pool.",
        "How large are pools?",
        buckets=metrics.POOL_EXPERTS,
    ),
    Metric(
        "out_of_pool_mass_ratio", _HISTOGRAM, "Mean gate probability outside the pool while decoding.",
        "Do pools fit their answers?", buckets=metrics.RATIO,
    ),
    Metric(
        "predicted_recall_ratio", _HISTOGRAM, "Share of the prefill's pool that had been predicted.",
        "How far is the predicted pool from the actual one?", buckets=metrics.RATIO,
    ),
    Metric("drift_widenings", _COUNTER, "Times that an answer's pool was widened.", "Do answers leave their pools?"),
    Metric("drift_experts", _COUNTER, "Experts that were added to pools by widening them.", "What does widening cost?"),
    Metric("drift_exact", _COUNTER, "Answers that went on with all experts.", "How often is a pool given up?"),
    Metric("requests_running", _GAUGE, "Requests that hold KV memory and slots.", "How many requests run at once?"),
    Metric("requests_waiting", _GAUGE, "Requests in the queue.", "Is another worker needed?"),
    Metric(
        "loop_lag_seconds", _HISTOGRAM, "How late a task of the token stream's event loop woke up.",
        "Does something block the streams of all answers?", buckets=metrics.LOOP_LAG_S,
    ),
    Metric("kv_used_bytes", _GAUGE, "KV memory reserved by running requests.", "Is KV the bottleneck?"),
    Metric(
        "kv_cached_bytes", _GAUGE, "KV memory whose content requests that begin alike can take over, in use or not.",
        "How much does the prefix cache hold?",
    ),
    Metric("kv_capacity_bytes", _GAUGE, "KV memory of the plan.", "What is the budget of KV memory?"),
)  # fmt: skip

# Read at every scrape. The host tier belongs to all workers of a node: each reports the same bytes, so take the
# maximum, not the sum.
TIERS = (
    Metric("capacity_bytes", _GAUGE, "Budget of the tier.", "How much may the tier hold?", every(tier=CACHE_TIERS)),
    Metric(
        "resident_bytes", _GAUGE, "Bytes of experts that are loaded or being read.",
        "How much does the tier hold?", every(tier=CACHE_TIERS),
    ),
    Metric(
        "pinned_bytes", _GAUGE, "Bytes of loaded experts that are pinned and cannot be evicted.", "What is in use?",
        every(tier=CACHE_TIERS),
    ),
    Metric(
        "reserved_bytes", _GAUGE, "Bytes of slots that are reserved and not bound yet.", "How much is reserved?",
        every(tier=("device",)),
    ),
)  # fmt: skip

MODEL = Metric(
    "model", Kind.INFO, "The model that this worker serves, and its plan.", "Which version, model and plan run here?",
    Labels(MODEL_LABELS, ()),
)  # fmt: skip


def tenant_families(tenants: Sequence[str]) -> tuple[Metric, ...]:
    """Returns the metrics by tenant; `tenants` are the values that the label can have."""
    return (
        Metric(
            "tenant_given_tokens", _COUNTER,
            "What tenants with requests in line were given, in prompt tokens: output, paging and slots, too.",
            "Who is served while others wait?", every(tenant=tenants),
        ),
        Metric(
            "tenant_entitled_tokens", _COUNTER,
            "What the weights of these tenants entitled them to of what all active ones were given.",
            "Who is starved?", every(tenant=tenants),
        ),
        Metric(
            "tenant_least_served_ratio", _GAUGE,
            "The least of what a tenant in line was given lately, over what its weight entitles it to, of all tenants.",
            "Is anybody starved, named here or not?",
        ),
    )  # fmt: skip


class LeastServed:
    """The share that the worst served tenant was given of what it was entitled to, over the last minutes.

    Amounts count for half after HALF_LIFE_S, and tenants as long as they are in line. Bounded: of many tenants, those
    in line last are known.
    """

    HALF_LIFE_S, IN_LINE_S = 300.0, 60.0
    LEAST_TOKENS = 500.0  # to be entitled to, before a tenant counts
    MOST_TENANTS = 1024

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self._clock = clock
        self._tenants: OrderedDict[str, tuple[float, float, float]] = OrderedDict()  # given, entitled to, at what time

    def add(self, tenant: str, given: float, entitled: float) -> None:
        """Adds prompt tokens that a tenant in line was given, and that it was entitled to."""
        before_given, before_entitled = self._now(self._tenants.get(tenant, (0.0, 0.0, 0.0)))
        self._tenants[tenant] = before_given + given, before_entitled + entitled, self._clock()
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > self.MOST_TENANTS:
            self._tenants.popitem(last=False)

    def ratio(self) -> float:
        """Returns the least share that a tenant got of what it was entitled to; 1 where none was in line for long."""
        since_s = self._clock() - self.IN_LINE_S
        now = [self._now(each) for each in tuple(self._tenants.values()) if each[2] >= since_s]
        return min((given / entitled for given, entitled in now if entitled >= self.LEAST_TOKENS), default=1.0)

    def _now(self, tenant: tuple[float, float, float]) -> tuple[float, float]:
        given, entitled, at_s = tenant
        left = 0.5 ** ((self._clock() - at_s) / self.HALF_LIFE_S)
        return given * left, entitled * left


WORKER_FAMILIES = (*PAGING, *ENGINE, *TIERS, *tenant_families([OTHER_TENANTS]), MODEL)


class TierBytes(NamedTuple):
    """The bytes of one tier now: its budget, what is loaded or loading, what is pinned, and what is reserved."""

    capacity: int = 0
    resident: int = 0
    pinned: int = 0
    reserved: int = 0  # of the device tier


class EngineLoad(Protocol):
    """The part of the engine's status that is exported."""

    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_cached(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...


class TierState(Protocol):
    """The state of the tiers, read at every scrape in the scraper's thread."""

    def __call__(self) -> dict[str, TierBytes]: ...


class WorkerMetrics:
    """The metrics of one worker, in a registry of its own: one process may have several workers."""

    def __init__(self, tenants: Collection[str] = ()) -> None:
        """`tenants` are those that metrics name; all others are one."""
        self.registry = registry = CollectorRegistry()
        self._named_tenants = frozenset(tenants)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        by_tenant = tenant_families([*dict.fromkeys(tenants), OTHER_TENANTS])
        made = Instruments((*PAGING, *ENGINE, *by_tenant, MODEL), registry)
        self._given, self._entitled = made.counter("tenant_given_tokens"), made.counter("tenant_entitled_tokens")
        self._least_served = LeastServed()
        made.gauge("tenant_least_served_ratio").set_function(self._least_served.ratio)
        self._lookups = made.counter("lookups")
        self._transfer_bytes = made.counter("transfer_bytes")
        self._page_in = made.histogram("page_in_seconds")
        self._page_ins, self._paged_again = made.counter("page_ins"), made.counter("paged_again")
        self._evictions, self._prefetches = made.counter("evictions"), made.counter("prefetches")
        self._stalled = made.histogram("stall_seconds")
        self._quarantined, self._trace_events = made.counter("quarantined"), made.counter("trace_events")
        self._charged, self._uncharged = made.counter("charged_bytes"), made.counter("uncharged_bytes")
        self._received, self._refused = made.counter("requests_received"), made.counter("requests_refused")
        self._requests = made.counter("requests")
        self._prompt_tokens, self._completion_tokens = made.counter("prompt_tokens"), made.counter("completion_tokens")
        self._cached_tokens, self._prefix_hits = made.counter("cached_prompt_tokens"), made.counter("prefix_hits")
        self._queue = made.histogram("queue_seconds")
        self._first_token = made.histogram("time_to_first_token_seconds")
        self._output_token = made.histogram("time_per_output_token_seconds")
        self._step, self._forward = made.histogram("step_seconds"), made.histogram("forward_seconds")
        self._step_tokens = made.counter("step_tokens")
        self._pool = made.histogram("pool_experts")
        self._out_of_pool = made.histogram("out_of_pool_mass_ratio")
        self._recall = made.histogram("predicted_recall_ratio")
        self._widenings, self._drift_experts = made.counter("drift_widenings"), made.counter("drift_experts")
        self._drift_exact = made.counter("drift_exact")
        self._loop_lag = made.histogram("loop_lag_seconds")
        self._running, self._waiting = made.gauge("requests_running"), made.gauge("requests_waiting")
        self._kv_cached = made.gauge("kv_cached_bytes")
        self._kv_used, self._kv_capacity = made.gauge("kv_used_bytes"), made.gauge("kv_capacity_bytes")
        self._info = made.gauge("model")

    # --- what is set once ----------------------------------------------------------------------------------

    def describe_model(self, labels: dict[str, str]) -> None:
        """Sets version, model, plan and the like as labels of `expert_pager_model_info`; "" where one is not given.

        Raises ValueError for a label that the catalogue does not have.
        """
        self._info.labels(**(dict.fromkeys(MODEL.labels.names, "") | labels)).set(1)

    def watch_engine(self, status: Callable[[], EngineLoad], kv_block_bytes: int) -> None:
        """Exports `status()` at every scrape, because an idle engine takes no steps and reports nothing."""
        self._running.set_function(lambda: status().running)
        self._waiting.set_function(lambda: status().waiting)
        self._kv_used.set_function(lambda: status().kv_blocks_used * kv_block_bytes)
        self._kv_cached.set_function(lambda: status().kv_blocks_cached * kv_block_bytes)
        self._kv_capacity.set_function(lambda: status().kv_blocks_total * kv_block_bytes)

    def watch_tiers(self, state: TierState) -> None:
        """Exports `state()` at every scrape: one consistent snapshot instead of gauges set by hand."""
        self.registry.register(_TierCollector(state))

    # --- the token stream's loop -------------------------------------------------------------------------------------

    def loop_lag(self, seconds: float) -> None:
        self._loop_lag.observe(seconds)

    # --- the pager's observer ---------------------------------------------------------------------------------------

    def lookups(self, tier: str, result: str, count: int) -> None:
        if count:
            self._lookups.labels(tier, result).inc(count)

    def transferred(self, source: str, destination: str, nbytes: int, seconds: float) -> None:
        self._transfer_bytes.labels(source, destination).inc(nbytes)
        if destination == "device":
            self._page_in.labels(source).observe(seconds)

    def paged(self, cause: str, count: int, again: int) -> None:
        self._page_ins.labels(cause).inc(count)
        self._paged_again.labels(cause).inc(again)

    def prefetched(self, used: int, wasted: int) -> None:
        self._prefetches.labels("used").inc(used)
        self._prefetches.labels("wasted").inc(wasted)

    def evicted(self, cause: str, count: int) -> None:
        if count:
            self._evictions.labels(cause).inc(count)

    def stalled(self, seconds: float, cause: str) -> None:
        self._stalled.labels(cause).observe(seconds)

    def uncharged(self, source: str, nbytes: int) -> None:
        self._uncharged.labels(source).inc(nbytes)

    def quarantined(self, tier: str) -> None:
        self._quarantined.labels(tier).inc()

    def traced(self, written: int, lost: int) -> None:
        self._trace_events.labels("written").inc(written)
        self._trace_events.labels("lost").inc(lost)

    # --- the token server's observer --------------------------------------------------------------------------------

    def received(self) -> None:
        self._received.inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(reason if reason in REASONS else "internal").inc()

    # --- the engine's observer --------------------------------------------------------------------------------------

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def ended(self, outcome: str, account: Account, usage: Usage | None, token_s: float | None) -> None:
        self._prompt_tokens.inc(account.prompt_tokens)
        self._completion_tokens.inc(account.completion_tokens)
        self._cached_tokens.inc(account.cached_prompt_tokens)
        if account.cached_prompt_tokens:
            self._prefix_hits.inc()
        self._charged.labels("disk").inc(account.paging.bytes_from_disk)
        self._charged.labels("host").inc(account.paging.bytes_from_host)
        if token_s is not None:
            self._output_token.observe(token_s)
        if usage is not None:
            self._answered(usage)
        self._requests.labels(outcome if outcome in OUTCOMES else "internal").inc()

    def _answered(self, usage: Usage) -> None:
        if usage.pool is not None:
            layers = [len(layer) for layer in usage.pool.experts if layer]
            if layers:
                self._pool.observe(sum(layers) / len(layers))
            self._out_of_pool.observe(usage.out_of_pool_mass)
        if usage.predicted_recall is not None:
            self._recall.observe(usage.predicted_recall)
        if usage.drift is not None:
            self._widenings.inc(usage.drift.widenings)
            self._drift_experts.inc(usage.drift.experts_added)
            if usage.drift.exact_from is not None:
                self._drift_exact.inc()

    def shared_out(self, tenant: str, given: float, entitled: float) -> None:
        label = tenant if tenant in self._named_tenants else OTHER_TENANTS
        self._given.labels(label).inc(given)
        self._entitled.labels(label).inc(entitled)
        self._least_served.add(tenant, given, entitled)

    def stepped(self, seconds: float, forward_seconds: float, num_tokens: int) -> None:
        self._step.observe(seconds)
        self._forward.observe(forward_seconds)
        self._step_tokens.inc(num_tokens)


class _TierCollector(Collector):
    def __init__(self, state: TierState) -> None:
        self._state = state

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []  # not asked at registration: the state may cost a lock

    def collect(self) -> Iterator[GaugeMetricFamily]:
        state = self._state()
        for family in TIERS:
            exported = GaugeMetricFamily(family.exposed, family.meaning, labels=family.labels.names)
            for tier in family.labels.values("tier"):
                value = getattr(state.get(tier, TierBytes()), family.name.removesuffix("_bytes"))
                exported.add_metric([tier], value)
            yield exported
