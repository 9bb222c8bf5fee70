"""What one node's workers have in common, in the hands of one control actor: their lives, and the host tier.

Workers map the host tier's segment and move the bytes themselves; only who may read or write which record goes through
here.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import select
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pager.cache.host_index import HostGrant, HostState, LocalHostIndex
from pager.errors import ConfigError, PagerError
from pager.types import ExpertKey, ExpertShape

if TYPE_CHECKING:
    from pager.cache.host import HostTier

log = logging.getLogger(__name__)

_SHM = Path("/dev/shm")


class NodeControl:
    """Knows the worker processes of its node and owns the segment and the index of its host tier, where there is one.

    It sees every worker's process end, whoever ended it, and takes back what that worker had claimed or pinned. Its
    methods run one at a time, beside one thread for each worker that waits for its end.
    """

    def __init__(self, namespace: str) -> None:
        self._prefix = f"expert-pager-{namespace}-"
        self._tier: HostTier | None = None
        self._index: LocalHostIndex | None = None
        self._lock_file = -1
        self._made_for: tuple[object, ...] = ()
        self._workers: dict[str, int] = {}  # those that live, each with the descriptor of its process
        self._lock = threading.Lock()  # nothing is granted to a worker while it is taken off the list
        remove_leftovers(self._prefix)

    # --- lives ------------------------------------------------------------------------------------------------------

    def watch(self, owner: str, pid: int) -> None:
        """A worker's process has started. It pins records under the name `owner`, and nobody else ever does."""
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            log.warning("%s ended before it was watched", owner)
            return
        self._workers[owner] = process
        threading.Thread(target=self._await_end, args=(owner, process), name=f"watch {owner}", daemon=True).start()

    def end(self, owner: str) -> bool:
        """Kills a worker's process. True once it is gone, with its memory and all that it held; else ask again."""
        with self._lock:
            if owner not in self._workers:
                return True
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._workers[owner], signal.SIGKILL)
            return False

    def _await_end(self, owner: str, process: int) -> None:
        ended = select.poll()
        ended.register(process, select.POLLIN)
        ended.poll()
        with self._lock:
            os.close(self._workers.pop(owner))
            if self._index is not None:
                self._index.drop_owner(owner)

    # --- host tier --------------------------------------------------------------------------------------------------

    def open_segment(self, budget_bytes: int, shape: ExpertShape, dtype: str) -> tuple[str, int] | PagerError:
        """Name and records of the node's segment, which the first caller's model sizes. Errors are returned."""
        import torch

        from pager.cache.host import HostTier, record_bytes

        asked = (budget_bytes, shape, dtype)
        if self._tier is None:
            torch_dtype = getattr(torch, dtype)
            index = LocalHostIndex(budget_bytes // record_bytes(shape, torch_dtype))
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
        """Late words of a worker that died get nothing: nobody would give it back."""
        with self._lock:
            if owner not in self._workers:
                return [HostGrant(key, HostState.FULL) for key in keys]
            return self._open_index.lookup_or_claim(keys, owner)

    def publish(self, keys: Sequence[ExpertKey], owner: str) -> None:
        self._open_index.publish(keys, owner)

    def abandon(self, keys: Sequence[ExpertKey], owner: str) -> None:
        self._open_index.abandon(keys, owner)

    def unpin(self, keys: Sequence[ExpertKey], owner: str) -> None:
        self._open_index.unpin(keys, owner)

    def host_bytes(self) -> tuple[int, int]:
        """Bytes of the host tier's records that are in use, and of these the pinned ones."""
        if self._tier is None or self._index is None:
            return 0, 0
        record = self._tier.nbytes // self._tier.num_records
        return self._index.num_resident * record, self._index.num_pinned * record

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


def remove_leftovers(prefix: str = "expert-pager-") -> None:
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
