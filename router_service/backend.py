"""Puts the router's parts together around a cluster, its routing-only passes and a tokenizer."""

from __future__ import annotations

from pathlib import Path

from pager import __version__
from pager.errors import ConfigError, InvalidRequest
from pager.routing.drift import check_can_drift
from pager.types import Full, PoolPolicy, PoolSource
from router_service.admission import Admission, AdmissionLimits
from router_service.breaker import StoreBreaker
from router_service.hints import HintStore
from router_service.local_hints import InProcessHints
from router_service.message_bounds import MessageBounds
from router_service.metrics import RouterMetrics
from router_service.pool_stores import open_pools
from router_service.ports import ClusterPort, Encoder, ModelInfo
from router_service.prediction import Predictor
from router_service.redis_hints import RedisHints
from router_service.scoring import PassChain, Passes, Scoring
from router_service.service import Backend
from router_service.shared_hints import SharedHints
from router_service.tenants import TenantLabels
from router_service.ui_pools import PoolLog
from router_service.ui_watch import Watch


def build_backend(
    *,
    model: ModelInfo,
    cluster: ClusterPort,
    passes: Passes,
    encoder: Encoder,
    limits: AdmissionLimits,
    default_pool: PoolPolicy,
    redis_url: str | None,
    pools_path: Path | None = None,
    write_timeout_s: float = 30.0,
    metric_tenants: TenantLabels | None = None,
) -> Backend:
    """The choices are those that `check_choices` has found to make sense. A Redis that is down is no error."""
    check_choices(passes, default_pool, redis_url, pools_path)
    metrics = RouterMetrics(metric_tenants)
    metrics.describe(version=__version__, model=model.name, fingerprint=model.fingerprint)
    breaker = StoreBreaker(metrics.redis_degraded.set, lambda reason: metrics.redis_failures.labels(reason).inc())
    hints = _hint_store(model, redis_url, breaker)
    scoring = Scoring(passes.available, encoder)
    chain = PassChain(passes, scoring, model.facts, lambda was, is_: metrics.escalations.labels(was, is_).inc())
    predictor = Predictor(chain, hints, model.facts, model.fingerprint)
    admission = Admission(limits)
    live_pools = PoolLog()
    metrics.requests_in_flight.set_function(lambda: admission.num_requests)
    metrics.tokens_in_flight.set_function(lambda: admission.num_tokens)
    metrics.bytes_in_flight.set_function(lambda: admission.num_bytes)
    return Backend(
        model=model,
        cluster=cluster,
        passes=passes,
        scoring=scoring,
        chain=chain,
        predictor=predictor,
        hints=hints,
        pools=open_pools(redis_url, pools_path, breaker),
        admission=admission,
        bounds=MessageBounds(model, encoder.longest_token_bytes, limits.most_tokens),
        metrics=metrics,
        default_pool=default_pool,
        live_pools=live_pools,
        watch=Watch(model, cluster, hints, live_pools),
        write_timeout_s=write_timeout_s,
    )


async def close_backend(backend: Backend) -> None:
    """Closes what `build_backend` made; the cluster is its owner's."""
    backend.scoring.close()
    await backend.hints.close()
    await backend.pools.close()


def check_choices(passes: Passes, default: PoolPolicy, redis_url: str | None, pools_path: Path | None) -> None:
    """Raises ConfigError for choices that can take no effect, before anything slow is started."""
    if default.source is PoolSource.PREDICTION and isinstance(default.size, Full):
        raise ConfigError("pools.default_source 'prediction' needs a pools.default_size other than 'full'")
    try:
        check_can_drift(default)
        passes.check(default)
    except InvalidRequest as error:
        raise ConfigError(f"the [pools] defaults can take no effect: {error.message}") from None
    open_pools(redis_url, pools_path)


def _hint_store(model: ModelInfo, redis_url: str | None, breaker: StoreBreaker) -> HintStore:
    local = InProcessHints()
    if redis_url is None:
        return local
    return SharedHints(local, RedisHints(redis_url, model.facts, model.fingerprint), breaker)
