"""What a tenant may be called."""

from __future__ import annotations

import re

from pager.errors import InvalidRequest

DEFAULT_TENANT = "default"
TENANT_KEY = "x-tenant-id"
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_tenant(value: str) -> str:
    """`value` itself. Raises InvalidRequest."""
    if not _TENANT.fullmatch(value):
        raise bad_tenant()
    return value


def bad_tenant() -> InvalidRequest:
    return InvalidRequest(
        f"metadata {TENANT_KEY} must be given once, as 1 to 64 of the characters A-Z a-z 0-9 . _ -", field=TENANT_KEY
    )
