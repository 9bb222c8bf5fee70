"""One forward: whose its tokens are, which experts each may pick, and what falls outside of the pools.

Legend: T tokens of a forward, N requests in it, L layers, E experts of a layer (shared last), R routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pager.cache.stats import UsageMeter
from pager.models.families import routed_probabilities
from pager.pools.drift import Outside, RequestRouting
from pager.types import RoutingFacts


@dataclass(frozen=True, slots=True)
class _State:
    """The state of the requests of a step, taken together."""

    pages_on_demand: bool
    is_exact: bool
    is_measured: bool
    is_frozen: bool


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
    ) -> None:
        """`rows` [T] indexes `requests`; None: one token each, or all of the only one's. `valid` [T] False is padding.

        With `prefill`, pools that are still open are chosen in its forward, and nothing is measured.
        """
        self.requests = tuple(requests)
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
        self._outside: OutsideMass | None = None
        if not prefill:
            self._outside = OutsideMass(
                facts, len(requests), rows, valid, per_expert=self._may_drift, device=requests[0].device
            )
        self.meter = requests[0].meter if len(requests) == 1 else UsageMeter(requests[0].meter.tenant)

    @property
    def pages_on_demand(self) -> bool:
        return self._now().pages_on_demand

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
        versions = tuple([request.version for request in self.requests])
        if versions != self._versions:
            self._versions = versions
            self._allowed_LNE = [None] * self._facts.num_layers
            self._pools_LNE = [None] * self._facts.num_layers
        with self._outside.forward() if self._outside is not None else nullcontext():
            yield
        for request in self.awaiting:
            request.awaits_experts = False

    def replayed(self) -> None:
        """Counts one more run of the forward that was recorded, which calls nothing here."""
        if self._outside is not None:
            self._outside.replayed()

    def allowed(self, layer: int, logits_TE: Tensor) -> Tensor | None:
        """[T or 1, E] bool: which experts each token may pick; None when all. Chooses the pools that are still open."""
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
        """The present state; kept for what comes where nothing can change it: all pools frozen, none that drifts."""
        if self._state is not None:
            return self._state
        requests = self.requests
        state = _State(
            pages_on_demand=any(request.lease is None or request.is_exact for request in requests),
            is_exact=all(request.is_exact for request in requests),
            is_measured=any(request.is_measured for request in requests),
            is_frozen=all(request.is_frozen for request in requests),
        )
        if state.is_frozen and not self._may_drift:
            self._state = state
        return state

    @property
    def awaiting(self) -> tuple[RequestRouting, ...]:
        """The requests whose leases may still be reading."""
        if self.prefill:
            return self.requests
        return tuple(request for request in self.requests if request.awaits_experts) if self._may_drift else ()

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
        if len(self.requests) > 1 and self.meter.counts.num_lookups:
            close_account(self.meter)
            parts = self.meter.counts.split(len(self.requests))
            for request, part in zip(self.requests, parts, strict=True):
                request.meter.counts += part
            self.meter = UsageMeter(self.requests[0].meter.tenant)

    def _choose(self, layer: int, logits_TE: Tensor, open_requests: list[int]) -> None:
        num_shared = self._facts.shared_per_layer[layer]
        probs_TR = routed_probabilities(logits_TE, num_shared).double()
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
