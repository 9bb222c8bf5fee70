"""A worker's way to the host tier of its node: the control actor is asked once, for the segment's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

from pager.errors import PagerError

if TYPE_CHECKING:
    from pager.cache.host import HostTier
    from pager.memory.plan import Plan
    from pager.models.open_model import OpenModel


class NodeHostTier:
    """The node's segment, mapped here once the model's sizes are known."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._tier: HostTier | None = None

    def attach(self, opened: OpenModel, plan: Plan) -> HostTier:
        """This worker's view of the segment. Raises BudgetError, ConfigError."""
        from pager.cache.host import HostTier, record_bytes

        shape = opened.family.expert_shape(opened.config)
        model = f"{shape} of {opened.dtype}"
        answer = ray.get(self._node.open_segment.remote(plan.host_bytes, record_bytes(shape, opened.dtype), model))
        if isinstance(answer, PagerError):
            raise answer
        name, num_records = answer
        self._tier = HostTier.attach(name, num_records, shape, opened.dtype)
        return self._tier

    def used_bytes(self) -> tuple[int, int]:
        """Resident and pinned, of all workers of the node."""
        return self._tier.used_bytes() if self._tier is not None else (0, 0)
