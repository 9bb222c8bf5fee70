"""Rules, scalers and Redis ask for what is there."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest
import redis

from pager.metrics import WorkerMetrics
from router_service.metrics import RouterMetrics


def exported() -> set[str]:
    """Every name that a scrape may have."""
    worker = WorkerMetrics()
    worker.watch_tiers(dict)
    worker.describe_model({})
    families = [family for metrics in (worker, RouterMetrics()) for family in metrics.registry.collect()]
    suffixes = {"counter": ("_total",), "histogram": ("_sum", "_count", "_bucket"), "gauge": ("",), "info": ("_info",)}
    return {family.name + suffix for family in families for suffix in suffixes.get(family.type, ())}


def expressions(manifests) -> Iterator[str]:
    for rules in manifests.of_kind("PrometheusRule"):
        for group in rules["spec"]["groups"]:
            yield from (rule["expr"] for rule in group["rules"])
    for scaled in manifests.of_kind("ScaledObject"):
        yield from (trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])


@pytest.mark.parametrize("overlay", ["production", "autoscale"])
def test_expressions_ask_for_metrics_that_are_exported(render, overlay):
    known = exported()
    asked = [name for text in expressions(render(overlay)) for name in re.findall(r"\bexpert_pager_\w+", text)]
    assert asked
    assert set(asked) <= known


def test_alerts_say_what_is_wrong_and_how_bad_it_is(render):
    (rules,) = render("production").of_kind("PrometheusRule")
    alerts = [rule for group in rules["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"].endswith(".")


def test_a_real_redis_takes_the_file_and_keeps_what_has_no_expiry(render, tmp_path):
    text = render("ha").one("ConfigMap", "expert-pager-redis")["data"]["redis.conf"]
    (tmp_path / "redis-auth.conf").write_text("requirepass sesame\n")
    text = text.replace("/run/secrets/redis", str(tmp_path)).replace("/data", str(tmp_path))
    (tmp_path / "redis.conf").write_text(text)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [shutil.which("redis-server"), str(tmp_path / "redis.conf"), "--port", str(port), "--bind", "127.0.0.1"]
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
    for _ in range(500):
        try:
            client.ping()
            return
        except redis.ConnectionError:
            time.sleep(0.02)
    raise AssertionError("redis-server does not answer")
