"""Drift: its policy as text, when an answer has left its pool, which experts would bring it back, and the change."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from pager.errors import InvalidRequest, PoolTooLarge
from pager.types import (
    DriftAction,
    DriftPolicy,
    DriftReport,
    ExpertKey,
    ExpertPool,
    Full,
    PoolPolicy,
)

if TYPE_CHECKING:
    from pager.pools.step import RequestRouting


def parse_drift(value: str | float | None) -> DriftPolicy | None:
    """Parses what a user wrote: 0.3, "0.3:exact", "0.3:widen:32" (threshold, action, tokens that are averaged), or
    "off".

    Raises InvalidRequest.
    """
    text = "off" if value is None else str(value).strip().lower()
    if text == "off":
        return None
    threshold, *rest = text.split(":")
    try:
        action = DriftAction(rest[0]) if rest else DriftAction.WIDEN
        window = {"window": int(rest[1])} if len(rest) > 1 else {}
        if len(rest) > 2:
            raise ValueError(rest)
        return check_drift(DriftPolicy(float(threshold), action, **window))
    except InvalidRequest:
        raise
    except ValueError:
        raise InvalidRequest(
            f"{value!r} says nothing about drift; write the gate mass outside of the pool that is too much (0.3), "
            "then what to do ('0.3:exact'; else widen), then over how many tokens ('0.3:widen:32')",
            field="pool.drift",
        ) from None


def check_drift(drift: DriftPolicy) -> DriftPolicy:
    """`drift` itself. Raises InvalidRequest."""
    if not (math.isfinite(drift.threshold) and 0 < drift.threshold < 1):
        raise InvalidRequest(
            f"a drift threshold is a share of the gate's mass, above 0 and below 1, not {drift.threshold}",
            field="pool.drift.threshold",
        )
    if drift.window < 1:
        raise InvalidRequest(
            f"drift is averaged over at least one token, not {drift.window}", field="pool.drift.window"
        )
    return drift


def check_can_drift(policy: PoolPolicy) -> PoolPolicy:
    """`policy` itself. Raises InvalidRequest for drift without a pool to leave."""
    if policy.drift is not None and policy.fixed is None and isinstance(policy.size, Full):
        raise InvalidRequest(
            "a request for all experts has no pool that it could leave; name a pool size, or leave `drift` out",
            field="pool.drift",
        )
    return policy


LOOKS_PER_WINDOW = 4
"""How often a window is looked at: each look costs one wait for the device."""

TRIAL_WINDOWS = 2
"""So many windows run with all experts before a pool is widened by what they wanted.

A pool that no longer fits bends what the routers above see: experts chosen by tokens that ran in it serve the next ones
worse than experts chosen by tokens that ran without (docs/log.md).
"""

GOAL_SHARE = 0.25
"""A widening takes enough experts to leave no more outside than this share of the threshold, of the tokens that chose.

Far below the threshold, because the tokens that name the experts flatter them: the next ones want others too.
"""

THRESHOLD_FALL = 1.5
"""As a pool grows, the threshold falls with this power of the share of experts left outside.

Routers prefer some experts, so the mass outside of a larger pool falls faster than the number of experts there. With
the first power, a pool that a false alarm had widened hid the next change of domain for 60 tokens; with 1.5 it took 20.
"""

LARGEST_GROWTH = 2.0
"""A widening adds at most this many times the pool's present experts."""


@dataclass(slots=True, eq=False)
class _Block:
    """Tokens between two looks, and the probability that each expert outside of the pool got from them, added up."""

    num_tokens: int
    outside_LR: list[np.ndarray]


class DriftMonitor:
    """The gate mass outside of one request's pool, over its last `window` tokens. Mutable; its routing owns it."""

    def __init__(self, policy: DriftPolicy, num_routed: int) -> None:
        """`num_routed` counts the routed experts of all layers."""
        self.policy = policy
        self._num_routed = num_routed
        self._num_at_first: int | None = None  # experts in the pool when it was first looked at
        self._num_measured = 0
        self._open: _Block | None = None
        self._window: deque[_Block] = deque()
        self._trial: list[_Block] | None = None
        self._peak = 0.0
        self._widenings = 0
        self._experts_added = 0
        self._experts_left_out = 0
        self._num_fruitless = 0  # widenings in a row for which there was no room
        self._rests_until = 0  # so many tokens measured
        self._exact_from: int | None = None

    @property
    def tokens_per_look(self) -> int:
        return max(1, self.policy.window // LOOKS_PER_WINDOW)

    def is_due(self, num_unread: int = 0) -> bool:
        """Tells whether it is time to look, if `num_unread` more tokens are added first; never once the answer is
        exact.
        """
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
        """Takes in what was added; True where the answer is out of its pool and something is to be done.

        The threshold is meant for the pool as it was at first, and falls as it grows (`THRESHOLD_FALL`).
        How the tokens since the last look were split into calls of `add` makes no difference.
        """
        block, self._open = self._open, None
        if block is None:
            return False
        if self._trial is not None:
            self._trial.append(block)
            return _tokens_of(self._trial) >= TRIAL_WINDOWS * self.policy.window
        self._window.append(block)
        while _tokens_of(self._window) - self._window[0].num_tokens >= self.policy.window:
            self._window.popleft()
        if _tokens_of(self._window) < self.policy.window:
            return False
        mass = _outside(_mean_of(self._window))
        self._peak = max(self._peak, mass)
        return mass > self.threshold(num_in_pool) and self._num_measured >= self._rests_until

    @property
    def is_on_trial(self) -> bool:
        """All experts run, to see which are wanted: `look` is True once that has been seen."""
        return self._trial is not None

    def begin_trial(self) -> None:
        self._trial = []

    def threshold(self, num_in_pool: int) -> float:
        """The policy's, for a pool that has grown to `num_in_pool`."""
        if self._num_at_first is None:
            self._num_at_first = num_in_pool
        left, left_at_first = self._num_routed - num_in_pool, self._num_routed - self._num_at_first
        return float(self.policy.threshold * (left / max(1, left_at_first)) ** THRESHOLD_FALL)

    def wanted(self, num_in_pool: int) -> tuple[ExpertKey, ...]:
        """Returns what to add to a pool of `num_in_pool`: the most wanted in the trial first; without one, in the
        window.

        Layers compete: where the pool still fits, nothing is added. Equal mass goes to the lower key.
        """
        mean_LR = _mean_of(self._trial or self._window)
        flat = np.concatenate(mean_LR)
        keys = [ExpertKey(layer, expert) for layer, mean_R in enumerate(mean_LR) for expert in range(len(mean_R))]
        order = np.argsort(-flat, kind="stable")[: np.count_nonzero(flat)]
        left = flat.sum() - np.cumsum(flat[order])
        goal = self.threshold(num_in_pool) * GOAL_SHARE * _num_sparse(mean_LR)
        enough = int(np.count_nonzero(left > goal)) + 1
        most = min(enough, int(LARGEST_GROWTH * num_in_pool))
        return tuple(keys[index] for index in order[:most])

    def widened(self, keys: Sequence[ExpertKey], num_left_out: int = 0) -> None:
        """The trial is over and `keys` are in the pool now, without so many that were wanted: a new window begins.

        Where there was no room for any, it rests twice as long as the last time before it speaks up again.
        """
        self._experts_left_out += num_left_out
        self._widenings += bool(keys)
        self._num_fruitless = 0 if keys else self._num_fruitless + 1
        if not keys:
            self._rests_until = self._num_measured + self.policy.window * 2**self._num_fruitless
        self._experts_added += len(keys)
        self._trial = None
        self._window.clear()

    def became_exact(self) -> None:
        """Records that the answer became exact: nothing lies outside any more. A token's prediction needs the one
        before it, so the next but one is exact.
        """
        self._exact_from = self._num_measured + 1

    def report(self) -> DriftReport:
        """An answer shorter than the window reports the mean of what it has."""
        peak = self._peak
        if not peak and self._num_measured:
            blocks = [*self._window, *([self._open] if self._open is not None else [])]
            peak = _outside(_mean_of(blocks)) if blocks else 0.0
        return DriftReport(peak, self._widenings, self._experts_added, self._exact_from, self._experts_left_out)


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


class _Kind(Enum):
    TRIAL = auto()  # all experts for some tokens, the pool held as before and the others paged on demand
    WIDEN = auto()
    EXACT = auto()


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a request's pool, and the experts that its lease is to hold for it."""

    kind: _Kind
    held: tuple[ExpertKey, ...] = ()
    num_slots: int = 0  # promised and unbound, for what is paged on demand
    added: tuple[ExpertKey, ...] = ()  # to the pool, the most wanted first
    num_left_out: int = 0  # of those wanted: for them the worker has no slots, whoever runs there


def answer_drift(request: RequestRouting) -> Change | None:
    """Looks, every few tokens, at what a request's forwards left outside of its pool, and does what its policy says.

    The steps of those forwards have been settled. Between two forwards, a pool grows or its request becomes exact.
    Where the slots for that are not to be had now, the request lets go of all its experts and runs no forward until
    `make_change` has made the change that is returned. So nobody waits while holding, and what an answer gets depends
    on the worker's slots, never on who holds them at that moment.
    """
    request.check_measured()
    monitor = request.monitor
    if monitor is None or not monitor.is_due():
        return None
    pool = request.pool
    assert pool is not None, "only what has a pool is measured"
    if not monitor.look(pool.num_experts):
        return None
    change = _change(request, monitor, pool)
    if make_change(request, change):
        return None
    assert request.lease is not None, "without a lease, every change is made at once"
    request.lease.become(())
    return change


def make_change(request: RequestRouting, change: Change) -> bool:
    """Changes the request; False, with nothing changed, without the slots for it.

    Raises PoolTooLarge where the slots can never be had, as when another tenant was guaranteed them meanwhile.
    """
    monitor, lease = request.monitor, request.lease
    assert monitor is not None, "only drift changes a request"
    if lease is not None:
        needed = len(change.held) + change.num_slots
        if needed > max(lease.capacity, lease.num_bound + lease.num_reserved):
            raise PoolTooLarge(needed, lease.capacity)
    if lease is not None and not lease.become(change.held, change.num_slots):
        return False
    if change.kind is _Kind.EXACT:
        request.go_exact()
        monitor.became_exact()
    elif change.kind is _Kind.TRIAL:
        request.suspend_pool()
        monitor.begin_trial()
    else:
        request.widen(change.added)
        monitor.widened(change.added, change.num_left_out)
    return True


def _change(request: RequestRouting, monitor: DriftMonitor, pool: ExpertPool) -> Change:
    top_k = max(request.facts.top_k_per_layer)
    if monitor.policy.action is DriftAction.EXACT:
        return Change(_Kind.EXACT, num_slots=top_k)  # enough for any exact request
    held, lease = tuple(pool.keys()), request.lease
    if not monitor.is_on_trial and (lease is None or len(held) + top_k <= lease.capacity):
        return Change(_Kind.TRIAL, held, top_k)
    wanted = monitor.wanted(pool.num_experts)
    added = wanted if lease is None else wanted[: max(0, lease.capacity - len(held))]
    return Change(_Kind.WIDEN, tuple(chain(held, added)), added=added, num_left_out=len(wanted) - len(added))
