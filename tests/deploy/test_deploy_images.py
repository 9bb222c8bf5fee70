"""What images are made of and who names them, and the step that prepares a model: run here as a pod runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.conftest import Rendered

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
K8S = ROOT / "deploy" / "k8s"
CHECKPOINT = ROOT / "tests" / "data" / "golden" / "ckpt_emo_tiny"
DOCKERFILES = ("router.Dockerfile", "worker.Dockerfile")
DIGEST = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_base_is_pinned_and_the_image_runs_as_somebody(name: str) -> None:
    lines = [line.strip() for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")]
    (python,) = [line.removeprefix("ARG PYTHON=") for line in lines if line.startswith("ARG PYTHON=")]
    assert DIGEST.fullmatch(python)
    stages: set[str] = set()
    for line in lines:
        if line.startswith("FROM "):
            base, _, stage = line.removeprefix("FROM ").partition(" AS ")
            assert base == "${PYTHON}" or base in stages
            stages.add(stage)
    assert {"build", "runtime", "dev"} < stages
    assert lines[-2].startswith("FROM runtime AS ")  # what is built unless a target is named: without the model
    users = [line.removeprefix("USER ") for line in lines if line.startswith("USER ")]
    assert users == ["10001:10001"]
    assert not any(re.search(r"\b(TOKEN|PASSWORD|SECRET)\b", line) for line in lines)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_installed_is_pinned(name: str) -> None:
    text = (DOCKER / name).read_text().replace("\\\n", " ")
    for command in re.findall(r"pip install .*", text):
        assert "-c /src/constraints.txt" in command
    for packages in re.findall(r"apt-get install -y --no-install-recommends ([^&]*)", text):
        assert all("=" in package for package in packages.split())


def test_ray_kills_no_worker_because_the_node_is_full() -> None:
    for name in DOCKERFILES:
        _, _, runtime = (DOCKER / name).read_text().partition(" AS runtime\n")
        set_there = [word for line in runtime.splitlines() if line.startswith("ENV ") for word in line.split()]
        assert "RAY_memory_monitor_refresh_ms=0" in set_there


def test_the_constraints_are_what_the_project_asks_for() -> None:
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = ("serve", "otel", "grammar")
    for text in requires("expert-pager") or ():
        requirement = Requirement(text)
        if requirement.name == "expert-pager-client":
            continue  # built from the same source, as the Dockerfiles do
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), text
    for name in DOCKERFILES:
        assert f"/src/client '/src[{','.join(extras)}]'" in (DOCKER / name).read_text()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_login_shell_finds_the_programs_too(name: str, tmp_path: Path) -> None:
    """KubeRay before 1.4 starts Ray by one, and Debian's /etc/profile sets PATH anew before it reads profile.d."""
    (line,) = re.findall(r"echo '(.+)' > /etc/profile.d/", (DOCKER / name).read_text())
    (tmp_path / "profile.sh").write_text(f"{line}\n")
    command = f"PATH=/usr/bin:/bin; . {tmp_path}/profile.sh; echo $PATH"
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert said == "/opt/expert-pager/bin:/usr/bin:/bin\n"


def test_what_the_build_copies_is_let_through() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in DOCKERFILES:
        for sources in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", (DOCKER / name).read_text(), re.M):
            for source in sources.split():
                assert source.rstrip("/") in let_through
                assert (ROOT / source).exists()


def test_images_and_source_are_set_in_one_place_each() -> None:
    tags = [path for path in K8S.rglob("*.yaml") if re.search(r"^images:", path.read_text(), re.M)]
    assert {path.relative_to(K8S).parent.as_posix() for path in tags} == {"site", "overlays/cpu-dev"}
    for path in K8S.rglob("*.yaml"):
        for image in re.findall(r"^\s+(?:- )?image: (\S+)", path.read_text(), re.M):
            assert image in ("expert-pager-router", "expert-pager-worker") or DIGEST.fullmatch(image), path


def test_every_rendered_image_has_a_tag(manifests: Rendered) -> None:
    for pod in manifests.workloads():
        for container in pod.containers:
            assert re.search(r":\d+\.\d+\.\d+", container["image"]), container["image"]


def test_every_command_of_a_pod_is_in_the_images(manifests: Rendered) -> None:
    ours = {path.name for path in (DOCKER / "bin").iterdir()}
    for pod in manifests.workloads():
        for container in pod.containers:
            words = [*container.get("args", ())[:1]]
            if "lifecycle" in container:
                words += container["lifecycle"]["preStop"]["exec"]["command"][:1]
            assert set(words) <= ours | {"sleep", "redis-server"}


def test_scripts_can_be_run() -> None:
    for path in (DOCKER / "bin").iterdir():
        assert os.access(path, os.X_OK), path
        if path.read_text().startswith("#!/bin/sh"):
            subprocess.run(["sh", "-n", str(path)], check=True)


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the init step on a volume that all calls share, with a link of the pod's own."""
    volume = tmp_path / "models"
    volume.mkdir()

    def run(pod: str, source: str, dtype: str = "") -> subprocess.CompletedProcess[str]:
        (tmp_path / pod).mkdir(exist_ok=True)
        bin_folder = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            [sys.executable, DOCKER / "bin" / "expert-pager-prepare", volume, tmp_path / pod / "current"],
            env=os.environ | {"MODEL_SOURCE": source, "MODEL_DTYPE": dtype, "PATH": bin_folder},
            capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_a_model_is_packed_and_verified_once_by_however_many_pods(
    prepare: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda pod: prepare(pod, str(CHECKPOINT)), ("one", "two")))
    assert [each.returncode for each in done] == [0, 0], done
    assert sorted("packed" in each.stdout for each in done) == [False, True]
    links = {(tmp_path / pod / "current").resolve() for pod in ("one", "two")}
    (model,) = links
    assert (model / "config.json").exists()
    assert "is there already" in prepare("one", str(CHECKPOINT)).stdout  # a container that starts again


@pytest.mark.slow
def test_a_source_that_is_damaged_leaves_nothing_that_would_be_served(
    prepare: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(CHECKPOINT, damaged)
    weights = next(damaged.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = prepare("one", str(damaged))
    assert done.returncode != 0
    assert "expert-pager pack failed" in done.stderr
    assert not (tmp_path / "one" / "current").exists()
    assert not list((tmp_path / "models").glob("*.verified"))


@pytest.mark.parametrize("source", ["", "emo-tiny", "hf:allenai/Emo", "hf:allenai/Emo@main"])
def test_a_source_that_names_no_one_model_is_refused(
    prepare: Callable[..., subprocess.CompletedProcess[str]], source: str
) -> None:
    done = prepare("one", source)
    assert done.returncode != 0
    assert "hf:ORGANISATION/NAME@REVISION" in done.stderr
