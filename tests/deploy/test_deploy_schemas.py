"""Every object of every overlay against its schema, with unknown fields refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from tests.deploy.conftest import Render, Rendered

SCHEMAS = Path(__file__).parents[2] / "deploy" / "k8s" / "schemas"
KUBERNETES = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.34.0-local-strict"
OWN_KINDS = {"RayCluster", "PodMonitor", "PrometheusRule", "ScaledObject"}


@cache
def kubernetes() -> Any:
    definitions = json.loads((KUBERNETES / "_definitions.json").read_bytes())
    return Registry().with_resource(definitions["$id"], DRAFT202012.create_resource(definitions))


@cache
def validator(kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    """apps/v1 of Kubernetes is in the file deployment-apps-v1.json."""
    group, _, version = api_version.rpartition("/")
    words = [kind.lower(), *([group.split(".")[0]] if group else []), version]
    path = SCHEMAS / f"{kind.lower()}.json" if kind in OWN_KINDS else KUBERNETES / f"{'-'.join(words)}.json"
    schema = json.loads(path.read_bytes())
    if kind not in OWN_KINDS:
        schema["$id"] = f"https://kubernetes.io/api/{path.name}"  # beside its definitions
    return jsonschema.Draft202012Validator(schema, registry=kubernetes())


def check(each: dict[str, Any]) -> None:
    validator(each["kind"], each["apiVersion"]).validate(each)


def test_every_object_is_what_its_schema_says(manifests: Rendered) -> None:
    for each in manifests.objects:
        check(each)


def test_the_overlays_have_every_kind_that_has_a_schema_here(render: Render) -> None:
    kinds = {each["kind"] for name in ("production", "autoscale") for each in render(name).objects}
    assert kinds >= OWN_KINDS
    assert {path.stem for path in SCHEMAS.glob("*.json")} == {kind.lower() for kind in OWN_KINDS}


@pytest.mark.parametrize(
    ("overlay", "kind", "path"),
    [
        ("gpu", "RayCluster", ()),
        ("gpu", "RayCluster", ("spec",)),
        ("gpu", "RayCluster", ("spec", "workerGroupSpecs", 0)),
        ("gpu", "RayCluster", ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0)),
        ("production", "PodMonitor", ("spec", "podMetricsEndpoints", 0)),
        ("production", "PrometheusRule", ("spec", "groups", 0, "rules", 0)),
        ("autoscale", "ScaledObject", ("spec", "triggers", 0)),
        ("gpu", "Deployment", ("spec", "template", "spec", "containers", 0)),
    ],
)
def test_a_field_that_nobody_knows_is_refused(
    render: Render, overlay: str, kind: str, path: tuple[str, ...] | tuple[int | str, ...]
) -> None:
    each = json.loads(json.dumps(next(iter(render(overlay).of_kind(kind)))))
    place = each
    for step in path:
        place = place[step]
    place["fildOfNobody"] = 1
    with pytest.raises(jsonschema.ValidationError, match="fildOfNobody"):
        check(each)


def test_the_pod_that_copies_a_model_is_one_that_the_namespace_admits(render: Render) -> None:
    (pod,) = yaml.safe_load_all((SCHEMAS.parent / "copy-model.yaml").read_text())
    check(pod)
    manifests = render("gpu")
    worker = manifests.workload("expert-pager-worker")
    assert pod["spec"]["securityContext"] == worker.spec["securityContext"]  # so that both may write to the volume
    (container,) = pod["spec"]["containers"]
    assert container["securityContext"] == worker.main["securityContext"]
    assert pod["metadata"]["namespace"] == manifests.of_kind("Namespace")[0]["metadata"]["name"]
    assert pod["spec"]["volumes"] == [worker.volume("models")]
    assert container["volumeMounts"][0]["mountPath"] == worker.spec["initContainers"][0]["args"][1]
