"""Rules, scalers, Redis and traces ask for what is there."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import yaml

from pager.observe.tracing import is_asked_for
from pager.observe.worker_metrics import WORKER_FAMILIES
from router_service.metrics import router_families
from tests.deploy.conftest import Render, Rendered
from tests.support.processes import free_port

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"


def exported() -> set[str]:
    """Every name that a scrape may have."""
    return {name for family in (*WORKER_FAMILIES, *router_families(("other",))) for name in family.samples}


def expressions(manifests: Rendered) -> Iterator[str]:
    for rules in manifests.of_kind("PrometheusRule"):
        for group in rules["spec"]["groups"]:
            yield from (rule["expr"] for rule in group["rules"])
    for scaled in manifests.of_kind("ScaledObject"):
        yield from (trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])


@pytest.mark.parametrize("overlay", ["production", "autoscale"])
def test_expressions_ask_for_metrics_that_are_exported(render: Render, overlay: str) -> None:
    known = exported()
    asked = [name for text in expressions(render(overlay)) for name in re.findall(r"(?<![\w:])expert_pager_\w+", text)]
    assert asked
    assert set(asked) <= known


@pytest.mark.parametrize("overlay", ["monitoring", "production", "autoscale"])
def test_rules_and_dashboards_are_shipped(render: Render, overlay: str) -> None:
    (rules,) = render(overlay).of_kind("PrometheusRule")
    assert rules["spec"] == yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
    shipped = render(overlay).one("ConfigMap", "expert-pager-dashboards")
    assert shipped["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert shipped["data"] == {path.name: path.read_text() for path in (MONITORING / "dashboards").glob("*.json")}


def test_a_real_redis_takes_the_file_and_keeps_what_has_no_expiry(
    render: Render, redis_server: Path, tmp_path: Path
) -> None:
    text = render("ha").one("ConfigMap", "expert-pager-redis")["data"]["redis.conf"]
    (tmp_path / "redis-auth.conf").write_text("requirepass sesame\n")
    text = text.replace("/run/secrets/redis", str(tmp_path)).replace("/data", str(tmp_path))
    (tmp_path / "redis.conf").write_text(text)
    port = free_port()
    command = [str(redis_server), str(tmp_path / "redis.conf"), "--port", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port, password="sesame") as client:
            await_answer(client)
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-lru"}
            assert client.config_get("appendonly") == {"appendonly": "yes"}
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
    finally:
        process.terminate()
        process.wait()


def await_answer(client: redis.Redis) -> None:
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            time.sleep(0.02)
    raise AssertionError("redis-server does not answer")


def test_whoever_traces_knows_the_collector_and_may_reach_it(render: Render) -> None:
    manifests = render("traces")
    settings = manifests.one("ConfigMap", "expert-pager-traces")
    port = int(settings["data"]["OTEL_EXPORTER_OTLP_ENDPOINT"].rpartition(":")[2])
    (rule,) = manifests.one("NetworkPolicy", "expert-pager-traces")["spec"]["egress"]
    assert port in {each["port"] for each in rule["ports"]}
    assert is_asked_for(settings["data"])
    for name in ("expert-pager-router", "expert-pager-worker"):
        pod = manifests.workload(name)
        assert {"configMapRef": {"name": settings["metadata"]["name"]}} in pod.main["envFrom"], name
        selector = manifests.one("NetworkPolicy", "expert-pager-traces")["spec"]["podSelector"]["matchExpressions"][0]
        assert pod.labels[selector["key"]] in selector["values"], name
