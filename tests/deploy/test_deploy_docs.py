"""What docs/deploy.md has people type is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from pager.cli import app
from tests.deploy.conftest import Render, Rendered
from tests.support.values import some

ROOT = Path(__file__).parents[2]
SHELL = {"cd", "export", "printf", "umask"}
TEXT = (ROOT / "docs" / "deploy.md").read_text()


def test_every_overlay_is_in_the_table() -> None:
    rows = set(re.findall(r"^\| `([\w-]+)` \| .* \| .*\|$", TEXT, re.M))
    assert {path.name for path in (ROOT / "deploy" / "k8s" / "overlays").iterdir()} <= rows


def test_every_path_is_there() -> None:
    paths = re.findall(r"(?:deploy|docs)/[\w./-]*\w", TEXT)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_secret_has_every_file_that_a_pod_reads(manifests: Rendered) -> None:
    made = set(re.findall(r"--from-file=([\w.-]+)", TEXT))
    read = set()
    for pod in manifests.workloads():
        for container in pod.containers:
            values = [variable.get("value", "") for variable in container.get("env", ())]
            read |= {value.rpartition("/")[2] for value in values if value.startswith("/run/secrets/expert-pager/")}
        for volume in pod.spec["volumes"]:
            read |= {item["key"] for item in volume.get("secret", {}).get("items", ())}
    settings = manifests.one("ConfigMap", "expert-pager-config")["data"]["service.toml"]
    read |= set(re.findall(r'"/run/secrets/expert-pager/([\w.-]+)"', settings))
    assert read
    assert read <= made


def test_numbers_are_those_of_the_manifests(render: Render) -> None:
    router = render("gpu").workload("expert-pager-router")
    assert f"grace period is {router.spec['terminationGracePeriodSeconds']} s" in TEXT
    assert f"goes on for {router.main['lifecycle']['preStop']['exec']['command'][1]} s (preStop)" in TEXT
    worker = render("gpu").workload("expert-pager-worker")
    assert f"{worker.main['lifecycle']['preStop']['exec']['command'][1]} s at most (preStop)" in TEXT
    storage = render("gpu").one("PersistentVolumeClaim", "expert-pager-model")["spec"]["resources"]["requests"]
    assert storage["storage"] in TEXT


def test_every_link_leads_somewhere() -> None:
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (ROOT / "docs" / link.partition("#")[0]).exists(), link


def commands() -> list[str]:
    """A line each, as the reader types them; `NAME=value` is none."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", TEXT, re.M | re.S)
    blocks = "\n".join(block for language, block in found if not language).replace("\\\n", " ")
    return [line.strip() for line in blocks.splitlines() if line and not re.match(r" *[A-Z_]+=", line)]


def test_every_program_is_one_that_the_reader_was_told_to_have() -> None:
    programs = {line.split()[0] for line in commands()}
    assert programs <= {
        "docker",
        "kubectl",
        "kind",
        "helm",
        "openssl",
        "printf",
        "umask",
        "cd",
        "export",
        ".venv/bin/expert-pager",
    }


def test_our_own_commands_have_the_options_that_are_used() -> None:
    used = [line for line in commands() if re.search(r"expert-pager (generate|replay|keys add)", line)]
    assert len(used) >= 3
    for line in used:
        names, rest = some(re.search(r"expert-pager (generate|replay|keys add) (.*)", line)).groups()
        command: Any = typer.main.get_command(app)
        for name in names.split():
            assert isinstance(command, TyperGroup)
            command = command.commands[name]
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--[a-z-]+", rest)) <= options, line
