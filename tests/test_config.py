from __future__ import annotations

import os
import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from docs.config_reference import example_file, page
from pager.config import SCHEMA, ServiceConfig, load_config, read_config
from pager.errors import ConfigError

EXAMPLE = Path(__file__).parents[1] / "docs" / "service.example.toml"
MODEL = {"model.path": "some/model"}


def written(folder: Path, text: str) -> Path:
    path = folder / "service.toml"
    path.write_bytes(os.fsencode(text))
    return path


def test_defaults_serve_one_worker_on_this_machine_only() -> None:
    config = load_config(overrides=MODEL)
    assert (config.workers.count, config.workers.device) == (1, "auto")
    assert (config.router.host, config.router.port) == ("127.0.0.1", 50051)
    assert config.cluster.ray_address is None
    assert config.model.public_name == "model"


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[model]\npath = 'a'\n[workers]\ncount = 2\nmax_running = 3\nmax_waiting = 4\n")
    env = {"EXPERT_PAGER_WORKERS_COUNT": "5", "EXPERT_PAGER_WORKERS_MAX_RUNNING": "6", "PATH": "/bin"}
    workers = load_config(path, env, {"workers.count": 7, "workers.max_waiting": None}).workers
    assert (workers.count, workers.max_running, workers.max_waiting) == (7, 6, 4)


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[model]\npath = 'a'\nname = 'tiny'\n")
    assert load_config(env={"EXPERT_PAGER_CONFIG": str(path)}).model.public_name == "tiny"


@pytest.mark.parametrize(
    ("text", "value"), [("64MiB", "64MiB"), ("25%", "25%"), ("1048576", 1048576), ("0.5", 0.5), ("", None)]
)
def test_sizes_from_the_environment(text: str, value: object) -> None:
    env = {"EXPERT_PAGER_WORKERS_EXPERT_MEMORY": text}
    assert load_config(env=env, overrides=MODEL).workers.expert_memory == value


def test_what_is_on_or_off_is_true_or_false(tmp_path: Path) -> None:
    path = written(tmp_path, "[model]\npath = 'a'\n[workers]\nprefix_cache = false\n")
    workers = load_config(path, {"EXPERT_PAGER_WORKERS_SHARE_PREFIXES": "True"}).workers
    assert (workers.prefix_cache, workers.share_prefixes) == (False, True)
    with pytest.raises(ConfigError, match=r"WORKERS_PREFIX_CACHE must be true or false, not 'off'"):
        load_config(path, {"EXPERT_PAGER_WORKERS_PREFIX_CACHE": "off"})


def test_a_host_memory_of_zero_is_legal() -> None:
    assert load_config(overrides=MODEL | {"workers.host_memory": 0}).workers.host_memory == 0


def test_whole_numbers_do_for_seconds() -> None:
    assert load_config(overrides=MODEL | {"router.drain_s": 5}).router.drain_s == 5.0


@pytest.mark.parametrize(
    ("setting", "variable", "joined"),
    [
        (None, None, None),
        (None, "", None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        (None, "local", None),
        (None, "auto", "auto"),
        ("auto", None, "auto"),
        ("auto", "[::1]:6379", "[::1]:6379"),
        ("local", "10.0.0.1:6379", None),
        ("head:6379", "10.0.0.1:6379", "head:6379"),
    ],
)
def test_a_setting_names_the_cluster_to_join_or_else_ray_s_own_variable(
    setting: str | None, variable: str | None, joined: str | None
) -> None:
    env = {} if variable is None else {"RAY_ADDRESS": variable}
    assert load_config(env=env, overrides=MODEL | {"cluster.ray_address": setting}).cluster.joined == joined


@pytest.mark.parametrize("address", ["head", ":6379", "head:", "head:0", "head:port", "ray://head:10001", "Auto"])
def test_an_address_of_no_cluster_is_refused(address: str) -> None:
    expected = "must be the HOST:PORT of a Ray cluster's head, auto or local"
    with pytest.raises(ConfigError, match=f"cluster.ray_address {expected}, not {address!r}"):
        load_config(overrides=MODEL | {"cluster.ray_address": address})
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS {expected}"):
        load_config(env={"RAY_ADDRESS": address}, overrides=MODEL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[workers]\ncuont = 1", "'workers.cuont'; did you mean 'workers.count'?"),
        ("[wokers]\ncount = 1", "'wokers'; did you mean 'workers'?"),
        ("[zzz]\n", "known: cluster, log, model, pools, router, workers"),
        ("workers = 3", "unknown section"),
        ("[workers]\ncount = 'two'", r"workers.count in .*service.toml must be a whole number, not 'two'"),
        ("[workers]\ncount = true", "must be a whole number, not True"),
        ("[workers]\ncount = -1", "must be between 0 and 64, not -1"),
        ("[workers]\ncount = 1.5", "must be a whole number, not 1.5"),
        ("[workers]\ndevice = 'tpu'", "must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        ("[workers]\nexpert_memory = 'much'", "a share of all experts such as '25%', not 'much'"),
        ("[workers]\nhost_memory = -1", r"must be 0 \(no host tier\)"),
        ("[workers]\nkv_memory = '25%'", "bytes or a size such as '64MiB'"),
        ("[router]\nport = 70000", "router.port in .* must be between 0 and 65535, not 70000"),
        ("[router]\ndrain_s = nan", "must be between 0 and 86400, not nan"),
        ("[router]\nrouter = 'best'", "one of auto, lexical, trunk, fitted, prefill, not 'best'"),
        ("[router]\nmin_recall = 1.5", "between 0 and 1, not 1.5"),
        ("[pools]\npath = 3", "must be a text, not 3"),
        ("[model]\ndtype = 'int3'", "one of auto, float32, bfloat16, float16, not 'int3'"),
        ("[model", "is not TOML"),
        ("a = " + "[" * 60_000, "is not TOML: it is nested too deep"),
        ("a" + ".a" * 30_000 + " = 1", "is not TOML: line 1 has more than 250 dots"),
        ("[workers]\n" + "count = 1 # all of it\n" * 5_000, "cannot be read: it has more than the 65536 bytes"),
        ("\udcff", "is not TOML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text), overrides=MODEL)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"EXPERT_PAGER_ROUTER_PROT": "1"}, "did you mean 'EXPERT_PAGER_ROUTER_PORT'?"),
        ({"EXPERT_PAGER_ROUTER_PORT": "http"}, "EXPERT_PAGER_ROUTER_PORT must be a whole number, not 'http'"),
        ({"EXPERT_PAGER_WORKERS_STEP_TIMEOUT_S": "soon"}, "must be a number, not 'soon'"),
    ],
)
def test_a_wrong_environment_is_refused_by_name(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(env=env, overrides=MODEL)


def test_service_links_of_kubernetes_are_not_settings() -> None:
    env = {
        "EXPERT_PAGER_SERVICE_HOST": "10.0.0.1",
        "EXPERT_PAGER_SERVICE_PORT_GRPC": "50051",
        "EXPERT_PAGER_PORT": "tcp://10.0.0.1:50051",
        "EXPERT_PAGER_PORT_50051_TCP_ADDR": "10.0.0.1",
        "EXPERT_PAGER_ROUTER_PORT": "tcp://10.0.0.1:50051",
    }
    assert load_config(env=env, overrides=MODEL) == load_config(overrides=MODEL)


def test_missing_file_and_missing_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"model\.path is not set"):
        load_config()


def test_a_value_that_was_renamed_is_read_as_its_new_name(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "[router]\nrouter = 'fused'"), overrides=MODEL).router.router == "prefill"


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'workers.count'"):
        load_config(overrides=MODEL | {"workers.cont": 1})


def test_configs_are_frozen() -> None:
    config: Any = ServiceConfig()
    with pytest.raises(FrozenInstanceError):
        config.router.port = 1


def test_the_example_is_made_from_the_schema_and_sets_every_default() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert text == example_file(), "run `make docs`"
    assert load_config(EXAMPLE) == load_config(overrides={"model.path": "models/emo-tiny"})


def test_what_the_example_shows_of_keys_without_a_default_is_legal(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line.removeprefix("# ") if re.match(r"# \w+ = ", line) else line for line in lines)
    reading = read_config(written(tmp_path, text))
    assert reading.problems == []
    assert reading.settings.keys() == SCHEMA.fields.keys()


def test_every_key_says_what_it_is_and_which_values_it_takes() -> None:
    for key, each in SCHEMA.fields.items():
        about = each.metadata["about"]
        assert len(about.split()) > 3, key
        assert about.endswith("."), key
        assert f"`{key}`" in page()
    assert "Must be between 0 and 64." in page()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tls_cert": "tls.crt"}, r"router\.tls_cert is set and router\.tls_key is not"),
        ({"tls_key": "tls.key"}, r"router\.tls_key is set and router\.tls_cert is not"),
        ({"tls_client_ca": "ca.crt"}, r"set router\.tls_cert and router\.tls_key too"),
    ],
)
def test_half_of_tls_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=MODEL | {f"router.{key}": value for key, value in given.items()})


def test_both_halves_may_come_from_different_places() -> None:
    env = {"EXPERT_PAGER_ROUTER_TLS_CERT": "tls.crt"}
    router = load_config(env=env, overrides=MODEL | {"router.tls_key": "tls.key"}).router
    assert (router.tls_cert, router.tls_key, router.tls_client_ca) == ("tls.crt", "tls.key", None)


OPEN = {"router.host": "0.0.0.0"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_without_keys_only_this_machine_is_listened_to(host: str) -> None:
    (problem,) = read_config(overrides=MODEL | {"router.host": host}).problems
    assert all(word in problem for word in (repr(host), "router.keys", "router.allow_open", "127.0.0.1"))
    with pytest.raises(ConfigError, match=r"router\.allow_open"):
        load_config(overrides=MODEL | {"router.host": host})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_the_loopback_needs_no_keys(host: str) -> None:
    assert load_config(overrides=MODEL | {"router.host": host}).router.is_local


@pytest.mark.parametrize(
    "given",
    [
        {"router.keys": "keys.json"},
        {"router.allow_open": True},
        {"router.jwt_secret": "secret", "router.jwt_audience": "service"},
        {"router.jwt_jwks": "jwks.json", "router.jwt_audience": "service"},
    ],
)
def test_with_keys_or_where_it_is_said_any_address_is_listened_to(given: dict[str, Any]) -> None:
    assert load_config(overrides=MODEL | OPEN | given).router.asks_for_keys != given.get("router.allow_open", False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"router.jwt_secret": "secret"}, "router.jwt_audience is not set"),
        ({"router.jwt_audience": "service"}, "router.jwt_audience would have no effect"),
        ({"router.jwt_issuer": "issuer"}, "router.jwt_issuer would have no effect"),
        ({"router.open_metrics": True}, "router.open_metrics would have no effect"),
        ({"router.allow_open": "yes"}, "router.allow_open must be true or false, not 'yes'"),
        ({"router.allow_open": 1}, "router.allow_open must be true or false, not 1"),
        ({"router.max_requests": True}, "router.max_requests must be a whole number, not True"),
    ],
)
def test_settings_of_callers_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    (problem,) = read_config(overrides=MODEL | given).problems
    assert problem.startswith(message)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("FALSE", False), ("", None)])
def test_switches_from_the_environment(text: str, value: bool | None) -> None:
    env = {"EXPERT_PAGER_ROUTER_TRUST_TENANT_HEADER": text, "EXPERT_PAGER_API_KEY": "epk_of-the-client-commands"}
    assert load_config(env=env, overrides=MODEL).router.trust_tenant_header is value
