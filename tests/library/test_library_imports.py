"""The library runs where the service's dependencies are not installed."""

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import sys

for name in ("ray", "grpc", "redis", "grpc_health", "grpc_reflection", "google.rpc", "prometheus_client", "typer"):
    sys.modules[name] = None  # importing it raises ImportError

import pager

assert "torch" not in sys.modules, "`import pager` alone should be quick"

import json
import torch

path, pool_size, ids = sys.argv[1], json.loads(sys.argv[2]), torch.tensor(json.loads(sys.argv[3]))
model = pager.load_model(path, dtype="float32", expert_memory="25%", pool_size=pool_size)
options = {"do_sample": False, "max_new_tokens": 32, "eos_token_id": -1, "attention_mask": torch.ones_like(ids)}
print(model.generate(ids, **options)[:, ids.shape[1] :].tolist())
"""


@pytest.mark.slow
def test_exact_generation_without_ray_grpc_or_redis(golden: Any) -> None:
    tokens = run(golden, "null", golden.tensors["prompt1.input_ids"])
    assert tokens == golden.tensors["prompt1.gen32"].tolist()


@pytest.mark.slow
def test_pooled_generation_without_ray_grpc_or_redis(golden_pools: Any) -> None:
    tokens = run(golden_pools, "4", golden_pools.tensors["input_ids"][:, :64])
    assert tokens == golden_pools.tensors["pool4_prompt64.gen32"].tolist()


def run(golden: Any, pool_size: str, ids: Any) -> Any:
    command = [sys.executable, "-c", PROGRAM, str(golden.checkpoint), pool_size, str(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
