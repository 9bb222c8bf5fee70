"""What docs/deploy.md has people type is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "deploy.md").read_text()


def test_every_overlay_is_in_the_table():
    rows = set(re.findall(r"^\| `([\w-]+)` \| .* \| .*\|$", TEXT, re.M))
    assert {path.name for path in (ROOT / "deploy" / "k8s" / "overlays").iterdir()} <= rows


def test_every_path_is_there():
    paths = re.findall(r"(?:deploy|docs)/[\w./-]*\w", TEXT)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_secret_has_every_file_that_a_pod_reads(manifests):
    made = set(re.findall(r"--from-file=([\w.-]+)", TEXT))
    read = set()
    for pod in manifests.workloads():
        for container in pod.containers:
            values = [variable.get("value", "") for variable in container.get("env", ())]
            read |= {value.rpartition("/")[2] for value in values if value.startswith("/run/secrets/expert-pager/")}
        for volume in pod.spec["volumes"]:
            read |= {item["key"] for item in volume.get("secret", {}).get("items", ())}
    assert read
    assert read <= made


def test_numbers_are_those_of_the_manifests(render):
    router = render("gpu").workload("expert-pager-router")
    assert f"grace period is {router.spec['terminationGracePeriodSeconds']} s" in TEXT
    assert f"goes on for {router.main['lifecycle']['preStop']['exec']['command'][1]} s (preStop)" in TEXT
    worker = render("gpu").workload("expert-pager-worker")
    assert f"{worker.main['lifecycle']['preStop']['exec']['command'][1]} s at most (preStop)" in TEXT
    storage = render("gpu").one("PersistentVolumeClaim", "expert-pager-model")["spec"]["resources"]["requests"]
    assert storage["storage"] in TEXT
