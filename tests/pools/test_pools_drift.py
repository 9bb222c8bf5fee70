from __future__ import annotations

import pytest

from pager.errors import InvalidRequest
from pager.pools.drift import check_can_drift, parse_drift
from pager.types import Count, DriftAction, DriftPolicy, ExpertPool, PoolPolicy, PoolSource


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("off", None),
        (0.3, DriftPolicy(0.3, DriftAction.WIDEN, 16)),
        ("0.3", DriftPolicy(0.3, DriftAction.WIDEN, 16)),
        (" 0.3:Exact ", DriftPolicy(0.3, DriftAction.EXACT, 16)),
        ("0.3:widen:32", DriftPolicy(0.3, DriftAction.WIDEN, 32)),
    ],
)
def test_what_people_write(text: str | float | None, expected: DriftPolicy | None) -> None:
    assert parse_drift(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "says nothing"),
        ("much", "says nothing"),
        ("0.3:shrink", "says nothing"),
        ("0.3:exact:x", "says nothing"),
        ("0.3:exact:4:5", "says nothing"),
        ("0", "above 0 and below 1, not 0.0"),
        ("1", "not 1.0"),
        ("nan", "not nan"),
        ("0.3:exact:0", "at least one token, not 0"),
    ],
)
def test_nonsense_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_drift(text)


def test_only_a_pool_can_be_left() -> None:
    drift = DriftPolicy(0.3)
    with pytest.raises(InvalidRequest, match="no pool that it could leave"):
        check_can_drift(PoolPolicy(drift=drift))
    for policy in (
        PoolPolicy(),
        PoolPolicy(Count(4), drift=drift),
        PoolPolicy(source=PoolSource.FIXED, fixed=ExpertPool(((1, 2),)), drift=drift),
    ):
        assert check_can_drift(policy) is policy
