"""The worker's metrics: names, labels and values as a scraper reads them over HTTP."""

import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pager.errors import PortInUse
from pager.metrics import OUTCOMES, MetricsServer, TierBytes, WorkerMetrics
from pager.types import DriftReport, ExpertPool


@pytest.fixture
def metrics() -> WorkerMetrics:
    return WorkerMetrics()


@pytest.fixture
def server(metrics: WorkerMetrics) -> Iterator[MetricsServer]:
    server = MetricsServer(metrics.registry, "127.0.0.1")
    yield server
    server.close()


def scrape(server: MetricsServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://{server.address}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_facts_become_series(metrics: WorkerMetrics, server: MetricsServer) -> None:
    described = {"version": "1", "model": "m", "dtype": "float32", "device": "cpu", "fingerprint": "f", "plan": "p"}
    metrics.describe_model(described)
    metrics.watch_engine(lambda: SimpleNamespace(running=3, waiting=4, kv_blocks_used=2, kv_blocks_total=7), 1000)
    metrics.watch_tiers(lambda: {"device": TierBytes(capacity=400, resident=300, pinned=200, reserved=100)})
    metrics.lookups("device", "hit", 5)
    metrics.transferred("disk", "device", 4096, 0.25)
    metrics.transferred("disk", "host", 100, 0.5)
    metrics.evicted("demand", 2)
    metrics.paged("lease", 7, again=3)
    metrics.prefetched(used=5, wasted=2)
    metrics.stalled(0.5, "lease")
    metrics.quarantined("disk")
    metrics.pool(ExpertPool(((1, 2, 3, 4), (), (5, 6))), 0.125)
    metrics.drift(DriftReport(0.7, widenings=2, experts_added=30))
    metrics.drift(DriftReport(0.7, exact_from=9))
    metrics.tokens(10, 20)
    metrics.finished("stop")
    found = scrape(server)

    def value(name: str, **labels: str) -> float:
        return found["expert_pager_" + name, tuple(sorted(labels.items()))]

    assert value("lookups_total", tier="device", result="hit") == 5
    assert value("transfer_bytes_total", source="disk", destination="device") == 4096
    assert value("page_in_seconds_sum", source="disk") == 0.25
    assert value("evictions_total", cause="demand") == 2
    assert value("stall_seconds_sum", cause="lease") == 0.5
    assert value("quarantined_total", tier="disk") == 1
    assert (value("requests_running"), value("requests_waiting")) == (3, 4)
    assert (value("kv_used_bytes"), value("kv_capacity_bytes")) == (2000, 7000)
    assert (value("pool_experts_sum"), value("pool_experts_count")) == (3, 1)
    assert value("out_of_pool_mass_ratio_sum") == 0.125
    assert (value("drift_widenings_total"), value("drift_experts_total"), value("drift_exact_total")) == (2, 30, 1)
    assert (value("prompt_tokens_total"), value("completion_tokens_total")) == (10, 20)
    assert value("requests_total", outcome="stop") == 1
    assert value("model_info", **described) == 1
    assert (value("page_ins_total", cause="lease"), value("paged_again_total", cause="lease")) == (7, 3)
    assert (value("prefetches_total", result="used"), value("prefetches_total", result="wasted")) == (5, 2)
    tiers = [value(f"{name}_bytes", tier="device") for name in ("capacity", "resident", "pinned", "reserved")]
    assert tiers == [400, 300, 200, 100]
    assert value("capacity_bytes", tier="host") == 0


def test_series_exist_before_anything_happened_and_labels_are_closed(
    metrics: WorkerMetrics, server: MetricsServer
) -> None:
    metrics.watch_tiers(dict)
    before = set(scrape(server))
    metrics.finished("an outcome nobody has heard of")
    for outcome in OUTCOMES:
        metrics.finished(outcome)
    for tier in ("host", "device"):
        metrics.lookups(tier, "hit_in_flight", 1)
    for cause in ("lease", "demand", "prefetch"):
        metrics.stalled(0.1, cause)
        metrics.evicted(cause, 1)
    metrics.transferred("host", "device", 1, 0.1)
    assert set(scrape(server)) == before
    labels = {name for _, pairs in before for name, _ in pairs}
    assert labels == {
        "tier", "result", "source", "destination", "cause", "outcome", "le",
        "implementation", "major", "minor", "patchlevel", "version",
    }  # fmt: skip


def test_the_process_is_measured_too(server: MetricsServer) -> None:
    assert scrape(server)["process_resident_memory_bytes", ()] > 0


def test_a_port_in_use_is_refused_by_name(metrics: WorkerMetrics, server: MetricsServer) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(PortInUse, match=str(port)):
        MetricsServer(metrics.registry, "127.0.0.1", port)
