"""What is done to the logits of single rows before a token is picked, and what is reported of them.

In transformers' order: bias, repetition penalty, presence and frequency penalties, what may not be picked before
`min_tokens`, the grammar. Each row is worked on by itself, so that nothing depends on what else is in the batch, and
the tokens concerned are few: all but a grammar's mask costs in proportion to them, not to the vocabulary.

Legend: B rows of a batch, M rows that are worked on, N pairs of such a row and a token, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pager.sampling import MAX_LOGPROBS
from pager.types import SamplingParams, TokenLogprobs


class Mask(Protocol):
    """What a grammar allows next. Mutable; owned by one sequence."""

    def allowed(self, output_ids: Sequence[int]) -> np.ndarray:
        """[V] bools, after all of `output_ids`, which only ever grow from call to call."""


class Context:
    """The tokens of one sequence as its sampling parameters look at them; mutable, owned by the sequence.

    It follows `output_ids`, which the sequence adds to. A token that was drawn and then lost is never seen.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`end_ids` are those that end the answer."""
        self.params = params
        self.output_ids = output_ids
        self.end_ids = np.array(sorted(end_ids), np.int64)
        self.mask: Mask | None = None
        self.has_penalty = bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)
        first = dict.fromkeys(prompt_ids if params.repetition_penalty != 1 else ())
        self.ids = np.array(list(first), np.int64)  # each once, in the order in which they came
        self.counts = np.zeros(len(first))  # in the answer
        self._place_of = {token_id: place for place, token_id in enumerate(first)}
        self._num_seen = 0

    @property
    def changes_logits(self) -> bool:
        """Whether its rows are worked on at all, at any step."""
        params = self.params
        return bool(self.has_penalty or params.logit_bias or params.min_tokens or params.grammar)

    def catch_up(self) -> None:
        """Counts the tokens that have come since the last time."""
        for token_id in self.output_ids[self._num_seen :] if self.has_penalty else ():
            place = self._place_of.setdefault(token_id, len(self.ids))
            if place == len(self.ids):
                self.ids, self.counts = np.append(self.ids, token_id), np.append(self.counts, 0.0)
            self.counts[place] += 1
        self._num_seen = len(self.output_ids)


class LogitEdits:
    """The work on the rows of a fixed list of sequences. `prepare` is the host's part, `apply` the device's."""

    def __init__(self, contexts: Sequence[tuple[int, Context]], device: torch.device) -> None:
        """With the row of each."""
        self._contexts = contexts
        self._device = device
        self._bias = self._pairs([[each[0] for each in context.params.logit_bias] for _, context in contexts])
        self._bias_N = self._floats([each[1] for _, context in contexts for each in context.params.logit_bias])
        self._penalised: tuple[Tensor, Tensor] | None = None
        self._early: tuple[Tensor, Tensor] | None = None
        self._masked_M: Tensor | None = None
        self._allowed_MV: Tensor | None = None

    def prepare(self) -> None:
        """Looks at the tokens that have come by now."""
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
        """[B, V] in float32; rows that nothing is done to keep their values."""
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
        """[N] rows and [N] token ids, from the ids of each row; None where there are none."""
        lengths = [len(each) for each in ids]
        if not any(lengths):
            return None
        rows_N = np.repeat(np.array([row for row, _ in self._contexts], np.int64), lengths)
        ids_N = np.concatenate([np.asarray(each, np.int64) for each in ids])
        return torch.from_numpy(rows_N).to(self._device), torch.from_numpy(ids_N).to(self._device)

    def _floats(self, values: Sequence[float] | np.ndarray) -> Tensor:
        return torch.tensor(np.asarray(values, np.float32), device=self._device)


def logprobs_of(logits_TV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Of each row's token, and of as many of the likeliest as the row wants. A row's do not depend on the others'."""
    logits_TV = logits_TV.float()
    total_T1 = logits_TV.logsumexp(dim=-1, keepdim=True)
    id_T1 = torch.tensor(token_ids, device=logits_TV.device)[:, None]
    logprob_T = (logits_TV.gather(1, id_T1) - total_T1)[:, 0].tolist()
    if not any(num_top):
        return [TokenLogprobs(*pair) for pair in zip(token_ids, logprob_T, strict=True)]
    # As many for every row as any might want: of equal logits the same ones are found, whatever others want.
    top_TN, top_id_TN = logits_TV.topk(min(MAX_LOGPROBS, logits_TV.shape[-1]), dim=-1)
    top = zip(top_id_TN.tolist(), (top_TN - total_T1).tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, tuple(ids[:count]), tuple(values[:count]))
        for token_id, logprob, (ids, values), count in zip(token_ids, logprob_T, top, num_top, strict=True)
    ]
