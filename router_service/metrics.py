"""What the router measures. The only module of the router that imports prometheus_client.

No request, prompt or expert id is ever a label, and of tenants only those that the configuration names.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from pager.metrics.families import Instruments
from pager.types import Account, ExpertPool
from router_service.metric_families import INFO_LABELS, REJECTIONS, router_families
from router_service.tenants import TenantLabels


class RouterMetrics:
    """Owns a registry of its own, so that two routers in one process do not meet."""

    def __init__(self, tenants: TenantLabels | None = None) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._tenants = tenants or TenantLabels()
        made = Instruments(router_families(self._tenants.values), registry)
        self.requests, self._answers = made.counter("router_requests"), made.counter("router_answers")
        self._calls, self.sent = made.counter("router_calls"), made.counter("router_sent")
        self.requests_in_flight = made.gauge("router_requests_in_flight")
        self.tokens_in_flight = made.gauge("router_tokens_in_flight")
        self.bytes_in_flight = made.gauge("router_in_flight_bytes")
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
        self.escalations, self.hint_lookups = made.counter("router_escalations"), made.counter("router_hint_lookups")
        self.replacements = made.counter("router_replacements")
        self.redis_degraded, self.workers = made.gauge("router_redis_degraded"), made.gauge("router_workers")
        self.ray_lost = made.counter("router_ray_lost")
        self.redis_failures = made.counter("router_redis_failures")
        self._worker_restarts = made.counter("router_worker_restarts")
        self._restarts_seen: dict[str, int] = {}
        self._info = made.gauge("router")

    def describe(self, **labels: str) -> None:
        """Version, model and default pool, as labels of `expert_pager_router_info`."""
        self._info.labels(*(labels[name] for name in INFO_LABELS)).set(1)

    def began(self, method: str) -> None:
        """A call arrived."""
        self._calls.labels(method).inc()

    def ended(self, method: str, code: str, tenant: str) -> None:
        """A call ended with this gRPC status."""
        self.requests.labels(method, code).inc()
        if method == "Generate":
            self._answers.labels(self._tenants.of(tenant), code).inc()

    def refused(self, reason: str) -> None:
        """A call was turned away before anything was done for it; for what it asks wrongly it is a failure instead."""
        if reason in REJECTIONS:
            self._rejections.labels(reason).inc()

    def dropped(self, reason: str, count: int = 1) -> None:
        """Calls that came to no method."""
        self._dropped.labels(reason).inc(count)

    def loop_lag(self, seconds: float) -> None:
        self._loop_lag.observe(seconds)

    def first_token(self, tenant: str, seconds: float) -> None:
        self._first_token.labels(self._tenants.of(tenant)).observe(seconds)

    def output_token(self, tenant: str, seconds: float) -> None:
        """The mean gap between the tokens of an answer, once an answer of several."""
        self._output_token.labels(self._tenants.of(tenant)).observe(seconds)

    def settled(self, tenant: str, account: Account) -> None:
        """What a request has used at a worker that is done with it."""
        label = self._tenants.of(tenant)
        if account.queue_s is not None:
            self._queue.labels(label).observe(account.queue_s)
        self._prompt_tokens.labels(label).inc(account.prompt_tokens)
        self._generated_tokens.labels(label).inc(account.completion_tokens)
        self._paged_bytes.labels(label, "disk").inc(account.bytes_from_disk)
        self._paged_bytes.labels(label, "host").inc(account.bytes_from_host)

    def predicted(self, predicted: ExpertPool, actual: ExpertPool) -> None:
        """What was predicted, and what the prefill then chose."""
        layers = list(zip(map(set, predicted.experts), map(set, actual.experts), strict=True))
        self._predicted_experts.labels("right").inc(sum(len(guess & chosen) for guess, chosen in layers))
        self._predicted_experts.labels("missing").inc(sum(len(chosen - guess) for guess, chosen in layers))
        self._predicted_experts.labels("surplus").inc(sum(len(guess - chosen) for guess, chosen in layers))

    def restarted(self, worker: str, num_restarts: int) -> None:
        """How often a worker has been started again until now."""
        self._worker_restarts.inc(max(0, num_restarts - self._restarts_seen.get(worker, 0)))
        self._restarts_seen[worker] = num_restarts
