"""Claims of request ids: a lock that a request holds while it is in flight, at whichever router it is.

An id is its tenant's own. Whoever holds a claim learns by it that the request was aborted at another router.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol


class Claims(Protocol):
    """The ids in flight at all routers that share them."""

    async def claim(self, request_id: str, tenant: str) -> bool:
        """False when a request of this tenant with this id is in flight, here or at another router."""

    async def release(self, request_id: str, tenant: str) -> None:
        """Gives up a claim that is held here; any other is left alone."""

    async def mark_aborted(self, request_id: str, tenant: str) -> bool:
        """Marks a claimed request of this tenant as aborted. False when there is none."""

    async def is_aborted(self, request_id: str, tenant: str) -> bool: ...

    async def close(self) -> None: ...


class LocalClaims:
    """The claims of one process. Owns the ids in flight at this router, which its admission bounds."""

    def __init__(self) -> None:
        self._held: set[tuple[str, str]] = set()  # tenant and id
        self._aborted: set[tuple[str, str]] = set()

    @property
    def held(self) -> Set[tuple[str, str]]:
        """Tenant and request id of what is in flight."""
        return self._held

    async def claim(self, request_id: str, tenant: str) -> bool:
        claim = (tenant, request_id)
        if claim in self._held:
            return False
        self._held.add(claim)
        return True

    async def release(self, request_id: str, tenant: str) -> None:
        self._held.discard((tenant, request_id))
        self._aborted.discard((tenant, request_id))

    async def mark_aborted(self, request_id: str, tenant: str) -> bool:
        claim = (tenant, request_id)
        if claim not in self._held:
            return False
        self._aborted.add(claim)
        return True

    async def is_aborted(self, request_id: str, tenant: str) -> bool:
        return (tenant, request_id) in self._aborted

    async def close(self) -> None:
        """Nothing is open."""
