"""The gate mass that falls outside of pools, added up on the device while a model runs.

Legend: T tokens of a forward, N documents in it, L layers, E experts of a layer, R routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pager.models.families import routed_probabilities
from pager.types import RoutingFacts


@dataclass(frozen=True, slots=True, eq=False)
class Outside:
    """Of one document: probability outside of its pool, summed over `count` (tokens times sparse layers)."""

    mass: float
    count: int
    mass_LR: list[np.ndarray] | None = None  # the same per layer and expert, where that was asked for


class OutsideMass:
    """Sums over the forwards since the last `take`, a document each. Nothing but `take` waits for the device.

    With `per_expert` it also keeps, per layer, which routed experts the mass was for.
    """

    @torch.inference_mode(False)  # what is made in that mode could not be added to outside of it
    def __init__(
        self,
        facts: RoutingFacts,
        num_documents: int,
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
        self._num_documents = num_documents
        self._rows = rows
        self._valid = valid
        self._num_sparse = sum(routed > 0 for routed in facts.routed_per_layer)
        self._per_expert = per_expert
        self._tokens_N = [1] * num_documents  # of each, in every token that `_num_calls` counts
        if rows is not None:
            counted = rows if valid is None else rows[valid]
            self._tokens_N = torch.bincount(counted, minlength=num_documents).tolist()
        self._num_calls = 0
        self._num_recorded = 0  # of a forward that is replayed
        # Where it is, for as long as `self` is there.
        self._total_N = torch.zeros(num_documents, dtype=torch.float32, device=device)
        self._num_waiting = 0
        self._waiting: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # logits and pools of layers alike
        self._experts_LNR: dict[int, Tensor] = {}

    def add(self, layer: int, logits_TE: Tensor, allowed_TE: Tensor) -> None:
        """One layer of a forward, its raw gate logits and what the pools allowed."""
        self._num_calls += len(logits_TE) if self._rows is None and self._num_documents == 1 else 1
        num_shared = self._facts.shared_per_layer[layer]
        if self._per_expert:
            mass_NR = self._by_document(self._outside(logits_TE, allowed_TE, num_shared).double())
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
            self._total_N += self._by_document(outside_LTR.sum((0, -1))).detach()
        self._num_waiting, self._waiting = 0, {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around a forward that is recorded and not run. It counts for nothing; each `replayed` for one that ran."""
        before = self._num_calls
        try:
            yield
            self._num_recorded = self._num_calls - before
        finally:
            self._num_calls, self._num_waiting, self._waiting = before, 0, {}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward: the layers of one that fails count for nothing, as it will be run again."""
        num_calls, experts_LNR = self._num_calls, dict(self._experts_LNR)
        try:
            yield
        except BaseException:
            if self._per_expert or self._num_waiting:  # else all its layers were added up, and count as a token
                self._num_calls, self._experts_LNR = num_calls, experts_LNR
            self._num_waiting, self._waiting = 0, {}
            raise

    def replayed(self) -> None:
        """What was recorded has run once more."""
        self._num_calls += self._num_recorded

    def num_tokens(self, index: int) -> int:
        """How many tokens of that document were added since the last `take`."""
        return self._tokens_N[index] * self._num_calls // max(1, self._num_sparse)

    def take(self) -> list[Outside]:
        """What every document's tokens left outside; empty where nothing was added. Starts anew."""
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
        empty = np.zeros((self._num_documents, 0))
        return [
            [parts.get(layer, empty)[row] for layer in range(self._facts.num_layers)]
            for row in range(self._num_documents)
        ]

    def _by_document(self, values_T: Tensor) -> Tensor:
        """[T, ...] added up to [N, ...]."""
        if self._rows is None:
            return values_T.sum(0, keepdim=True) if self._num_documents == 1 else values_T
        return values_T.new_zeros(self._num_documents, *values_T.shape[1:]).index_add_(0, self._rows, values_T)

    def _clear(self) -> None:
        self._num_calls, self._experts_LNR = 0, {}
        self._total_N.zero_()


def _total(mass_LR: list[np.ndarray]) -> float:
    return float(sum(mass_R.sum() for mass_R in mass_LR))
