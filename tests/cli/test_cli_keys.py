"""`expert-pager keys`: what it prints, what it keeps, and what it says of things that cannot be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pager.cli.pools import api_key
from pager.errors import ConfigError
from tests.cli.conftest import Run
from tests.support.processes import start_redis


def test_a_key_is_printed_once_and_kept_as_its_hash(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    options = ("--keys", path, "--tenant", "acme")
    done = run("keys", "add", *options, "--role", "inference", "--role", "operator", "--tokens-per-day", 5000)
    key = done.stdout.strip()
    assert (done.returncode, done.stdout) == (0, f"{key}\n")
    assert key.startswith("epk_")
    assert len(key) > 40
    (entry,) = json.loads(path.read_text())["keys"]
    assert entry["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert (entry["roles"], entry["limits"]) == (["inference", "operator"], {"tokens_per_day": 5000})
    assert done.stderr == f"added {entry['id']} for tenant acme: inference, operator\n"
    assert path.stat().st_mode & 0o777 == 0o600
    listed = run("keys", "list", "--keys", path, "--json").stdout
    assert json.loads(listed)["keys"][0] | {"created": ""} == {
        "id": entry["id"], "tenant": "acme", "certificate": None, "jwt": False, "kind": "key", "created": "",
        "roles": ["inference", "operator"], "priority": 0, "weight": 1.0, "guaranteed_share": 0.0,
        "limits": {"requests_in_flight": None, "tokens_in_flight": None, "requests_per_minute": None,
                   "requests_per_day": None, "tokens_per_minute": None, "tokens_per_day": 5000},
    }  # fmt: skip
    for text in (listed, run("keys", "list", "--keys", path).stdout, path.read_text()):
        assert key not in text
    assert "sha256" not in listed
    assert run("keys", "revoke", entry["id"], "--keys", path).stdout == f"revoked {entry['id']}\n"
    assert json.loads(path.read_text()) == {"keys": []}


def test_certificates_and_tokens_need_no_key(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for identity in (("--certificate", "client.example"), ("--jwt",)):
        done = run("keys", "add", "--keys", path, "--tenant", "acme", *identity)
        assert (done.returncode, done.stdout) == (0, "")
    shown = run("keys", "list", "--keys", path).stdout
    assert "certificate client.example" in shown
    assert "token" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "--tenant", "a b"), "tenant"),
        (("add", "--tenant", "a", "--role", "root"), "inference, operator, metrics"),
        (("add", "--tenant", "a", "--jwt", "--certificate", "x"), "give only one"),
        (("add", "--tenant", "a", "--tokens-per-day", "0"), "tokens-per-day"),
        (("revoke", "nobody"), "there is no key 'nobody'"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    path = tmp_path / "keys.json"
    run("keys", "add", "--keys", path, "--tenant", "acme")
    before = path.read_bytes()
    done = run("keys", *arguments, "--keys", path)
    assert done.returncode in (1, 2)
    assert said in " ".join(done.stderr.split())
    assert path.read_bytes() == before


def test_a_damaged_file_and_no_store_are_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{")
    done = run("keys", "add", "--keys", path, "--tenant", "acme")
    assert (done.returncode, done.stdout, path.read_text()) == (1, "", "{")
    assert str(path) in done.stderr
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert "REDIS_URL" in run("keys", "list").stderr
    assert "cannot be written" in run("keys", "add", "--tenant", "a", "--keys", tmp_path / "none" / "keys.json").stderr


def test_keys_in_redis(run: Run, redis_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redis = start_redis(redis_server, tmp_path)
    try:
        monkeypatch.setenv("REDIS_URL", redis.url)
        monkeypatch.setattr("router_service.redis.TIMEOUT_S", 60.0)
        assert run("keys", "add", "--tenant", "acme").stdout.startswith("epk_")
        (shown,) = json.loads(run("keys", "list", "--json").stdout)["keys"]
        assert run("keys", "revoke", shown["id"]).returncode == 0
        assert json.loads(run("keys", "list", "--json").stdout) == {"keys": []}
    finally:
        redis.kill()
    monkeypatch.setattr("router_service.redis.TIMEOUT_S", 0.25)
    assert "cannot be read" in run("keys", "list").stderr


def test_the_commands_of_a_client_take_the_key_from_the_environment_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("epk_in-a-file\n")
    assert api_key({}) is None
    assert api_key({"EXPERT_PAGER_API_KEY": "epk_x"}) == "epk_x"
    assert api_key({"EXPERT_PAGER_API_KEY_FILE": str(path)}) == "epk_in-a-file"
    wrong: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
        ({"EXPERT_PAGER_API_KEY": "epk_x", "EXPERT_PAGER_API_KEY_FILE": str(path)}, lambda said: "keep one" in said),
        ({"EXPERT_PAGER_API_KEY_FILE": str(tmp_path / "none")}, lambda said: "cannot be read" in said),
    ]
    for env, is_said in wrong:
        with pytest.raises(ConfigError) as caught:
            api_key(env)
        assert is_said(caught.value.message)
        assert "epk_" not in caught.value.message
