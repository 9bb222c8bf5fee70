"""The composition root of the router process: workers, predictors, the fronts, and how they start and stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pager import __version__
from pager.cluster.cluster import Cluster, RayLost
from pager.cluster.placement import ClusterPort, LoadedModel
from pager.cluster.ray_process import RayProcess
from pager.config import RouterConfig, ServiceConfig
from pager.errors import CheckpointError, ConfigError, InvalidRequest, PoolTooLarge, PortInUse
from pager.memory import format_address, parse_bytes
from pager.observe import tracing
from pager.observe.metrics import MetricsServer, leave_out_of_collections
from pager.pools.drift import check_can_drift, parse_drift
from pager.pools.pick import largest_counts, parse_pool_size
from pager.tokenizing import read_tokenizer, special_texts
from pager.types import Full, ModelInfo, PoolPolicy, PoolSize, PoolSource
from router_service.access_log import AuditLog
from router_service.admission import Admission, AdmissionLimits, TenantLabels
from router_service.api import Api, metrics_route
from router_service.chat import ChatTemplate, TokenTexts
from router_service.hints import InProcessHints, LocalClaims
from router_service.http import HttpServer, page_guard
from router_service.keys import (
    IN_REDIS,
    Gate,
    KeySet,
    KeysInRedis,
    Tokens,
    WatchedFile,
    WatchedRedis,
    parse_jwks,
    parse_key_set,
    parse_secret,
)
from router_service.metrics import RouterMetrics
from router_service.prediction import (
    Encoder,
    PassChain,
    Passes,
    PassPlan,
    PredictedModel,
    Predictor,
    Scoring,
    TextEncoder,
    TrafficCodebook,
)
from router_service.redis import (
    RedisClaims,
    RedisClient,
    RedisHints,
    RedisLearned,
    SharedClaims,
    SharedHints,
    SharedLearned,
    SharedQuotas,
    StoreBreaker,
    open_pools,
    redis_url,
)
from router_service.requests import MessageBounds
from router_service.server import HealthPort, RouterServer
from router_service.service import Pipeline, Stores
from router_service.tls import TlsFiles
from router_service.trunk import TrunkOf, TrunkProcess
from router_service.ui import Page, PoolLog, Watch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("expert_pager.router")

LISTEN_EVERY_S = 0.1
LOOPBACK = "127.0.0.1"
EXIT_RAY_LOST = os.EX_TEMPFAIL  # a new process recovers what was lost


@dataclass(frozen=True, slots=True)
class Ready:
    """The served model, and the addresses."""

    address: str
    http_url: str
    metrics_url: str
    model: LoadedModel
    num_workers: int


async def serve(
    config: ServiceConfig, env: Mapping[str, str], announce: Callable[[Ready], None], ray: RayProcess | None = None
) -> signal.Signals:
    """Serves until SIGTERM or SIGINT, which it returns; requests in flight then have `drain_s` to end.

    `ray` is a process that was started early, and is ended here.

    A second signal ends the wait. When the embedded Ray loses a daemon, the service drains in the same way and the
    process ends with EXIT_RAY_LOST. Raises PagerError for anything that keeps it from starting.
    """
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        ray = ray or RayProcess(config)
        stack.callback(ray.end)
        starting = asyncio.create_task(_start(stack, config, env, ray, lambda: signals.put_nowait(signal.SIGTERM)))
        stopping = asyncio.create_task(signals.get())
        while not (starting.done() or stopping.done()):
            _listen(signals)
            await asyncio.wait((starting, stopping), timeout=LISTEN_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        _listen(signals)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return stopping.result()
        try:
            server, cluster, ready = starting.result()
        except RayLost:  # the loss has been logged, and nothing is left to close
            end_process(EXIT_RAY_LOST)
        announce(ready)
        await asyncio.wait((stopping, cluster.ray_lost), return_when=asyncio.FIRST_COMPLETED)
        hurrying = asyncio.create_task(signals.get()) if stopping.done() else stopping
        draining = asyncio.create_task(_drain(server, cluster, config.router.drain_s))
        # A worker that ended together with Ray does not answer, and nothing reports its end.
        timeout_s = config.router.drain_s if cluster.ray_lost.done() else None
        await asyncio.wait((draining, hurrying), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not draining.done():
            draining.cancel()
            await server.cut_off()
    if cluster.ray_lost.done():
        end_process(EXIT_RAY_LOST)
    return stopping.result()


async def _drain(server: RouterServer, cluster: Cluster, drain_s: float) -> None:
    """Drains this router's own requests first, then those that other routers run on its workers."""
    end_s = time.monotonic() + drain_s
    if not await server.drain(drain_s):
        await server.cut_off()
    await cluster.drain(max(0.0, end_s - time.monotonic()))


def end_process(status: int) -> NoReturn:
    """Ends the process of a service that is closed, without the interpreter's own teardown.

    In that teardown, threads that wait for a lost Ray never return, and libraries print reports of their own (nanobind
    about leaks, where triton is installed) into a log that has to be lines of JSON.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _listen(signals: asyncio.Queue[signal.Signals]) -> None:
    """Installs the signal handlers. Repeated while starting, because Ray's core replaces them with one that aborts."""
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, signals.put_nowait, each)


# --- start-up, in its order -----------------------------------------------------------------------------------------


async def _start(
    stack: AsyncExitStack, config: ServiceConfig, env: Mapping[str, str], ray: RayProcess, stop: Callable[[], None]
) -> tuple[RouterServer, Cluster, Ready]:
    """Starts everything, and registers on `stack` how to stop it, last started first."""
    choices = _choices(config, env)
    _check_ports(config)
    gate, audit = await _open_gate(stack, config.router, choices.redis_url)
    tracing.start("expert-pager-router", __version__, env)
    stack.callback(tracing.stop)
    planned = _plan_passes(config)
    expected = _with_source(choices, config.pools.default_source, planned.has_codebook)
    check_choices(planned, expected)
    tokenizer = _tokenizer(config)
    refused = () if config.model.special_tokens or tokenizer is None else special_texts(tokenizer)
    template = ChatTemplate.read(Path(config.model.path), _path(config.model.chat_template))
    template = template and replace(template, refused=refused)
    health = HealthPort()
    stack.push_async_callback(health.stop)
    if config.router.health_port is not None:  # probes are answered from now on: alive, and not ready
        await health.start(config.router.host, config.router.health_port)
    cluster, passes = await _connect(stack, config, planned, expected.default_pool.source, ray)
    model = cluster.model()
    choices = _with_source(choices, config.pools.default_source, passes.codebook is not None)
    if config.cluster.joined is None and config.workers.count:  # all workers are like the first
        check_fits(choices.default_pool.size, model)
    service = build_service(model, cluster, passes, TextEncoder(tokenizer, refused), choices)
    stack.push_async_callback(service.close)
    metrics = service.pipeline.metrics
    cluster.ray_lost.add_done_callback(lambda lost: metrics.ray_lost.labels(lost.result()).inc())
    guard = page_guard(gate, audit, open_metrics=config.router.open_metrics)
    metrics_server = MetricsServer(metrics.registry, config.router.host, config.router.metrics_port, guard)
    stack.callback(metrics_server.close)
    page = Page(service.watch, asyncio.get_running_loop())
    metrics_server.mount("/ui", page)
    cluster.publish_router_metrics(metrics_server.address)
    timeout_s = config.router.write_timeout_s
    server = RouterServer(
        service.pipeline,
        service.bounds,
        service.watch,
        timeout_s,
        config.router.max_connection_age_s,
        gate=gate,
        audit=audit,
        stop=stop,
    )
    stack.push_async_callback(server.stop)
    texts = tokenizer and TokenTexts(tokenizer)
    api = Api(service.pipeline, texts, template, timeout_s, gate=gate, audit=audit)
    http_server = HttpServer(api.app(*page.routes(), metrics_route(metrics.registry)))
    stack.push_async_callback(http_server.stop)
    leave_out_of_collections()
    await server.start(config.router.host, config.router.port, choices.tls, health)
    await http_server.start(config.router.host, config.router.http_port, choices.tls)
    _log_who_may_call(config.router)
    ready = Ready(
        address=format_address(config.router.host, server.port),
        http_url=f"{'http' if choices.tls is None else 'https'}://{http_server.address}",
        metrics_url=f"http://{metrics_server.address}/metrics",
        model=cluster.model(),
        num_workers=len(cluster.workers()),
    )
    return server, cluster, ready


@dataclass(frozen=True, slots=True)
class Choices:
    """The operator's choices for the requests of a router, read from the settings and the environment."""

    default_pool: PoolPolicy = field(default_factory=PoolPolicy)
    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    redis_url: str | None = None
    pools_path: Path | None = None  # the folder of named pools, where there is no Redis
    learns: bool = True  # codewords, from traffic
    tenants: TenantLabels = field(default_factory=TenantLabels)
    tls: TlsFiles | None = None
    shows_pools: bool = False  # as adapters, in metrics
    keeps_prefills: bool = False  # conversations keep the pool that the prefill of their first turn chose


def _choices(config: ServiceConfig, env: Mapping[str, str]) -> Choices:
    """Reads the choices, except those that depend on the model. Raises ConfigError, InvalidRequest."""
    pools = config.pools
    size = parse_pool_size(pools.default_size)
    return Choices(
        default_pool=PoolPolicy(size, drift=parse_drift(pools.default_drift)),
        limits=_limits(config.router),
        redis_url=redis_url(env),
        pools_path=_path(pools.path or None),
        learns=pools.learn_codewords,
        tenants=TenantLabels.parse(config.router.metric_tenants),
        tls=_tls_files(config.router),
        shows_pools=config.router.pools_as_adapters,
    )


def _with_source(choices: Choices, name: str, has_codebook: bool) -> Choices:
    """Returns the choices with the pool source of requests that name none: `auto` is the codebook if there is one."""
    source = PoolSource(name if name != "auto" else "codebook" if has_codebook else "prefill")
    is_left_to_us = name == "auto" and source is PoolSource.PREFILL
    return replace(choices, default_pool=replace(choices.default_pool, source=source), keeps_prefills=is_left_to_us)


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


def _limits(router: RouterConfig) -> AdmissionLimits:
    return AdmissionLimits(
        router.max_requests,
        router.max_tokens,
        router.max_requests_per_tenant,
        router.max_tokens_per_tenant,
        parse_bytes(router.max_bytes),
        parse_bytes(router.max_bytes_per_tenant),
    )


def _tls_files(router: RouterConfig) -> TlsFiles | None:
    """Returns the TLS files; None without TLS. Raises ConfigError for a missing file before the slow part begins."""
    if router.tls_cert is None or router.tls_key is None:
        return None
    files = TlsFiles(
        Path(router.tls_cert), Path(router.tls_key), Path(router.tls_client_ca) if router.tls_client_ca else None
    )
    files.credentials()
    return files


async def _open_gate(
    stack: AsyncExitStack, router: RouterConfig, redis_url: str | None
) -> tuple[Gate, AuditLog | None]:
    """Opens the checker of callers and the audit log that the settings ask for. Raises ConfigError."""
    audit = None if router.audit_log is None else AuditLog(Path(router.audit_log), parse_bytes(router.audit_log_bytes))
    if audit is not None:
        stack.callback(audit.close)
    keys: WatchedFile[KeySet] | WatchedRedis | None = None
    if router.keys == IN_REDIS:
        if redis_url is None:
            raise ConfigError("router.keys is 'redis', and neither REDIS_URL nor REDIS_URL_FILE names one")
        keys = WatchedRedis(KeysInRedis(RedisClient(redis_url)))
    elif router.keys is not None:
        keys = WatchedFile(Path(router.keys), "router.keys", parse_key_set)
    gate = Gate(keys, _tokens(router), trusts_tenant_header=router.trust_tenant_header)
    stack.push_async_callback(gate.close)
    await gate.start()
    return gate, audit


def _tokens(router: RouterConfig) -> Tokens | None:
    """Returns how JSON web tokens are checked; None where none are accepted. Raises ConfigError."""
    secret, jwks = router.jwt_secret, router.jwt_jwks
    if secret is None and jwks is None:
        return None
    return Tokens(
        router.jwt_audience or "",
        router.jwt_issuer,
        router.jwt_tenant_claim,
        None if secret is None else WatchedFile(Path(secret), "router.jwt_secret", parse_secret),
        None if jwks is None else WatchedFile(Path(jwks), "router.jwt_jwks", parse_jwks),
    )


def _log_who_may_call(router: RouterConfig) -> None:
    if router.asks_for_keys:
        log.info("callers need a key")
    elif router.is_local:
        log.info("no key is required (router.keys is not set), so the service listens on this machine alone")
    else:
        log.warning("no key is required: anyone who reaches %s may call (router.allow_open)", router.host)


def _check_ports(config: ServiceConfig) -> None:
    """Checks that every known port is free, before the slow part of the start. Raises PortInUse, ConfigError."""
    router, workers = config.router, config.workers
    _check_port_free(router.host, router.port, "router.port")
    _check_port_free(router.host, router.http_port, "router.http_port")
    _check_port_free(router.host, router.metrics_port, "router.metrics_port")
    if router.health_port is not None:
        _check_port_free(router.host, router.health_port, "router.health_port")
    if config.cluster.joined is None and workers.metrics_port and workers.per_node is None:
        for index in range(workers.count):
            _check_port_free(LOOPBACK, workers.metrics_port + index, "workers.metrics_port")


def _check_port_free(host: str, port: int, key: str) -> None:
    """Checks that a port is free. Raises PortInUse, or ConfigError for a host that is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} on {host} is in use; choose another ({key})") from None
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def _plan_passes(config: ServiceConfig) -> PassPlan:
    model = Path(config.model.path)
    if not model.exists():
        raise CheckpointError(f"{model} is not a directory; give the folder of a downloaded or packed checkpoint")
    return PassPlan.read(model, config.router)


def _tokenizer(config: ServiceConfig) -> Tokenizer | None:
    # the router encodes several texts at a time itself, each in a thread
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return read_tokenizer(Path(config.model.path))


def check_choices(passes: Passes | PassPlan, choices: Choices) -> None:
    """Raises ConfigError for choices that would have no effect."""
    default = choices.default_pool
    if default.source is PoolSource.PREDICTION and isinstance(default.size, Full):
        raise ConfigError("pools.default_source 'prediction' needs a pools.default_size other than 'full'")
    try:
        check_can_drift(default)
        passes.check(default)
    except InvalidRequest as error:
        raise ConfigError(f"the [pools] defaults would have no effect: {error.message}") from None
    open_pools(choices.redis_url, choices.pools_path)


def check_fits(default_size: PoolSize, model: ModelInfo) -> None:
    """Raises PoolTooSmall or PoolTooLarge for a default pool that no worker has the slots for."""
    if not isinstance(default_size, Full):
        needed = sum(largest_counts(default_size, model.facts))
        if needed > model.num_slots:
            raise PoolTooLarge(needed, model.num_slots, field="pools.default_size")


async def _connect(
    stack: AsyncExitStack, config: ServiceConfig, planned: PassPlan, default_source: PoolSource, ray: RayProcess
) -> tuple[Cluster, Passes]:
    """Starts or finds the workers. The trunk is loaded meanwhile, unless the first prompt may wait for it.

    It may beside a codebook, for which one machine has a lighter service while nobody uses it; a router with a pod of
    its own takes prompts from others as soon as it is ready.
    """
    has_file, is_alone = planned.file is not None, config.cluster.joined is None
    is_wanted = planned.begins_with_trunk and not (is_alone and default_source is PoolSource.CODEBOOK)
    of = TrunkOf(config.model.path, config.router.device, config.model.dtype, has_file)
    trunk = TrunkProcess(of, stays=is_wanted)
    stack.push_async_callback(trunk.close)
    loading = asyncio.create_task(trunk.ready()) if is_wanted else None
    if loading is not None:
        stack.push_async_callback(_end, loading)
    cluster = await Cluster.connect(config, ray.open)
    stack.push_async_callback(cluster.close)
    model = cluster.model()
    passes = planned.passes(PredictedModel(model.fingerprint, model.facts, model.unread_gates), lambda: trunk, trunk)
    if loading is not None and passes.chain:
        await loading
    return cluster, passes


async def _end(task: asyncio.Task[Any]) -> None:
    """Waits for the task. Its failure is ignored, because the workers failed of the same cause and reported it."""
    await asyncio.gather(task, return_exceptions=True)


# --- state shared by the fronts -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Service:
    """The state that all fronts of a router share. The cluster behind it belongs to its owner, which closes it."""

    pipeline: Pipeline
    predictor: Predictor
    bounds: MessageBounds
    watch: Watch

    async def close(self) -> None:
        """Ends the threads of the predictor and the connections of the stores."""
        self.predictor.close()
        await self.pipeline.stores.close()


def build_service(
    model: ModelInfo, cluster: ClusterPort, passes: Passes, encoder: Encoder, choices: Choices
) -> Service:
    """Builds the service from choices that `check_choices` has accepted. An unreachable Redis is not an error."""
    check_choices(passes, choices)
    codewords = () if passes.codebook is None else passes.codebook.names
    metrics = RouterMetrics(choices.tenants, codewords)
    metrics.describe(version=__version__, model=model.name, fingerprint=model.fingerprint)
    if choices.shows_pools:
        size = choices.default_pool.size
        counts = model.facts.top_k_per_layer if isinstance(size, Full) else largest_counts(size, model.facts)
        metrics.adapters.show(model.name, sum(counts))
    stores = open_stores(model, metrics, choices)
    traffic = _traffic(passes, model, stores, metrics, learns=choices.learns)
    chain = PassChain(passes, Scoring(passes.available, encoder, passes.trunk), model.facts, metrics.escalated, traffic)
    keeping = {PoolSource.CODEBOOK, PoolSource.PREFILL} if choices.keeps_prefills else {PoolSource.CODEBOOK}
    predictor = Predictor(chain, stores.hints, model.facts, model.fingerprint, keeping)
    admission = Admission(choices.limits)
    metrics.watch_admission(admission)
    live_pools = PoolLog()
    pipeline = Pipeline(
        replace(model, codewords=codewords),
        choices.default_pool,
        cluster=cluster,
        predictor=predictor,
        stores=stores,
        admission=admission,
        metrics=metrics,
        live_pools=live_pools,
    )
    return Service(
        pipeline,
        predictor,
        MessageBounds(model, encoder.longest_token_bytes, choices.limits.most_tokens),
        Watch(model, cluster, stores.hints, live_pools, metrics.served),
    )


def _traffic(
    passes: Passes, model: ModelInfo, stores: Stores, metrics: RouterMetrics, *, learns: bool
) -> TrafficCodebook | None:
    if passes.codebook is None:
        return None
    routed = model.facts.routed_per_layer
    # A learned codeword is found by the trunk's scores alone.
    learns = learns and passes.judges_by_trunk
    return TrafficCodebook(passes.codebook, routed, stores.learned, metrics.revised, learns=learns)


def open_stores(model: ModelInfo, metrics: RouterMetrics, choices: Choices) -> Stores:
    """Opens the stores in Redis, or in this process and a folder. Raises ConfigError if pools have two places."""
    breaker = StoreBreaker(metrics.redis_degraded.set, lambda reason: metrics.redis_failures.labels(reason).inc())
    pools = open_pools(choices.redis_url, choices.pools_path, breaker)
    hints, claims = InProcessHints(), LocalClaims()
    if choices.redis_url is None:
        return Stores(hints, claims, pools)
    client = RedisClient(choices.redis_url)
    shared_hints = RedisHints(client, model.facts, model.fingerprint)
    shared_claims = RedisClaims(client, model.fingerprint)
    return Stores(
        SharedHints(hints, shared_hints, shared_claims, breaker),
        SharedClaims(claims, shared_claims, breaker),
        pools,
        SharedQuotas(choices.redis_url, breaker),
        SharedLearned(RedisLearned(client, model.facts, model.fingerprint), breaker),
    )
