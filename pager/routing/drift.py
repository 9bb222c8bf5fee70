"""What people say about drift, and whether it makes sense. Pure."""

from __future__ import annotations

import math

from pager.errors import InvalidRequest
from pager.types import DriftAction, DriftPolicy, Full, PoolPolicy


def parse_drift(value: str | float | None) -> DriftPolicy | None:
    """What a person wrote: 0.3, "0.3:exact", "0.3:widen:32" (threshold, action, tokens that are averaged), or "off".

    Raises InvalidRequest.
    """
    text = "off" if value is None else str(value).strip().lower()
    if text == "off":
        return None
    threshold, *rest = text.split(":")
    try:
        action = DriftAction(rest[0]) if rest else DriftAction.WIDEN
        window = {"window": int(rest[1])} if len(rest) > 1 else {}
        if len(rest) > 2:
            raise ValueError(rest)
        return check_drift(DriftPolicy(float(threshold), action, **window))
    except InvalidRequest:
        raise
    except ValueError:
        raise InvalidRequest(
            f"{value!r} says nothing about drift; write the router mass outside of the pool that is too much (0.3), "
            "then what to do ('0.3:exact'; else widen), then over how many tokens ('0.3:widen:32')",
            field="pool.drift",
        ) from None


def check_drift(drift: DriftPolicy) -> DriftPolicy:
    """`drift` itself. Raises InvalidRequest."""
    if not (math.isfinite(drift.threshold) and 0 < drift.threshold < 1):
        raise InvalidRequest(
            f"a drift threshold is a share of the router's mass, above 0 and below 1, not {drift.threshold}",
            field="pool.drift.threshold",
        )
    if drift.window < 1:
        raise InvalidRequest(
            f"drift is averaged over at least one token, not {drift.window}", field="pool.drift.window"
        )
    return drift


def check_can_drift(policy: PoolPolicy) -> PoolPolicy:
    """`policy` itself. Raises InvalidRequest for drift without a pool to leave."""
    if policy.drift is not None and policy.fixed is None and isinstance(policy.size, Full):
        raise InvalidRequest(
            "a request for all experts has no pool that it could leave; name a pool size, or leave `drift` out",
            field="pool.drift",
        )
    return policy
