"""Reads settings from a TOML file, the environment and flags, each overriding the one before. Knows no single setting.

Everything that is wrong is found in one reading, and says where it stands.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pager.errors import ConfigError
from pager.memory.units import parse_bytes, parse_bytes_or_share
from pager.reading import read_bounded, reason_of

Check = Callable[[Any], str | None]  # what was expected, when the value is not it

MAX_FILE_BYTES = 1 << 16  # every setting there is takes a few kilobytes
MAX_DOTS = 250  # of a line: the parser needs memory in the square of a key's parts
ENV_PREFIX = "EXPERT_PAGER_"
ENV_FILE = "EXPERT_PAGER_CONFIG"  # names the file, where no path is given
_KIND_NAMES: dict[type, str] = {str: "a text", int: "a whole number", float: "a number"}
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP)(_|$)")


@dataclass(frozen=True, slots=True)
class Setting:
    """A value, and where it was given: a file, an environment variable or a flag."""

    value: Any
    origin: str


@dataclass(slots=True)
class Reading:
    """What was given, by key ("workers.count"), and all that is wrong with it, a sentence each."""

    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def value(self, key: str) -> Any:
        """None where it was not given."""
        return self.settings[key].value if key in self.settings else None


class Schema:
    """Sections of settings, a dataclass each; a field's metadata may have a `check`."""

    def __init__(self, sections: Mapping[str, type[Any]]) -> None:
        self.sections = sections
        self.fields: dict[str, Field[Any]] = {}
        self._hints: dict[str, Any] = {}
        for name, section in sections.items():
            hints = get_type_hints(section)
            for each in fields(section):
                self.fields[f"{name}.{each.name}"] = each
                self._hints[f"{name}.{each.name}"] = hints[each.name]
        self._by_variable = {ENV_PREFIX + key.replace(".", "_").upper(): key for key in self.fields}

    def read(
        self,
        path: Path | None,
        env: Mapping[str, str],
        overrides: Mapping[str, Any],
        flags: Mapping[str, str],
    ) -> Reading:
        """`overrides` by key, None for one that is not given; `flags` says how the user gave it."""
        reading = Reading()
        if path is None and env.get(ENV_FILE):
            path = Path(env[ENV_FILE])
        if path is not None:
            self._read_file(path, reading)
        self._read_environment(env, reading)
        for key, value in overrides.items():
            if value is not None and self._is_known(key, "option", reading):
                said = flags.get(key, key)
                self.take(key, value, said, said, reading)
        return reading

    def _read_file(self, path: Path, reading: Reading) -> None:
        try:
            document = _parse_toml(read_bounded(path, MAX_FILE_BYTES))
        except OSError as error:
            reading.problems.append(f"config file {path} cannot be read: {reason_of(error)}")
            return
        except ValueError as error:
            reading.problems.append(f"config file {path} is not TOML: {error}")
            return
        for section, entries in document.items():
            if section not in self.sections or not isinstance(entries, dict):
                reading.problems.append(_unknown(section, self.sections, f"section in {path}"))
                continue
            for name, value in entries.items():
                key = f"{section}.{name}"
                if self._is_known(key, f"key in {path}", reading):
                    self.take(key, value, f"{key} in {path}", str(path), reading)

    def _read_environment(self, env: Mapping[str, str], reading: Reading) -> None:
        for variable, text in env.items():
            if not variable.startswith(ENV_PREFIX) or variable == ENV_FILE or _is_service_link(variable, text):
                continue
            if variable not in self._by_variable:
                reading.problems.append(_unknown(variable, self._by_variable, "environment variable"))
            elif text.strip():  # an empty variable is one that is not set
                key = self._by_variable[variable]
                self.take(key, _from_text(text.strip(), self._hints[key]), variable, variable, reading)

    def _is_known(self, key: str, what: str, reading: Reading) -> bool:
        if key not in self.fields:
            reading.problems.append(_unknown(key, self.fields, what))
        return key in self.fields

    def take(self, key: str, value: Any, said: str, origin: str, reading: Reading) -> None:
        """Adds a setting to `reading`, or what is wrong with it."""
        kinds = _kinds(self._hints[key])
        if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
            value = float(value)
        if isinstance(value, str):
            value = self.fields[key].metadata.get("renamed", {}).get(value, value)
        check: Check | None = self.fields[key].metadata.get("check")
        expected = None
        if type(value) not in kinds:
            expected = " or ".join(_KIND_NAMES[kind] for kind in kinds if kind in _KIND_NAMES)
        elif check is not None:
            expected = check(value)
        if expected:
            reading.problems.append(f"{said} must be {expected}, not {shown(value)}")
        else:
            reading.settings[key] = Setting(value, origin)


def _parse_toml(data: bytes) -> dict[str, Any]:
    """Raises ValueError, also for what takes the parser a stack or a memory without end."""
    text = data.decode("utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.count(".") > MAX_DOTS:
            raise ValueError(f"line {number} has more than {MAX_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def shown(value: Any) -> str:
    """As a message may have it: a file's content, given where its name belongs, may be a secret."""
    return "a text of several lines" if isinstance(value, str) and "\n" in value.strip() else repr(value)


def _is_service_link(variable: str, text: str) -> bool:
    """Kubernetes gives every pod EXPERT_PAGER_PORT=tcp://… and the like when a Service is called expert-pager."""
    return text.startswith(("tcp://", "udp://")) or _SERVICE_LINK.search(variable) is not None


def _from_text(text: str, hint: Any) -> Any:
    """`text` as the first of int, float and str that the key takes; `take` refuses what is none of them."""
    for kind in (int, float):
        if kind in _kinds(hint):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _kinds(hint: Any) -> tuple[type, ...]:
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _unknown(name: str, known: Iterable[str], what: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))
    return f"unknown {what}: {name!r}; {hint}"


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


def _is(check: Check, default: Any = MISSING, renamed: Mapping[str, str] | None = None) -> Any:
    """A setting with a check. `renamed` maps values of earlier versions to those of today."""
    return field(default=default, metadata={"check": check, "renamed": renamed or {}})


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
    # The routing-only pass. auto: fitted where the model has a router.safetensors, else trunk; prefill: no pass.
    router: str = _is(_one_of("auto", "lexical", "trunk", "fitted", "prefill"), "auto", {"fused": "prefill"})
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
    health_port: int | None = _is(_between(0, 65535), None)  # health alone and without TLS, for who cannot speak it


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
