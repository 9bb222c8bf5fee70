"""A worker's way to the host tier of its node: the segment is mapped here, the index asked over there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from pager.cache.host_index import HostGrant, HostState
from pager.errors import PagerError
from pager.types import ExpertKey

if TYPE_CHECKING:
    from pager.cache.host import HostTier
    from pager.engine.trunk import OpenModel
    from pager.planner import Plan

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0  # a worker that does not hear from the control actor for so long goes on without it


class RemoteHostIndex:
    """A worker's HostIndex: asks the node's control actor. Getting a record takes one call; giving it back, no wait."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._is_lost = False

    def lookup_or_claim(self, keys: Sequence[ExpertKey], owner: str) -> list[HostGrant]:
        if not self._is_lost:
            try:
                grants: list[HostGrant] = ray.get(
                    self._node.lookup_or_claim.remote(list(keys), owner), timeout=CALL_TIMEOUT_S
                )
                return grants
            except ray.exceptions.RayError as error:
                self._is_lost = True
                log.warning("the node's control actor does not answer; going on without the host tier: %s", error)
        return [HostGrant(key, HostState.FULL) for key in keys]

    def publish(self, keys: Sequence[ExpertKey], owner: str) -> None:
        self._node.publish.remote(list(keys), owner)

    def abandon(self, keys: Sequence[ExpertKey], owner: str) -> None:
        self._node.abandon.remote(list(keys), owner)

    def unpin(self, keys: Sequence[ExpertKey], owner: str) -> None:
        self._node.unpin.remote(list(keys), owner)


class NodeHostTier:
    """`owner` is the name under which this worker pins records."""

    def __init__(self, node: Any, owner: str) -> None:
        self._node = node
        self._owner = owner

    def attach(self, opened: OpenModel, plan: Plan) -> HostTier:
        """This worker's view of the segment. Raises BudgetError, ConfigError."""
        from pager.cache.host import HostTier

        shape = opened.family.expert_shape(opened.config)
        dtype = str(opened.dtype).removeprefix("torch.")
        answer = ray.get(self._node.open_segment.remote(plan.host_bytes, shape, dtype))
        if isinstance(answer, PagerError):
            raise answer
        name, num_records = answer
        index = RemoteHostIndex(self._node)
        return HostTier.attach(name, num_records, shape, opened.dtype, index=index, owner=self._owner)

    def used_bytes(self) -> tuple[int, int]:
        """Resident and pinned, of all workers of the node; zeros when its control actor does not answer."""
        try:
            resident, pinned = ray.get(self._node.host_bytes.remote(), timeout=1.0)
        except ray.exceptions.RayError:
            return 0, 0
        return resident, pinned
