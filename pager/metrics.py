"""What a worker measures, under which names. The only module below the router that imports prometheus_client.

`WorkerMetrics` has the methods of both observers, the pager's and the engine's: they report facts, this counts them.
No request, prompt, tenant or expert id is ever a label, and every series exists from the start.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import NamedTuple, Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pager.errors import ConfigError, PagerError, PortInUse
from pager.types import DriftReport, ExpertPool, FinishReason

PREFIX = "expert_pager"
TIERS = ("disk", "host", "device")
CACHE_TIERS = ("host", "device")
LOOKUP_RESULTS = ("hit", "hit_in_flight", "miss")
CAUSES = ("lease", "demand", "prefetch")
TRANSFERS = (("disk", "host"), ("disk", "device"), ("host", "device"))

FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
OUTPUT_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
PAGE_IN_BUCKETS_S = (
    5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5
)  # fmt: skip
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)
STALL_BUCKETS_S = (1e-4, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
POOL_BUCKETS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)


class TierBytes(NamedTuple):
    """One tier now: what its budget is, what is loaded or loading, what of it is in use, what is promised.

    The host tier belongs to all workers of a node: each reports the same bytes, so take the maximum, not the sum.
    """

    capacity: int = 0
    resident: int = 0
    pinned: int | None = None  # None: this worker does not know
    reserved: int | None = None


class EngineLoad(Protocol):
    """What is exported of the engine's status."""

    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...


class TierState(Protocol):
    """Read at every scrape, in the scraper's thread."""

    def __call__(self) -> dict[str, TierBytes]: ...


class WorkerMetrics:
    """Owns a registry of its own, so that two workers in one process do not meet."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._add_pager_metrics(registry)
        self._add_engine_metrics(registry)
        self._info = Info(f"{PREFIX}_model", "The model that this worker serves.", registry=registry)

    def _add_pager_metrics(self, registry: CollectorRegistry) -> None:
        counter, histogram = _families(registry)
        self._lookups = counter("lookups", "Experts asked for, by tier and what was met there.", "tier", "result")
        self._transfer_bytes = counter("transfer_bytes", "Bytes of experts moved.", "source", "destination")
        self._page_in = histogram("page_in_seconds", "One expert's way into a slot.", PAGE_IN_BUCKETS_S, "source")
        self._stalled = histogram("stall_seconds", "Waits of a forward for experts.", STALL_BUCKETS_S, "cause")
        self._evictions = counter("evictions", "Experts evicted, by what needed the slot.", "cause")
        self._quarantined = counter("quarantined", "Reads that failed or had a wrong checksum.", "tier")
        for tier in CACHE_TIERS:
            for result in LOOKUP_RESULTS:
                self._lookups.labels(tier, result)
        for source, destination in TRANSFERS:
            self._transfer_bytes.labels(source, destination)
        for source in ("disk", "host"):
            self._page_in.labels(source)
        for cause in CAUSES:
            self._stalled.labels(cause)
            self._evictions.labels(cause)
        for tier in ("disk", "host"):
            self._quarantined.labels(tier)

    def _add_engine_metrics(self, registry: CollectorRegistry) -> None:
        counter, histogram = _families(registry)
        self._requests = counter("requests", "Requests that ended, by finish reason or error.", "outcome")
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self._completion_tokens = counter("completion_tokens", "Generated tokens of requests that ended.")
        self._queue = histogram("queue_seconds", "Wait for KV and slots before admission.", FIRST_TOKEN_BUCKETS_S)
        self._first_token = histogram(
            "time_to_first_token_seconds", "From submission to the first token.", FIRST_TOKEN_BUCKETS_S
        )
        self._output_token = histogram(
            "time_per_output_token_seconds", "Mean gap between an answer's tokens.", OUTPUT_TOKEN_BUCKETS_S
        )
        self._step = histogram("step_seconds", "One engine step.", STEP_BUCKETS_S)
        self._forward = histogram("forward_seconds", "The model's forwards in one step.", STEP_BUCKETS_S)
        self._step_tokens = counter("step_tokens", "Tokens that the model's forwards have run.")
        self._pool = histogram("pool_experts", "Routed experts a layer in an answer's pool, mean.", POOL_BUCKETS)
        self._out_of_pool = histogram(
            "out_of_pool_mass_ratio", "Router mass outside the pool while decoding.", RATIO_BUCKETS
        )
        self._widenings = counter("drift_widenings", "Times that a finished answer's pool was widened.")
        self._drift_experts = counter("drift_experts", "Experts that were added to pools by widening them.")
        self._drift_exact = counter("drift_exact", "Answers that went on with all experts.")
        self._recall = histogram(
            "predicted_recall_ratio", "Share of the prefill's pool that was predicted.", RATIO_BUCKETS
        )
        self._running = Gauge(f"{PREFIX}_requests_running", "Requests that hold KV and slots.", registry=registry)
        self._waiting = Gauge(f"{PREFIX}_requests_waiting", "Requests in line.", registry=registry)
        self._kv_used = Gauge(f"{PREFIX}_kv_used_bytes", "KV cache reserved by running requests.", registry=registry)
        self._kv_capacity = Gauge(f"{PREFIX}_kv_capacity_bytes", "KV cache as planned.", registry=registry)

    # --- what the worker says once ----------------------------------------------------------------------------------

    def describe_model(self, labels: dict[str, str]) -> None:
        """Version, model, dtype and the like, as labels of `expert_pager_model_info`."""
        self._info.info(labels)

    def watch_engine(self, status: Callable[[], EngineLoad], kv_block_bytes: int) -> None:
        """Exports `status()` at every scrape: an engine that idles takes no steps, and tells nobody."""
        self._running.set_function(lambda: status().running)
        self._waiting.set_function(lambda: status().waiting)
        self._kv_used.set_function(lambda: status().kv_blocks_used * kv_block_bytes)
        self._kv_capacity.set_function(lambda: status().kv_blocks_total * kv_block_bytes)

    def watch_tiers(self, state: TierState) -> None:
        """Exports `state()` at every scrape: one consistent snapshot instead of gauges set by hand."""
        self.registry.register(_TierCollector(state))

    # --- the pager's observer ---------------------------------------------------------------------------------------

    def lookups(self, tier: str, result: str, count: int) -> None:
        if count:
            self._lookups.labels(tier, result).inc(count)

    def transferred(self, source: str, destination: str, nbytes: int, seconds: float) -> None:
        self._transfer_bytes.labels(source, destination).inc(nbytes)
        if destination == "device":
            self._page_in.labels(source).observe(seconds)

    def evicted(self, cause: str, count: int) -> None:
        if count:
            self._evictions.labels(cause).inc(count)

    def stalled(self, seconds: float, cause: str) -> None:
        self._stalled.labels(cause).observe(seconds)

    def quarantined(self, tier: str) -> None:
        self._quarantined.labels(tier).inc()

    # --- the engine's observer --------------------------------------------------------------------------------------

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def output_token(self, seconds: float) -> None:
        self._output_token.observe(seconds)

    def tokens(self, prompt: int, completion: int) -> None:
        self._prompt_tokens.inc(prompt)
        self._completion_tokens.inc(completion)

    def finished(self, outcome: str) -> None:
        self._requests.labels(outcome if outcome in OUTCOMES else "internal").inc()

    def load(self, running: int, waiting: int, kv_blocks_used: int) -> None:
        """Nothing: `watch_engine` asks for it."""

    def pool(self, pool: ExpertPool, out_of_pool_mass: float) -> None:
        layers = [len(layer) for layer in pool.experts if layer]
        if layers:
            self._pool.observe(sum(layers) / len(layers))
        self._out_of_pool.observe(out_of_pool_mass)

    def drift(self, report: DriftReport) -> None:
        self._widenings.inc(report.widenings)
        self._drift_experts.inc(report.experts_added)
        if report.exact_from is not None:
            self._drift_exact.inc()

    def predicted(self, recall: float) -> None:
        self._recall.observe(recall)

    def stepped(self, seconds: float, forward_seconds: float, num_tokens: int) -> None:
        self._step.observe(seconds)
        self._forward.observe(forward_seconds)
        self._step_tokens.inc(num_tokens)


class MetricsServer:
    """`/metrics` of one registry over HTTP, in a thread of its own."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int = 0) -> None:
        """Port 0 takes a free one. Raises PortInUse, ConfigError."""
        self._server: WSGIServer
        self._thread: Thread
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(f"metrics port {port} on {host} is in use; choose another, or 0 for any") from None
            raise ConfigError(f"metrics can not be served on {host}:{port}: {error.strerror or error}") from None
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _TierCollector(Collector):
    def __init__(self, state: TierState) -> None:
        self._state = state

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []  # not asked at registration: the state may cost a lock

    def collect(self) -> Iterator[GaugeMetricFamily]:
        state = self._state()
        texts = {
            "capacity": "The tier's budget.",
            "resident": "Loaded or loading.",
            "pinned": "Of the resident bytes, what can not be evicted now.",
            "reserved": "Promised to requests and not bound yet.",
        }
        for name, text in texts.items():
            family = GaugeMetricFamily(f"{PREFIX}_{name}_bytes", text, labels=["tier"])
            for tier in CACHE_TIERS:
                value = getattr(state.get(tier, TierBytes()), name)
                if value is not None:
                    family.add_metric([tier], value)
            yield family


def _families(registry: CollectorRegistry) -> tuple[Callable[..., Counter], Callable[..., Histogram]]:
    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=registry)

    def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=buckets, registry=registry)

    return counter, histogram


def _reasons(kind: type[PagerError]) -> set[str]:
    return {kind.reason.lower()}.union(*(_reasons(child) for child in kind.__subclasses__()))


OUTCOMES: frozenset[str] = frozenset(reason.value for reason in FinishReason) | _reasons(PagerError)
