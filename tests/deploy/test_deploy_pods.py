"""What a pod may do, what it is asked, what it has room for, and how long it has to end: on every overlay."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pager.config import ServiceConfig, load_config
from pager.memory import parse_bytes
from tests.deploy.conftest import Render, Rendered
from tests.support.values import some

SECRET_FOLDERS = ("/run/secrets/expert-pager", "/run/secrets/redis", "/run/tls")
UNITS = {"": 1, "Mi": 2**20, "Gi": 2**30}
RAY_CONTAINERS = {"router", "worker", "ray-head"}
PRE_STOP_S = {"sleep": 1, "expert-pager-worker-drain": 1}  # which of the words is the longest it takes
CLOSE_S = 20  # of a service after its drain: workers, Ray


def nbytes(quantity: str) -> int:
    number, unit = some(re.fullmatch(r"(\d+)(\w*)", quantity)).groups()
    return int(number) * UNITS[unit]


def settings(manifests: Any, tmp_path: Path) -> ServiceConfig:
    text = manifests.one("ConfigMap", "expert-pager-config")["data"]["service.toml"]
    (tmp_path / "service.toml").write_text(text)
    # As the command of the image does, which joins the cluster of its pod.
    return load_config(tmp_path / "service.toml", env={}, overrides={"cluster.ray_address": "auto"})


def pods(manifests: Any) -> list[Any]:
    found = list(manifests.workloads())
    assert {"expert-pager-router", "expert-pager-head", "expert-pager-worker"} <= {each.name for each in found}
    return found


def test_no_container_has_more_rights_than_it_needs(manifests: Rendered) -> None:
    for pod in pods(manifests):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, (pod.name, container["name"])
            assert not any("hostPort" in port for port in container.get("ports", ()))
        assert not any("hostPath" in volume for volume in pod.spec["volumes"])
    (namespace,) = manifests.of_kind("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_no_pod_has_a_token_of_the_api_server_or_links_of_services(manifests: Rendered) -> None:
    for pod in pods(manifests):
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False
        account = manifests.one("ServiceAccount", pod.spec["serviceAccountName"])
        assert account["automountServiceAccountToken"] is False


def test_what_is_written_to_is_a_volume(manifests: Rendered) -> None:
    for pod in pods(manifests):
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            if container["name"] in RAY_CONTAINERS:
                for path in ("/tmp", "/dev/shm"):
                    assert "emptyDir" in pod.volume(mounts[path]["name"]), (pod.name, path)
            for path, mount in mounts.items():
                is_source = (
                    {"configMap", "secret"} & pod.volume(mount["name"]).keys() if mount["name"] != "data" else ()
                )
                assert not is_source or mount["readOnly"] is True, (pod.name, path)
        assert all("sizeLimit" in each["emptyDir"] for each in pod.spec["volumes"] if "emptyDir" in each)


def test_the_model_is_read_only_once_it_is_prepared(manifests: Rendered) -> None:
    for name in ("expert-pager-router", "expert-pager-worker"):
        pod = manifests.workload(name)
        (init,) = pod.spec["initContainers"]
        volume, link = init["args"][1:]
        assert init["args"][0] == "expert-pager-prepare"
        writable = {mount["mountPath"]: mount.get("readOnly", False) for mount in init["volumeMounts"]}
        assert writable[volume] is False
        readable = {mount["mountPath"]: mount.get("readOnly", False) for mount in pod.main["volumeMounts"]}
        assert readable[volume] is True
        assert readable[str(Path(link).parent)] is True
        (source,) = init["envFrom"]
        config = manifests.one("ConfigMap", source["configMapRef"]["name"].rpartition("-")[0])
        assert config["metadata"]["name"] == source["configMapRef"]["name"]
        assert config["data"]["MODEL_SOURCE"]


def test_the_three_probes_ask_different_questions(manifests: Rendered) -> None:
    for pod in pods(manifests):
        asked = [
            {key: pod.main[probe][key] for key in ("grpc", "tcpSocket", "httpGet", "exec") if key in pod.main[probe]}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe")
        ]
        if pod.name == "expert-pager-redis":
            asked = asked[1:]  # it starts by answering
        assert all(asked)
        assert len({json.dumps(question, sort_keys=True) for question in asked}) == len(asked), pod.name


def test_liveness_asks_neither_for_workers_nor_for_weights(manifests: Rendered, tmp_path: Path) -> None:
    router = settings(manifests, tmp_path).router
    for pod in pods(manifests):
        if pod.name in ("expert-pager-router", "expert-pager-keeper"):
            assert pod.main["livenessProbe"]["grpc"] == {"port": router.health_port}
            assert pod.main["readinessProbe"]["grpc"] == {
                "port": router.health_port,
                "service": "expert_pager.v1.ExpertPager",
            }
        elif pod.name in ("expert-pager-worker", "expert-pager-head"):
            assert pod.main["livenessProbe"]["grpc"] == {"port": 6380}  # the node, not the worker on it
        alive = pod.main["livenessProbe"]
        assert alive["periodSeconds"] * alive["failureThreshold"] >= 60


def test_ports_are_those_of_the_settings(manifests: Rendered, tmp_path: Path) -> None:
    config = settings(manifests, tmp_path)
    assert config.router.host == "0.0.0.0"
    assert config.router.asks_for_keys != config.router.allow_open
    mounts = [mount["mountPath"] for mount in manifests.workload("expert-pager-router").main["volumeMounts"]]
    assert config.router.keys is None or str(Path(config.router.keys).parent) in mounts
    assert config.workers.per_node == 1  # so that a worker's metrics port is its pod's
    router, worker = manifests.workload("expert-pager-router"), manifests.workload("expert-pager-worker")
    ports = {port["name"]: port["containerPort"] for port in router.main["ports"]}
    numbers = {name: getattr(config.router, f"{name}_port") for name in ("http", "health", "metrics")}
    assert ports == {"grpc": config.router.port, **numbers}
    ports = {port["name"]: port["containerPort"] for port in worker.main["ports"]}
    assert ports["metrics"] == config.workers.metrics_port
    assert worker.main["readinessProbe"]["httpGet"] == {"path": "/metrics", "port": "metrics"}


def test_shared_memory_holds_the_host_tier_and_memory_holds_both(manifests: Rendered, tmp_path: Path) -> None:
    config = settings(manifests, tmp_path)
    pod = manifests.workload("expert-pager-worker")
    (mount,) = [each for each in pod.main["volumeMounts"] if each["mountPath"] == "/dev/shm"]
    shared = pod.volume(mount["name"])["emptyDir"]
    assert shared["medium"] == "Memory"
    object_store = 83886080
    assert nbytes(shared["sizeLimit"]) >= parse_bytes(str(config.workers.host_memory)) + object_store
    resources = pod.main["resources"]
    kv_memory = parse_bytes(config.workers.kv_memory) if config.workers.kv_memory else 0
    assert nbytes(resources["limits"]["memory"]) >= nbytes(shared["sizeLimit"]) + kv_memory + 2**30
    assert resources["requests"]["memory"] == resources["limits"]["memory"]  # it plans with all of it
    assert int(resources["limits"]["cpu"]) == config.workers.num_threads


def test_every_container_says_what_it_needs(manifests: Rendered) -> None:
    for pod in pods(manifests):
        for container in pod.containers:
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][kind].keys(), (pod.name, container["name"])


def test_the_grace_period_has_room_for_pre_stop_and_drain(manifests: Rendered, tmp_path: Path) -> None:
    config = settings(manifests, tmp_path)
    drain_s = config.router.drain_s
    for pod in pods(manifests):
        command = pod.main["lifecycle"]["preStop"]["exec"]["command"]
        pre_stop_s = float(command[PRE_STOP_S[command[0]]])
        is_router = pod.name in ("expert-pager-router", "expert-pager-keeper")
        needed_s = pre_stop_s + (drain_s + CLOSE_S if is_router else 0)
        assert pod.spec["terminationGracePeriodSeconds"] >= needed_s, pod.name
    worker = manifests.workload("expert-pager-worker").main["lifecycle"]["preStop"]["exec"]["command"]
    assert float(worker[1]) >= config.workers.drain_s + 10  # Ray's command, the last words, the end of the process
    assert config.workers.drain_s >= drain_s  # what a router would let a request take


def test_secrets_are_files_and_nothing_else(manifests: Rendered) -> None:
    for pod in pods(manifests):
        for container in pod.containers:
            for variable in container.get("env", ()):
                value = variable.get("value", "")
                assert "secretKeyRef" not in variable.get("valueFrom", {}), (pod.name, variable)
                if (
                    re.search("TOKEN|PASSWORD|SECRET|REDIS|KEY$", variable["name"])
                    and variable["name"] != "RAY_AUTH_MODE"
                ):
                    assert variable["name"].endswith(("_FILE", "_PATH", "_KEY")), (pod.name, variable)
                    assert value.startswith(SECRET_FOLDERS), (pod.name, variable)
            words = " ".join([*container.get("command", ()), *container.get("args", ())])
            assert not re.search("token|password|secret|redis://", words), (pod.name, words)
        for volume in pod.spec["volumes"]:
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == 0o440
    assert not manifests.of_kind("Secret")
    for config in manifests.of_kind("ConfigMap"):
        assert not re.search(r"requirepass|redis://|token =", json.dumps(config["data"]))


def test_every_member_of_the_ray_cluster_asks_for_the_token(manifests: Rendered) -> None:
    for pod in pods(manifests):
        if pod.labels.get("expert-pager/ray") != "member":
            continue
        env = {variable["name"]: variable.get("value") for variable in pod.main["env"]}
        assert env["RAY_AUTH_MODE"] == "token"
        assert env["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/expert-pager/ray-token"


@pytest.mark.parametrize("overlay", ["gpu", "production"])
def test_a_ray_cluster_offers_a_worker_a_pod_and_nothing_else(render: Render, overlay: str, tmp_path: Path) -> None:
    manifests = render(overlay)
    config = settings(manifests, tmp_path)
    (cluster,) = manifests.of_kind("RayCluster")
    head, (workers,) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "resources" not in head["rayStartParams"]
    assert json.loads(json.loads(workers["rayStartParams"]["resources"])) == {"expert_pager_worker": 1}
    assert workers["replicas"] <= workers["maxReplicas"] == config.workers.count
    assert workers["rayStartParams"]["num-gpus"] == "1"
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    versions = dict(line.split("==") for line in constraints() if "==" in line)
    assert cluster["spec"]["rayVersion"] == versions["ray"]


def constraints() -> list[str]:
    path = Path(__file__).parents[2] / "deploy" / "docker" / "constraints.txt"
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]
