"""The service's configuration: one TOML schema, overridden by environment variables, overridden by flags.

`[workers] count = 2` in the file, `EXPERT_PAGER_WORKERS_COUNT=2` in the environment and `--workers 2` say the same.
Read once at the composition root, by `pager.config_reading`; inner classes take values. Secrets are not in here: Redis
comes from `REDIS_URL` or `REDIS_URL_FILE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from pager.config_reading import ENV_PREFIX, Check, Reading, Schema
from pager.errors import ConfigError
from pager.units import parse_bytes, parse_bytes_or_share

RAY_ADDRESS = "RAY_ADDRESS"  # Ray's own variable


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


def _ray_address(value: str) -> str | None:
    host, _, port = value.rpartition(":")
    ok = value in ("auto", "local") or (bool(host) and "/" not in host and port.isdigit() and 0 < int(port) < 65536)
    return None if ok else "the HOST:PORT of a Ray cluster's head, auto or local"


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
    policy: str = _is(_one_of("lru", "lfu", "lfru", "least-stale"), "least-stale")  # which expert to evict
    state: str | None = None  # folder where each remembers what it holds, to page it in before it is ready again
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
    max_bytes: str | int = _is(_size, "256MiB")  # of the messages of requests in flight
    max_bytes_per_tenant: str | int = _is(_size, "64MiB")
    stream_buffer_chunks: int = _is(_between(1, 1_000_000), 256)
    write_timeout_s: float = _is(_between(0.1, 86400), 30.0)  # a client that reads nothing for so long is cut off
    drain_s: float = _is(_between(0, 86400), 30.0)
    tls_cert: str | None = None  # PEM files; both this and its key, or neither
    tls_key: str | None = None
    tls_client_ca: str | None = None  # clients must show a certificate that this has signed
    health_port: int | None = _is(_between(0, 65535), None)  # health alone and without TLS, for who can not speak it


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """`ray_address` names the Ray cluster to join; `file_sd` is where metrics targets are written.

    Without it RAY_ADDRESS names the cluster, as for any program that uses Ray; without either, and for `local`, Ray is
    started in this process's own session. `auto` is the only cluster that runs on this machine.
    """

    ray_address: str | None = _is(_ray_address, None)
    namespace: str = "expert-pager"
    file_sd: str | None = None

    @property
    def joined(self) -> str | None:
        """The address of the cluster to join; None where Ray is started here."""
        return None if self.ray_address == "local" else self.ray_address


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """What a request gets that names no pool: a size (`"full"`, 32, `"12.5%"`, `"mass:0.9"`, `"64MiB"`), who chooses
    it, and what is done when the answer leaves it (`"0.3"`, `"0.3:exact"`). `path` is the folder of named pools."""

    default_size: str | int = "full"
    default_source: str = _is(_one_of("prefill", "prediction"), "prefill")
    default_drift: str | float | None = None
    path: str | None = None  # None: in Redis where there is one, else in memory


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Of routers and workers, on stderr: text, or a JSON object a line, with request and trace ids. Never prompts."""

    format: str = _is(_one_of("text", "json"), "text")


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    workers: WorkerConfig = field(default_factory=WorkerConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    pools: PoolConfig = field(default_factory=PoolConfig)
    log: LogConfig = field(default_factory=LogConfig)


SCHEMA = Schema({each.name: each.default_factory for each in fields(ServiceConfig)})  # type: ignore[misc]


def load_config(
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    flags: Mapping[str, str] | None = None,
) -> ServiceConfig:
    """Defaults, then the file, then `env`, then `overrides` ({"workers.count": 2}; None means not given).

    `flags` says how the user gave an override. Raises ConfigError for a file that is not readable TOML, an unknown key,
    a value of the wrong type or range, or settings that do not go together.
    """
    reading = read_config(path, env, overrides, flags)
    if reading.problems:
        first, *more = reading.problems
        rest = f"; and {len(more)} more, which `expert-pager config --check` lists" if more else ""
        raise ConfigError(first + rest)
    return config_of(reading)


def read_config(
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Reading:
    """As `load_config`; what is wrong, all of it, is in the answer."""
    env = env or {}
    reading = SCHEMA.read(path, env, overrides or {}, flags or {})
    if env.get(RAY_ADDRESS) and reading.value("cluster.ray_address") in (None, "auto"):
        SCHEMA.take("cluster.ray_address", env[RAY_ADDRESS], RAY_ADDRESS, RAY_ADDRESS, reading)
    if not reading.value("model.path"):
        reading.problems.append(
            "model.path is not set; name a checkpoint folder in the file's [model] section, in "
            f"{ENV_PREFIX}MODEL_PATH, or on the command line"
        )
    reading.problems.extend(_tls_problems(reading))
    return reading


def config_of(reading: Reading) -> ServiceConfig:
    """What is in force, without what has a problem."""
    given: dict[str, dict[str, Any]] = {name: {} for name in SCHEMA.sections}
    for key, setting in reading.settings.items():
        section, name = key.split(".")
        given[section][name] = setting.value
    return ServiceConfig(**{name: section(**given[name]) for name, section in SCHEMA.sections.items()})


def _tls_problems(reading: Reading) -> Iterator[str]:
    cert, key = "router.tls_cert", "router.tls_key"
    has_cert, has_key = (reading.value(each) is not None for each in (cert, key))
    if has_cert != has_key:
        has, lacks = (cert, key) if has_cert else (key, cert)
        origin = reading.settings[has].origin
        yield f"{has} is set and {lacks} is not; TLS takes both, plain text neither (the one comes from {origin})"
    if reading.value("router.tls_client_ca") is not None and not has_cert:
        yield (
            "router.tls_client_ca asks clients for certificates, which takes TLS: set router.tls_cert "
            "and router.tls_key too"
        )
