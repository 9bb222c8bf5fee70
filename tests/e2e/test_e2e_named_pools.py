"""A pool made from a file of examples, by name, in a running service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
from expert_pager.v1 import expert_pager_pb2 as pb

QUERIES = ("SELECT name FROM users WHERE id = 3;", "SELECT count(*) FROM orders GROUP BY day;")
SONNETS = ("Shall I compare thee to a summer's day?\nThou art more lovely and more temperate.",)


def test_a_tenants_pool_is_made_from_a_file_and_named_in_requests(idle_service: Any, run: Any, tmp_path: Path) -> None:
    service, address = idle_service, idle_service.ready["address"]

    def calibrate(tenant: str, texts: tuple[str, ...]) -> dict[str, Any]:
        file = tmp_path / f"{tenant}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        done = run(
            "calibrate", "--name", "mine", "--examples", file, "--pool", "12.5%",
            "--server", address, "--tenant", tenant, "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    made = {"ada": calibrate("ada", QUERIES), "bob": calibrate("bob", SONNETS)}
    assert made["ada"]["pool"]["digest"] != made["bob"]["pool"]["digest"]
    for tenant, pool in made.items():
        answer = service.generate("Once there was", tenant=tenant, pool=pb.PoolPolicy(name="mine"), max_tokens=4)
        assert answer.usage.mode == pb.ANSWER_MODE_POOL
        assert [list(layer.experts) for layer in answer.usage.pool.layers] == pool["pool"]["layers"]
        assert answer.usage.model_fingerprint == pool["model_fingerprint"]
        with service.client(tenant) as client:
            listed = client.list_pools().pools
        assert [(each.name, each.pool.digest) for each in listed] == [("mine", pool["pool"]["digest"])]
    refused = service.refusal("Once there was", tenant="cyd", pool=pb.PoolPolicy(name="mine"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_POOL")
    with service.client("ada") as client:
        assert client.delete_pool("mine")
    refused = service.refusal("Once there was", tenant="ada", pool=pb.PoolPolicy(name="mine"))
    assert refused.code is grpc.StatusCode.NOT_FOUND
    assert service.generate("Once", tenant="bob", pool=pb.PoolPolicy(name="mine"), max_tokens=1).usage.pool.digest
    with service.client("bob") as client:
        assert client.delete_pool("mine")
