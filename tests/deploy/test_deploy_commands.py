"""The commands of pods: Ray is started alike with and without the operator; a worker's preStop waits for its work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore

import pytest

from pager.metrics import MetricsServer, WorkerMetrics

BIN = Path(__file__).parents[2] / "deploy" / "docker" / "bin"
OPERATORS = {"node-ip-address", "address", "block", "head"}  # what KubeRay adds by itself


def flags(script: str) -> dict[str, str]:
    text = (BIN / script).read_text()
    found = dict(re.findall(r"--([\w-]+)=(\S+|'[^']*')", re.sub(r"='([^']*)'", lambda m: "=" + quoted(m[1]), text)))
    return {name: value for name, value in found.items() if name not in OPERATORS}


def quoted(text: str) -> str:
    return text.replace(" ", "")


@pytest.mark.parametrize(("script", "group"), [("expert-pager-head", "head"), ("expert-pager-worker", "workers")])
def test_ray_is_started_with_the_same_parameters_by_script_and_by_operator(render, script, group):
    (cluster,) = render("monitoring").of_kind("RayCluster")
    spec = cluster["spec"]
    params = dict((spec["headGroupSpec"] if group == "head" else spec["workerGroupSpecs"][0])["rayStartParams"])
    if "resources" in params:
        params["resources"] = quoted(json.loads(params["resources"]))
    by_script = flags(script)
    if by_script["num-gpus"].startswith('"${NUM_GPUS'):
        env = {each["name"]: each.get("value") for each in render("plain").workload("expert-pager-worker").main["env"]}
        by_script["num-gpus"] = env["NUM_GPUS"]
    assert by_script == params


def test_a_router_offers_its_cluster_nothing():
    router = flags("expert-pager-router")
    assert (router["num-cpus"], router["num-gpus"]) == ("0", "0")
    assert "resources" not in router


@dataclass
class Load:
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 1


def drain(limit_s: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, BIN / "expert-pager-worker-drain", str(limit_s)]
    return subprocess.Popen(command, env=os.environ | {"POD_IP": "127.0.0.77"})


def test_a_worker_is_left_to_end_what_it_runs():
    load, asked, metrics = Load(running=1), Semaphore(0), WorkerMetrics()

    def status() -> Load:
        asked.release()
        return load

    metrics.watch_engine(status, 1)
    server = MetricsServer(metrics.registry, "127.0.0.77", 9465)
    try:
        waiting = drain(600)
        for _ in range(3 * 4):  # four gauges a scrape
            assert asked.acquire(timeout=60)
        assert waiting.poll() is None
        load.running = 0
        assert waiting.wait(timeout=60) == 0
        load.waiting = 1
        assert drain(0.1).wait(timeout=60) == 0  # no longer than it was given
    finally:
        server.close()
    assert drain(600).wait(timeout=60) == 0  # where nothing is loaded there is nothing to wait for
