"""What Prometheus gets to see of a service, and what nobody does."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

MARKER = "xylophone quagmire zephyr"
ID = "request-id-to-look-for"
TENANT = "tenant-to-look-for"

# Every name, with the labels beside `le`, and whether these requests must have moved it.
WORKER = {
    "expert_pager_lookups_total": {"tier", "result"},
    "expert_pager_transfer_bytes_total": {"source", "destination"},
    "expert_pager_page_in_seconds": {"source"},
    "expert_pager_stall_seconds": {"cause"},
    "expert_pager_evictions_total": {"cause"},
    "expert_pager_resident_bytes": {"tier"},
    "expert_pager_reserved_bytes": {"tier"},
    "expert_pager_capacity_bytes": {"tier"},
    "expert_pager_pinned_bytes": {"tier"},
    "expert_pager_quarantined_total": {"tier"},
    "expert_pager_pool_experts": set(),
    "expert_pager_out_of_pool_mass_ratio": set(),
    "expert_pager_predicted_recall_ratio": set(),
    "expert_pager_time_to_first_token_seconds": set(),
    "expert_pager_time_per_output_token_seconds": set(),
    "expert_pager_queue_seconds": set(),
    "expert_pager_step_seconds": set(),
    "expert_pager_requests_running": set(),
    "expert_pager_requests_waiting": set(),
    "expert_pager_requests_total": {"outcome"},
    "expert_pager_kv_used_bytes": set(),
    "expert_pager_kv_capacity_bytes": set(),
}
ROUTER = {
    "expert_pager_router_requests_total": {"method", "code"},
    "expert_pager_router_requests_in_flight": set(),
    "expert_pager_router_tokens_in_flight": set(),
    "expert_pager_router_admission_rejections_total": {"reason"},
    "expert_pager_router_time_to_first_token_seconds": {"tenant"},
    "expert_pager_router_time_per_output_token_seconds": {"tenant"},
    "expert_pager_router_route_seconds": {"source"},
    "expert_pager_router_recall_ratio": {"source"},
    "expert_pager_router_redis_degraded": set(),
    "expert_pager_router_workers": {"state"},
}


@pytest.fixture(scope="module")
def marked(service: Any) -> Any:
    """The service after requests of every fate whose text can be told from everything else."""
    service.wait_until_idle()
    options = {"tenant": TENANT, "max_tokens": 8}
    service.generate(MARKER, pool=12, request_id=ID, **options)
    service.generate(MARKER, request_id=ID, **options)
    service.generate(MARKER, pool=8, stop=[MARKER], **options)
    service.stub.Route(pb.RouteRequest(text=MARKER.encode(), pool=pb.PoolPolicy(count=8)))
    bad: list[tuple[Any, dict[str, Any]]] = [
        (MARKER.encode() + b"\xff", {}),
        (MARKER * 400, {}),
        (MARKER, {"pool": 1}),
        (MARKER, {"stop": [MARKER * 40]}),
        (MARKER, {"temperature": -1.0}),
    ]
    for prompt, more in bad:
        assert MARKER not in service.refusal(prompt, **{**options, **more}).message
    call = service.open(MARKER, pool=8, tenant=TENANT, max_tokens=900)
    next(call)
    call.cancel()
    with contextlib.suppress(grpc.RpcError):
        service.generate(MARKER, timeout=0.05, tenant=TENANT, max_tokens=900)
    service.wait_until_idle()
    return service


def test_every_promised_metric_is_where_the_discovery_file_says(marked: Any) -> None:
    groups = json.loads((marked.folder / "targets.json").read_text())
    assert {group["labels"]["job"] for group in groups} == {"expert-pager-router", "expert-pager-worker"}
    for target, promised in (("router", ROUTER), ("worker-0", WORKER)):
        found = marked.metrics(target)
        for name, labels in promised.items():
            series = [dict(given) for sample, given in found if sample in (name, f"{name}_count")]
            assert series, name
            assert all(set(given) == labels for given in series), name


def test_they_count_what_happened(marked: Any) -> None:
    worker, router = marked.metrics("worker-0"), marked.metrics("router")
    for name in ("lookups_total", "transfer_bytes_total", "page_in_seconds_count", "pool_experts_count"):
        assert worker.total(f"expert_pager_{name}") > 0, name
    for name in ("predicted_recall_ratio_count", "time_to_first_token_seconds_count", "queue_seconds_count"):
        assert worker.total(f"expert_pager_{name}") > 0, name
    assert worker.total("expert_pager_capacity_bytes", tier="device") == marked.plan["slot_bytes"]
    assert worker.total("expert_pager_requests_total", outcome="length") >= 3
    assert worker.total("expert_pager_requests_total", outcome="cancelled") >= 1
    assert router.total("expert_pager_router_requests_total", method="Generate", code="INVALID_ARGUMENT") >= 5
    assert router.total("expert_pager_router_recall_ratio_count") > 0
    assert router.total("expert_pager_router_workers", state="ready") == 1


def test_no_label_names_a_request_a_prompt_a_tenant_or_an_expert(marked: Any) -> None:
    allowed = {
        "le", "tier", "result", "source", "destination", "cause", "outcome", "method", "code", "reason", "state",
        "version", "model", "dtype", "device", "fingerprint", "plan",  # of the one series that says what is served
        "tenant", "from", "to", "daemon", "codeword", "change", "model_name",
        "implementation", "major", "minor", "patchlevel",  # of Python
    }  # fmt: skip
    for target in ("router", "worker-0"):
        found = marked.metrics(target)
        assert {label for _, given in found for label, _ in given} <= allowed
        values = {value for _, given in found for _, value in given}
        for secret in (ID, TENANT, *MARKER.split()):
            assert not any(secret in value for value in values)
        assert len(found) < 1500, "the number of series does not grow with the number of experts"


def test_no_log_has_any_of_a_prompt(marked: Any) -> None:
    found = re.search(r"--log_dir=(\S+)", marked.command_lines())
    assert found, "where Ray keeps what workers write"
    logs = {path: path.read_text(errors="replace") for path in Path(found[1]).rglob("*") if path.is_file()}
    assert any("WorkerActor" in text or "ready after" in text for text in logs.values())
    for where, text in {**logs, Path("the service's own"): marked.log}.items():
        for word in MARKER.split():
            assert word not in text, where
    assert ID in marked.log, "a call is found by its request id"
