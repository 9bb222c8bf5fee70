"""Where other threads meet the engine's: arrivals, cancellations, and which request ids are in use."""

from __future__ import annotations

import threading

from pager.engine.sequence import Sequence
from pager.errors import DuplicateRequest, NotReady, Overloaded


class Inbox:
    """Thread-safe. The engine's thread takes, everybody else puts."""

    def __init__(self, max_live: int) -> None:
        self._max_live = max_live
        self._live: dict[tuple[str, str], Sequence] = {}  # by tenant and request id
        self._arrived: list[Sequence] = []
        self._cancelled: list[Sequence] = []
        self._is_open = True
        self.is_halted = False
        self._changed = threading.Condition()

    def put(self, sequence: Sequence) -> None:
        """Raises NotReady when closed, DuplicateRequest for an id that its tenant uses, Overloaded at the bound."""
        key = _key_of(sequence)
        with self._changed:
            if not self._is_open:
                raise NotReady("this worker is shutting down; send the request to another", retry_after_s=1.0)
            if key in self._live:
                raise DuplicateRequest(
                    f"request id {sequence.request.id!r} is in use; choose another", field="request_id"
                )
            if len(self._live) >= self._max_live:
                raise Overloaded(f"{len(self._live)} requests are running or waiting already", retry_after_s=1.0)
            self._live[key] = sequence
            self._arrived.append(sequence)
            self._changed.notify_all()

    def cancel(self, request_id: str, tenant: str) -> bool:
        """Whether that tenant has such a request."""
        with self._changed:
            sequence = self._live.get((tenant, request_id))
            if sequence is None:
                return False
            self._cancelled.append(sequence)
            self._changed.notify_all()
            return True

    def take(self) -> tuple[list[Sequence], list[Sequence]]:
        """What has arrived and what was cancelled since the last time."""
        with self._changed:
            taken = self._arrived, self._cancelled
            self._arrived, self._cancelled = [], []
            return taken

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended; its id may be used again."""
        with self._changed:
            del self._live[_key_of(sequence)]
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def halt(self) -> None:
        """The engine's thread is to stop."""
        with self._changed:
            self.is_halted = True
            self._changed.notify_all()

    def wait_for_news(self, timeout_s: float | None) -> None:
        """Until something comes; at once when something has, or when the thread is to stop."""
        with self._changed:
            if not (self._arrived or self._cancelled or self.is_halted):
                self._changed.wait(timeout_s)

    def wait_until_empty(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def live(self) -> list[Sequence]:
        with self._changed:
            return list(self._live.values())

    def __len__(self) -> int:
        return len(self._live)


def _key_of(sequence: Sequence) -> tuple[str, str]:
    return sequence.request.tenant, sequence.request.id
