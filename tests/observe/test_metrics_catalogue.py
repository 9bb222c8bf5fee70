"""The catalogue, the code and a scrape say the same; label sets are closed, and promtool finds nothing to say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from docs.metrics_catalogue import catalogue
from pager.errors import ConfigError
from pager.observe.metrics import Kind, Metric
from pager.observe.worker_metrics import MODEL_LABELS, WORKER_FAMILIES, TierBytes, WorkerMetrics
from pager.types import ExpertPool, FinishReason, PagingCounts, Usage
from router_service.admission import MAX_NAMED_TENANTS, TenantLabels, tenant_in
from router_service.metrics import INFO_LABELS, RouterMetrics, router_families

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
TENANTS = ("acme", "initech", "other")
Series = set[tuple[str, frozenset[tuple[str, str]]]]
CODEWORDS = ("c00-0123", "c01-4567")


def worker_registry() -> CollectorRegistry:
    metrics = WorkerMetrics()
    metrics.watch_tiers(lambda: {"device": TierBytes(1, 2, 3, 4)})
    metrics.describe_model(dict.fromkeys(MODEL_LABELS, "x"))
    return metrics.registry


def router_metrics() -> RouterMetrics:
    metrics = RouterMetrics(TenantLabels.parse(" acme,initech ,acme"), CODEWORDS)
    metrics.describe(**dict.fromkeys(INFO_LABELS, "x"))
    return metrics


def scraped(registry: CollectorRegistry) -> Series:
    """Our series; of histograms their counts, since every one has the same buckets."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in families
        for sample in family.samples
        if sample.name.startswith("expert_pager_") and not sample.name.endswith(("_created", "_bucket", "_sum"))
    }


def declared(families: tuple[Metric, ...]) -> Series:
    def name(family: Metric) -> str:
        return family.exposed + "_count" if family.kind is Kind.HISTOGRAM else family.exposed

    return {
        (name(family), frozenset(zip(family.labels.names, values, strict=True)))
        for family in families
        for values in family.labels.series or [("x",) * len(family.labels.names)]
    }


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == catalogue(), "run `make docs`"


def test_a_worker_has_exactly_the_series_of_its_catalogue_from_the_start() -> None:
    assert scraped(worker_registry()) == declared(WORKER_FAMILIES)


def test_a_router_has_exactly_the_series_of_its_catalogue_whoever_calls() -> None:
    metrics = router_metrics()
    assert scraped(metrics.registry) == declared(router_families(TENANTS, CODEWORDS))
    pool = ExpertPool(((1, 2), (3,)))
    usage = Usage(
        "pool", FinishReason.LENGTH, 3, 4, pool, PagingCounts(1, 2, 100, 200, 0.5), 0.1, None, 0.25, 0.5, "fingerprint"
    )
    for tenant in ("acme", "stranger", "another"):
        metrics.ended("Generate", "OK", tenant)
        metrics.first_token(tenant, 0.5)
        metrics.output_token(tenant, 0.1)
        metrics.settled(tenant, usage.account)
    metrics.ended("Route", "OK", "acme")
    metrics.predicted(ExpertPool(((2, 5, 6), (3,))), pool)
    for num_restarts in (0, 2, 2, 3):
        metrics.restarted("worker-0", num_restarts)
    assert scraped(metrics.registry) == declared(router_families(TENANTS, CODEWORDS))

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"expert_pager_router_{name}", labels)

    assert value("answers_total", tenant="acme", code="OK") == 1
    assert value("answers_total", tenant="other", code="OK") == 2
    assert value("paged_bytes_total", tenant="other", source="host") == 400
    assert value("queue_seconds_sum", tenant="acme") == 0.25
    assert [value("predicted_experts_total", result=result) for result in ("right", "missing", "surplus")] == [2, 1, 2]
    assert value("worker_restarts_total") == 3


def test_every_family_answers_a_question() -> None:
    families = (*WORKER_FAMILIES, *router_families(TENANTS, CODEWORDS))
    assert len({family.exposed for family in families}) == len(families)
    for family in families:
        assert family.question.endswith("?"), family.name
        assert family.meaning.endswith("."), family.name
        assert family.exposed.endswith("_total") == (family.kind is Kind.COUNTER), family.name
        assert bool(family.buckets) == (family.kind is Kind.HISTOGRAM), family.name


@pytest.mark.parametrize("registry", [worker_registry(), router_metrics().registry], ids=["worker", "router"])
def test_promtool_has_nothing_to_say(registry: CollectorRegistry, promtool: Path) -> None:
    done = subprocess.run(
        [promtool, "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_tenants_that_nobody_can_be_called_are_refused() -> None:
    for text in ("acme corp", "other", ",".join(f"t{number}" for number in range(MAX_NAMED_TENANTS + 1))):
        with pytest.raises(ConfigError, match=r"router\.metric_tenants"):
            TenantLabels.parse(text)
    assert TenantLabels.parse("").values == ("other",)


def test_a_call_without_a_legal_tenant_is_counted_all_the_same() -> None:
    assert tenant_in(None) == "default"
    assert tenant_in([("x-tenant-id", "acme")]) == "acme"
    assert TenantLabels(["acme"]).of(tenant_in([("x-tenant-id", "no such; tenant")])) == "other"
