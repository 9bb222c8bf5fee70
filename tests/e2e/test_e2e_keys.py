"""A service that asks for keys, as its users start and call it."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from pager import Client, SamplingParams
from pager.errors import PermissionDenied, QuotaExceeded, Unauthenticated
from tests.support.files import EMO_TINY

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_keys_from_their_making_to_their_end(serve: Callable[..., Any], run: Run, tmp_path: Path, until: Any) -> None:
    keys = tmp_path / "keys.json"

    def made(tenant: str, *options: object) -> str:
        done = run("keys", "add", "--tenant", tenant, "--keys", keys, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    acme, initech, house = (
        made("acme", "--requests-per-minute", 1000, "--requests-per-day", 12),
        made("initech"),
        made("house", "--role", "operator", "--role", "metrics"),
    )
    options = ("--dtype", "float32", "--expert-memory", "25%", "--host", "0.0.0.0", "--keys", keys)
    audit = tmp_path / "audit.jsonl"
    with serve(tmp_path / "service", EMO_TINY, *options, EXPERT_PAGER_ROUTER_AUDIT_LOG=str(audit)) as service:
        address = service.ready["address"].replace("0.0.0.0", "127.0.0.1")
        url = service.ready["http_url"].replace("0.0.0.0", "127.0.0.1")
        with Client(address) as nobody, pytest.raises(Unauthenticated):
            nobody.model()
        with Client(address, api_key=acme) as client:
            assert client.generate("SELECT name", SamplingParams(max_tokens=4)).text()
            with pytest.raises(PermissionDenied):
                client.residency()
        with Client(address, api_key=house) as operator:
            assert len(operator.residency()) == 1
        with openai.OpenAI(base_url=f"{url}/v1", api_key=acme, max_retries=0, timeout=120) as http:
            raw = http.completions.with_raw_response.create(model="emo-tiny", prompt="SELECT name", max_tokens=4)
            assert raw.headers["x-ratelimit-limit-requests"] == "1000"
        stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="epk_none", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        metrics = service.ready["metrics_url"].replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(metrics, timeout=30)
        asked = urllib.request.Request(metrics, headers={"authorization": f"Bearer {house}"})
        with urllib.request.urlopen(asked, timeout=30) as reply:
            assert b"expert_pager_router_calls_total" in reply.read()
        with Client(address, api_key=acme) as client:
            for _ in range(10):
                client.model()
            with pytest.raises(QuotaExceeded) as caught:
                client.model()
            assert caught.value.retry_after_s is not None
            (entry,) = (each for each in json.loads(keys.read_text())["keys"] if each["tenant"] == "acme")
            assert run("keys", "revoke", entry["id"], "--keys", keys).returncode == 0
            revoked_s = time.monotonic()

            def is_refused() -> bool:
                with pytest.raises((Unauthenticated, QuotaExceeded)) as caught:
                    client.model()
                return isinstance(caught.value, Unauthenticated)

            until(is_refused, 30)
            print(f"refused {time.monotonic() - revoked_s:.2f} s after it was revoked")
        refused = run("drain", "worker-0", "--server", address, EXPERT_PAGER_API_KEY=initech)
        assert "the key does not permit this" in refused.stderr
        with Client(address, api_key=house) as operator, Client(address, api_key=initech) as other:
            answer = other.generate("SELECT name", SamplingParams(max_tokens=200, ignore_eos=True))
            next(answer)
            drained = run("drain", "worker-0", "--server", address, EXPERT_PAGER_API_KEY=house)
            assert (drained.returncode, drained.stdout) == (0, "worker-0 drains\n"), drained.stderr
            assert sum(len(chunk.token_ids) for chunk in answer) >= 199, "what was in flight has ended by itself"
            until(lambda: operator.residency()[0].state != "ready", 60)
            until(lambda: operator.residency()[0].state == "ready", 120)
            assert other.generate("SELECT name", SamplingParams(max_tokens=4)).text()
        ended = run("drain", "--router", "--server", address, "--json", EXPERT_PAGER_API_KEY=house)
        assert json.loads(ended.stdout) == {"draining": "router"}
        assert service.process.wait(60) == 0
        written = audit.read_text()
        outcomes = {(line["what"], line["outcome"]) for line in map(json.loads, written.splitlines())}
        assert {("GetResidency", "OK"), ("GetResidency", "PERMISSION_DENIED")} <= outcomes
        assert {("GetModel", "UNAUTHENTICATED"), ("Models", "UNAUTHENTICATED")} <= outcomes
        assert {("Drain", "OK"), ("Drain", "PERMISSION_DENIED")} <= outcomes
        for text in (written, service.log):
            assert not any(key in text for key in (acme, initech, house, "epk_none", "SELECT name"))
        assert "callers need a key" in service.log
