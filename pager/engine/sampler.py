"""Draws the next token of every row of a batch.

A sampled row costs one number from its request's own generator, turned into a token by the inverse of the row's
cumulative distribution. So a seed gives the same tokens whatever else is in the batch, on any device, and rows are
drawn together: all of them on a GPU, a few at a time on a CPU. The distribution is what transformers' Temperature-,
TopK-, TopP- and MinPLogitsWarper leave of the logits, after the edits of single rows below.

Legend: B rows, M rows of one kind, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pager.sampling import MAX_LOGPROBS
from pager.types import SamplingParams, TokenLogprobs

# --- edits of single rows' logits -------------------------------------------------------------------------------------
#
# Edits of single rows' logits before a token is picked, and their log-probabilities. In transformers' order: bias,
# repetition penalty, presence and frequency penalties, tokens that may not be picked before `min_tokens`, the grammar.
# Each row is edited by itself, so that nothing depends on what else is in the batch, and few tokens are concerned: all
# edits but a grammar's mask cost in proportion to them, not to the vocabulary.
# Legend: B rows of a batch, M rows that are edited, N pairs of such a row and a token, V vocabulary, T tokens.


class Mask(Protocol):
    """The mask of what a grammar allows next. Mutable; owned by one request."""

    def allowed(self, output_ids: Sequence[int]) -> np.ndarray:
        """Returns [V] bools, after all of `output_ids`, which only ever grow from call to call."""


class Context:
    """The tokens of one request as its sampling parameters see them; mutable, owned by the request.

    It follows `output_ids`, to which the request appends. A token that was drawn and then lost is never seen.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Starts before the answer. `end_ids` are the tokens that end it."""
        self.params = params
        self.output_ids = output_ids
        self.end_ids = np.array(sorted(end_ids), np.int64)
        self.mask: Mask | None = None
        self.has_penalty = bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)
        first = dict.fromkeys(prompt_ids if params.repetition_penalty != 1 else ())
        self.ids = np.array(list(first), np.int64)  # each once, in the order in which they first occurred
        self.counts = np.zeros(len(first))  # occurrences in the answer
        self._place_of = {token_id: place for place, token_id in enumerate(first)}
        self._num_seen = 0

    @property
    def changes_logits(self) -> bool:
        """Tells whether its rows are edited at any step."""
        params = self.params
        return bool(self.has_penalty or params.logit_bias or params.min_tokens or params.grammar)

    def catch_up(self) -> None:
        """Counts the tokens that were appended since the last call."""
        for token_id in self.output_ids[self._num_seen :] if self.has_penalty else ():
            place = self._place_of.setdefault(token_id, len(self.ids))
            if place == len(self.ids):
                self.ids, self.counts = np.append(self.ids, token_id), np.append(self.counts, 0.0)
            self.counts[place] += 1
        self._num_seen = len(self.output_ids)


class LogitEdits:
    """The edits of the rows of a fixed list of requests. `prepare` is the host's part, `apply` the device's."""

    def __init__(self, contexts: Sequence[tuple[int, Context]], device: torch.device) -> None:
        """Takes each context with its row."""
        self._contexts = contexts
        self._device = device
        self._bias = self._pairs([[each[0] for each in context.params.logit_bias] for _, context in contexts])
        self._bias_N = self._floats([each[1] for _, context in contexts for each in context.params.logit_bias])
        self._penalised: tuple[Tensor, Tensor] | None = None
        self._early: tuple[Tensor, Tensor] | None = None
        self._masked_M: Tensor | None = None
        self._allowed_MV: Tensor | None = None

    def prepare(self) -> None:
        """Reads the tokens that were appended until now."""
        for _, context in self._contexts:
            context.catch_up()
        rows = [context for _, context in self._contexts]
        self._penalised = self._pairs([context.ids if context.has_penalty else () for context in rows])
        if self._penalised is not None:
            self._prepare_penalties([context for context in rows if context.has_penalty])
        early = [len(context.output_ids) < context.params.min_tokens for context in rows]
        self._early = self._pairs(
            [context.end_ids if is_early else () for context, is_early in zip(rows, early, strict=True)]
        )
        masks = [(row, context) for row, context in self._contexts if context.mask is not None]
        self._masked_M = self._allowed_MV = None
        if masks:
            allowed = [context.mask.allowed(context.output_ids) for _, context in masks if context.mask is not None]
            self._masked_M = torch.tensor([row for row, _ in masks], device=self._device)
            self._allowed_MV = torch.from_numpy(np.stack(allowed)).to(self._device)

    def _prepare_penalties(self, contexts: Sequence[Context]) -> None:
        params = [context.params for context in contexts]
        lengths = [len(context.ids) for context in contexts]
        self._repetition_N = self._floats(np.repeat([each.repetition_penalty for each in params], lengths))
        minus = [
            each.presence_penalty * (context.counts > 0) + each.frequency_penalty * context.counts
            for each, context in zip(params, contexts, strict=True)
        ]
        self._minus_N = self._floats(np.concatenate(minus))

    def apply(self, logits_BV: Tensor) -> Tensor:
        """Returns [B, V] in float32; rows without edits keep their values."""
        logits_BV = logits_BV.to(torch.float32, copy=True)
        if self._bias is not None:
            logits_BV[self._bias] += self._bias_N
        if self._penalised is not None:
            logit_N = logits_BV[self._penalised]
            repeated_N = torch.where(logit_N < 0, logit_N * self._repetition_N, logit_N / self._repetition_N)
            logits_BV[self._penalised] = repeated_N - self._minus_N
        if self._early is not None:
            logits_BV[self._early] = -torch.inf
        if self._masked_M is not None and self._allowed_MV is not None:
            masked_MV = logits_BV[self._masked_M].masked_fill_(~self._allowed_MV, -torch.inf)
            logits_BV[self._masked_M] = masked_MV
        return logits_BV

    def _pairs(self, ids: Sequence[Sequence[int] | np.ndarray]) -> tuple[Tensor, Tensor] | None:
        """Returns [N] rows and [N] token ids, from the ids of each row; None where there are none."""
        lengths = [len(each) for each in ids]
        if not any(lengths):
            return None
        rows_N = np.repeat(np.array([row for row, _ in self._contexts], np.int64), lengths)
        ids_N = np.concatenate([np.asarray(each, np.int64) for each in ids])
        return torch.from_numpy(rows_N).to(self._device), torch.from_numpy(ids_N).to(self._device)

    def _floats(self, values: Sequence[float] | np.ndarray) -> Tensor:
        return torch.tensor(np.asarray(values, np.float32), device=self._device)


def logprobs_of(logits_TV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Returns the log-probability of each row's token, and of as many of the likeliest as the row wants. Rows do not
    depend on each other.
    """
    logits_TV = logits_TV.float()
    total_T1 = logits_TV.logsumexp(dim=-1, keepdim=True)
    id_T1 = torch.tensor(token_ids, device=logits_TV.device)[:, None]
    logprob_T = (logits_TV.gather(1, id_T1) - total_T1)[:, 0].tolist()
    if not any(num_top):
        return [TokenLogprobs(*pair) for pair in zip(token_ids, logprob_T, strict=True)]
    # As many for every row as any might want: among equal logits the same ones are found, whatever others want.
    top_TN, top_id_TN = logits_TV.topk(min(MAX_LOGPROBS, logits_TV.shape[-1]), dim=-1)
    top = zip(top_id_TN.tolist(), (top_TN - total_T1).tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, tuple(ids[:count]), tuple(values[:count]))
        for token_id, logprob, (ids, values), count in zip(token_ids, logprob_T, top, num_top, strict=True)
    ]


# --- drawing tokens ---------------------------------------------------------------------------------------------------


DRAWN_ROWS = 4
"""The rows that are drawn at a time on a CPU: sorting one takes twenty times the memory of its logits."""

NOT_FINITE = -1
"""The id of a row whose logits hold NaN or infinity: that request cannot continue, the others can."""
NOTHING_ALLOWED = -2
"""The id of a row for which its grammar and its other parameters leave no token."""


class Draw:
    """One request's sampling parameters, its generator and the tokens that they depend on; mutable, owned by the
    request.
    """

    def __init__(self, params: SamplingParams, context: Context | None = None) -> None:
        self.params = params
        self.context = context or Context(params)
        self._random = random.Random(params.seed)
        self._num_drawn = 0
        self._last = 0.0
        self._is_last_due = False

    def next_uniform(self) -> float:
        """Returns the next number in [0, 1)."""
        if not self._is_last_due:
            self._last = self._random.random()
        self._is_last_due = False
        self._num_drawn += 1
        return self._last

    def rewind(self, num_tokens: int) -> None:
        """Returns to the state after this many tokens: a number that was drawn for a failed step is the next one again.

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
    min_p_M1: torch.Tensor | None  # None where no row has it
    drawn_M1: torch.Tensor  # on the host, page-locked for a GPU
    uniform_M1: torch.Tensor

    def parts(self, most: int) -> Iterator[_Rows]:
        """Yields at most so many rows at a time; what they draw does not depend on it."""
        if len(self.draws) <= most:
            yield self
            return
        for start in range(0, len(self.draws), most):
            part = slice(start, start + most)
            values = {each.name: getattr(self, each.name) for each in fields(self)}
            some: dict[str, Any] = {name: None if value is None else value[part] for name, value in values.items()}
            yield _Rows(**some)


class Sampler:
    """Samples for a fixed list of requests; make a new one when the batch changes.

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
        """Tells whether its device part neither reads from the host nor reports to it from step to step."""
        return self._edits is None and not self._reported

    def sample(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Returns [B] int64 ids on the logits' device, NOT_FINITE or NOTHING_ALLOWED where a row has no
        distribution.
        """
        self.draw()
        return self.pick(logits_BV)

    def draw(self) -> None:
        """Does the host's part of `sample`: draws a number from every sampled row's generator."""
        if self._edits is not None:
            self._edits.prepare()
        for rows in self._groups:
            rows.drawn_M1.copy_(torch.tensor([[draw.next_uniform()] for draw in rows.draws], dtype=torch.float64))
            rows.uniform_M1.copy_(rows.drawn_M1, non_blocking=True)

    def pick(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Does the device's part of `sample`."""
        peak_B, id_B = logits_BV.max(dim=-1)
        is_finite_B = peak_B.isfinite()
        if self._edits is not None:
            logits_BV = self._edits.apply(logits_BV)
            peak_B, id_B = logits_BV.max(dim=-1)
        for rows in self._groups:
            for part in rows.parts(DRAWN_ROWS if logits_BV.device.type == "cpu" else len(rows.draws)):
                id_B[part.index_M] = _draw(logits_BV[part.index_M], part)
        if self._edits is not None:
            id_B = torch.where(peak_B.isfinite(), id_B, NOTHING_ALLOWED)
        return torch.where(is_finite_B, id_B, NOT_FINITE)

    def logprobs(self, logits_BV: torch.Tensor, token_ids: Sequence[int]) -> dict[int, TokenLogprobs]:
        """Returns by row the log-probabilities of the tokens that were picked from these logits, for rows that want
        them.
        """
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
    """Returns [M] columns: the first whose cumulative weight exceeds `uniform` of the total; never one of weight
    zero.
    """
    cumulative_MV = weight_MV.cumsum(dim=-1)
    target_M1 = uniform_M1 * cumulative_MV[:, -1:]
    column_M = torch.searchsorted(cumulative_MV, target_M1, right=True)[:, 0]
    return column_M.clamp(max=weight_MV.shape[-1] - 1)
