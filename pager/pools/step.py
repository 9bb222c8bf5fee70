"""One request's experts, and one forward: which experts its requests may pick, and what falls outside of the pools.

Legend: T tokens of a forward, N requests in it, L layers, E experts of a layer (shared last), R routed experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pager.cache.lease import Lease
from pager.cache.stats import UsageMeter
from pager.models.families import routed_probabilities
from pager.pools.drift import DriftMonitor
from pager.pools.pick import check_pool, covered_mass, largest_counts, pick_layer
from pager.types import (
    ExpertKey,
    ExpertPool,
    Full,
    Mass,
    PoolPolicy,
    PoolSource,
    RoutingFacts,
)


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
    def is_in_place(self) -> bool:
        """Tells whether it holds no slots."""
        return self.lease is not None and self.lease.is_in_place

    def fork(self) -> RequestRouting:
        """The routing of another answer of the request: the same pool and lease, and what lies outside of it counted
        from here on. For a pool that is frozen and that nothing changes.
        """
        assert self.is_frozen, "answers share a pool, and there is none yet"
        assert self.monitor is None, "answers share a pool that stays as it is"
        forked = copy.copy(self)
        forked._outside, forked._num_measured, forked._taken = 0.0, 0, (0.0, 0)
        return forked

    @property
    def is_frozen(self) -> bool:
        """Tells whether every sparse layer has its pool."""
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
        """Tells whether drift has changed which experts it may use."""
        return self._first_pool is not None

    @property
    def degraded(self) -> bool:
        """Tells whether the pool covers less than the mass that was asked for, as the cap did not allow more."""
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
        """Tells whether there is a pool to be outside of: in force, or suspended for a trial of which experts are
        wanted.
        """
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


# --- a forward --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _State:
    """The state of the requests of a step, taken together."""

    pages_on_demand: bool
    is_exact: bool
    is_measured: bool
    is_frozen: bool
    is_in_place: bool


class StepRouting:
    """The requests of one forward, and which token is whose: a value that is handed into the forward.

    The requests of a batch that stays the same run all their forwards with one. What it measures stays on the device
    until `settle`, which comes before a request is looked at, changed or run in another step.
    """

    def __init__(
        self,
        requests: Sequence[RequestRouting],
        *,
        rows: Tensor | None = None,
        valid: Tensor | None = None,
        prefill: bool = False,
        beside: StepRouting | None = None,
    ) -> None:
        """`rows` [T] indexes `requests`; None: one token each, or all of the only one's. `valid` [T] False is padding.

        With `prefill`, pools that are still open are chosen in its forward, and nothing is measured. `beside` is a
        step of one token for each of its requests, which are the last ones of the forward, and as exact as these.
        """
        self.requests = tuple(requests)
        self._beside = beside
        self.rows = rows
        self.valid = valid
        self.prefill = prefill
        facts = requests[0].facts
        self._facts = facts
        self._allowed_LNE: list[Tensor | None] = [None] * facts.num_layers
        self._pools_LNE: list[Tensor | None] = [None] * facts.num_layers
        self._versions: tuple[int, ...] = ()
        self._may_drift = any(request.monitor is not None for request in requests)
        self._state: _State | None = None
        self._awaiting: tuple[RequestRouting, ...] = ()
        self._outside: OutsideMass | None = None
        if not prefill:
            self._outside = OutsideMass(
                facts, len(requests), rows, valid, per_expert=self._may_drift, device=requests[0].device
            )
        self._payers = self.requests if beside is None else (*self.requests, *beside.requests)
        self.meter = requests[0].meter if len(self._payers) == 1 else UsageMeter(requests[0].meter.tenant)

    @property
    def pages_on_demand(self) -> bool:
        return self._now().pages_on_demand

    @property
    def is_in_place(self) -> bool:
        """Tells whether some request holds no slots: its experts are computed where the page cache has them."""
        return self._now().is_in_place or (self._beside is not None and self._beside.is_in_place)

    @property
    def reservation(self) -> Lease | None:
        """The lease with the most promised slots, within which an exact forward pages."""
        leases = [request.lease for request in self.requests if request.lease is not None]
        return max(leases, key=lambda lease: lease.num_reserved, default=None)

    @property
    def restricts(self) -> bool:
        """Tells whether routers have to ask: some request has a pool, chooses one, or has its mass measured."""
        now = self._now()
        return not (now.is_exact and now.is_frozen) or now.is_measured

    @property
    def is_steady(self) -> bool:
        """Tells whether its forwards do the same from here on, but for their numbers: leased pools that will not
        change.
        """
        return not self._now().pages_on_demand and self._state is not None

    def recording(self) -> AbstractContextManager[None]:
        """Surrounds a forward of a steady step that is recorded and not run."""
        return self._outside.recording() if self._outside is not None else nullcontext()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Surrounds a forward; what one that fails has measured counts for nothing."""
        if self._state is not None and self._state.is_in_place:
            self._state = None  # between two forwards a request without slots may have been given some
        versions = tuple([request.version for request in self.requests])
        if versions != self._versions:
            self._versions = versions
            self._allowed_LNE = [None] * self._facts.num_layers
            self._pools_LNE = [None] * self._facts.num_layers
        self._awaiting = tuple([request for request in self.requests if request.awaits_experts])
        measuring = self._outside.forward() if self._outside is not None else nullcontext()
        with measuring, self._beside.forward() if self._beside is not None else nullcontext():
            yield
        for request in self._awaiting:
            request.awaits_experts = False
        self._awaiting = ()

    def replayed(self) -> None:
        """Counts one more run of the forward that was recorded, which calls nothing here."""
        if self._outside is not None:
            self._outside.replayed()

    def allowed(self, layer: int, logits_TE: Tensor) -> Tensor | None:
        """[T or 1, E] bool: which experts each token may pick; None when all. Chooses the pools that are still open."""
        if self._beside is None:
            return self._allowed(layer, logits_TE)
        num_own = len(logits_TE) - len(self._beside.requests)
        own_TE = self._allowed(layer, logits_TE[:num_own])
        beside_TE = self._beside.allowed(layer, logits_TE[num_own:])
        if own_TE is None or beside_TE is None:
            assert own_TE is beside_TE, "requests with a pool run beside each other, and exact ones do"
            return None
        return torch.cat([own_TE.expand(num_own, -1), beside_TE])

    def _allowed(self, layer: int, logits_TE: Tensor) -> Tensor | None:
        now = self._now()
        if not now.is_frozen:
            open_requests = [n for n, request in enumerate(self.requests) if not request.has_layer(layer)]
            if open_requests:
                self._choose(layer, logits_TE, open_requests)
        if now.is_measured and self._outside is not None:
            in_pool_NE = self._stacked(layer, RequestRouting.in_pool, self._pools_LNE)
            self._outside.add(layer, logits_TE, self._of_tokens(in_pool_NE))
        if now.is_exact:
            return None
        return self._of_tokens(self._stacked(layer, RequestRouting.allowed, self._allowed_LNE))

    def _now(self) -> _State:
        """The present state; kept where all pools are frozen and none drifts: for what comes or, where a request holds
        no slots, for the present forward.
        """
        if self._state is not None:
            return self._state
        requests = self.requests
        state = _State(
            pages_on_demand=any(request.lease is None or request.is_exact for request in requests),
            is_exact=all(request.is_exact for request in requests),
            is_measured=any(request.is_measured for request in requests),
            is_frozen=all(request.is_frozen for request in requests),
            is_in_place=any(request.is_in_place for request in requests),
        )
        if state.is_frozen and not self._may_drift:
            self._state = state
        return state

    @property
    def awaiting(self) -> tuple[RequestRouting, ...]:
        """The requests whose leases may still be reading."""
        if self.prefill:
            return self.requests
        return self._awaiting

    def num_unsettled(self, request: RequestRouting) -> int:
        """Returns how many of the request's tokens were measured and not handed over yet. Does not synchronise."""
        if self._outside is None:
            return 0
        return sum(self._outside.num_tokens(n) for n, other in enumerate(self.requests) if other is request)

    def settle(self) -> None:
        """Hands the mass measured on the device to the requests. Synchronises."""
        if self._outside is None:
            return
        for request, outside in zip(self.requests, self._outside.take() or (), strict=False):
            try:
                request.add_outside(outside)
            except Exception as error:
                request.fault = error

    def share_costs(self, close_account: Callable[[UsageMeter], None]) -> None:
        """Charges what the requests paged on demand together to them in equal parts.

        The joint account is closed first: a read that nobody waited for may still be under way.
        """
        if len(self._payers) > 1 and self.meter.counts.num_lookups:
            close_account(self.meter)
            parts = self.meter.counts.split(len(self._payers))
            for request, part in zip(self._payers, parts, strict=True):
                request.meter.counts += part
            self.meter = UsageMeter(self.requests[0].meter.tenant)

    def _choose(self, layer: int, logits_TE: Tensor, open_requests: list[int]) -> None:
        num_shared = self._facts.shared_per_layer[layer]
        probs_TR = routed_probabilities(logits_TE.detach(), num_shared).double()
        if self.valid is not None:
            probs_TR = probs_TR * self.valid[:, None]
        if self.rows is None and len(self.requests) == 1:
            mass_NR = probs_TR.sum(0, keepdim=True)
        else:
            mass_NR = probs_TR.new_zeros(len(self.requests), probs_TR.shape[-1])
            rows = self.rows if self.rows is not None else torch.arange(len(probs_TR), device=probs_TR.device)
            mass_NR.index_add_(0, rows, probs_TR)
        masses = mass_NR.cpu().numpy()
        for index in open_requests:
            self.requests[index].choose_layer(layer, masses[index])
        self._allowed_LNE[layer] = self._pools_LNE[layer] = None

    def _stacked(self, layer: int, mask: Callable[[RequestRouting, int], Tensor], kept: list[Tensor | None]) -> Tensor:
        stacked_NE = kept[layer]
        if stacked_NE is None:
            stacked_NE = kept[layer] = torch.stack([mask(request, layer) for request in self.requests])
        return stacked_NE

    def _of_tokens(self, mask_NE: Tensor) -> Tensor:
        return mask_NE if self.rows is None else mask_NE[self.rows]


class OutsideMass:
    """Sums over the forwards since the last `take`, one a request. Nothing but `take` waits for the device.

    With `per_expert` it also keeps, per layer, which routed experts the mass was for.
    """

    @torch.inference_mode(False)  # what is made in that mode could not be added to outside of it
    def __init__(
        self,
        facts: RoutingFacts,
        num_requests: int,
        rows: Tensor | None,
        valid: Tensor | None,
        *,
        per_expert: bool,
        device: torch.device,
    ) -> None:
        """`rows` [T] says whose each token is (None: one each, or all the only one's), `valid` [T] which count.

        With `rows` the tokens of a forward are counted here, which waits for the device.
        """
        self._facts = facts
        self._num_requests = num_requests
        self._rows = rows
        self._valid = valid
        self._num_sparse = sum(routed > 0 for routed in facts.routed_per_layer)
        self._per_expert = per_expert
        self._tokens_N = [1] * num_requests  # of each, in every token that `_num_calls` counts
        if rows is not None:
            counted = rows if valid is None else rows[valid]
            self._tokens_N = torch.bincount(counted, minlength=num_requests).tolist()
        self._num_calls = 0
        self._num_recorded = 0  # of a forward that is replayed
        # Where it is, for as long as `self` is there.
        self._total_N = torch.zeros(num_requests, dtype=torch.float32, device=device)
        self._num_waiting = 0
        self._waiting: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # logits and pools of layers alike
        self._experts_LNR: dict[int, Tensor] = {}

    def add(self, layer: int, logits_TE: Tensor, allowed_TE: Tensor) -> None:
        """Adds one layer of a forward: its raw gate logits and what the pools allowed."""
        self._num_calls += len(logits_TE) if self._rows is None and self._num_requests == 1 else 1
        num_shared = self._facts.shared_per_layer[layer]
        if self._per_expert:
            mass_NR = self._by_request(self._outside(logits_TE, allowed_TE, num_shared).double())
            self._experts_LNR[layer] = mass_NR if layer not in self._experts_LNR else self._experts_LNR[layer] + mass_NR
            return
        # Layers wait for each other: a few operations a forward instead of a few a layer.
        waiting = self._waiting.setdefault((*logits_TE.shape, num_shared), [])
        waiting.append((logits_TE, allowed_TE))
        self._num_waiting += 1
        if self._num_waiting >= self._num_sparse:
            self._add_up()

    def _outside(self, logits_TE: Tensor, allowed_TE: Tensor, num_shared: int) -> Tensor:
        """[..., T, R] probability outside of the pools, 0 within."""
        probs_TR = routed_probabilities(logits_TE, num_shared)
        outside_TR = probs_TR.masked_fill(allowed_TE[..., : probs_TR.shape[-1]], 0)
        return outside_TR if self._valid is None else outside_TR * self._valid[:, None]

    def _add_up(self) -> None:
        for (*_, num_shared), layers in self._waiting.items():
            logits, allowed = zip(*layers, strict=True)
            outside_LTR = self._outside(torch.stack(logits), torch.stack(allowed), num_shared)
            self._total_N += self._by_request(outside_LTR.sum((0, -1))).detach()
        self._num_waiting, self._waiting = 0, {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Surrounds a forward that is recorded and not run. It counts for nothing; each `replayed` for one that ran."""
        before = self._num_calls
        try:
            yield
            self._num_recorded = self._num_calls - before
        finally:
            self._num_calls, self._num_waiting, self._waiting = before, 0, {}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Surrounds a forward: the layers of one that fails count for nothing, as it will be run again."""
        num_calls, experts_LNR = self._num_calls, dict(self._experts_LNR)
        try:
            yield
        except BaseException:
            if self._per_expert or self._num_waiting:  # else all its layers were added up, and count as a token
                self._num_calls, self._experts_LNR = num_calls, experts_LNR
            self._num_waiting, self._waiting = 0, {}
            raise

    def replayed(self) -> None:
        """Counts one more run of what was recorded."""
        self._num_calls += self._num_recorded

    def num_tokens(self, index: int) -> int:
        """Returns how many tokens of that request were added since the last `take`."""
        return self._tokens_N[index] * self._num_calls // max(1, self._num_sparse)

    def take(self) -> list[Outside]:
        """Returns what every request's tokens left outside; empty where nothing was added. Starts anew."""
        if self._num_calls == 0:
            return []
        counts = [tokens * self._num_calls for tokens in self._tokens_N]
        if self._per_expert:
            experts_NLR = self._experts_on_host()
            taken = [Outside(_total(mass_LR), n, mass_LR) for mass_LR, n in zip(experts_NLR, counts, strict=True)]
        else:
            self._add_up()
            taken = [Outside(mass, n) for mass, n in zip(self._total_N.tolist(), counts, strict=True)]
        self._clear()
        return taken

    def _experts_on_host(self) -> list[list[np.ndarray]]:
        """[N][L] arrays of [R], by one copy."""
        layers = sorted(self._experts_LNR)
        flat = torch.cat([self._experts_LNR[layer] for layer in layers], dim=1).cpu().numpy()
        ends = np.cumsum([self._experts_LNR[layer].shape[1] for layer in layers])
        parts = dict(zip(layers, np.split(flat, ends[:-1], axis=1), strict=True))
        empty = np.zeros((self._num_requests, 0))
        return [
            [parts.get(layer, empty)[row] for layer in range(self._facts.num_layers)]
            for row in range(self._num_requests)
        ]

    def _by_request(self, values_T: Tensor) -> Tensor:
        """[T, ...] added up to [N, ...]."""
        if self._rows is None:
            return values_T.sum(0, keepdim=True) if self._num_requests == 1 else values_T
        return values_T.new_zeros(self._num_requests, *values_T.shape[1:]).index_add_(0, self._rows, values_T)

    def _clear(self) -> None:
        self._num_calls, self._experts_LNR = 0, {}
        self._total_N.zero_()


def _total(mass_LR: list[np.ndarray]) -> float:
    return float(sum(mass_R.sum() for mass_R in mass_LR))
