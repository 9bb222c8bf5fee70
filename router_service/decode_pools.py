"""Pool policies from protobuf. Everything that can be checked without the pools that are kept is checked here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from expert_pager.v1 import expert_pager_pb2 as pb

from pager.errors import InvalidRequest
from pager.routing.drift import check_can_drift, check_drift
from pager.routing.named import check_name
from pager.routing.pool import check_pool, check_pool_size, largest_counts
from pager.types import (
    Bytes,
    Count,
    Counts,
    DriftAction,
    DriftPolicy,
    ExpertPool,
    Full,
    Mass,
    PoolPolicy,
    PoolSize,
    PoolSource,
    Share,
)
from router_service.ports import ModelInfo

_DIGEST = re.compile(r"[0-9a-f]{24}")
_SOURCES = {
    pb.POOL_SOURCE_PREFILL: PoolSource.PREFILL,
    pb.POOL_SOURCE_PREDICTION: PoolSource.PREDICTION,
    pb.POOL_SOURCE_FIXED: PoolSource.FIXED,
}
_ACTIONS = {
    pb.DRIFT_ACTION_UNSPECIFIED: DriftAction.WIDEN,
    pb.DRIFT_ACTION_WIDEN: DriftAction.WIDEN,
    pb.DRIFT_ACTION_EXACT: DriftAction.EXACT,
}


@dataclass(frozen=True, slots=True)
class PoolByDigest:
    """A pool by the digest it was given out under."""

    digest: str
    drift: DriftPolicy | None = None


@dataclass(frozen=True, slots=True)
class PoolByName:
    """A pool by the name its tenant gave it."""

    name: str
    drift: DriftPolicy | None = None


def pool_policy(wire: pb.PoolPolicy, model: ModelInfo, default: PoolPolicy) -> PoolPolicy | PoolByDigest | PoolByName:
    """Raises InvalidRequest or PoolTooSmall."""
    if wire.source not in (pb.POOL_SOURCE_UNSPECIFIED, *_SOURCES):
        raise InvalidRequest(
            f"pool.source {wire.source} is unknown; use PREFILL, PREDICTION or FIXED", field="pool.source"
        )
    if wire.WhichOneof("fixed") is not None:
        return _fixed(wire, model)
    if wire.source == pb.POOL_SOURCE_FIXED:
        raise InvalidRequest(
            "a FIXED pool is given in `experts`, `digest` or `name`, and none is set", field="pool.fixed"
        )
    if wire.WhichOneof("size") is not None:
        return chosen_pool(pool_size(wire), _SOURCES.get(wire.source, PoolSource.PREFILL), _drift(wire), model)
    source = _SOURCES.get(wire.source, default.source)
    return chosen_pool(default.size, source, _drift(wire) or default.drift, model)


def _fixed(wire: pb.PoolPolicy, model: ModelInfo) -> PoolPolicy | PoolByDigest | PoolByName:
    if wire.source not in (pb.POOL_SOURCE_UNSPECIFIED, pb.POOL_SOURCE_FIXED):
        raise InvalidRequest("a pool given in `experts`, `digest` or `name` has the source FIXED", field="pool.source")
    if wire.WhichOneof("size") is not None:
        raise InvalidRequest("a fixed pool has the size it has; leave `size` out", field="pool.size")
    drift = _drift(wire)
    match wire.WhichOneof("fixed"):
        case "name":
            return PoolByName(check_name(wire.name, "pool.name"), drift)
        case "digest":
            if not _DIGEST.fullmatch(wire.digest):
                raise InvalidRequest("a pool digest has 24 hexadecimal digits, lower case", field="pool.digest")
            return PoolByDigest(wire.digest, drift)
    pool = ExpertPool(tuple(tuple(sorted(layer.experts)) for layer in wire.experts.layers))
    return fixed_pool(check_pool(pool, model.facts), drift)


def fixed_pool(pool: ExpertPool, drift: DriftPolicy | None = None) -> PoolPolicy:
    return PoolPolicy(source=PoolSource.FIXED, fixed=pool, drift=drift)


def chosen_pool(size: PoolSize, source: PoolSource, drift: DriftPolicy | None, model: ModelInfo) -> PoolPolicy:
    """A policy whose pool is chosen from the prompt. Raises InvalidRequest or PoolTooSmall."""
    if isinstance(size, Full) and source is PoolSource.PREDICTION:
        raise InvalidRequest(
            "a request for all experts has nothing to predict; give a size, or the source PREFILL", field="pool.source"
        )
    return check_can_drift(PoolPolicy(_fits(size, model), source, drift=drift))


def calibrated_size(wire: pb.PoolPolicy, model: ModelInfo, default: PoolSize) -> PoolSize:
    """The size of a pool to be made from examples. Raises InvalidRequest or PoolTooSmall."""
    if wire.WhichOneof("fixed") is not None or wire.source or wire.HasField("drift"):
        raise InvalidRequest("a named pool is made by its size; leave the rest of `pool` out", field="pool")
    size = pool_size(wire) if wire.WhichOneof("size") is not None else default
    if isinstance(size, Full):
        raise InvalidRequest("a pool of all experts needs no examples; give a size below `full`", field="pool.size")
    return _fits(size, model)


def pool_size(wire: pb.PoolPolicy) -> PoolSize:
    size: PoolSize
    match wire.WhichOneof("size"):
        case "count":
            size = Count(wire.count)
        case "share":
            size = Share(wire.share)
        case "mass":
            size = Mass(wire.mass.mass, wire.mass.cap if wire.mass.HasField("cap") else None)
        case "counts":
            size = Counts(tuple(wire.counts.routed))
        case "bytes":
            size = Bytes(wire.bytes)
        case _:
            size = Full()
    return check_pool_size(size)


def _fits(size: PoolSize, model: ModelInfo) -> PoolSize:
    if not isinstance(size, Full):
        largest_counts(size, model.facts)
    most = max(model.facts.routed_per_layer, default=0)
    match size:
        case Count(routed):
            largest = routed
        case Counts(per_layer):
            largest = max(per_layer, default=0)
        case _:
            largest = 0
    if largest > most:
        raise InvalidRequest(
            f"a pool of {largest} routed experts is more than the {most} that a layer has; ask for `full`",
            field="pool.size.count",
        )
    return size


def _drift(wire: pb.PoolPolicy) -> DriftPolicy | None:
    if not wire.HasField("drift"):
        return None
    if wire.drift.action not in _ACTIONS:
        raise InvalidRequest(
            f"pool.drift.action {wire.drift.action} is unknown; use WIDEN or EXACT", field="pool.drift.action"
        )
    window = {"window": wire.drift.window} if wire.drift.HasField("window") else {}
    return check_drift(DriftPolicy(wire.drift.threshold, _ACTIONS[wire.drift.action], **window))
