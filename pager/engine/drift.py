"""When an answer has left its pool, and which experts would bring it back. Pure: numpy in, expert ids out.

Knows no tensors, devices, leases or clocks. Legend: L layers, R routed experts of a layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pager.types import DriftPolicy, DriftReport, ExpertKey

LOOKS_PER_WINDOW = 4
"""How often a window is looked at: each look costs one wait for the device."""

RETURN_SHARE = 0.9
"""Drift is over when the mass outside is down to this share of the threshold; until then every look widens further.

One window is little evidence: a pool widened by what 8 tokens of a new domain wanted serves its next hundred badly, so
it goes on growing while tokens come.
"""

GOAL_SHARE = 0.5
"""A widening takes enough experts to bring the window's own mass down to this share of the threshold.

Well below `RETURN_SHARE`, because the tokens that named the experts flatter them: the next ones want others too.
"""

LARGEST_GROWTH = 1.0
"""A widening adds at most this many times the pool's present experts."""


@dataclass(slots=True, eq=False)
class _Block:
    """Tokens between two looks, and the probability that each expert outside of the pool got from them, added up."""

    num_tokens: int
    outside_LR: list[np.ndarray]
    is_fresh: bool = True  # run under the present pool


class DriftMonitor:
    """The router mass outside of one document's pool, over its last `window` tokens. Mutable; the document owns it."""

    def __init__(self, policy: DriftPolicy, num_routed: int) -> None:
        """`num_routed` counts the routed experts of all layers."""
        self.policy = policy
        self._num_routed = num_routed
        self._num_at_first: int | None = None  # experts in the pool when it was first looked at
        self._num_measured = 0
        self._open: _Block | None = None
        self._window: deque[_Block] = deque()
        self._peak = 0.0
        self._is_drifting = False
        self._widenings = 0
        self._experts_added = 0
        self._exact_from: int | None = None

    @property
    def tokens_per_look(self) -> int:
        return max(1, self.policy.window // LOOKS_PER_WINDOW)

    def is_due(self, num_unread: int) -> bool:
        """Is it time to look, if `num_unread` more tokens are added first? Never again once the answer is exact."""
        read = self._open.num_tokens if self._open is not None else 0
        return self._exact_from is None and read + num_unread >= self.tokens_per_look

    def add(self, num_tokens: int, outside_LR: Sequence[np.ndarray]) -> None:
        """Takes so many more tokens: per layer and routed expert their mass outside, summed; empty where dense."""
        if self._exact_from is not None or not num_tokens:
            return
        self._num_measured += num_tokens
        if self._open is None:
            self._open = _Block(num_tokens, [np.array(mass_R, dtype=np.float64) for mass_R in outside_LR])
            return
        self._open.num_tokens += num_tokens
        for total_R, mass_R in zip(self._open.outside_LR, outside_LR, strict=True):
            total_R += mass_R

    def look(self, num_in_pool: int) -> bool:
        """Moves the window up to what was added; True where the answer is out of its pool and something is to be done.

        The threshold is meant for the pool as it was at first. As it grows, less would lie outside of any pool of its
        size, and the threshold falls in proportion to the experts that are left outside.
        How the tokens since the last look were split into calls of `add` makes no difference.
        """
        if self._open is not None:
            self._window.append(self._open)
            self._open = None
        while self._window and _tokens_of(self._window) - self._window[0].num_tokens >= self.policy.window:
            self._window.popleft()
        fresh = [block for block in self._window if block.is_fresh]
        if _tokens_of(fresh) < (self.tokens_per_look if self._is_drifting else self.policy.window):
            return False
        mass, threshold = _outside(_mean_of(fresh)), self.threshold(num_in_pool)
        self._peak = max(self._peak, mass)
        self._is_drifting = mass > (threshold * RETURN_SHARE if self._is_drifting else threshold)
        return self._is_drifting

    def threshold(self, num_in_pool: int) -> float:
        """The policy's, for a pool that has grown to `num_in_pool`."""
        if self._num_at_first is None:
            self._num_at_first = num_in_pool
        left, left_at_first = self._num_routed - num_in_pool, self._num_routed - self._num_at_first
        return self.policy.threshold * left / max(1, left_at_first)

    def wanted(self, num_in_pool: int) -> tuple[ExpertKey, ...]:
        """The experts to add to a pool of `num_in_pool`, the most wanted in the window first.

        Layers compete: where the pool still fits, nothing is added. Equal mass goes to the lower key.
        """
        mean_LR = _mean_of(self._window)
        flat = np.concatenate(mean_LR)
        keys = [ExpertKey(layer, expert) for layer, mean_R in enumerate(mean_LR) for expert in range(len(mean_R))]
        order = np.argsort(-flat, kind="stable")[: np.count_nonzero(flat)]
        left = flat.sum() - np.cumsum(flat[order])
        goal = self.threshold(num_in_pool) * GOAL_SHARE * _num_sparse(mean_LR)
        enough = int(np.count_nonzero(left > goal)) + 1
        most = min(enough, int(LARGEST_GROWTH * num_in_pool))
        return tuple(keys[index] for index in order[:most])

    def widened(self, keys: Sequence[ExpertKey]) -> None:
        """`keys` are in the pool now. The mass is measured anew; the window's tokens still say what else they want."""
        self._widenings += 1
        self._experts_added += len(keys)
        for block in self._window:
            block.is_fresh = False
            for key in keys:
                block.outside_LR[key.layer][key.expert] = 0.0

    def became_exact(self) -> None:
        """Nothing lies outside any more. A token's prediction needs the one before it, so the next but one is exact."""
        self._exact_from = self._num_measured + 1

    def report(self) -> DriftReport:
        """An answer shorter than the window reports the mean of what it has."""
        peak = self._peak
        if not peak and self._num_measured:
            peak = _outside(_mean_of([*self._window, *([self._open] if self._open is not None else [])]))
        return DriftReport(peak, self._widenings, self._experts_added, self._exact_from)


def _tokens_of(blocks: Iterable[_Block]) -> int:
    return sum(block.num_tokens for block in blocks)


def _mean_of(blocks: Collection[_Block]) -> list[np.ndarray]:
    """Per layer and expert, the mean over the blocks' tokens."""
    num_tokens = _tokens_of(blocks)
    layers = zip(*(block.outside_LR for block in blocks), strict=True)
    return [sum(masses[1:], start=masses[0]) / num_tokens for masses in layers]


def _outside(mean_LR: Sequence[np.ndarray]) -> float:
    return float(sum(mean_R.sum() for mean_R in mean_LR)) / max(1, _num_sparse(mean_LR))


def _num_sparse(mean_LR: Sequence[np.ndarray]) -> int:
    return sum(len(mean_R) > 0 for mean_R in mean_LR)
