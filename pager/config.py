"""The service's configuration: one TOML schema, overridden by environment variables, overridden by flags.

`[workers] count = 2` in the file, `EXPERT_PAGER_WORKERS_COUNT=2` in the environment and `--workers 2` say the same.
Read once at the composition root; inner classes take values. Secrets are not in here: Redis comes from `REDIS_URL` or
`REDIS_URL_FILE`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pager.errors import ConfigError
from pager.units import parse_bytes, parse_bytes_or_share

ENV_PREFIX = "EXPERT_PAGER_"
ENV_FILE = "EXPERT_PAGER_CONFIG"  # names the file, where no path is given

Check = Callable[[Any], str | None]  # what was expected, when the value is not it


def _between(low: float, high: float = float("inf")) -> Check:
    expected = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
    return lambda value: None if low <= value <= high else expected


def _one_of(*choices: str) -> Check:
    return lambda value: None if value in choices else "one of " + ", ".join(choices)


def _device(value: str) -> str | None:
    ok = value in ("auto", "cpu", "cuda") or (value.startswith("cuda:") and value[5:].isdigit())
    return None if ok else "auto, cpu, cuda or cuda:N"


def _size(value: str | int) -> str | None:
    try:
        parse_bytes(value)
    except ConfigError:
        return "bytes or a size such as '64MiB'"
    return None


def _size_or_share(value: str | int | float) -> str | None:
    try:
        parse_bytes_or_share(value, 2**60)
    except ConfigError:
        return "bytes, a size such as '64MiB' or a share of all experts such as '25%'"
    return None


def _host_size(value: str | int | float) -> str | None:
    expected = None if value in (0, "0") else _size_or_share(value)
    return expected and f"0 (no host tier), {expected}"


def _is(check: Check, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`path` is a checkpoint folder; `name` is what clients call the model (None: the folder's name)."""

    path: str = ""
    dtype: str | None = _is(_one_of("auto", "float32", "bfloat16", "float16"), None)
    name: str | None = None

    @property
    def public_name(self) -> str:
        return self.name or Path(self.path).resolve().name


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Budgets are per worker, except `host_memory`, which all workers of a node share. None: the planner chooses."""

    count: int = _is(_between(0, 64), 1)  # 0: use the workers that another router started (with cluster.ray_address)
    per_node: int | None = _is(_between(1, 64), None)  # of several nodes; None: all are on one node
    device: str = _is(_device, "auto")
    expert_memory: str | int | float | None = _is(_size_or_share, None)
    host_memory: str | int | float | None = _is(_host_size, None)
    kv_memory: str | int | None = _is(_size, None)
    max_running: int = _is(_between(1, 4096), 32)
    max_waiting: int = _is(_between(0, 65536), 256)
    num_threads: int | None = _is(_between(1, 1024), None)
    step_timeout_s: float = _is(_between(0.1, 86400), 30.0)
    drain_s: float = _is(_between(0, 86400), 30.0)  # what a worker's requests have to end after its SIGTERM
    metrics_port: int = _is(_between(0, 65535), 0)  # 0: any free port, published in the file_sd file
    policy: str = _is(_one_of("lru", "lfu", "lfru", "least-stale"), "lru")  # which expert to evict
    trace: str | None = None  # folder for a record of every access to an expert, a file a worker; see `replay`

    @property
    def sharing_a_node(self) -> int:
        """Among how many a node's cores and memory are divided."""
        return self.per_node or max(1, self.count)


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Bounds are on what is in flight, tokens being prompt plus max_tokens; beyond one a request is refused at once."""

    host: str = "127.0.0.1"
    port: int = _is(_between(0, 65535), 50051)
    metrics_port: int = _is(_between(0, 65535), 9464)
    metric_tenants: str = ""  # "acme, initech": the tenants that metrics name; all others are `other`
    # The routing-only pass. auto: fitted where the model has a router.safetensors, else trunk; fused: none.
    router: str = _is(_one_of("auto", "lexical", "trunk", "fitted", "fused"), "auto")
    min_recall: float | None = _is(_between(0, 1), None)  # below it the next better source; None: 0.5, if fitted
    device: str = _is(_device, "cpu")  # where that pass runs
    max_requests: int = _is(_between(1, 1_000_000), 256)
    max_tokens: int = _is(_between(1), 1 << 20)
    max_requests_per_tenant: int = _is(_between(1, 1_000_000), 128)
    max_tokens_per_tenant: int = _is(_between(1), 1 << 19)
    stream_buffer_chunks: int = _is(_between(1, 1_000_000), 256)
    write_timeout_s: float = _is(_between(0.1, 86400), 30.0)  # a client that reads nothing for so long is cut off
    drain_s: float = _is(_between(0, 86400), 30.0)
    tls_cert: str | None = None  # PEM files; both this and its key, or neither
    tls_key: str | None = None
    tls_client_ca: str | None = None  # clients must show a certificate that this has signed
    health_port: int | None = _is(_between(0, 65535), None)  # health alone and without TLS, for who can not speak it


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """`ray_address` None starts Ray in this process's own session; `file_sd` is where metrics targets are written."""

    ray_address: str | None = None
    namespace: str = "expert-pager"
    file_sd: str | None = None


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """What a request gets that names no pool: a size (`"full"`, 32, `"12.5%"`, `"mass:0.9"`, `"64MiB"`), who chooses
    it, and what is done when the answer leaves it (`"0.3"`, `"0.3:exact"`). `path` is the folder of named pools."""

    default_size: str | int = "full"
    default_source: str = _is(_one_of("prefill", "prediction"), "prefill")
    default_drift: str | float | None = None
    path: str | None = None  # None: in Redis where there is one, else in memory


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    pools: PoolConfig = field(default_factory=PoolConfig)


_SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "workers": WorkerConfig,
    "router": RouterConfig,
    "cluster": ClusterConfig,
    "pools": PoolConfig,
}
_KEYS: dict[str, Field[Any]] = {
    f"{name}.{each.name}": each for name, kind in _SECTIONS.items() for each in fields(kind)
}
_HINTS: dict[str, Any] = {
    f"{name}.{key}": hint for name, kind in _SECTIONS.items() for key, hint in get_type_hints(kind).items()
}


def load_config(
    path: Path | None = None, env: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> ServiceConfig:
    """Defaults, then the file, then `env`, then `overrides` ({"workers.count": 2}; None means not given).

    Raises ConfigError for a file that is not readable TOML, an unknown key, or a value of the wrong type or range.
    """
    env = env or {}
    if path is None and env.get(ENV_FILE):
        path = Path(env[ENV_FILE])
    values = _from_file(path) if path is not None else {}
    values |= _from_environment(env)
    values |= {
        _known(key, "option"): _checked(key, value, key)
        for key, value in (overrides or {}).items()
        if value is not None
    }
    if not values.get("model.path"):
        raise ConfigError(
            "model.path is not set; name a checkpoint folder in the file's [model] section, in "
            f"{ENV_PREFIX}MODEL_PATH, or on the command line"
        )
    _check_tls(values)
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    for key, value in values.items():
        section, name = key.split(".")
        sections[section][name] = value
    return ServiceConfig(**{name: kind(**sections[name]) for name, kind in _SECTIONS.items()})


def _check_tls(values: Mapping[str, Any]) -> None:
    has_cert, has_key = (values.get(f"router.tls_{name}") is not None for name in ("cert", "key"))
    if has_cert != has_key:
        has, lacks = ("tls_cert", "tls_key") if has_cert else ("tls_key", "tls_cert")
        raise ConfigError(f"router.{has} is set and router.{lacks} is not; TLS takes both, plain text neither")
    if values.get("router.tls_client_ca") is not None and not has_cert:
        raise ConfigError(
            "router.tls_client_ca asks clients for certificates, which takes TLS: set router.tls_cert "
            "and router.tls_key too"
        )


def _from_file(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} can not be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not TOML: {error}") from None
    values = {}
    for section, entries in document.items():
        if section not in _SECTIONS or not isinstance(entries, dict):
            raise _unknown(section, _SECTIONS, f"section in {path}")
        for name, value in entries.items():
            key = _known(f"{section}.{name}", f"key in {path}")
            values[key] = _checked(key, value, f"{key} in {path}")
    return values


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    by_variable = {ENV_PREFIX + key.replace(".", "_").upper(): key for key in _KEYS}
    values = {}
    for variable, text in env.items():
        if not variable.startswith(ENV_PREFIX) or variable == ENV_FILE or _is_service_link(variable, text):
            continue
        if variable not in by_variable:
            raise _unknown(variable, by_variable, "environment variable")
        if text.strip():  # an empty variable is one that is not set
            key = by_variable[variable]
            values[key] = _checked(key, _from_text(text.strip(), _HINTS[key]), variable)
    return values


def _is_service_link(variable: str, text: str) -> bool:
    """Kubernetes gives every pod EXPERT_PAGER_PORT=tcp://… and the like when a Service is called expert-pager."""
    return text.startswith(("tcp://", "udp://")) or _SERVICE_LINK.search(variable) is not None


_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP)(_|$)")


def _from_text(text: str, hint: Any) -> Any:
    """`text` as the first of int, float and str that the key takes; `_checked` refuses what is none of them."""
    for kind in (int, float):
        if kind in _kinds(hint):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _checked(key: str, value: Any, said: str) -> Any:
    kinds = _kinds(_HINTS[key])
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    if type(value) not in kinds:
        expected = " or ".join(_KIND_NAMES[kind] for kind in kinds if kind in _KIND_NAMES)
        raise ConfigError(f"{said} must be {expected}, not {value!r}")
    check: Check | None = _KEYS[key].metadata.get("check")
    expected_value = check(value) if check and value is not None else None
    if expected_value:
        raise ConfigError(f"{said} must be {expected_value}, not {value!r}")
    return value


_KIND_NAMES: dict[type, str] = {str: "a text", int: "a whole number", float: "a number"}


def _kinds(hint: Any) -> tuple[type, ...]:
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _known(key: str, what: str) -> str:
    if key not in _KEYS:
        raise _unknown(key, _KEYS, what)
    return key


def _unknown(name: str, known: Iterable[str], what: str) -> ConfigError:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))
    return ConfigError(f"unknown {what}: {name!r}; {hint}")
