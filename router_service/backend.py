"""Puts the router's parts together around a cluster, a scorer and a tokenizer."""

from __future__ import annotations

from pager.errors import ConfigError
from pager.types import Full, PoolPolicy, PoolSource
from router_service.admission import Admission, AdmissionLimits
from router_service.hints import HintStore
from router_service.local_hints import InProcessHints
from router_service.metrics import RouterMetrics
from router_service.ports import ClusterPort, Encoder, ModelInfo, Scorer
from router_service.redis_hints import RedisHints
from router_service.scoring import Predictor, Scoring
from router_service.service import Backend
from router_service.shared_hints import SharedHints


def build_backend(
    *,
    model: ModelInfo,
    cluster: ClusterPort,
    scorer: Scorer,
    encoder: Encoder,
    limits: AdmissionLimits,
    default_pool: PoolPolicy,
    redis_url: str | None,
    write_timeout_s: float = 30.0,
) -> Backend:
    """Raises ConfigError for a default pool that makes no sense; a Redis that is down is no error."""
    if default_pool.source is PoolSource.FIXED or (
        default_pool.source is PoolSource.PREDICTION and isinstance(default_pool.size, Full)
    ):
        raise ConfigError("pools.default_source 'prediction' needs a pools.default_size other than 'full'")
    metrics = RouterMetrics()
    hints = _hint_store(model, redis_url, metrics)
    scoring = Scoring(scorer, encoder)
    admission = Admission(limits)
    metrics.requests_in_flight.set_function(lambda: admission.num_requests)
    metrics.tokens_in_flight.set_function(lambda: admission.num_tokens)
    return Backend(
        model=model,
        cluster=cluster,
        scoring=scoring,
        predictor=Predictor(scoring, hints, model.facts, model.fingerprint),
        hints=hints,
        admission=admission,
        metrics=metrics,
        default_pool=default_pool,
        write_timeout_s=write_timeout_s,
    )


async def close_backend(backend: Backend) -> None:
    """Closes what `build_backend` made; the cluster is its owner's."""
    backend.scoring.close()
    backend.metrics.close()
    await backend.hints.close()


def _hint_store(model: ModelInfo, redis_url: str | None, metrics: RouterMetrics) -> HintStore:
    local = InProcessHints()
    if redis_url is None:
        return local
    shared = RedisHints(redis_url, model.facts, model.fingerprint)
    return SharedHints(local, shared, on_degraded=metrics.redis_degraded.set)
