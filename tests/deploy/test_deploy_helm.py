"""The Helm chart, rendered by Helm's own engine: what it makes of the values for an overlay is what that overlay is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import OVERLAYS, ROOT, Object, Render

HELM = ROOT / "deploy" / "helm"
CHART = HELM / "expert-pager"
NAMESPACE = "expert-pager"
# What a chart is meant to have more: pods start anew with other settings, and the volume outlives its release.
ONLY_IN_THE_CHART = {"expert-pager/settings", "helm.sh/resource-policy"}


def values_of(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((HELM / "values" / f"{name}.yaml").read_text()))


RenderChart = Callable[..., list[Object]]


@pytest.fixture
def render_chart(helm: Any) -> RenderChart:
    """`render_chart(values, chart=CHART)`: the objects of a release."""

    def render(values: dict[str, Any], chart: Path = CHART) -> list[Object]:
        with helm.Chart.load(chart) as loaded:
            files = loaded.render(values, name="expert-pager", namespace=NAMESPACE)
        return [each for text in files.values() for each in yaml.safe_load_all(text) if each]

    return render


def plain(value: Any, key: str = "") -> Any:
    """A value without what says the same: the order of variables and volumes, hashes in names, comments in settings."""
    if isinstance(value, dict):
        kept = {name: plain(each, name) for name, each in value.items() if name not in ONLY_IN_THE_CHART}
        return {name: each for name, each in kept.items() if not (name in ("annotations", "namespace") and not each)}
    if isinstance(value, list):
        items = [plain(each) for each in value]
        by_name = key in ("env", "volumes", "volumeMounts")
        return sorted(items, key=lambda each: (each["name"], str(each))) if by_name else items
    if isinstance(value, str):
        return re.sub(r"^(expert-pager-\w+)-[0-9a-z]{10}$", r"\1", value).strip()
    return value


def by_name(objects: Iterable[Object]) -> dict[str, Any]:
    """Objects by kind and name, without the namespace, which is the release's."""
    found = {}
    for each in map(plain, objects):
        each["metadata"].pop("namespace", None)
        found[f"{each['kind']}/{each['metadata']['name']}"] = each
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_chart_renders_what_the_overlay_does(overlay: str, render: Render, render_chart: RenderChart) -> None:
    expected = by_name(each for each in render(overlay).objects if each["kind"] != "Namespace")  # Helm's to make
    found = by_name(render_chart(values_of(overlay)))
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert found[name] == each, name


def test_there_are_values_for_every_overlay() -> None:
    assert tuple(sorted(path.stem for path in (HELM / "values").iterdir())) == OVERLAYS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_helm_finds_nothing_to_complain_of(overlay: str, helm: Any) -> None:
    found = helm.lint(str(CHART), values=values_of(overlay), namespace=NAMESPACE)
    complaints = [each for each in found["messages"] if "icon is recommended" not in str(each)]
    assert complaints == []


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"workers": {"replicas": -1}}, "replicas"),
        ({"wrokers": {"replicas": 1}}, "wrokers"),
        ({"device": "tpu"}, "device"),
        ({"model": {"source": "emo-tiny"}}, "source"),
        ({"images": {"router": {"repository": "x", "tag": ""}}}, "tag"),
        ({"traces": {"share": 2}}, "share"),
        ({"autoscale": {"enabled": True}}, "StatefulSet"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    values: dict[str, Any], complaint: str, helm: Any, render_chart: RenderChart
) -> None:
    with pytest.raises(helm.HelmError, match=complaint):
        render_chart(values)


def test_values_get_to_where_they_are_meant(render_chart: RenderChart) -> None:
    settings = '[model]\npath = "/run/model/current"\n'
    values = {
        "secret": "mine",
        "settings": settings,
        "model": {"volume": {"storageClassName": "nfs"}},
        "workers": {"replicas": 3, "maxReplicas": 9},
        "traces": {"enabled": True, "share": 0.5},
    }
    objects = by_name(render_chart(values))
    assert objects["ConfigMap/expert-pager-config"]["data"]["service.toml"] == settings.strip()
    assert objects["PersistentVolumeClaim/expert-pager-model"]["spec"]["storageClassName"] == "nfs"
    (group,) = objects["RayCluster/expert-pager"]["spec"]["workerGroupSpecs"]
    assert (group["replicas"], group["maxReplicas"]) == (3, 9)
    secrets = re.findall(r"'secretName': '(\w[\w-]*)'", str(objects))
    assert set(secrets) == {"mine"}
    assert objects["ConfigMap/expert-pager-traces"]["data"]["OTEL_TRACES_SAMPLER_ARG"] == "0.5"


def test_pods_start_anew_when_their_settings_change(render_chart: RenderChart) -> None:
    def annotations(**values: Any) -> str:
        objects = render_chart({"workers": {"kind": "StatefulSet"}, **values})
        (router,) = [each for each in objects if each["metadata"]["name"] == "expert-pager-router"]
        return str(router["spec"]["template"]["metadata"]["annotations"])

    assert annotations() == annotations()
    assert annotations() != annotations(settings="[model]\n") != annotations(settings="[model]\n", model={"dtype": ""})
    assert annotations() != annotations(traces={"enabled": True}) != annotations(traces={"enabled": True, "share": 0.5})


def test_redis_starts_anew_when_its_file_changes(render_chart: RenderChart, tmp_path: Path) -> None:
    def annotation(chart: Path) -> str:
        (redis,) = [each for each in render_chart({"ha": {"enabled": True}}, chart) if _is_redis(each)]
        return str(redis["spec"]["template"]["metadata"]["annotations"])

    changed = shutil.copytree(CHART, tmp_path / "chart")
    assert annotation(changed) == annotation(CHART)
    file = changed / "files" / "redis.conf"
    file.write_text(file.read_text() + "maxmemory-samples 10\n")
    assert annotation(changed) != annotation(CHART)


def _is_redis(each: Object) -> bool:
    return (each["kind"], each["metadata"]["name"]) == ("StatefulSet", "expert-pager-redis")


def test_a_packed_chart_has_all_its_files(tmp_path: Path, helm: Any, render_chart: RenderChart) -> None:
    """Some are links to the kustomizations' own."""
    archive = helm.package(str(CHART), destination=str(tmp_path))
    shutil.unpack_archive(archive, tmp_path)
    values = values_of("production")
    assert by_name(render_chart(values, tmp_path / "expert-pager")) == by_name(render_chart(values))
