"""How the tokens of one forward choose their experts: every document by its own pool.

Legend: T tokens of the forward, N documents in it, L layers, E experts of a layer (shared last), R routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pager.cache.lease import Lease
from pager.cache.stats import UsageMeter
from pager.models.families import routed_probabilities
from pager.pools.drift import DriftMonitor
from pager.pools.outside import Outside, OutsideMass
from pager.pools.pick import check_pool, covered_mass, largest_counts, pick_layer
from pager.types import ExpertKey, ExpertPool, Full, Mass, PoolPolicy, PoolSource, RoutingFacts

if TYPE_CHECKING:
    from pager.pools.widening import Change


class DocumentRouting:
    """One document's pool: chosen layer by layer while its prompt is prefilled, then frozen (EMO rules 13 to 15).

    Only drift changes it later (`pager.pools.widening`): between two forwards it grows, or the document becomes exact.
    Mutable; owned by one sequence. With a lease, choosing a layer's pool binds it; without, paging is on demand.
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
        self._first_pool: ExpertPool | None = None
        self.monitor: DriftMonitor | None = None
        if policy.drift is not None and not self.is_exact:
            self.monitor = DriftMonitor(policy.drift, sum(facts.routed_per_layer))
        self.fault: Exception | None = None  # what its measuring failed with, in a step that it shares with others
        self.change: Change | None = None  # what it becomes once it can have the slots; it runs no forward until then
        self.awaits_experts = False  # it was widened, and no forward has waited for the new experts yet
        self.open_step: StepRouting | None = None
        if policy.fixed is not None:
            for layer, experts in enumerate(check_pool(policy.fixed, facts).experts):
                self._set_layer(layer, experts)

    @property
    def is_frozen(self) -> bool:
        """Every sparse layer has its pool; nothing will change it."""
        return self.is_exact or all(
            chosen is not None or not num_experts
            for chosen, num_experts in zip(self._experts, self.facts.experts_per_layer, strict=True)
        )

    @property
    def pool(self) -> ExpertPool | None:
        """The pool, once it is frozen; None for a document that never had one. Going exact does not change it."""
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
    def degraded(self) -> bool:
        """A mass was asked for that the cap did not allow."""
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
        """Freezes the layer's pool from the gate mass of the document's tokens (float64), and starts paging it in."""
        self._mass_LR[layer] = mass_R
        top_k = self.facts.top_k_per_layer[layer]
        self._set_layer(layer, pick_layer(mass_R, self.policy.size, self._counts[layer], top_k))
        if self.lease is not None:
            self.lease.bind(layer, self._experts[layer] or ())

    def widen(self, keys: Sequence[ExpertKey]) -> None:
        """Adds routed experts to the frozen pool and restricts the document to it, between two forwards.

        What the past was computed with stays.
        """
        self._remember_first_pool()
        self.is_exact = False
        for layer in sorted({key.layer for key in keys}):
            new = {key.expert for key in keys if key.layer == layer}
            self._set_layer(layer, tuple(sorted(new.union(self._experts[layer] or ()))))
        self.awaits_experts = self.lease is not None

    def suspend_pool(self) -> None:
        """All experts from the next forward on, while what lies outside of the pool goes on being measured."""
        self._remember_first_pool()
        self.is_exact = True

    def go_exact(self) -> None:
        """All experts from the next forward on, for good."""
        self.suspend_pool()
        self._allowed_LE = [None] * self.facts.num_layers

    def allowed(self, layer: int) -> Tensor:
        """[E] bool: which experts of the layer the router may pick; shared ones always."""
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
        """Mean gate mass outside the pool over the tokens generated so far and the sparse layers. Synchronises."""
        if self.open_step is not None:
            self.open_step.settle()
        self.check_measured()
        return self._outside / self._num_measured if self._num_measured else 0.0

    def check_measured(self) -> None:
        """Raises what measuring this document failed with. Whoever settles a step settles it for others, too."""
        if self.fault is not None:
            raise self.fault

    @property
    def is_measured(self) -> bool:
        """There is a pool that mass can be outside of: one in force, or one that is suspended to see what is wanted."""
        return not self.is_exact or (self.monitor is not None and self.monitor.is_on_trial)

    def add_outside(self, outside: Outside) -> None:
        if not self.is_measured:
            return
        if not self.is_exact:
            self._outside += outside.mass
            self._num_measured += outside.count
        if self.monitor is not None and outside.mass_LR is not None:
            num_sparse = sum(routed > 0 for routed in self.facts.routed_per_layer)
            self.monitor.add(outside.count // num_sparse, outside.mass_LR)

    def _remember_first_pool(self) -> None:
        self._first_pool = self.first_pool
        if self.open_step is not None:
            self.open_step.settle()
            self.open_step.forget_pools()

    def _set_layer(self, layer: int, experts: tuple[int, ...]) -> None:
        num_experts = self.facts.experts_per_layer[layer]
        if not num_experts:
            return
        allowed_E = torch.zeros(num_experts, dtype=torch.bool)
        allowed_E[list(experts)] = True
        allowed_E[num_experts - self.facts.shared_per_layer[layer] :] = True
        self._experts[layer] = experts
        self._allowed_LE[layer] = allowed_E.to(self.device)


@dataclass(frozen=True, slots=True)
class _State:
    """What the documents of a step are, taken together."""

    pages_on_demand: bool
    is_exact: bool
    is_measured: bool
    is_frozen: bool


class StepRouting:
    """The documents of one forward, and which token is whose. Reused from step to step while the batch is the same."""

    def __init__(
        self,
        documents: Sequence[DocumentRouting],
        *,
        rows: Tensor | None = None,
        valid: Tensor | None = None,
        prefill: bool = False,
    ) -> None:
        """`rows` [T] indexes `documents`; None: one token each, or all of the only one's. `valid` [T]: no padding."""
        self.documents = tuple(documents)
        self.rows = rows
        self.valid = valid
        self.prefill = prefill
        facts = documents[0].facts
        self._facts = facts
        self._allowed_LNE: list[Tensor | None] = [None] * facts.num_layers
        self._pools_LNE: list[Tensor | None] = [None] * facts.num_layers
        self._may_drift = any(document.monitor is not None for document in documents)
        self._state: _State | None = None
        self._outside: OutsideMass | None = None
        if not prefill:
            self._outside = OutsideMass(
                facts, len(documents), rows, valid, per_expert=self._may_drift, device=documents[0].device
            )
        self.meter = documents[0].meter if len(documents) == 1 else UsageMeter()
        for document in documents:
            if document.open_step is not None and document.open_step is not self:
                document.open_step.settle()
            document.open_step = self

    @property
    def pages_on_demand(self) -> bool:
        return self._now().pages_on_demand

    @property
    def is_steady(self) -> bool:
        """From here on its forwards do the same, but for their numbers: pools that are leased and will not change."""
        return not self._now().pages_on_demand and self._state is not None

    def recording(self) -> AbstractContextManager[None]:
        """Around a forward of a steady step that is recorded and not run."""
        return self._outside.recording() if self._outside is not None else nullcontext()

    def forward(self) -> AbstractContextManager[None]:
        """Around a forward; what one that fails has measured counts for nothing."""
        return self._outside.forward() if self._outside is not None else nullcontext()

    def replayed(self) -> None:
        """The forward that was recorded has run once more, without anything here being called."""
        if self._outside is not None:
            self._outside.replayed()

    def allowed(self, layer: int, logits_TE: Tensor) -> Tensor | None:
        """[T or 1, E] bool: which experts each token may pick; None when all. Chooses the pools that are still open."""
        now = self._now()
        if not now.is_frozen:
            open_documents = [n for n, document in enumerate(self.documents) if not document.has_layer(layer)]
            if open_documents:
                self._choose(layer, logits_TE, open_documents)
        if now.is_measured and self._outside is not None:
            in_pool_NE = self._stacked(layer, DocumentRouting.in_pool, self._pools_LNE)
            self._outside.add(layer, logits_TE, self._of_tokens(in_pool_NE))
        if now.is_exact:
            return None
        return self._of_tokens(self._stacked(layer, DocumentRouting.allowed, self._allowed_LNE))

    def _now(self) -> _State:
        """Kept for the layers and forwards to come where nothing can change it: all pools frozen, none that drifts."""
        if self._state is not None:
            return self._state
        documents = self.documents
        state = _State(
            pages_on_demand=any(document.lease is None or document.is_exact for document in documents),
            is_exact=all(document.is_exact for document in documents),
            is_measured=any(document.is_measured for document in documents),
            is_frozen=all(document.is_frozen for document in documents),
        )
        if state.is_frozen and not self._may_drift:
            self._state = state
        return state

    @property
    def awaiting(self) -> tuple[DocumentRouting, ...]:
        """Whose leases may still be reading."""
        if self.prefill:
            return self.documents
        return tuple(document for document in self.documents if document.awaits_experts) if self._may_drift else ()

    def num_unsettled(self, document: DocumentRouting) -> int:
        """How many of the document's tokens were measured and not handed over yet. Does not synchronise."""
        if self._outside is None:
            return 0
        return sum(self._outside.num_tokens(n) for n, other in enumerate(self.documents) if other is document)

    def settle(self) -> None:
        """Hands the mass measured on the device to the documents. Synchronises."""
        if self._outside is None:
            return
        for document, outside in zip(self.documents, self._outside.take() or (), strict=False):
            try:
                document.add_outside(outside)
            except Exception as error:
                document.fault = error

    def forget_pools(self) -> None:
        """A document's pool is about to change."""
        self._allowed_LNE = [None] * self._facts.num_layers
        self._pools_LNE = [None] * self._facts.num_layers

    def share_costs(self, close_account: Callable[[UsageMeter], None]) -> None:
        """What the documents paged on demand together is charged to them in equal parts.

        The joint account is closed first: a read that nobody waited for may still be under way.
        """
        if len(self.documents) > 1 and self.meter.counts.num_lookups:
            close_account(self.meter)
            parts = self.meter.counts.split(len(self.documents))
            for document, part in zip(self.documents, parts, strict=True):
                document.meter.counts += part
            self.meter = UsageMeter()

    def _choose(self, layer: int, logits_TE: Tensor, open_documents: list[int]) -> None:
        num_shared = self._facts.shared_per_layer[layer]
        probs_TR = routed_probabilities(logits_TE, num_shared).double()
        if self.valid is not None:
            probs_TR = probs_TR * self.valid[:, None]
        if self.rows is None and len(self.documents) == 1:
            mass_NR = probs_TR.sum(0, keepdim=True)
        else:
            mass_NR = probs_TR.new_zeros(len(self.documents), probs_TR.shape[-1])
            rows = self.rows if self.rows is not None else torch.arange(len(probs_TR), device=probs_TR.device)
            mass_NR.index_add_(0, rows, probs_TR)
        masses = mass_NR.cpu().numpy()
        for index in open_documents:
            self.documents[index].choose_layer(layer, masses[index])
        self._allowed_LNE[layer] = self._pools_LNE[layer] = None

    def _stacked(self, layer: int, mask: Callable[[DocumentRouting, int], Tensor], kept: list[Tensor | None]) -> Tensor:
        stacked_NE = kept[layer]
        if stacked_NE is None:
            stacked_NE = kept[layer] = torch.stack([mask(document, layer) for document in self.documents])
        return stacked_NE

    def _of_tokens(self, mask_NE: Tensor) -> Tensor:
        return mask_NE if self.rows is None else mask_NE[self.rows]
