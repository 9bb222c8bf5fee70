"""One request's choice of experts, and whether its pool still fits what it generates.

Legend: L layers, E experts of a layer (shared last), R routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pager.cache.lease import Lease
from pager.cache.stats import UsageMeter
from pager.pools.drift import DriftMonitor
from pager.pools.pick import check_pool, covered_mass, largest_counts, pick_layer
from pager.types import ExpertKey, ExpertPool, Full, Mass, PoolPolicy, PoolSource, RoutingFacts


@dataclass(frozen=True, slots=True, eq=False)
class Outside:
    """The probability that falls outside of one request's pool, summed over `count` (tokens times sparse layers)."""

    mass: float
    count: int
    mass_LR: list[np.ndarray] | None = None  # the same per layer and expert, where that was asked for


class RequestRouting:
    """One request's pool: chosen layer by layer while its prompt is prefilled, then frozen (EMO rules 13 to 15).

    Only drift changes it later (`pager.pools.drift`): between two forwards it grows, or the request becomes exact.
    Mutable; owned by one request. With a lease, choosing a layer's pool binds it; without, paging is on demand. It does
    not know the steps that it takes part in: whoever runs them hands over what they measured.
    """

    def __init__(
        self,
        facts: RoutingFacts,
        policy: PoolPolicy,
        *,
        device: torch.device | str = "cpu",
        lease: Lease | None = None,
        meter: UsageMeter | None = None,
    ) -> None:
        """`policy.source` PREDICTION needs its pool in `policy.fixed` by now. Raises PoolTooSmall, InvalidRequest."""
        self.facts = facts
        self.policy = policy
        self.lease = lease
        self.meter = meter or UsageMeter()
        self.device = torch.device(device)
        self.is_exact = isinstance(policy.size, Full) and policy.fixed is None
        self._counts = largest_counts(policy.size, facts) if not self.is_exact else facts.routed_per_layer
        self._experts: list[tuple[int, ...] | None] = [None] * facts.num_layers
        self._allowed_LE: list[Tensor | None] = [None] * facts.num_layers
        self._mass_LR: list[np.ndarray] = [np.zeros(0)] * facts.num_layers
        self._outside = 0.0
        self._num_measured = 0
        self._taken = (0.0, 0)  # of both, what `take_outside` has returned
        self._first_pool: ExpertPool | None = None
        self.monitor: DriftMonitor | None = None
        if policy.drift is not None and not self.is_exact:
            self.monitor = DriftMonitor(policy.drift, sum(facts.routed_per_layer))
        self.fault: Exception | None = None  # what its measuring failed with, in a step that it shares with others
        self.awaits_experts = False  # it was widened, and no forward has waited for the new experts yet
        self.version = 0  # grows with every change of what `allowed` and `in_pool` return
        if policy.fixed is not None:
            for layer, experts in enumerate(check_pool(policy.fixed, facts).experts):
                self._set_layer(layer, experts)

    @property
    def is_frozen(self) -> bool:
        """Whether every sparse layer has its pool."""
        return self.is_exact or all(
            chosen is not None or not num_experts
            for chosen, num_experts in zip(self._experts, self.facts.experts_per_layer, strict=True)
        )

    @property
    def pool(self) -> ExpertPool | None:
        """The pool, once it is frozen; None for a request that never had one. Going exact does not change it."""
        if not self.is_frozen or (self.is_exact and self._first_pool is None):
            return None
        experts = tuple(chosen or () for chosen in self._experts)
        mass = covered_mass(self._mass_LR, experts) if self.policy.fixed is None else self.policy.fixed.covered_mass
        return ExpertPool(experts, mass)

    @property
    def first_pool(self) -> ExpertPool | None:
        """The pool as it was before any drift: what the prompt chose, and what may be remembered for it."""
        return self._first_pool or self.pool

    @property
    def has_changed(self) -> bool:
        """Whether drift has changed which experts it may use."""
        return self._first_pool is not None

    @property
    def degraded(self) -> bool:
        """Whether the pool covers less than the mass that was asked for, as the cap did not allow more."""
        pool, size = self.pool, self.policy.size
        if pool is None or not isinstance(size, Mass) or self.policy.source is PoolSource.FIXED:
            return False
        if self.policy.fixed is not None:
            return pool.covered_mass is not None and pool.covered_mass < size.mass - 1e-6
        pairs = zip(self._mass_LR, pool.experts, strict=True)
        return any(len(mass) and mass[list(ids)].sum() < (size.mass - 1e-6) * mass.sum() for mass, ids in pairs)

    def has_layer(self, layer: int) -> bool:
        return self.is_exact or self._experts[layer] is not None

    def choose_layer(self, layer: int, mass_R: np.ndarray) -> None:
        """Freezes the layer's pool from the gate mass of the request's tokens (float64), and starts paging it in."""
        self._mass_LR[layer] = mass_R
        top_k = self.facts.top_k_per_layer[layer]
        self._set_layer(layer, pick_layer(mass_R, self.policy.size, self._counts[layer], top_k))
        if self.lease is not None:
            self.lease.bind(layer, self._experts[layer] or ())

    def widen(self, keys: Sequence[ExpertKey]) -> None:
        """Adds routed experts to the frozen pool and restricts the request to it, between two forwards.

        What the past was computed with stays.
        """
        self._first_pool = self.first_pool
        self.is_exact = False
        for layer in sorted({key.layer for key in keys}):
            new = {key.expert for key in keys if key.layer == layer}
            self._set_layer(layer, tuple(sorted(new.union(self._experts[layer] or ()))))
        self.awaits_experts = self.lease is not None

    def suspend_pool(self) -> None:
        """Allows all experts from the next forward on, and goes on measuring what lies outside of the pool."""
        self._first_pool = self.first_pool
        self.is_exact = True
        self.version += 1

    def go_exact(self) -> None:
        """Allows all experts from the next forward on, for good."""
        self.suspend_pool()
        self._allowed_LE = [None] * self.facts.num_layers
        self.version += 1

    def allowed(self, layer: int) -> Tensor:
        """[E] bool: which experts of the layer the gate may pick; shared ones always."""
        return self._all_experts(layer) if self.is_exact else self.in_pool(layer)

    def in_pool(self, layer: int) -> Tensor:
        """[E] bool: which experts of the layer are in the pool, even while it is suspended; all without a pool."""
        allowed_E = self._allowed_LE[layer]
        if allowed_E is None:
            allowed_E = self._allowed_LE[layer] = self._all_experts(layer)
        return allowed_E

    def _all_experts(self, layer: int) -> Tensor:
        return torch.ones(self.facts.experts_per_layer[layer], dtype=torch.bool, device=self.device)

    def out_of_pool_mass(self) -> float:
        """Mean gate mass outside the pool over the sparse layers and the generated tokens whose steps were settled."""
        self.check_measured()
        return self._outside / self._num_measured if self._num_measured else 0.0

    def take_outside(self) -> float | None:
        """The mean gate mass outside the pool of what was settled since the last call; None where nothing was."""
        mass, count = self._outside - self._taken[0], self._num_measured - self._taken[1]
        self._taken = (self._outside, self._num_measured)
        return mass / count if count else None

    def check_measured(self) -> None:
        """Raises what measuring this request failed with: a step is settled for all its requests at once."""
        if self.fault is not None:
            raise self.fault

    @property
    def is_measured(self) -> bool:
        """Whether there is a pool to be outside of: in force, or suspended for a trial of which experts are wanted."""
        return not self.is_exact or (self.monitor is not None and self.monitor.is_on_trial)

    def add_outside(self, outside: Outside) -> None:
        """Takes what a step has measured of this request."""
        if not self.is_measured:
            return
        if not self.is_exact:
            self._outside += outside.mass
            self._num_measured += outside.count
        if self.monitor is not None and outside.mass_LR is not None:
            num_sparse = sum(routed > 0 for routed in self.facts.routed_per_layer)
            self.monitor.add(outside.count // num_sparse, outside.mass_LR)

    def _set_layer(self, layer: int, experts: tuple[int, ...]) -> None:
        num_experts = self.facts.experts_per_layer[layer]
        if not num_experts:
            return
        allowed_E = torch.zeros(num_experts, dtype=torch.bool)
        allowed_E[list(experts)] = True
        allowed_E[num_experts - self.facts.shared_per_layer[layer] :] = True
        self._experts[layer] = experts
        self._allowed_LE[layer] = allowed_E.to(self.device)
        self.version += 1
