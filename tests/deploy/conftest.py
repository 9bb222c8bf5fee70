"""The manifests as `kubectl kustomize` renders them, and small ways to look into them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
OVERLAYS = tuple(sorted(path.name for path in (K8S / "overlays").iterdir()))
Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Workload:
    """A pod's template, and what of its owner matters."""

    kind: str
    name: str
    template: Object

    @property
    def spec(self) -> Object:
        return dict(self.template["spec"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.template["metadata"]["labels"])

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def main(self) -> Object:
        return dict(self.spec["containers"][0])

    def volume(self, name: str) -> Object:
        return next(volume for volume in self.spec["volumes"] if volume["name"] == name)


@dataclass(frozen=True, slots=True)
class Rendered:
    overlay: str
    objects: tuple[Object, ...]

    def of_kind(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind: str, name: str) -> Object:
        """`name` without the hash that kustomize adds to generated ConfigMaps."""
        found = [
            each
            for each in self.of_kind(kind)
            if each["metadata"]["name"] == name
            or (kind == "ConfigMap" and each["metadata"]["name"].rpartition("-")[0] == name)
        ]
        assert len(found) == 1, f"{len(found)} objects {kind}/{name} in {self.overlay}"
        return found[0]

    def workloads(self) -> Iterator[Workload]:
        for each in self.objects:
            kind, name, spec = each["kind"], each["metadata"]["name"], each.get("spec", {})
            if kind in ("Deployment", "StatefulSet"):
                yield Workload(kind, name, spec["template"])
            elif kind == "RayCluster":
                yield Workload(kind, f"{name}-head", spec["headGroupSpec"]["template"])
                for group in spec["workerGroupSpecs"]:
                    yield Workload(kind, f"{name}-worker", group["template"])

    def workload(self, name: str) -> Workload:
        (found,) = [each for each in self.workloads() if each.name == name]
        return found


@cache
def rendered(kubectl: Path, overlay: str) -> Rendered:
    command = [str(kubectl), "kustomize", str(K8S / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Rendered(overlay, tuple(yaml.safe_load_all(done.stdout)))


Render = Callable[[str], Rendered]


@pytest.fixture(scope="session")
def render(kubectl: Path) -> Render:
    return partial(rendered, kubectl)


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, render: Render) -> Rendered:
    return render(request.param)
