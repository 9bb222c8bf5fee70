"""Tenants and callers: their legal names, permissions and bounds, and the tenants that metrics name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from pager.errors import ConfigError, InvalidRequest

DEFAULT_TENANT = "default"
TENANT_KEY = "x-tenant-id"
OTHER_TENANTS = "other"
MAX_NAMED_TENANTS = 50  # each has some hundred series
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_tenant(value: str) -> str:
    """Returns `value` if it is a legal name. Raises InvalidRequest."""
    if not _TENANT.fullmatch(value):
        raise bad_tenant()
    return value


def bad_tenant() -> InvalidRequest:
    return InvalidRequest(
        f"metadata {TENANT_KEY} must be given once, as 1 to 64 of the characters A-Z a-z 0-9 . _ -", field=TENANT_KEY
    )


def tenant_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Returns the one `x-tenant-id`, or "default". Raises InvalidRequest."""
    values = [value for key, value in metadata or () if key == TENANT_KEY]
    if not values:
        return DEFAULT_TENANT
    value = values[0]
    if len(values) > 1 or not isinstance(value, str):
        raise bad_tenant()
    return check_tenant(value)


class Role(StrEnum):
    """A permission of a caller."""

    INFERENCE = "inference"  # may generate, with the pools and the requests of its own tenant
    OPERATOR = "operator"  # may see what workers hold, and manage the pools and requests of every tenant
    METRICS = "metrics"  # may read /metrics and /ui


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """The bounds of one caller, beside those of its tenant and of the service. None is no bound."""

    requests_in_flight: int | None = None
    tokens_in_flight: int | None = None
    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a method. `id` names the key, certificate or token, and is not a secret; it is empty where no key
    is required.
    """

    tenant: str
    id: str = ""
    roles: frozenset[Role] = frozenset(Role)
    limits: CallerLimits = CallerLimits()
    priority: int = 0  # of its requests: those of a higher priority are admitted first
    weight: float = 1.0  # of its tenant's share of a worker
    guaranteed_share: float = 0.0  # of its tenant: of each worker's slots, which no other tenant takes
    acts_for_another: bool = False  # the tenant is not the key's own


present: ContextVar[Caller | None] = ContextVar("present", default=None)
"""The caller of the present call, from when it is known, whether or not it may make the call."""


class TenantLabels:
    """The values of the label `tenant`: the tenants that the configuration names, and OTHER_TENANTS for all others.

    Tenants choose their own names, so any other rule would let a client create series.
    """

    def __init__(self, named: Iterable[str] = ()) -> None:
        self._named = tuple(dict.fromkeys(named))

    @classmethod
    def parse(cls, text: str) -> TenantLabels:
        """Parses names separated by commas. Raises ConfigError."""
        named = [name.strip() for name in text.split(",") if name.strip()]
        for name in named:
            if not _TENANT.fullmatch(name) or name == OTHER_TENANTS:
                raise ConfigError(
                    f"router.metric_tenants names {name!r}, which is not a tenant's name (or is the name for all "
                    "others)"
                )
        if len(named) > MAX_NAMED_TENANTS:
            raise ConfigError(
                f"router.metric_tenants names {len(named)} tenants and metrics have room for {MAX_NAMED_TENANTS}; "
                "name the largest"
            )
        return cls(named)

    @property
    def values(self) -> tuple[str, ...]:
        return (*self._named, OTHER_TENANTS)

    def of(self, tenant: str) -> str:
        return tenant if tenant in self._named else OTHER_TENANTS


def tenant_or_invalid(value: str) -> str:
    """Returns a tenant's name as log lines have it, since tenants choose their own names."""
    return value if _TENANT.fullmatch(value) else "(invalid)"


def tenant_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Returns the caller's tenant, unchecked; for metrics, which have a fixed list of tenants."""
    values = [value for key, value in metadata or () if key == TENANT_KEY and isinstance(value, str)]
    return values[0] if values else DEFAULT_TENANT
