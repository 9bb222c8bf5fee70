"""Rows of many documents through a paged model, each under a pool of its own, whatever its budget of experts.

Legend: B rows, S tokens a row (padded), T = B·S, V vocabulary, P predicted tokens of a document, D hidden,
L layers, R routed experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pager.engine.paged_model import PagedModel
from pager.models.families import routed_probabilities
from pager.models.open_model import moe_blocks
from pager.pools.document import DocumentRouting
from pager.types import ExpertPool, PoolPolicy, PoolSize

BATCH_TOKENS = 8192  # at most; fewer where what they work with would take more than BATCH_BYTES
BATCH_BYTES = 256 * 2**20
HEAD_TOKENS = 512  # logits of so many tokens exist at a time

Ids = Sequence[int]
Layers = tuple[np.ndarray, ...]  # a float64 [R] a layer, empty where dense


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One document under one pool: the predictions of the tokens after its prompt."""

    nats: float  # added up
    best_P: np.ndarray  # int32: the likeliest token at each place
    pool: ExpertPool | None  # None for all experts


@dataclass(frozen=True, slots=True, eq=False)
class GateMeans:
    """Mean gate probabilities of one document, with all experts: over its prompt, and over the whole."""

    prompt_LR: Layers
    whole_LR: Layers


class Forwards:
    """One thread only: the model's own. Documents are batched by length; padding votes and counts for nothing."""

    def __init__(self, paged: PagedModel, prompt_tokens: int, *, batch_tokens: int | None = None) -> None:
        self.paged = paged
        self.prompt_tokens = prompt_tokens
        self._batch_tokens = batch_tokens or _batch_tokens(paged)
        self._running: list[int] = []  # the texts of the batch that is running

    def outcomes(
        self, texts: Sequence[Ids], policies: Sequence[PoolPolicy], *, voters: int | None = None
    ) -> list[Outcome]:
        """A text each with its policy. Pools left open are chosen layer by layer by the first `voters` tokens.

        `voters` None: by the prompt, as a request's prefill does; a causal model sees nothing later, so that one
        forward over the whole text is the prefill and what follows it.
        """
        outcomes: list[Outcome | None] = [None] * len(texts)
        for rows, hidden_BSD, routings in self._run(texts, policies, voters or self.prompt_tokens):
            for row, hidden_SD, routing in zip(rows, hidden_BSD, routings, strict=True):
                outcomes[row] = self._predict(hidden_SD, texts[row], routing.pool)
        return [outcome for outcome in outcomes if outcome is not None]

    def pools(self, texts: Sequence[Ids], size: PoolSize) -> list[ExpertPool]:
        """The pool that each whole text would choose for itself, layer by layer."""
        pools: dict[int, ExpertPool] = {}
        longest = max(map(len, texts))
        for rows, _, routings in self._run(texts, [PoolPolicy(size)] * len(texts), longest):
            for row, routing in zip(rows, routings, strict=True):
                assert routing.pool is not None
                pools[row] = routing.pool
        return [pools[row] for row in range(len(texts))]

    def full(self, texts: Sequence[Ids]) -> tuple[list[Outcome], list[GateMeans]]:
        """With all experts, and what the gates wanted."""
        with self._recording(texts) as means:
            outcomes = self.outcomes(texts, [PoolPolicy()] * len(texts))
        return outcomes, [means[row] for row in range(len(texts))]

    def means(self, texts: Sequence[Ids]) -> list[GateMeans]:
        """What the gates want with all experts."""
        with self._recording(texts) as means:
            for _ in self._run(texts, [PoolPolicy()] * len(texts), self.prompt_tokens):
                pass
        return [means[row] for row in range(len(texts))]

    @torch.inference_mode()
    def _run(
        self, texts: Sequence[Ids], policies: Sequence[PoolPolicy], voters: int
    ) -> Iterator[tuple[list[int], Tensor, list[DocumentRouting]]]:
        """Batch by batch: which texts, their hidden states [B, S, D], and their pools."""
        device = self.paged.device
        for rows in batches([len(text) for text in texts], self._batch_tokens):
            lengths = [len(texts[row]) for row in rows]
            padded = [[*texts[row], *[0] * (max(lengths) - len(texts[row]))] for row in rows]
            place_S = torch.arange(max(lengths), device=device)
            valid_BS = place_S < torch.tensor([min(voters, length) for length in lengths], device=device)[:, None]
            routings = [self.paged.document(policies[row]) for row in rows]
            row_T = torch.arange(len(rows), device=device).repeat_interleave(max(lengths))
            self._running = rows
            with self.paged.step(routings, rows=row_T, valid=valid_BS.flatten(), prefill=True):
                inputs = torch.tensor(padded, device=device)
                hidden_BSD = self.paged.model.model(input_ids=inputs, use_cache=False).last_hidden_state
            yield rows, hidden_BSD, routings

    @torch.inference_mode()
    def _predict(self, hidden_SD: Tensor, text: Ids, pool: ExpertPool | None) -> Outcome:
        head = self.paged.model.get_output_embeddings()
        hidden_PD = hidden_SD[self.prompt_tokens - 1 : len(text) - 1]
        label_P = torch.tensor(text[self.prompt_tokens :], device=hidden_PD.device)
        nats, best = 0.0, []
        for hidden, label in zip(hidden_PD.split(HEAD_TOKENS), label_P.split(HEAD_TOKENS), strict=True):
            logits_PV = head(hidden).float()
            nats += float((logits_PV.logsumexp(-1) - logits_PV.gather(-1, label[:, None])[:, 0]).double().sum())
            best.append(logits_PV.argmax(-1).int().cpu().numpy())
        return Outcome(nats, np.concatenate(best), pool)

    @contextmanager
    def _recording(self, texts: Sequence[Ids]) -> Iterator[dict[int, GateMeans]]:
        """Fills in, as the batches run, each text's means."""
        facts = self.paged.facts
        empty = [np.zeros(0)] * facts.num_layers
        found = {row: GateMeans(tuple(empty), tuple(empty)) for row in range(len(texts))}

        def record(layer: int, logits_TE: Tensor) -> None:
            probs_TR = routed_probabilities(logits_TE, facts.shared_per_layer[layer])
            probs_BSR = probs_TR.view(len(self._running), -1, probs_TR.shape[-1]).double()
            for row, probs_SR in zip(self._running, probs_BSR, strict=True):
                prompt = probs_SR[: self.prompt_tokens].mean(0).cpu().numpy()
                whole = probs_SR[: len(texts[row])].mean(0).cpu().numpy()
                found[row] = GateMeans(
                    _with(found[row].prompt_LR, layer, prompt), _with(found[row].whole_LR, layer, whole)
                )

        with ExitStack() as hooks:
            for layer, block in moe_blocks(self.paged.model):
                hooks.callback(block.gate.register_forward_hook(_on_logits(layer, record)).remove)
            yield found


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, the longest texts first: rows of a batch differ little, and padded they have at most `batch_tokens`."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        num_rows = max(1, batch_tokens // lengths[order[0]])
        yield order[:num_rows]
        order = order[num_rows:]


def _batch_tokens(paged: PagedModel) -> int:
    """Each token is copied for each of its experts, on the way in and on the way out."""
    copies = 2 * max(paged.facts.top_k_per_layer, default=1) + 2
    token_bytes = copies * int(paged.config.hidden_size) * paged.dtype.itemsize
    return max(1, min(BATCH_TOKENS, BATCH_BYTES // token_bytes))


def _on_logits(
    layer: int, record: Callable[[int, Tensor], None]
) -> Callable[[nn.Module, Any, tuple[Tensor, ...]], None]:
    return lambda _, __, output: record(layer, output[0])


def _with(layers: Layers, layer: int, value: np.ndarray) -> Layers:
    return (*layers[:layer], value, *layers[layer + 1 :])
