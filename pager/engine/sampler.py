"""Draws the next token of every row of a batch.

A sampled row costs one number from its sequence's own generator, turned into a token by the inverse of the row's
cumulative distribution. So a seed gives the same tokens whatever else is in the batch, on any device, and all rows
are drawn together. What is drawn from is what transformers' Temperature-, TopK-, TopP- and MinPLogitsWarper leave of
the logits, after what `pager.engine.logits` does to those of single rows.

Legend: B rows, M rows of one kind, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pager.engine.logits import Context, LogitEdits, logprobs_of
from pager.types import SamplingParams, TokenLogprobs

NOT_FINITE = -1
"""The id of a row whose logits hold NaN or infinity: that sequence cannot go on, the others can."""
NOTHING_ALLOWED = -2
"""The id of a row of which its grammar and its other parameters leave no token."""


class Draw:
    """One sequence's parameters, its generator and the tokens they look at; mutable, owned by the sequence."""

    def __init__(self, params: SamplingParams, context: Context | None = None) -> None:
        self.params = params
        self.context = context or Context(params)
        self._random = random.Random(params.seed)
        self._num_drawn = 0
        self._last = 0.0
        self._is_last_due = False

    def next_uniform(self) -> float:
        """In [0, 1)."""
        if not self._is_last_due:
            self._last = self._random.random()
        self._is_last_due = False
        self._num_drawn += 1
        return self._last

    def rewind(self, num_tokens: int) -> None:
        """The sequence has so many tokens: a number that was drawn for a step that failed then is the next one again.

        So a seed gives the same tokens whatever failed in between.
        """
        if self._num_drawn > num_tokens:
            self._num_drawn, self._is_last_due = num_tokens, True


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The sampled rows of one kind: restricted by top-k, top-p or min-p, or not. Kinds never depend on other rows."""

    draws: tuple[Draw, ...]
    index_M: torch.Tensor
    temperature_M1: torch.Tensor
    top_k_M1: torch.Tensor | None
    top_p_M1: torch.Tensor | None
    min_p_M1: torch.Tensor | None  # where one of the rows has it
    drawn_M1: torch.Tensor  # of the host, page-locked for a GPU
    uniform_M1: torch.Tensor


class Sampler:
    """Samples for a fixed list of sequences; make a new one when the batch changes.

    Neither of its halves waits for the device. Between two calls of `draw` the ids of the first must have been fetched.
    """

    @torch.inference_mode(False)  # as in DecodeBatch
    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        self._device = device
        edited = [(row, draw.context) for row, draw in enumerate(draws) if draw.context.changes_logits]
        self._edits = LogitEdits(edited, device) if edited else None
        self._reported = {
            row: draw.params.logprobs for row, draw in enumerate(draws) if draw.params.logprobs is not None
        }
        sampled = [(row, draw) for row, draw in enumerate(draws) if draw.params.temperature > 0]
        plain = [pair for pair in sampled if not _is_restricted(pair[1].params)]
        restricted = [pair for pair in sampled if _is_restricted(pair[1].params)]
        self._groups = [self._rows(pairs) for pairs in (plain, restricted) if pairs]

    @property
    def is_recordable(self) -> bool:
        """Its device's part looks at nothing that the host says or wants to know from step to step."""
        return self._edits is None and not self._reported

    def sample(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """[B] int64 ids on the logits' device, NOT_FINITE or NOTHING_ALLOWED where a row has no distribution."""
        self.draw()
        return self.pick(logits_BV)

    def draw(self) -> None:
        """The host's part of `sample`: a number from every sampled row's generator."""
        if self._edits is not None:
            self._edits.prepare()
        for rows in self._groups:
            rows.drawn_M1.copy_(torch.tensor([[draw.next_uniform()] for draw in rows.draws], dtype=torch.float64))
            rows.uniform_M1.copy_(rows.drawn_M1, non_blocking=True)

    def pick(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The device's part of `sample`."""
        peak_B, id_B = logits_BV.max(dim=-1)
        is_finite_B = peak_B.isfinite()
        if self._edits is not None:
            logits_BV = self._edits.apply(logits_BV)
            peak_B, id_B = logits_BV.max(dim=-1)
        for rows in self._groups:
            id_B[rows.index_M] = _draw(logits_BV[rows.index_M], rows)
        if self._edits is not None:
            id_B = torch.where(peak_B.isfinite(), id_B, NOTHING_ALLOWED)
        return torch.where(is_finite_B, id_B, NOT_FINITE)

    def logprobs(self, logits_BV: torch.Tensor, token_ids: Sequence[int]) -> dict[int, TokenLogprobs]:
        """By row, of the tokens that were picked from these logits: for rows that want them and have a token."""
        rows = [row for row in self._reported if token_ids[row] >= 0]
        if not rows:
            return {}
        found = logprobs_of(logits_BV[rows], [token_ids[row] for row in rows], [self._reported[row] for row in rows])
        return dict(zip(rows, found, strict=True))

    def _rows(self, pairs: Sequence[tuple[int, Draw]]) -> _Rows:
        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, device=self._device)[:, None]

        params = [draw.params for _, draw in pairs]
        is_restricted = _is_restricted(params[0])
        drawn_M1 = torch.zeros(len(pairs), 1, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        return _Rows(
            draws=tuple(draw for _, draw in pairs),
            index_M=torch.tensor([row for row, _ in pairs], device=self._device),
            temperature_M1=column([each.temperature for each in params]),
            top_k_M1=column([each.top_k or 2**31 for each in params]) if is_restricted else None,
            top_p_M1=column([each.top_p for each in params]) if is_restricted else None,
            min_p_M1=column([each.min_p for each in params]) if any(each.min_p for each in params) else None,
            drawn_M1=drawn_M1,
            uniform_M1=drawn_M1.to(self._device),
        )


def _is_restricted(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


def _draw(logits_MV: torch.Tensor, rows: _Rows) -> torch.Tensor:
    uniform_M1 = rows.uniform_M1
    logits_MV = logits_MV.float()
    if rows.top_k_M1 is None or rows.top_p_M1 is None:
        return _inverse(_softmax(logits_MV, rows.temperature_M1), uniform_M1)
    # Stable: of two equal logits the lower id comes first, so a cut between them is the same everywhere.
    sorted_MV, id_MV = logits_MV.sort(dim=-1, descending=True, stable=True)
    probability_MV = _softmax(sorted_MV, rows.temperature_M1)
    rank_V = torch.arange(logits_MV.shape[-1], device=logits_MV.device)
    probability_MV = probability_MV.masked_fill(rank_V >= rows.top_k_M1, 0)
    probability_MV = probability_MV / probability_MV.sum(dim=-1, keepdim=True)
    mass_before_MV = probability_MV.cumsum(dim=-1) - probability_MV
    probability_MV = probability_MV.masked_fill(mass_before_MV >= rows.top_p_M1, 0)
    if rows.min_p_M1 is not None:
        probability_MV = probability_MV.masked_fill(probability_MV < rows.min_p_M1 * probability_MV[:, :1], 0)
    return id_MV.gather(1, _inverse(probability_MV, uniform_M1)[:, None])[:, 0]


def _softmax(logits_MV: torch.Tensor, temperature_M1: torch.Tensor) -> torch.Tensor:
    # The maximum is subtracted first: a tiny temperature then overflows to minus infinity only, which is a zero.
    shifted_MV = (logits_MV - logits_MV.max(dim=-1, keepdim=True).values) / temperature_M1
    return shifted_MV.softmax(dim=-1, dtype=torch.float64)


def _inverse(weight_MV: torch.Tensor, uniform_M1: torch.Tensor) -> torch.Tensor:
    """[M] columns: the first whose cumulative weight exceeds `uniform` of the total; never one of weight zero."""
    cumulative_MV = weight_MV.cumsum(dim=-1)
    target_M1 = uniform_M1 * cumulative_MV[:, -1:]
    column_M = torch.searchsorted(cumulative_MV, target_M1, right=True)[:, 0]
    return column_M.clamp(max=weight_MV.shape[-1] - 1)
