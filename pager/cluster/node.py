"""What one node's workers have in common, in the hands of one control actor: their lives, and the host tier's files.

Workers map the segment and its index themselves, and ask nobody for a record (`pager.cache.host_index`).
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import signal
import threading
from contextlib import suppress

from pager.cache.host_index import SHM, HostIndex, HostSegment
from pager.errors import ConfigError, PagerError
from pager.leftovers import remove_abandoned

log = logging.getLogger(__name__)

SEGMENT_PREFIX = "expert-pager-"


class NodeControl:
    """Knows the worker processes of its node and owns the segment of its host tier, where there is one.

    It sees every worker's process end, whoever ended it, and takes back what that worker had claimed or pinned. Its
    methods run one at a time, beside one thread for each worker that waits for its end. It imports no torch.
    """

    def __init__(self, namespace: str) -> None:
        self._prefix = f"{SEGMENT_PREFIX}{namespace}-"
        self._segment: HostSegment | None = None
        self._index: HostIndex | None = None
        self._made_for: tuple[object, ...] = ()
        self._workers: dict[str, int] = {}  # those that live, each with the descriptor of its process
        self._lock = threading.Lock()
        remove_leftovers()

    # --- lives ------------------------------------------------------------------------------------------------------

    def watch(self, owner: str, pid: int) -> None:
        """A worker's process has started, and is called `owner` from now on."""
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
                self._index.clear_dead()

    # --- host tier --------------------------------------------------------------------------------------------------

    def open_segment(self, budget_bytes: int, record_bytes: int, model: str) -> tuple[str, int] | PagerError:
        """Name and records of the node's segment, which the first caller sizes; `model` says whose experts they are.

        Errors are returned.
        """
        asked = (budget_bytes, record_bytes, model)
        with self._lock:
            if self._segment is None:
                try:
                    name = self._prefix + secrets.token_hex(6)
                    self._segment = HostSegment.within(budget_bytes, name, record_bytes)
                except PagerError as error:
                    return error
                self._index = HostIndex(name, self._segment.num_records)
                self._made_for = asked
            elif asked != self._made_for:
                return ConfigError(f"this node's host tier is for {self._made_for}, not {asked}; restart the service")
            return self._segment.name, self._segment.num_records

    def host_bytes(self) -> tuple[int, int]:
        """Bytes of the host tier's records that are in use, and of these the pinned ones."""
        with self._lock:
            if self._segment is None or self._index is None:
                return 0, 0
            record = self._segment.nbytes // self._segment.num_records
            return self._index.num_resident * record, self._index.num_pinned * record

    def close(self) -> None:
        """Removes the segment. Idempotent."""
        with self._lock:
            if self._index is not None:
                self._index.close()
            if self._segment is not None:
                self._segment.close()
            self._index = self._segment = None


def remove_leftovers() -> None:
    """Unlinks segments of this user whose owner is gone without having cleaned up: nobody holds their lock."""
    remove_abandoned(SHM.glob(f"{SEGMENT_PREFIX}*"), lambda path: path.unlink(missing_ok=True))
