"""The commands of pods: Ray is started alike with and without the operator; a worker's preStop drains it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray.scripts.scripts
from click.testing import CliRunner

from tests.deploy.conftest import Render
from tests.support.waiting import until

BIN = Path(__file__).parents[2] / "deploy" / "docker" / "bin"
OPERATORS = {"node-ip-address", "address", "block", "head"}  # what KubeRay adds by itself


def flags(script: str) -> dict[str, str]:
    text = (BIN / script).read_text()
    found = dict(re.findall(r"--([\w-]+)=(\S+|'[^']*')", re.sub(r"='([^']*)'", lambda m: "=" + quoted(m[1]), text)))
    return {name: value for name, value in found.items() if name not in OPERATORS}


def quoted(text: str) -> str:
    return text.replace(" ", "")


@pytest.mark.parametrize(("script", "group"), [("expert-pager-head", "head"), ("expert-pager-worker", "workers")])
def test_ray_is_started_with_the_same_parameters_by_script_and_by_operator(
    render: Render, script: str, group: str
) -> None:
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


def test_a_router_offers_its_cluster_nothing() -> None:
    router = flags("expert-pager-router")
    assert (router["num-cpus"], router["num-gpus"]) == ("0", "0")
    assert "resources" not in router


WORKER = """
trap 'touch told; until [ -e may-end ]; do sleep 0.05; done; exit 0' TERM
touch runs
while :; do sleep 0.05; done
"""
RAYLET = f"(exec -a ray::WorkerActor bash -c {shlex.quote(WORKER)}) & wait"


@contextlib.contextmanager
def node(folder: Path, address: str) -> Iterator[Path]:
    """Processes that are named and related as a raylet and its worker are."""
    folder.mkdir()
    flags = [f"--node_ip_address={address}", "--node_id=f00d", "--gcs-address=head:6379"]
    command = ["raylet", "-c", RAYLET, "raylet", *flags]
    raylet = subprocess.Popen(command, executable=shutil.which("bash"), cwd=folder)
    children = []
    try:
        until((folder / "runs").exists)
        children = psutil.Process(raylet.pid).children(recursive=True)
        yield folder
    finally:
        for process in (*children, raylet):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        raylet.wait()


def drain(folder: Path, limit_s: float) -> subprocess.Popen[bytes]:
    (folder / "ray").write_text(f'#!/bin/sh\n[ -e here/told ] || echo "$@" > {folder}/said\n')
    (folder / "ray").chmod(0o755)
    command = [sys.executable, str(BIN / "expert-pager-worker-drain"), str(limit_s)]
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"POD_IP": "127.0.0.77", "PATH": path})


def test_a_worker_is_told_to_end_and_waited_for_when_its_node_is_closed(tmp_path: Path) -> None:
    with node(tmp_path / "here", "127.0.0.77") as here, node(tmp_path / "there", "127.0.0.78") as there:
        waiting = drain(tmp_path, 600)
        until((here / "told").exists)
        said = (tmp_path / "said").read_text().split()  # before
        assert said[0] == "drain-node"
        assert {"--address=head:6379", "--node-id=f00d", "--deadline-remaining-seconds=600"} <= set(said)
        assert waiting.poll() is None
        (here / "may-end").touch()
        assert waiting.wait(timeout=60) == 0
        assert not (there / "told").exists()


def test_a_pods_end_does_not_wait_longer_than_it_was_told_nor_for_nothing(tmp_path: Path) -> None:
    with node(tmp_path / "here", "127.0.0.77"):
        assert drain(tmp_path, 0.1).wait(timeout=60) == 0
    assert drain(tmp_path, 600).wait(timeout=60) == 0


def test_the_command_that_closes_a_node_is_one_that_ray_has() -> None:
    usage = CliRunner().invoke(ray.scripts.scripts.drain_node, ["--help"]).output
    script = (BIN / "expert-pager-worker-drain").read_text()
    options = set(re.findall(r'"(--[a-z-]+)=', script))
    assert len(options) >= 3
    assert all(option in usage for option in options)
    reason = re.search("--reason=([A-Z_]+)", script)
    assert reason
    assert reason[1] in usage.replace("\n", "").replace(" ", "")
