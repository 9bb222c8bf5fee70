"""A service's own life: ready in time, at work on a checkpoint with a damaged expert, and gone without a trace."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from tokenizers import Tokenizer

from pager.predict.trunk import TrunkPredictor
from pager.store.checkpoint import Checkpoint
from pager.store.expert_source import PackedExperts
from pager.store.pack import record
from pager.store.pack_format import PACK_NAME
from pager.types import ExpertKey
from router_service.app import EXIT_RAY_LOST

PROMPT = "The parties agree as follows: "
NOT_SERVING = 2
DAMAGED = ExpertKey(layer=3, expert=77)
READY_WITHIN_S = 30


def pool_with(*experts: int) -> pb.PoolPolicy:
    """The first ten experts of every layer, and these of layer 3."""
    layers = [list(range(10)) for _ in range(6)]
    layers[DAMAGED.layer] = sorted({*layers[DAMAGED.layer], *experts})
    fixed = pb.FixedPool(layers=[pb.LayerExperts(experts=layer) for layer in layers])
    return pb.PoolPolicy(experts=fixed)


@pytest.fixture(scope="module")
def packed(
    model: Path, run: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The shipped model, packed; then one byte of one expert is flipped."""
    path = tmp_path_factory.mktemp("packed") / "emo-packed"
    done = run("pack", model, path)
    assert done.returncode == 0, done.stderr
    source = PackedExperts(path / PACK_NAME)
    offset = source.offset_of(DAMAGED) + 1000
    source.close()
    flip_bit(path / PACK_NAME, offset)
    return path


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture(scope="module")
def packed_service(packed: Path, serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = (packed, "--expert-memory", "25%", "--host-memory", "10%", "--pool", "12.5%")
    patient = {"EXPERT_PAGER_ROUTER_DRAIN_S": "600"}  # the machine may be busy
    with serve(tmp_path_factory.mktemp("serve-packed") / "packed", *options, **patient) as running:
        yield running


def test_it_is_ready_in_time(packed_service: Any) -> None:
    """On a machine of its own: what others take of this one meanwhile makes it no slower."""
    assert packed_service.ready_after_s - packed_service.others_s < READY_WITHIN_S


def test_a_damaged_expert_fails_who_needs_it_and_nobody_else(packed_service: Any) -> None:
    others = packed_service.open(PROMPT, pool=pool_with(), max_tokens=120)
    next(others)
    for reason in ("CHECKSUM_MISMATCH", "EXPERT_UNAVAILABLE"):  # then it is quarantined for a while
        refused = packed_service.refusal(PROMPT, pool=pool_with(DAMAGED.expert), max_tokens=4)
        assert (refused.code, refused.reason) == (grpc.StatusCode.DATA_LOSS, reason)
        assert "expert 77 of layer 3" in refused.message
        assert "expert-pager verify" in refused.message
        assert ".pack" not in refused.message, "a client is told nothing of the server's files"
    assert [len(message.token_ids) for message in others] == [1] * 119
    answer = packed_service.generate(PROMPT, pool=pool_with(76, 78), max_tokens=4)
    assert answer.usage.completion_tokens == 4
    assert packed_service.worker_metrics().total("expert_pager_quarantined_total") >= 1
    packed_service.wait_until_idle()


def test_a_flipped_byte_of_a_recorded_checkpoint_is_found_when_it_is_read(
    model: Path, run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(model, tmp_path / "recorded"))
    record(path)
    router = TrunkPredictor.load(path)
    prompt_ids = Tokenizer.from_file(str(path / "tokenizer.json")).encode(PROMPT).ids
    # What layer 0's router wants is certain: no expert has written before it.
    wanted = int(router.scores(prompt_ids).mean_LR[0].argmax())
    with Checkpoint.open(path) as checkpoint:
        spec = checkpoint.specs[f"model.layers.0.mlp.experts.{wanted}.up_proj.weight"]
    flip_bit(path / spec.file, spec.offset + 100)
    done = run("generate", PROMPT, "--model", path, "--max-tokens", 2)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"expert {wanted} of layer 0" in done.stderr
    assert "does not match its checksum" in done.stderr


def test_sigterm_finishes_what_runs_and_leaves_nothing(packed_service: Any, until: Callable[..., None]) -> None:
    service = packed_service
    processes = service.processes()
    found = re.search(r"--log_dir=(/tmp/expert-pager-[^/ ]+)", service.command_lines())
    assert found
    assert Path(found[1]).is_dir()
    assert [name for name in os.listdir("/dev/shm") if service.namespace in name], "the host tier"
    call = service.open(PROMPT, pool=8, max_tokens=900)
    next(call)
    service.process.terminate()
    until(lambda: service.health() == service.health("") == NOT_SERVING, 20)
    refused = service.refusal(PROMPT, pool=8, max_tokens=2)
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
    assert refused.retry_s is not None
    rest = list(call)
    assert (1 + len(rest), rest[-1].usage.completion_tokens) == (900, 900)
    service.channel.close()
    assert service.process.wait(60) == 0
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
    assert not Path(found[1]).exists()
    assert not [name for name in os.listdir("/dev/shm") if service.namespace in name]
    assert "Traceback" not in service.log


@pytest.mark.parametrize(("daemon", "drain_s"), [("gcs_server", 600), ("raylet", 1)])
def test_a_service_that_loses_a_daemon_of_its_ray_drains_and_exits_to_be_started_again(
    daemon: str, drain_s: int, model: Path, serve: Callable[..., Any], until: Callable[..., None], tmp_path: Path
) -> None:
    options = (model, "--expert-memory", "25%", "--host-memory", "10%", "--pool", "12.5%")
    with serve(tmp_path / daemon, *options, EXPERT_PAGER_ROUTER_DRAIN_S=str(drain_s)) as service:
        processes = service.processes()
        found = re.search(r"--log_dir=(/tmp/expert-pager-[^/ ]+)", service.command_lines())
        assert found
        [lost] = [each for each in processes if each.name() == daemon]
        call = service.open(PROMPT, pool=8, max_tokens=900, timeout=270)
        next(call)
        lost.kill()
        until(lambda: service.health() == service.health("") == NOT_SERVING, 120)
        assert service.metrics("router").total("expert_pager_router_ray_lost_total", daemon=daemon) == 1
        refused = service.refusal(PROMPT, pool=8, max_tokens=2)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        if drain_s > 1:
            rest = list(call)
            assert (1 + len(rest), rest[-1].usage.completion_tokens) == (900, 900)
        else:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert service.refusal_of(caught.value).reason == "NOT_READY"
        service.channel.close()
        assert service.process.wait(120) == EXIT_RAY_LOST
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert alive == []
        assert not Path(found[1]).exists()
        assert not [name for name in os.listdir("/dev/shm") if service.namespace in name]
        assert f"Ray's {daemon} has ended" in service.log
        assert "Traceback" not in service.log


def test_a_service_whose_process_that_is_connected_to_ray_ends_exits_to_be_started_again(
    model: Path, serve: Callable[..., Any], tmp_path: Path
) -> None:
    """Ray's daemons and the workers end with it."""
    options = (model, "--expert-memory", "25%", "--pool", "12.5%")
    with serve(tmp_path / "driver", *options, EXPERT_PAGER_ROUTER_DRAIN_S="20") as service:
        processes = service.processes()
        [driver] = [each for each in processes if "ray_process" in " ".join(each.cmdline())]
        call = service.open(PROMPT, pool=8, max_tokens=900, timeout=270)
        next(call)
        driver.kill()
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert service.refusal_of(caught.value).reason in ("WORKER_LOST", "NOT_READY")
        service.channel.close()
        assert service.process.wait(120) == EXIT_RAY_LOST
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert alive == []
        assert "Ray's driver has ended" in service.log
        assert "Traceback" not in service.log


def test_a_daemon_of_ray_that_is_lost_while_workers_start_ends_the_start(
    model: Path, launch: Callable[..., psutil.Popen], until: Callable[..., None]
) -> None:
    options = ("--expert-memory", "25%", "--device", "cpu", "--port", 0, "--http-port", 0, "--metrics-port", 0)
    process = launch("serve", model, *options, EXPERT_PAGER_CLUSTER_NAMESPACE=f"e2e-{os.getpid()}-lost")
    try:
        until(lambda: any("ray::WorkerActor" in " ".join(each.cmdline()) for each in process.children(True)), 120)
        processes = process.children(recursive=True)
        [lost] = [each for each in processes if each.name() == "gcs_server"]
        lost.kill()
        written, _ = process.communicate(timeout=60)
        assert process.returncode == EXIT_RAY_LOST
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert alive == []
    finally:
        if process.poll() is None:
            for each in [*process.children(recursive=True), process]:
                each.kill()
    assert "Ray's gcs_server has ended" in written
    assert "Traceback" not in written
