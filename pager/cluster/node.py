"""The host tier of a node, owned by one control actor: its segment and the index of what is in it.

Workers map the segment and move the bytes themselves; only who may read or write which record goes through here.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from pager.cache.host_index import HostGrant, HostState, LocalHostIndex
from pager.errors import ConfigError, PagerError
from pager.types import ExpertKey, ExpertShape

if TYPE_CHECKING:
    from pager.cache.host import HostTier
    from pager.engine.trunk import OpenModel
    from pager.planner import Plan

log = logging.getLogger(__name__)

_SHM = Path("/dev/shm")
CALL_TIMEOUT_S = 10.0  # a worker that does not hear from the control actor for so long goes on without it


class NodeControl:
    """Owns the node's segment and index. Its methods run one at a time."""

    def __init__(self, namespace: str) -> None:
        self._prefix = f"expert-pager-{namespace}-"
        self._tier: HostTier | None = None
        self._index: LocalHostIndex | None = None
        self._lock_file = -1
        self._made_for: tuple[object, ...] = ()
        remove_leftovers(self._prefix)

    def open_segment(self, budget_bytes: int, shape: ExpertShape, dtype: str) -> tuple[str, int] | PagerError:
        """Name and records of the node's segment, which the first caller's model sizes. Errors are returned."""
        import torch

        from pager.cache.host import HostTier, records_for

        asked = (budget_bytes, shape, dtype)
        if self._tier is None:
            torch_dtype = getattr(torch, dtype)
            index = LocalHostIndex(records_for(budget_bytes, shape, torch_dtype))
            name = self._prefix + secrets.token_hex(6)
            try:
                self._tier = HostTier.create(budget_bytes, shape, torch_dtype, name=name, index=index, owner="node")
            except PagerError as error:
                return error
            self._index, self._made_for = index, asked
            self._lock_file = os.open(_SHM / name, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(self._lock_file, fcntl.LOCK_SH)  # says that its owner lives
        elif asked != self._made_for:
            return ConfigError(f"this node's host tier was made for {self._made_for}, not {asked}; restart the service")
        return self._tier.name, self._tier.num_records

    def lookup_or_claim(self, keys: Sequence[ExpertKey], owner: str) -> list[HostGrant]:
        return self._open_index.lookup_or_claim(keys, owner)

    def publish(self, keys: Sequence[ExpertKey], owner: str) -> None:
        self._open_index.publish(keys, owner)

    def abandon(self, keys: Sequence[ExpertKey], owner: str) -> None:
        self._open_index.abandon(keys, owner)

    def unpin(self, keys: Sequence[ExpertKey], owner: str) -> None:
        self._open_index.unpin(keys, owner)

    def drop_owner(self, owner: str) -> None:
        """A worker died: its claims and pins are void."""
        if self._index is not None:
            self._index.drop_owner(owner)

    def resident_bytes(self) -> int:
        """Bytes of the records in use."""
        if self._tier is None or self._index is None:
            return 0
        return self._index.num_resident * (self._tier.nbytes // self._tier.num_records)

    def close(self) -> None:
        """Removes the segment. Idempotent."""
        if self._tier is not None:
            self._tier.close()
            os.close(self._lock_file)
            self._tier = None

    @property
    def _open_index(self) -> LocalHostIndex:
        assert self._index is not None, "asked for a record before the segment was opened"
        return self._index


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

    def drop_owner(self, owner: str) -> None:
        self._node.drop_owner.remote(owner)


class NodeHostTier:
    """A worker's way to its node's host tier; `owner` is the name under which it pins records."""

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

    def resident_bytes(self) -> int:
        """Of all workers of the node; 0 when its control actor does not answer."""
        try:
            return int(ray.get(self._node.resident_bytes.remote(), timeout=1.0))
        except ray.exceptions.RayError:
            return 0


def remove_leftovers(prefix: str) -> None:
    """Unlinks segments of this name whose owner is gone without having cleaned up: nobody holds their lock."""
    for path in _SHM.glob(f"{prefix}*"):
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            log.warning("removing %s, which a service that crashed has left behind", path)
            path.unlink(missing_ok=True)
        finally:
            os.close(file)
