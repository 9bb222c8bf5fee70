"""What was asked for ahead of its use. Pure: keys and batch numbers."""

from __future__ import annotations

from pager.cache.usage import UsageMeter
from pager.types import ExpertKey


class PrefetchList:
    """The wanted experts that no reader has come to yet, and the protected ones that a prefetch may not evict.

    An expert that was prefetched is protected from other prefetches until it is used or evicted by a lease, and for
    PROTECTED_BATCHES at most: what a request that never came had asked for must not block the list for ever.
    """

    PROTECTED_BATCHES = 16

    def __init__(self) -> None:
        self._wanted: dict[ExpertKey, UsageMeter] = {}
        self._protected: dict[ExpertKey, int] = {}  # in the order of their batches
        self._batch = 0

    def start_batch(self) -> int:
        """The number of the batch that begins now; the protection of old ones lapses."""
        self._batch += 1
        oldest = self._batch - self.PROTECTED_BATCHES
        for key in [key for key, batch in self._protected.items() if batch <= oldest]:
            del self._protected[key]
        return self._batch

    def want(self, key: ExpertKey, meter: UsageMeter) -> bool:
        """False when it was wanted already."""
        if key in self._wanted:
            return False
        self._wanted[key] = meter
        return True

    def take(self, key: ExpertKey) -> UsageMeter | None:
        """The meter to charge, and the key is wanted no more; None when it was not wanted."""
        return self._wanted.pop(key, None)

    def is_wanted(self, key: ExpertKey) -> bool:
        return key in self._wanted

    def protect(self, key: ExpertKey) -> None:
        self._protected[key] = self._batch

    @property
    def protected(self) -> dict[ExpertKey, int]:
        return self._protected

    def forget(self, key: ExpertKey) -> None:
        """The expert is in use, or evicted: neither wanted nor protected."""
        self._wanted.pop(key, None)
        self._protected.pop(key, None)
