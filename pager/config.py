"""Reads settings from a TOML file, the environment and flags, each overriding the one before. Knows no single setting.

Everything that is wrong is found in one reading, and says where it stands.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pager.errors import ConfigError
from pager.gguf import SUFFIX
from pager.memory import parse_bytes, parse_bytes_or_share
from pager.reading import read_bounded, reason_of

MAX_FILE_BYTES = 1 << 16  # every setting there is takes a few kilobytes
MAX_DOTS = 250  # of a line: the parser needs memory in the square of a key's parts
ENV_PREFIX = "EXPERT_PAGER_"
ENV_FILE = "EXPERT_PAGER_CONFIG"  # names the file, where no path is given
API_KEY, API_KEY_FILE = f"{ENV_PREFIX}API_KEY", f"{ENV_PREFIX}API_KEY_FILE"  # of client commands
_KIND_NAMES: dict[type, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP)(_|$)")


@dataclass(frozen=True, slots=True)
class Check:
    """A condition on a value beyond its type: `expected` completes "must be"."""

    expected: str
    passes: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Setting:
    """A value, and where it was given: a file, an environment variable or a flag."""

    value: Any
    origin: str


@dataclass(slots=True)
class Reading:
    """The given values, by key ("workers.count"), and everything that is wrong with them, a sentence each."""

    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def value(self, key: str) -> Any:
        """Returns the value; None where it was not given."""
        return self.settings[key].value if key in self.settings else None


class Schema:
    """Sections of settings, a dataclass each.

    A field's metadata has what the key is (`about`) and may have a `check` and an `example`; the reference pages and
    the example file are made from them.
    """

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
            if not variable.startswith(ENV_PREFIX) or variable in (ENV_FILE, API_KEY, API_KEY_FILE):
                continue
            if _is_service_link(variable, text):
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
            value = self.fields[key].metadata["renamed"].get(value, value)
        check: Check | None = self.fields[key].metadata.get("check")
        expected = None
        if type(value) not in kinds:
            expected = " or ".join(_KIND_NAMES[kind] for kind in kinds if kind in _KIND_NAMES)
        elif check is not None and not check.passes(value):
            expected = check.expected
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
    """Returns a value as a message may show it: a file's content, given where its name belongs, may be a secret."""
    return "a text of several lines" if isinstance(value, str) and "\n" in value.strip() else repr(value)


def _is_service_link(variable: str, text: str) -> bool:
    """Kubernetes gives every pod EXPERT_PAGER_PORT=tcp://… and the like when a Service is called expert-pager."""
    return text.startswith(("tcp://", "udp://")) or _SERVICE_LINK.search(variable) is not None


def _from_text(text: str, hint: Any) -> Any:
    """`text` as the first of bool, int, float and str that the key takes; `take` refuses what is none of them."""
    if bool in _kinds(hint) and text.lower() in ("true", "false"):
        return text.lower() == "true"
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
    return Check(expected, lambda value: low <= value <= high)


def _one_of(*choices: str) -> Check:
    return Check("one of " + ", ".join(choices), lambda value: value in choices)


def _is_device(value: str) -> bool:
    return value in ("auto", "cpu", "cuda") or (value.startswith("cuda:") and value[5:].isdigit())


def _parses(parse: Callable[[Any], object]) -> Callable[[Any], bool]:
    def passes(value: Any) -> bool:
        try:
            parse(value)
        except ConfigError:
            return False
        return True

    return passes


def _is_ray_address(value: str) -> bool:
    host, _, port = value.rpartition(":")
    has_port = port.isdigit() and 0 < int(port) < 65536
    return value in ("auto", "local") or (bool(host) and "/" not in host and has_port)


_is_share = _parses(lambda value: parse_bytes_or_share(value, 2**60))
_SHARE = "bytes, a size such as '64MiB' or a share of all experts such as '25%'"
DEVICE = Check("auto, cpu, cuda or cuda:N", _is_device)
SIZE = Check("bytes or a size such as '64MiB'", _parses(parse_bytes))
SIZE_OR_SHARE = Check(_SHARE, _is_share)
HOST_SIZE = Check(f"0 (no host tier), {_SHARE}", lambda value: value in (0, "0") or _is_share(value))
RAY = Check("the HOST:PORT of a Ray cluster's head, auto or local", _is_ray_address)
PORT = _between(0, 65535)
SECONDS = _between(0, 86400)


def _key(
    default: Any,
    about: str,
    check: Check | None = None,
    example: Any = None,
    renamed: Mapping[str, str] | None = None,
) -> Any:
    """A field of a section.

    `example` is what the example file shows of a key that has no default; `renamed` maps values of earlier versions to
    those of today.
    """
    return field(
        default=default, metadata={"about": about, "check": check, "example": example, "renamed": renamed or {}}
    )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The checkpoint that is served."""

    path: str = _key(
        "",
        "Checkpoint folder, as downloaded or packed, GGUF file, or ORGANISATION/NAME[@REVISION] on the Hugging Face "
        "hub, which `expert-pager serve` downloads into the hub's cache. The one key that has to be set.",
        example="models/emo-tiny",
    )
    name: str | None = _key(
        None,
        "What clients call the model. Not set: the name of the checkpoint's folder or file, or its name on the hub.",
        example="emo-tiny",
    )
    special_tokens: bool = _key(
        True,
        "Whether texts of requests may spell special tokens, such as <|im_end|>, which then are those tokens. Not so: "
        "such a text is refused; a chat template writes them all the same, and prompts of token ids may hold any.",
    )
    chat_template: str | None = _key(
        None,
        "File with the chat template (Jinja) of the HTTP API. Not set: the checkpoint's own.",
        example="chat.jinja",
    )
    dtype: str | None = _key(
        None,
        "Number format in which weights are served; auto takes what the checkpoint says. Not set: bfloat16, half the "
        "bytes of float32 to page.",
        _one_of("auto", "float32", "bfloat16", "float16"),
        "bfloat16",
    )

    @property
    def public_name(self) -> str:
        return self.name or Path(self.path).resolve().name.removesuffix(SUFFIX)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The worker processes. Budgets are per worker, except `host_memory`, which all workers of a node share; a budget
    that is not set is chosen by the planner from what the machine has.
    """

    count: int = _key(
        1, "Worker processes to start. 0 uses those that another router started, and needs cluster.ray_address.",
        _between(0, 64),
    )  # fmt: skip
    per_node: int | None = _key(
        None,
        "Workers that share a node, when they run on several nodes; they go where Ray has the resource "
        "expert_pager_worker. Not set: all workers are on one node.",
        _between(1, 64),
        1,
    )
    device: str = _key("auto", "Where the model runs. auto is a GPU where there is one.", DEVICE)
    expert_memory: str | int | float | None = _key(
        None, "Memory of a worker for routed experts. Not set: what the device has left.", SIZE_OR_SHARE, "25%"
    )
    host_memory: str | int | float | None = _key(
        None,
        "Memory of a node for experts behind the workers' own, in shared memory: the host tier. Not set: none where "
        "the model runs on the CPU.",
        HOST_SIZE,
        "50%",
    )
    in_place: bool = _key(
        True,
        "On a CPU without a host tier: compute experts for which there is no slot where the page cache has them, in "
        "memory that the system can take back.",
    )
    kv_memory: str | int | None = _key(None, "Memory of a worker for keys and values of attention.", SIZE, "2GiB")
    max_running: int = _key(
        32, "Most requests of a worker that hold KV and slots at a time: the largest batch.", _between(1, 4096)
    )
    max_waiting: int = _key(
        256, "Most requests that wait at a worker. A request beyond that is refused.", _between(0, 65536)
    )
    prefix_cache: bool = _key(
        True, "Keep keys and values of prompts and answers, as far as KV memory goes, for requests that begin alike."
    )
    share_prefixes: bool = _key(
        False,
        "Also between tenants. A tenant can then find out from its first token's time how prompts of others begin.",
    )
    num_threads: int | None = _key(
        None,
        "Processor threads of a worker. Not set: as many as are measured to be fastest when the model is loaded, of "
        "the machine's cores divided by the workers.",
        _between(1, 1024),
        4,
    )
    step_timeout_s: float = _key(
        30.0,
        "Seconds in which a step reads no byte and computes no layer until it counts as hung and the worker is started "
        "again.",
        _between(0.1, 86400),
    )
    drain_s: float = _key(30.0, "Seconds that a worker's requests have to end after its SIGTERM.", SECONDS)
    metrics_port: int = _key(
        0,
        "Port of the first worker's /metrics; the next workers take the ports after it. 0: any free port each, "
        "published in cluster.file_sd.",
        PORT,
    )
    policy: str = _key(
        "least-stale",
        "Eviction policy: which expert leaves when a slot is needed. `expert-pager replay` compares them on your "
        "traffic; the default read least in benchmarks/results/policies_*.",
        _one_of("lru", "lfu", "lfru", "least-stale"),
    )
    state: str | None = _key(
        None,
        "Folder in which each worker remembers what it holds, to page it in again before it is ready after a restart. "
        "Not set: it starts empty.",
        example="state",
    )
    trace: str | None = _key(
        None,
        "Folder for a record of every access to an expert, a file a worker, for `expert-pager replay`. Not set: "
        "nothing is recorded.",
        example="traces",
    )

    @property
    def sharing_a_node(self) -> int:
        """Among how many a node's cores and memory are divided."""
        return self.per_node or max(1, self.count)

    @property
    def most_threads(self) -> int:
        """The threads of a worker: as configured, or else its part of this machine's cores, as the upper bound of the
        search for the fastest number.
        """
        return self.num_threads or max(1, len(os.sched_getaffinity(0)) // self.sharing_a_node)


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """The service that clients call. Its bounds are on what is in flight; beyond one a request is refused at once."""

    host: str = _key(
        "127.0.0.1",
        "Address to listen on. Without keys it has to be one of this machine alone, unless router.allow_open is true.",
    )
    port: int = _key(50051, "Port of gRPC; 0 takes a free one.", PORT)
    http_port: int = _key(8080, "Port of the HTTP API (OpenAI's and Anthropic's methods), 0 takes a free one.", PORT)
    metrics_port: int = _key(9464, "Port of /metrics and /ui; 0 takes a free one.", PORT)
    metric_tenants: str = _key(
        "", "Tenants that metrics name, with commas between (acme, initech). All others count as `other`."
    )
    router: str = _key(
        "auto",
        "Predictor of a prompt's pool. lexical and fitted need the model's router.safetensors; prefill is none, so "
        "that the prompt's prefill alone chooses; auto is fitted where there is that file, else trunk, and prefill for "
        "families whose gates no predictor reads.",
        _one_of("auto", "lexical", "trunk", "fitted", "prefill"),
        renamed={"fused": "prefill"},
    )
    min_recall: float | None = _key(
        None,
        "Share of the prefill's own pool that a prediction is expected to name; below it the next better source is "
        "taken. Not set: 0.5, where the predictor was fitted.",
        _between(0, 1),
        0.5,
    )
    device: str = _key("cpu", "Where the predictor runs. The default leaves a GPU to the workers.", DEVICE)
    max_requests: int = _key(256, "Most requests in flight, of all tenants together.", _between(1, 1_000_000))
    max_tokens: int = _key(1 << 20, "Most tokens in flight: those of the prompts plus max_tokens of each.", _between(1))
    max_requests_per_tenant: int = _key(
        128, "Most requests in flight of one tenant. The default is half of all, so that none can take everything.",
        _between(1, 1_000_000),
    )  # fmt: skip
    max_tokens_per_tenant: int = _key(1 << 19, "Most tokens in flight of one tenant, half of all as well.", _between(1))
    max_bytes: str | int = _key("256MiB", "Most bytes of the messages of all requests in flight.", SIZE)
    max_bytes_per_tenant: str | int = _key(
        "64MiB", "Most bytes of the messages of one tenant's requests in flight.", SIZE
    )
    stream_buffer_chunks: int = _key(
        256, "Chunks of an answer that are kept for a client that reads slowly; beyond them its stream is cancelled.",
        _between(1, 1_000_000),
    )  # fmt: skip
    write_timeout_s: float = _key(
        30.0, "Seconds after which a client that reads nothing is cut off.", _between(0.1, 86400)
    )
    max_connection_age_s: float = _key(
        300.0,
        "Seconds after which a client's gRPC connection takes no new requests, so that it connects anew, to a router "
        "that has come since perhaps. What is in flight on it goes on.",
        _between(1, 31_536_000),
    )
    drain_s: float = _key(30.0, "Seconds that requests in flight have to end after SIGTERM.", SECONDS)
    tls_cert: str | None = _key(
        None,
        "File of the service's certificate (PEM), read again when it is renewed. It goes with router.tls_key. Not set: "
        "plain text.",
        example="tls.crt",
    )
    tls_key: str | None = _key(None, "File of the certificate's private key (PEM).", example="tls.key")
    tls_client_ca: str | None = _key(
        None,
        "File of the certificate (PEM) that has to have signed those of clients. Not set: clients need none.",
        example="clients.crt",
    )
    keys: str | None = _key(
        None,
        "JSON file of API keys, which `expert-pager keys` writes, or redis for those in Redis; read again when they "
        "change. Not set: no key is required.",
        example="keys.json",
    )
    jwt_secret: str | None = _key(
        None, "File with the secret of JSON web tokens (HS256), 32 bytes at least. Not set: no such tokens.",
        example="jwt.secret",
    )  # fmt: skip
    jwt_jwks: str | None = _key(
        None, "File with the public keys of JSON web tokens (RS256), a JWK set. Not set: no such tokens.",
        example="jwks.json",
    )  # fmt: skip
    jwt_audience: str | None = _key(
        None, "Audience that a JSON web token has to be for. It goes with router.jwt_secret or router.jwt_jwks.",
        example="expert-pager",
    )  # fmt: skip
    jwt_issuer: str | None = _key(
        None, "Issuer that a JSON web token has to be from. Not set: whoever signs with the key.",
        example="https://id.example.org",
    )  # fmt: skip
    jwt_tenant_claim: str = _key("tenant", "Claim of a JSON web token that has the tenant.")
    trust_tenant_header: bool | None = _key(
        None,
        "Whether the header x-tenant-id says whose request it is. Not set: true without keys, false with them, where "
        "only an operator's is believed.",
        example=False,
    )
    allow_open: bool = _key(
        False, "Whether a service without keys may listen on other addresses than the loopback: whoever reaches it may "
        "call it.",
    )  # fmt: skip
    open_metrics: bool = _key(
        False,
        "Whether /metrics on router.metrics_port needs no key where keys are set: for a Prometheus in a private "
        "network. Otherwise it needs one with the role metrics, as metrics name tenants and tell how busy they are.",
    )
    pools_as_adapters: bool = _key(
        False,
        "Whether metrics name the named pools of requests in flight, as adapters for endpoint pickers of the "
        "Kubernetes gateway inference extension. The names are tenants' own, and whoever reads /metrics sees them.",
    )
    audit_log: str | None = _key(
        None,
        "File of the audit log: refusals, changes of pools and operators' calls, a JSON object a line. Not set: none.",
        example="audit.jsonl",
    )
    audit_log_bytes: str | int = _key(
        "16MiB", "Size at which a new file of the audit log is begun; eight older ones are kept.", SIZE
    )
    health_port: int | None = _key(
        None, "Port of grpc.health.v1 alone, never with TLS: for probes that cannot speak it. Not set: no such port.",
        PORT, 50052,
    )  # fmt: skip

    @property
    def asks_for_keys(self) -> bool:
        return any(each is not None for each in (self.keys, self.jwt_secret, self.jwt_jwks))

    @property
    def is_local(self) -> bool:
        """Tells whether only this machine can reach the service."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The Ray cluster in which the workers run."""

    ray_address: str | None = _key(
        None,
        "Ray cluster to join: HOST:PORT of its head, or auto, the only cluster that runs on this machine; local starts "
        "Ray here. Not set: the cluster that the variable RAY_ADDRESS names, else local.",
        RAY,
        "auto",
    )
    namespace: str = _key("expert-pager", "Ray namespace of the workers. Routers that share workers share it.")
    file_sd: str | None = _key(
        None,
        "File in which the addresses of all /metrics are kept for Prometheus (file_sd_configs). Not set: none.",
        example="/run/targets.json",
    )

    @property
    def joined(self) -> str | None:
        """The address of the cluster to join; None where Ray is started here."""
        return None if self.ray_address == "local" else self.ray_address


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """The defaults of requests, and the place where named pools are kept."""

    default_size: str | int = _key(
        "full",
        "Pool size: experts a layer (32), a share of all (12.5%), gate mass to cover (mass:0.9), bytes (64MiB) or "
        "full, which restricts nothing and is therefore the default.",
    )
    default_source: str = _key(
        "auto",
        "What chooses the pool: codebook (one of the pools that alike prompts share; a prompt that none covers gets a "
        "pool of its own), prefill (the worker's prefill, layer by layer) or prediction (the router's scores). auto: "
        "codebook where the model has one, else prefill.",
        _one_of("auto", "codebook", "prefill", "prediction"),
    )
    default_drift: str | float | None = _key(
        None,
        "Share of gate mass outside of the pool from which on the pool is widened; with `:exact` behind it all experts "
        "are used from there on. Not set: the pool stays as it is.",
        example="0.3",
    )
    learn_codewords: bool = _key(
        True,
        "Whether the codebook learns from traffic: similar prompts that no codeword covers, of any tenant, become a "
        "new codeword. It keeps which experts they wanted, not their text. It needs a predictor that runs the trunk.",
    )
    path: str | None = _key(
        None,
        "Folder of named pools. A tenant has at most 256 of them, all tenants 16384, and none more than it leaves free "
        "for others. Not set: they are kept in Redis, or in memory where there is no Redis.",
        example="pools",
    )


@dataclass(frozen=True, slots=True)
class LogConfig:
    """The logs of router and workers, on stderr. Prompts are never logged."""

    format: str = _key(
        "text", "How a record is written: as text, or as a JSON object a line, with request_id and trace_id.",
        _one_of("text", "json"),
    )  # fmt: skip


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
    """Reads as `load_config` does; everything that is wrong is in the result."""
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
    reading.problems.extend(_node_problems(reading))
    reading.problems.extend(_caller_problems(reading, config_of(reading).router))
    return reading


def config_of(reading: Reading) -> ServiceConfig:
    """Returns the values in force, without those that have a problem."""
    given: dict[str, dict[str, Any]] = {name: {} for name in SCHEMA.sections}
    for key, setting in reading.settings.items():
        section, name = key.split(".")
        given[section][name] = setting.value
    return ServiceConfig(**{name: section(**given[name]) for name, section in SCHEMA.sections.items()})


def _node_problems(reading: Reading) -> Iterator[str]:
    count, per_node = reading.value("workers.count"), reading.value("workers.per_node")
    is_local = reading.value("cluster.ray_address") in (None, "local")
    if is_local and per_node is not None and count > per_node:
        yield (
            f"workers.count is {count} and workers.per_node {per_node}, and Ray is started here as one node: the other "
            "workers would wait for ever; leave per_node out, or join a cluster of several nodes (cluster.ray_address)"
        )


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


def _caller_problems(reading: Reading, router: RouterConfig) -> Iterator[str]:
    """Settings of who may call that are unsafe, or would have no effect."""
    has_tokens = router.jwt_secret is not None or router.jwt_jwks is not None
    if not (router.asks_for_keys or router.allow_open or router.is_local):
        origin = reading.settings["router.host"].origin
        yield (
            f"router.host {router.host!r} (from {origin}) lets other machines call a service that asks for no keys: "
            "set router.keys (`expert-pager keys add` makes them), listen on 127.0.0.1, or set router.allow_open "
            "to true if whoever reaches the service may use it"
        )
    if has_tokens and not router.jwt_audience:
        yield "router.jwt_audience is not set: a JSON web token that was made for another service would be taken"
    for key in ("jwt_audience", "jwt_issuer"):
        if getattr(router, key) is not None and not has_tokens:
            yield f"router.{key} would have no effect: set router.jwt_secret or router.jwt_jwks too"
    if router.open_metrics and not router.asks_for_keys:
        yield "router.open_metrics would have no effect: /metrics needs no key where none are set (router.keys)"
