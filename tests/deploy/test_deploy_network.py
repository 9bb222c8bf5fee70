"""Who selects whom: policies, services, budgets, scalers and scrapers, on every overlay."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.deploy.conftest import Object, Render, Rendered
from tests.support.values import some

MEMBERS = {"expert-pager-router", "expert-pager-head", "expert-pager-worker"}
SCALERS = ("HorizontalPodAutoscaler", "ScaledObject")


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """As Kubernetes does it, for what is used here."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for each in selector.get("matchExpressions", ()):
        assert each["operator"] == "In"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def selected(manifests: Any, selector: dict[str, Any]) -> set[str]:
    return {pod.name for pod in manifests.workloads() if selects(selector, pod.labels)}


def policy(manifests: Any, name: str) -> dict[str, Any]:
    return dict(manifests.one("NetworkPolicy", name)["spec"])


def test_everything_is_in_one_namespace_and_has_its_label(manifests: Rendered) -> None:
    for each in manifests.objects:
        assert each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "expert-pager"
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] == "expert-pager", each["metadata"]["name"]


def test_no_pod_may_talk_unless_a_policy_says_so(manifests: Rendered) -> None:
    deny = policy(manifests, "expert-pager-default-deny")
    assert selected(manifests, deny["podSelector"]) == {pod.name for pod in manifests.workloads()}
    assert set(deny["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in deny
    assert "egress" not in deny


def test_members_of_the_ray_cluster_reach_each_other_and_nobody_else_reaches_them(manifests: Rendered) -> None:
    ray = policy(manifests, "expert-pager-ray")
    members = selected(manifests, ray["podSelector"])
    assert members >= MEMBERS
    (sources,) = [rule["from"] for rule in ray["ingress"]]
    (source,) = sources
    assert selected(manifests, source["podSelector"]) == members
    assert "namespaceSelector" not in source  # this namespace
    for each in manifests.of_kind("NetworkPolicy"):
        for rule in each["spec"].get("ingress", ()):
            assert rule["from"], each["metadata"]["name"]  # nobody is nobody in particular
            if any("namespaceSelector" in source for source in rule["from"]):
                assert rule["ports"], each["metadata"]["name"]


def test_clients_reach_routers_on_the_ports_of_the_service_alone(manifests: Rendered) -> None:
    clients = policy(manifests, "expert-pager-clients")
    assert selected(manifests, clients["podSelector"]) == {"expert-pager-router"}
    (rule,) = clients["ingress"]
    service_ports = manifests.one("Service", "expert-pager")["spec"]["ports"]
    assert [port["name"] for port in service_ports] == ["grpc", "http"]
    assert [port["port"] for port in rule["ports"]] == [port["port"] for port in service_ports]


def test_services_select_pods_that_have_the_port(manifests: Rendered) -> None:
    for service in manifests.of_kind("Service"):
        pods = [
            pod for pod in manifests.workloads() if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
        ]
        (pod,) = pods
        names = {port["name"] for port in pod.main["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    head = manifests.workload("expert-pager-router").main["env"]
    address = next(variable["value"] for variable in head if variable["name"] == "RAY_HEAD_ADDRESS")
    if not manifests.of_kind("RayCluster"):
        assert manifests.one("Service", address.partition(":")[0])["spec"]["ports"][0]["port"] == 6379
    else:
        (cluster,) = manifests.of_kind("RayCluster")
        assert address == f"{cluster['metadata']['name']}-head-svc:6379"


def test_controllers_select_their_own_pods_and_no_others(manifests: Rendered) -> None:
    for each in manifests.objects:
        if each["kind"] in ("Deployment", "StatefulSet"):
            assert selected(manifests, each["spec"]["selector"]) == {each["metadata"]["name"]}


def controllers(manifests: Rendered) -> list[Object]:
    return [*manifests.of_kind("Deployment"), *manifests.of_kind("StatefulSet")]


def scaler_of(manifests: Rendered, controller: Object) -> Object | None:
    target = {"kind": controller["kind"], "name": controller["metadata"]["name"]}
    scalers = [each for kind in SCALERS for each in manifests.of_kind(kind)]
    return next((each for each in scalers if target.items() <= each["spec"]["scaleTargetRef"].items()), None)


def fewest(manifests: Rendered, controller: Object) -> int:
    """The fewest pods that there are of a controller."""
    scaler = scaler_of(manifests, controller)
    if scaler is None:
        return int(controller["spec"]["replicas"])
    return int(scaler["spec"]["minReplicaCount" if scaler["kind"] == "ScaledObject" else "minReplicas"])


def test_the_number_of_pods_is_either_the_manifests_or_the_scalers(manifests: Rendered) -> None:
    """Given in both, each `apply` would undo what the autoscaler has done."""
    for each in controllers(manifests):
        assert ("replicas" in each["spec"]) == (scaler_of(manifests, each) is None), each["metadata"]["name"]


def test_budgets_leave_something_and_let_nodes_be_drained(manifests: Rendered) -> None:
    replicas = {each["metadata"]["name"]: fewest(manifests, each) for each in controllers(manifests)}
    for cluster in manifests.of_kind("RayCluster"):
        replicas["expert-pager-worker"] = cluster["spec"]["workerGroupSpecs"][0]["replicas"]
    for budget in manifests.of_kind("PodDisruptionBudget"):
        (name,) = selected(manifests, budget["spec"]["selector"])
        assert isinstance(budget["spec"]["minAvailable"], int)  # all that a RayCluster's pods can have
        assert 1 <= budget["spec"]["minAvailable"] < replicas[name], name


def test_scalers_scale_what_is_there_and_no_further_than_the_settings(manifests: Rendered) -> None:
    for each in (scaler for kind in SCALERS for scaler in manifests.of_kind(kind)):
        target = each["spec"]["scaleTargetRef"]
        found = manifests.one(target["kind"], target["name"])
        assert found["apiVersion"] == target["apiVersion"]
        if each["kind"] == "ScaledObject":
            text = manifests.one("ConfigMap", "expert-pager-config")["data"]["service.toml"]
            assert each["spec"]["maxReplicaCount"] == int(some(re.search(r"^count = (\d+)", text, re.M))[1])


def test_there_is_one_router_that_owns_the_workers(manifests: Rendered) -> None:
    owners = []
    for name in ("expert-pager-router", "expert-pager-keeper"):
        for each in manifests.of_kind("Deployment"):
            if each["metadata"]["name"] != name:
                continue
            env = {item["name"]: item.get("value") for item in each["spec"]["template"]["spec"]["containers"][0]["env"]}
            if env.get("EXPERT_PAGER_WORKERS_COUNT") != "0":
                owners.append(name)
                assert each["spec"]["replicas"] == 1
                assert each["spec"]["strategy"] == {"type": "Recreate"}
    assert len(owners) == 1


def test_two_routers_share_a_redis(render: Render) -> None:
    manifests = render("ha")
    assert fewest(manifests, manifests.one("Deployment", "expert-pager-router")) == 2
    to_redis = policy(manifests, "expert-pager-to-redis")
    routers = {"expert-pager-router", "expert-pager-keeper"}
    assert selected(manifests, to_redis["podSelector"]) == routers
    for name in routers:
        env = {each["name"]: each.get("value") for each in manifests.workload(name).main["env"]}
        assert env["REDIS_URL_FILE"] == "/run/secrets/expert-pager/redis-url"
    (source,) = policy(manifests, "expert-pager-redis")["ingress"][0]["from"]
    assert selected(manifests, source["podSelector"]) == routers


@pytest.mark.parametrize("overlay", ["monitoring", "production", "autoscale"])
def test_prometheus_is_let_in_where_it_scrapes(render: Render, overlay: str) -> None:
    manifests = render(overlay)
    (monitor,) = manifests.of_kind("PodMonitor")
    scraped = selected(manifests, monitor["spec"]["selector"])
    assert scraped == {pod.name for pod in manifests.workloads() if pod.name.endswith(("router", "keeper", "worker"))}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    ports = {
        port["containerPort"]
        for name in scraped
        for port in manifests.workload(name).main["ports"]
        if port["name"] == endpoint["port"]
    }
    metrics = policy(manifests, "expert-pager-metrics")
    assert selected(manifests, metrics["podSelector"]) == scraped
    assert {port["port"] for port in metrics["ingress"][0]["ports"]} == ports


@pytest.mark.parametrize("overlay", ["tls", "production"])
def test_tls_is_for_clients_and_not_for_probes(render: Render, overlay: str) -> None:
    manifests = render(overlay)
    for name in {"expert-pager-router", "expert-pager-keeper"} & {pod.name for pod in manifests.workloads()}:
        pod = manifests.workload(name)
        env = {each["name"]: each.get("value") for each in pod.main["env"]}
        (mount,) = [each for each in pod.main["volumeMounts"] if each["name"] == "tls"]
        for key in ("CERT", "KEY"):
            assert env[f"EXPERT_PAGER_ROUTER_TLS_{key}"].startswith(mount["mountPath"])
        assert pod.volume("tls")["secret"]["secretName"] == "expert-pager-tls"
        assert pod.main["livenessProbe"]["grpc"]["port"] != 50051
    assert "appProtocol" not in manifests.one("Service", "expert-pager")["spec"]["ports"][0]
