"""What a worker measures.

`WorkerMetrics` has the methods of all observers, the pager's, the engine's and the token server's: they report facts,
this counts them.
No request, prompt, tenant or expert id is ever a label, and every series exists from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pager.metrics.families import Instruments
from pager.metrics.worker_families import ENGINE, MODEL, OUTCOMES, PAGING, REASONS, TIERS
from pager.types import Account, DriftReport, ExpertPool


class TierBytes(NamedTuple):
    """One tier now: what its budget is, what is loaded or loading, what of it is in use, what is promised."""

    capacity: int = 0
    resident: int = 0
    pinned: int = 0
    reserved: int = 0  # of the device tier


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
        made = Instruments((*PAGING, *ENGINE, MODEL), registry)
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
        self._kv_used, self._kv_capacity = made.gauge("kv_used_bytes"), made.gauge("kv_capacity_bytes")
        self._info = made.gauge("model")

    # --- what the worker says once ----------------------------------------------------------------------------------

    def describe_model(self, labels: dict[str, str]) -> None:
        """Version, model, plan and the like, as labels of `expert_pager_model_info`; "" where one is not given.

        Raises ValueError for a label that the catalogue does not have.
        """
        self._info.labels(**(dict.fromkeys(MODEL.labels.names, "") | labels)).set(1)

    def watch_engine(self, status: Callable[[], EngineLoad], kv_block_bytes: int) -> None:
        """Exports `status()` at every scrape: an engine that idles takes no steps, and tells nobody."""
        self._running.set_function(lambda: status().running)
        self._waiting.set_function(lambda: status().waiting)
        self._kv_used.set_function(lambda: status().kv_blocks_used * kv_block_bytes)
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

    def output_token(self, seconds: float) -> None:
        self._output_token.observe(seconds)

    def used(self, account: Account) -> None:
        self._prompt_tokens.inc(account.prompt_tokens)
        self._completion_tokens.inc(account.completion_tokens)
        self._charged.labels("disk").inc(account.bytes_from_disk)
        self._charged.labels("host").inc(account.bytes_from_host)

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
