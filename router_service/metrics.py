"""All metrics of a router and the object that records them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

from expert_pager.v1 import expert_pager_pb2 as pb
from prometheus_client import CollectorRegistry, Gauge, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily

from pager.cluster.placement import WorkerState, WorkerView
from pager.observe import metrics
from pager.observe.metrics import Instruments, Kind, Labels, Metric, every
from pager.predict.fitted import Codeword
from pager.predict.learning import Changes, Learned
from pager.types import Account, ExpertPool
from router_service.admission import Admission, TenantLabels
from router_service.status import CODES
from router_service.ui import Served

INFER = ("ModelInfer", "ModelStreamInfer")  # methods of the Open Inference Protocol
METHODS = (*(method.name for method in pb.DESCRIPTOR.services_by_name["ExpertPager"].methods), *INFER)
ANSWERING = ("Generate", "Complete", *INFER, "Completions", "ChatCompletions", "Responses", "Messages", "Playground")
"""The methods of all fronts that generate."""

STATUSES = ("OK", *sorted({code.name for code in CODES.values()}))
SOURCES = ("hint", "turn", "codebook", "own", "lexical", "trunk", "fitted", "prefill")  # sources of a predicted pool
PLACED = ("codeword", "fixed", "predicted")  # the origin of the pool by which a request was placed
PASSES = ("lexical", "trunk", "fitted", "prefill")
REJECTIONS = ("OVERLOADED", "TENANT_OVERLOADED", "QUOTA_EXCEEDED", "SLOTS_EXHAUSTED", "NOT_READY", "DEADLINE_EXCEEDED")
DROPS = ("no_message", "unknown_method", "unseen")
WORKER_STATES = ("starting", "ready", "draining", "hung", "dead")
REDIS_REASONS = ("unreachable", "timeout", "readonly", "full", "busy", "loading", "moved", "other")
"""Why Redis failed, as `router_service.redis` tells failures apart."""

RAY_DAEMONS = ("gcs_server", "raylet", "driver")  # the last is the router's own process, which is connected to Ray
LEARNED = "learned"  # in the place of the names of codewords that traffic makes, which nobody knows beforehand
CODEBOOK_CHANGES = tuple(each.name for each in fields(Changes))
INFO_LABELS = ("version", "model", "fingerprint")

_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM


def router_families(tenants: Sequence[str], codewords: Sequence[str] = ()) -> tuple[Metric, ...]:
    """Returns the router's metrics; `tenants` and `codewords` are the values of the labels of those names."""
    answers = _answers(every(tenant=tenants), tenants)
    return (*_calls(), *answers, *_pools(), *_codebook(codewords), *_surroundings())


def _calls() -> tuple[Metric, ...]:
    return (
        Metric(
            "router_calls", _COUNTER, "Calls that arrived, by method.",
            "Which methods are called?", every(method=METHODS),
        ),
        Metric(
            "router_requests", _COUNTER, "Calls that ended, by method and gRPC status code.",
            "Which calls fail, and how?", every(method=METHODS, code=STATUSES),
        ),
        Metric("router_requests_in_flight", _GAUGE, "Admitted requests that have not ended.", "How busy is it?"),
        Metric(
            "router_tokens_in_flight", _GAUGE, "Prompt plus max_tokens of the admitted requests.",
            "How much work is admitted?",
        ),
        Metric(
            "router_in_flight_bytes", _GAUGE, "Bytes of the messages of admitted requests.",
            "How much memory do requests take?",
        ),
        Metric(
            "router_admission_rejections", _COUNTER,
            "Calls refused before any work, by a router or a worker, by reason.",
            "What is refused, and why?", every(reason=REJECTIONS),
        ),
        Metric(
            "router_dropped_calls", _COUNTER,
            "Calls that reached no method: without a message that gRPC can receive (too large, or in an unknown "
            "compression), of an unknown method, or ended by gRPC before the router saw them.",
            "Does gRPC refuse calls that no other metric counts?", every(reason=DROPS),
        ),
        Metric(
            "router_loop_lag_seconds", _HISTOGRAM, "Delay with which a task of the event loop woke up.",
            "Does something block all calls?", buckets=metrics.LOOP_LAG_S,
        ),
    )  # fmt: skip


def _answers(by_tenant: Labels, tenants: Sequence[str]) -> tuple[Metric, ...]:
    return (
        Metric(
            "router_answers", _COUNTER, "Calls of Generate that ended, by gRPC status code.",
            "Which tenants get answers, and which get errors?", every(tenant=tenants, code=STATUSES),
        ),
        Metric(
            "router_time_to_first_token_seconds", _HISTOGRAM, "Time from a call's arrival to its first token.",
            "How long do users wait?", by_tenant, metrics.FIRST_TOKEN_S,
        ),
        Metric(
            "router_time_per_output_token_seconds", _HISTOGRAM, "Mean gap between the tokens of an answer.",
            "How fast are tokens delivered?", by_tenant, metrics.OUTPUT_TOKEN_S,
        ),
        Metric(
            "router_queue_seconds", _HISTOGRAM,
            "Time that finished requests waited in their worker's line until they were admitted.",
            "Whose requests wait for memory?", by_tenant, metrics.FIRST_TOKEN_S,
        ),
        Metric(
            "router_prompt_tokens", _COUNTER, "Prompt tokens that workers ran or had cached, also for failed answers.",
            "Which tenants send how much?", by_tenant,
        ),
        Metric(
            "router_generated_tokens", _COUNTER, "Tokens that workers have generated, also for failed answers.",
            "Which tenants get how much?", by_tenant,
        ),
        Metric(
            "router_paged_bytes", _COUNTER,
            "Bytes of experts that workers have read for requests, also for failed ones, by source.",
            "Whose requests cause paging?", every(tenant=tenants, source=("disk", "host")),
        ),
    )  # fmt: skip


def _pools() -> tuple[Metric, ...]:
    escalations = tuple((was, is_) for at, was in enumerate(PASSES) for is_ in PASSES[at + 1 :])
    return (
        Metric(
            "router_route_seconds", _HISTOGRAM, "Time to predict a pool, by source.",
            "What does prediction cost?", every(source=SOURCES), metrics.ROUTE_S,
        ),
        Metric(
            "router_recall_ratio", _HISTOGRAM, "Share of the prefill's pool that had been predicted, by source.",
            "How good is each source?", every(source=SOURCES), metrics.RATIO,
        ),
        Metric(
            "router_predicted_experts", _COUNTER,
            "Experts of predicted and actual pools: in both, in the actual one alone, in the predicted one alone.",
            "How far are predicted pools from actual ones, in experts?", every(result=("right", "missing", "surplus")),
        ),
        Metric(
            "router_escalations", _COUNTER, "Prompts passed on because the expected recall of a predictor was too low.",
            "Is the cheap predictor good enough?", Labels(("from", "to"), escalations),
        ),
        Metric(
            "router_hint_lookups", _COUNTER, "Lookups of an observed pool by prompt prefix.",
            "Do prompts repeat?", every(result=("hit", "miss")),
        ),
    )  # fmt: skip


def _codebook(codewords: Sequence[str]) -> tuple[Metric, ...]:
    return (
        Metric(
            "router_codeword_requests", _COUNTER,
            "Requests that got a codeword's pool, by codeword; those learned from traffic together.",
            "Which codewords are in use, and how many requests share each?",
            every(codeword=(*codewords, LEARNED) if codewords else ()),
        ),
        Metric(
            "router_codebook_fallbacks", _COUNTER,
            "Requests that no codeword covers, which get a pool of their own.",
            "Does the codebook know the traffic?",
        ),
        Metric(
            "router_codebook_version", _GAUGE, "How often what was learned from traffic has been revised.",
            "Does the codebook learn, and have all routers the same one?",
        ),
        Metric(
            "router_learned_codewords", _GAUGE, "Codewords in force that were learned from traffic.",
            "How much of the traffic is unlike the documents that were fitted to?",
        ),
        Metric(
            "router_codebook_changes", _COUNTER, "Learned codewords that were born, split, merged or died, by change.",
            "Does the codebook settle?", every(change=CODEBOOK_CHANGES),
        ),
        Metric(
            "router_codebook_coverage_ratio", _HISTOGRAM,
            "Score mass inside the best codeword's pool, divided by that inside the prompt's own pool.",
            "How well do codewords suit the prompts?", buckets=metrics.COVERAGE,
        ),
        Metric(
            "router_placements", _COUNTER,
            "Requests placed, by the origin of their pool and whether the worker held all of it.",
            "How often is a codeword placed where its pool is?",
            every(source=PLACED, result=("hit", "miss")),
        ),
    )  # fmt: skip


def _surroundings() -> tuple[Metric, ...]:
    return (
        Metric(
            "router_sent", _COUNTER, "Requests sent to workers; a request that is placed again counts again.",
            "How many requests does this router send?",
        ),
        Metric(
            "router_replacements", _COUNTER, "Requests placed again because their worker was lost.",
            "What do lost workers cost?",
        ),
        Metric(
            "router_redis_degraded", _GAUGE, "1 while Redis is configured but does not answer or accepts no writes.",
            "Are hints and named pools shared?",
        ),
        Metric(
            "router_redis_failures", _COUNTER, "Commands that Redis failed or refused, by reason.",
            "What is wrong with Redis?", every(reason=REDIS_REASONS),
        ),
        Metric(
            "router_ray_lost", _COUNTER, "Daemons that the embedded Ray has lost; the router drains and exits then.",
            "Why does this router restart?", every(daemon=RAY_DAEMONS),
        ),
        Metric(
            "router_workers", _GAUGE, "Workers by state.",
            "How many workers can answer?", every(state=WORKER_STATES),
        ),
        Metric(
            "router_worker_restarts", _COUNTER, "Restarts of a worker, as this router saw them.",
            "Does a worker keep failing?",
        ),
        Metric(
            "router", Kind.INFO, "The model that this router serves, and its version.",
            "Which version and model run here?", Labels(INFO_LABELS, ()),
        ),
    )  # fmt: skip


GATEWAY = {
    "vllm:num_requests_waiting": "Requests in the queues of ready workers.",
    "vllm:num_requests_running": "Requests that ready workers run.",
    "vllm:kv_cache_usage_perc": "Share of the KV memory that is reserved, the mean of the ready workers.",
}
"""What endpoint pickers of the Kubernetes gateway inference extension read, under the names that they expect."""


ADAPTERS = "vllm:lora_requests_info"


class Adapters:
    """Which named pools requests wait for or run with, as endpoint pickers read which adapters a server has loaded.

    Owned by the event loop; scraped by other threads. Nothing is exported until `show`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.num_slots = 0  # of all workers that are ready
        self._registry = registry
        self._model, self._slots_a_pool = "", 1
        self._live: dict[object, tuple[str, Callable[[], bool]]] = {}

    def show(self, model: str, slots_a_pool: int) -> None:
        """Exports the names from now on; called once."""
        self._model, self._slots_a_pool = model, max(1, slots_a_pool)
        self._registry.register(self)

    @contextmanager
    def following(self, name: str, runs: Callable[[], bool]) -> Iterator[None]:
        """Counts a request with this pool as in flight during the block; `runs` tells whether it is being served.

        `name` may be empty.
        """
        key = object()
        if name:
            self._live[key] = (name, runs)
        try:
            yield
        finally:
            self._live.pop(key, None)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yields the one sample that there is now: names are its labels, and the time of the scrape its value."""
        live = tuple(self._live.values())
        running = sorted({f"{self._model}:{name}" for name, runs in live if runs()})
        waiting = sorted({f"{self._model}:{name}" for name, runs in live if not runs()})
        family = GaugeMetricFamily(
            ADAPTERS,
            "Named pools that requests of this router run with and wait for, as adapters.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        most = self.num_slots // self._slots_a_pool
        family.add_metric((str(most), ",".join(running), ",".join(waiting)), time.time())
        yield family


class RouterMetrics:
    """The metrics of one router, in a registry of its own, since one process may have several routers."""

    def __init__(self, tenants: TenantLabels | None = None, codewords: Sequence[str] = ()) -> None:
        self.registry = registry = CollectorRegistry()
        self.served = Served()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._tenants, self._codewords = tenants or TenantLabels(), frozenset(codewords)
        made = Instruments(router_families(self._tenants.values, codewords), registry)
        self.requests, self._answers = made.counter("router_requests"), made.counter("router_answers")
        self._calls, self.sent = made.counter("router_calls"), made.counter("router_sent")
        self._requests_in_flight = made.gauge("router_requests_in_flight")
        self._tokens_in_flight = made.gauge("router_tokens_in_flight")
        self._bytes_in_flight = made.gauge("router_in_flight_bytes")
        self._dropped = made.counter("router_dropped_calls")
        self._loop_lag = made.histogram("router_loop_lag_seconds")
        self._rejections = made.counter("router_admission_rejections")
        self._first_token = made.histogram("router_time_to_first_token_seconds")
        self._output_token = made.histogram("router_time_per_output_token_seconds")
        self._queue = made.histogram("router_queue_seconds")
        self._prompt_tokens = made.counter("router_prompt_tokens")
        self._generated_tokens = made.counter("router_generated_tokens")
        self._paged_bytes = made.counter("router_paged_bytes")
        self.route_seconds, self.recall = made.histogram("router_route_seconds"), made.histogram("router_recall_ratio")
        self._predicted_experts = made.counter("router_predicted_experts")
        self._escalations, self.hint_lookups = made.counter("router_escalations"), made.counter("router_hint_lookups")
        self._codeword_requests = made.counter("router_codeword_requests")
        self._fallbacks = made.counter("router_codebook_fallbacks")
        self._coverage = made.histogram("router_codebook_coverage_ratio")
        self._placements = made.counter("router_placements")
        self._codebook_version = made.gauge("router_codebook_version")
        self._learned_codewords = made.gauge("router_learned_codewords")
        self._codebook_changes = made.counter("router_codebook_changes")
        self.replacements = made.counter("router_replacements")
        self.redis_degraded, self.workers = made.gauge("router_redis_degraded"), made.gauge("router_workers")
        self.ray_lost = made.counter("router_ray_lost")
        self.redis_failures = made.counter("router_redis_failures")
        self._worker_restarts = made.counter("router_worker_restarts")
        self._restarts_seen: dict[str, int] = {}
        self._info = made.gauge("router")
        self.adapters = Adapters(registry)
        self._gateway = [Gauge(name, meaning, ["model_name"], registry=registry) for name, meaning in GATEWAY.items()]

    def describe(self, **labels: str) -> None:
        """Sets what is served as the labels of `expert_pager_router_info`."""
        self._info.labels(*(labels[name] for name in INFO_LABELS)).set(1)

    def saw(self, model: str, workers: Sequence[WorkerView]) -> None:
        """Sets the metrics that depend on the workers, which the router has just read."""
        states = [worker.state for worker in workers]
        for state in WorkerState:
            self.workers.labels(state).set(states.count(state))
        for worker in workers:
            self.restarted(worker.id, worker.num_restarts)
        ready = [worker for worker in workers if worker.state == WorkerState.READY]
        self.adapters.num_slots = sum(worker.num_slots for worker in ready)
        shares = [worker.kv_share for worker in ready]
        values = (sum(each.waiting for each in ready), sum(each.running for each in ready))
        for gauge, value in zip(self._gateway, (*values, sum(shares) / max(1, len(shares))), strict=True):
            gauge.labels(model).set(value)

    def watch_admission(self, admission: Admission) -> None:
        """Exports the requests in flight at every scrape."""
        self._requests_in_flight.set_function(lambda: admission.num_requests)
        self._tokens_in_flight.set_function(lambda: admission.num_tokens)
        self._bytes_in_flight.set_function(lambda: admission.num_bytes)

    def escalated(self, was: str, is_: str) -> None:
        """Counts a prompt that was passed on to a better source."""
        self._escalations.labels(was, is_).inc()

    def shared(self, codeword: Codeword) -> None:
        """Records what the codebook found for a request."""
        self._coverage.observe(codeword.coverage)
        if codeword.is_covered:
            self.got_pool_of(codeword.name)
        else:
            self._fallbacks.inc()

    def got_pool_of(self, codeword: str) -> None:
        """Counts a request that got the pool of a codeword, by its name; those that traffic has made together."""
        self._codeword_requests.labels(codeword if codeword in self._codewords else LEARNED).inc()

    def placed(self, source: str, missing_bytes: int) -> None:
        """Counts a request that was placed; `source` is one of PLACED."""
        self._placements.labels(source, "miss" if missing_bytes else "hit").inc()

    def revised(self, learned: Learned) -> None:
        """Records a version of what was learned from traffic, which the router has taken over."""
        self._codebook_version.set(learned.version)
        self._learned_codewords.set(len(learned.codewords))
        for change in CODEBOOK_CHANGES:
            self._codebook_changes.labels(change).inc(getattr(learned.changes, change))

    def began(self, method: str) -> None:
        """Counts a call that arrived."""
        self._calls.labels(method).inc()

    def ended(self, method: str, code: str, tenant: str) -> None:
        """Counts a call that ended with this gRPC status."""
        self.requests.labels(method, code).inc()
        if method in ANSWERING:
            self._answers.labels(self._tenants.of(tenant), code).inc()
            self.served.ended(code)

    def refused(self, reason: str) -> None:
        """Counts a call that was refused before any work; one with an illegal request counts as a failure."""
        if reason in REJECTIONS:
            self._rejections.labels(reason).inc()

    def dropped(self, reason: str, count: int = 1) -> None:
        """Counts calls that reached no method."""
        self._dropped.labels(reason).inc(count)

    def loop_lag(self, seconds: float) -> None:
        self._loop_lag.observe(seconds)

    def first_token(self, tenant: str, seconds: float) -> None:
        self._first_token.labels(self._tenants.of(tenant)).observe(seconds)
        self.served.waits_s.append(seconds)

    def output_token(self, tenant: str, seconds: float) -> None:
        """Records the mean gap between an answer's tokens; called for each of several answers."""
        self._output_token.labels(self._tenants.of(tenant)).observe(seconds)

    def settled(self, tenant: str, account: Account) -> None:
        """Records what a request has used at a worker, when it ends there."""
        label = self._tenants.of(tenant)
        if account.queue_s is not None:
            self._queue.labels(label).observe(account.queue_s)
        self._prompt_tokens.labels(label).inc(account.prompt_tokens)
        self._generated_tokens.labels(label).inc(account.completion_tokens)
        self._paged_bytes.labels(label, "disk").inc(account.paging.bytes_from_disk)
        self._paged_bytes.labels(label, "host").inc(account.paging.bytes_from_host)

    def predicted(self, predicted: ExpertPool, actual: ExpertPool) -> None:
        """Records how the prediction compares with the prefill's choice."""
        layers = list(zip(map(set, predicted.experts), map(set, actual.experts), strict=True))
        self._predicted_experts.labels("right").inc(sum(len(guess & chosen) for guess, chosen in layers))
        self._predicted_experts.labels("missing").inc(sum(len(chosen - guess) for guess, chosen in layers))
        self._predicted_experts.labels("surplus").inc(sum(len(guess - chosen) for guess, chosen in layers))

    def restarted(self, worker: str, num_restarts: int) -> None:
        """Sets the number of times that a worker has been restarted until now."""
        self._worker_restarts.inc(max(0, num_restarts - self._restarts_seen.get(worker, 0)))
        self._restarts_seen[worker] = num_restarts
