"""Records what a model's gates and experts do in a forward: the one place in which the lab hooks into a model.

Experts are paged as they are needed, whatever the model's budget.
Legend: T tokens, K experts a token picks, E experts of a layer (shared last), R routed experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pager.engine import experts
from pager.engine.paged_model import PagedModel
from pager.errors import InvalidRequest
from pager.models.families import routed_probabilities
from pager.models.open_model import moe_blocks
from pager.pools.step import RequestRouting
from pager.types import ExpertKey, ExpertPool, PoolPolicy, PoolSize, PoolSource, RoutingFacts, RoutingScores

Ids = Sequence[int]
Examples = Sequence[Ids]
Layers = tuple[np.ndarray, ...]  # a float64 [R] per layer, empty where dense
Predictor = Callable[[Ids], RoutingScores]
OnGate = Callable[[int, Tensor, Tensor], None]  # layer, probs_TR over the routed experts, index_TK as the pool allows
OnExperts = Callable[
    [int, Any, tuple[Tensor, ...], Tensor], None
]  # layer, module, (hidden_TD, index_TK, weights_TK), out

EVERY_EXPERT = PoolPolicy()


@contextmanager
def recording(paged: PagedModel, on_gate: OnGate, on_experts: OnExperts | None = None) -> Iterator[None]:
    """Calls `on_gate` after every gate of a forward in this context, and `on_experts` after the experts of its layer.

    In a layer the gate comes first.
    """

    def after_gate(layer: int) -> Callable[..., None]:
        num_shared = paged.facts.shared_per_layer[layer]
        return lambda _, __, output: on_gate(layer, routed_probabilities(output[0], num_shared), output[2])

    def after_experts(layer: int, called: OnExperts) -> Callable[..., None]:
        return lambda module, inputs, output: called(layer, module, inputs, output)

    with ExitStack() as hooks:
        for layer, block in moe_blocks(paged.model):
            hooks.callback(block.gate.register_forward_hook(after_gate(layer)).remove)
            if on_experts is not None:
                hooks.callback(block.experts.register_forward_hook(after_experts(layer, on_experts)).remove)
        yield


@torch.inference_mode()
def run_document(
    paged: PagedModel, token_ids: Ids, policy: PoolPolicy = EVERY_EXPERT, *, num_padding: int = 0
) -> RequestRouting:
    """Runs one document as a prefill and returns its routing, which has the pool. Padding goes behind it."""
    document: RequestRouting = paged.routing(policy)
    inputs = torch.tensor([[*token_ids, *[0] * num_padding]], device=paged.device)
    with paged.step([document], prefill=True):
        paged.model.model(input_ids=inputs, use_cache=False)
    return document


def mean_probabilities(paged: PagedModel, documents: Examples, policy: PoolPolicy = EVERY_EXPERT) -> Layers:
    """Returns each routed expert's mean gate probability over all tokens of documents that run one after the other."""
    totals = _Totals(paged.facts)
    with recording(paged, totals.add):
        for document in documents:
            run_document(paged, document, policy)
    return totals.means(sum(map(len, documents)))


class Probe:
    """The measurements of a model that the selection methods need. Means are over all tokens of all examples.

    One thread only, the model's own. Examples run one at a time, unpadded. Every method raises InvalidRequest for token
    ids that the model does not have and for examples longer than its context.
    """

    def __init__(
        self, paged: PagedModel, *, predictors: Mapping[str, Predictor] | None = None, sample: Examples = ()
    ) -> None:
        """Takes a model. `predictors` are the routing-only passes by name, `sample` the documents that `frequency`
        counts over.
        """
        self._paged = paged
        self._predictors = dict(predictors or {})
        self._sample = sample
        self._frequency: Layers | None = None

    @property
    def facts(self) -> RoutingFacts:
        return self._paged.facts

    def mean_probabilities(self, examples: Examples) -> Layers:
        """Returns each routed expert's mean gate probability, with all experts."""
        return mean_probabilities(self._paged, self._checked(examples))

    def prefill_probabilities(self, example: Ids, size: PoolSize) -> Layers:
        """Returns the same of one example as a request's prefill sees it: each layer chooses its pool and runs with
        it.
        """
        return mean_probabilities(self._paged, self._checked([example]), PoolPolicy(size))

    def layer_probabilities(self, examples: Examples, below: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns [R] of layer `len(below)`, while the layers below it have only these routed experts."""
        totals, target = _Totals(self.facts), len(below)
        above = [tuple(range(routed)) for routed in self.facts.routed_per_layer[target:]]
        policy = PoolPolicy(source=PoolSource.FIXED, fixed=ExpertPool((*map(tuple, below), *above)))

        def stop_at_target(layer: int, probs_TR: Tensor, index_TK: Tensor) -> None:
            if layer == target:
                totals.add(layer, probs_TR, index_TK)
                raise _LayerReached

        with recording(self._paged, stop_at_target):
            for example in self._checked(examples):
                with suppress(_LayerReached):
                    run_document(self._paged, example, policy)
        return totals.means(sum(map(len, examples)))[target]

    def easy_ep(self, examples: Examples) -> Layers:
        """Sums, over the tokens that pick an expert, its weighted output's norm, times how far the MoE block turns the
        token.

        arXiv 2504.06792, as the authors of EMO coded it (rule 19). Each rank of the picks runs again by itself, so that
        any kernel and budget will do.
        """
        totals = [torch.zeros(all_, dtype=torch.float64) for all_ in self.facts.experts_per_layer]

        def add(layer: int, experts: Any, inputs: tuple[Tensor, ...], moe_TD: Tensor) -> None:
            hidden_TD, index_TK, weights_TK = inputs
            hidden = hidden_TD.float()
            turned_T = 1 - cosine_similarity(hidden, hidden + moe_TD.float(), dim=-1).double()
            for rank in range(index_TK.shape[1]):
                kept = slice(rank, rank + 1)
                out_TD = experts.forward(hidden_TD, index_TK[:, kept], weights_TK[:, kept])  # past the hook
                score_T = out_TD.float().norm(dim=-1).double() * turned_T
                totals[layer].index_add_(0, index_TK[:, rank].cpu(), score_T.cpu())

        with recording(self._paged, _nothing, add):
            for example in self._checked(examples):
                run_document(self._paged, example)
        routed = self.facts.routed_per_layer
        return tuple(score_E[:num].numpy() for score_E, num in zip(totals, routed, strict=True))

    def frequency(self) -> Layers:
        """Returns each expert's share of the picks over a sample of everything the model reads, whatever the
        examples.
        """
        if not self._sample:
            raise InvalidRequest(
                "the frequency of experts is counted over a sample of documents, and none was given; give some, or "
                "choose another method",
                field="method",
            )
        if self._frequency is None:
            self._frequency = self._count_picks(self._checked(self._sample))
        return self._frequency

    def predicted(self, source: str, example: Ids) -> RoutingScores:
        """Returns what a routing-only pass ("trunk", "lexical" or "fitted") expects of one example."""
        if source not in self._predictors:
            remedy = (
                "load a TrunkPredictor" if source == "trunk" else "run `expert-pager fit-router` on this checkpoint"
            )
            raise InvalidRequest(f"there is no {source!r} router for this model; {remedy} first", field="method")
        return self._predictors[source](self._checked([example])[0])

    def _count_picks(self, documents: Examples) -> Layers:
        totals = [torch.zeros(routed, dtype=torch.float64) for routed in self.facts.routed_per_layer]

        def count(layer: int, _: Tensor, index_TK: Tensor) -> None:
            picks_E = torch.bincount(index_TK.flatten(), minlength=self.facts.experts_per_layer[layer])
            totals[layer] += picks_E[: len(totals[layer])].double().cpu()

        with recording(self._paged, count):
            for document in documents:
                run_document(self._paged, document)
        return tuple((picks_R / max(float(picks_R.sum()), 1.0)).numpy() for picks_R in totals)

    def _checked(self, examples: Examples) -> Examples:
        config = self._paged.config
        for example in examples:
            unknown = [token for token in example if not 0 <= token < config.vocab_size]
            if unknown:
                raise InvalidRequest(
                    f"an example has the token id {unknown[0]}, which is outside of the {config.vocab_size} known",
                    field="examples",
                )
            if not 0 < len(example) <= config.max_position_embeddings:
                raise InvalidRequest(
                    f"an example has {len(example)} tokens; 1 to {config.max_position_embeddings} can be read",
                    field="examples",
                )
        return examples


class _Totals:
    """Sums of gate probabilities over tokens, layer by layer."""

    def __init__(self, facts: RoutingFacts) -> None:
        self._total = [torch.zeros(routed, dtype=torch.float64) for routed in facts.routed_per_layer]

    def add(self, layer: int, probs_TR: Tensor, _: Tensor) -> None:
        self._total[layer] += probs_TR.double().sum(0).cpu()

    def means(self, num_tokens: int) -> Layers:
        return tuple((mass_R / num_tokens).numpy() for mass_R in self._total)


class _LayerReached(Exception):
    """Ends a forward at the requested layer; the layers above it need not run."""


def _nothing(*_: object) -> None:
    """Records nothing: an `on_gate` for runs without a recording."""


# --- rows of many documents, each under a pool of its own -------------------------------------------------------------
#
# Rows of many documents through a paged model, each under a pool of its own, whatever its budget of experts.
#
# Legend: B rows, S tokens a row (padded), T = B·S, V vocabulary, P predicted tokens of a document, D hidden, L layers,
# R routed experts of a layer, K experts a token picks, N tokens of one expert.


BATCH_TOKENS = 8192  # an upper bound; fewer where their working memory would exceed BATCH_BYTES
BATCH_BYTES = 256 * 2**20
HEAD_TOKENS = 512  # tokens whose logits exist at a time


@dataclass(frozen=True, slots=True, eq=False)
class PooledOutcome:
    """One document under one pool: the predictions of the tokens after its prompt."""

    nats: float  # summed
    best_P: np.ndarray  # int32: the likeliest token at each place
    pool: ExpertPool | None  # None for all experts


@dataclass(frozen=True, slots=True, eq=False)
class GateMeans:
    """Mean gate probabilities of one document, with all experts: over its prompt, and over the whole."""

    prompt_LR: Layers
    whole_LR: Layers


class Forwards:
    """Runs texts in batches by length; padding votes and counts for nothing. One thread only, the model's own."""

    def __init__(self, paged: PagedModel, prompt_tokens: int, *, batch_tokens: int | None = None) -> None:
        self.paged = paged
        self.prompt_tokens = prompt_tokens
        self._batch_tokens = batch_tokens or _batch_tokens(paged)
        self._running: list[int] = []  # the texts of the running batch

    def outcomes(
        self, texts: Sequence[Ids], policies: Sequence[PoolPolicy], *, voters: int | None = None
    ) -> list[PooledOutcome]:
        """Runs each text under its policy. Pools left open are chosen layer by layer by the first `voters` tokens.

        `voters` None: by the prompt, as a request's prefill does; a causal model sees nothing later, so that one
        forward over the whole text is the prefill and what follows it.
        """
        outcomes: list[PooledOutcome | None] = [None] * len(texts)
        for rows, hidden_BSD, routings in self._run(texts, policies, voters or self.prompt_tokens):
            for row, hidden_SD, routing in zip(rows, hidden_BSD, routings, strict=True):
                outcomes[row] = self._predict(hidden_SD, texts[row], routing.pool)
        return [outcome for outcome in outcomes if outcome is not None]

    def pools(self, texts: Sequence[Ids], size: PoolSize) -> list[ExpertPool]:
        """Returns the pool that each whole text would choose for itself, layer by layer."""
        pools: dict[int, ExpertPool] = {}
        longest = max(map(len, texts))
        for rows, _, routings in self._run(texts, [PoolPolicy(size)] * len(texts), longest):
            for row, routing in zip(rows, routings, strict=True):
                assert routing.pool is not None
                pools[row] = routing.pool
        return [pools[row] for row in range(len(texts))]

    def full(self, texts: Sequence[Ids]) -> tuple[list[PooledOutcome], list[GateMeans]]:
        """Returns the outcomes with all experts, and the mean gate probabilities."""
        with self._recording(texts) as means:
            outcomes = self.outcomes(texts, [EVERY_EXPERT] * len(texts))
        return outcomes, means

    def means(self, texts: Sequence[Ids]) -> list[GateMeans]:
        """Returns the mean gate probabilities of each text with all experts."""
        with self._recording(texts) as means:
            for _ in self._run(texts, [EVERY_EXPERT] * len(texts), self.prompt_tokens):
                pass
        return means

    @torch.inference_mode()
    def _run(
        self, texts: Sequence[Ids], policies: Sequence[PoolPolicy], voters: int
    ) -> Iterator[tuple[list[int], Tensor, list[RequestRouting]]]:
        """Yields batch by batch the texts' numbers, their hidden states [B, S, D] and their routing."""
        device = self.paged.device
        for rows in batches([len(text) for text in texts], self._batch_tokens):
            lengths = [len(texts[row]) for row in rows]
            padded = [[*texts[row], *[0] * (max(lengths) - len(texts[row]))] for row in rows]
            place_S = torch.arange(max(lengths), device=device)
            valid_BS = place_S < torch.tensor([min(voters, length) for length in lengths], device=device)[:, None]
            routings = [self.paged.routing(policies[row]) for row in rows]
            row_T = torch.arange(len(rows), device=device).repeat_interleave(max(lengths))
            self._running = rows
            with self.paged.step(routings, rows=row_T, valid=valid_BS.flatten(), prefill=True):
                inputs = torch.tensor(padded, device=device)
                hidden_BSD = self.paged.model.model(input_ids=inputs, use_cache=False).last_hidden_state
            yield rows, hidden_BSD, routings

    @torch.inference_mode()
    def _predict(self, hidden_SD: Tensor, text: Ids, pool: ExpertPool | None) -> PooledOutcome:
        head = self.paged.model.get_output_embeddings()
        hidden_PD = hidden_SD[self.prompt_tokens - 1 : len(text) - 1]
        label_P = torch.tensor(text[self.prompt_tokens :], device=hidden_PD.device)
        nats, best = 0.0, []
        for hidden, label in zip(hidden_PD.split(HEAD_TOKENS), label_P.split(HEAD_TOKENS), strict=True):
            logits_PV = head(hidden).float()
            nats += float((logits_PV.logsumexp(-1) - logits_PV.gather(-1, label[:, None])[:, 0]).double().sum())
            best.append(logits_PV.argmax(-1).int().cpu().numpy())
        return PooledOutcome(nats, np.concatenate(best), pool)

    @contextmanager
    def _recording(self, texts: Sequence[Ids]) -> Iterator[list[GateMeans]]:
        """Yields a list that has every text's means, once the batches that ran inside are done."""
        dense = [np.zeros(0)] * self.paged.facts.num_layers
        prompts, wholes = ([list(dense) for _ in texts] for _ in range(2))
        found: list[GateMeans] = []

        def record(layer: int, probs_TR: Tensor, _: Tensor) -> None:
            probs_BSR = probs_TR.view(len(self._running), -1, probs_TR.shape[-1]).double()
            for row, probs_SR in zip(self._running, probs_BSR, strict=True):
                prompts[row][layer] = probs_SR[: self.prompt_tokens].mean(0).cpu().numpy()
                wholes[row][layer] = probs_SR[: len(texts[row])].mean(0).cpu().numpy()

        with recording(self.paged, record):
            yield found
        found += [GateMeans(tuple(prompt), tuple(whole)) for prompt, whole in zip(prompts, wholes, strict=True)]


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yields the indices of each batch, the longest texts first; padded they have at most `batch_tokens` tokens."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        num_rows = max(1, batch_tokens // lengths[order[0]])
        yield order[:num_rows]
        order = order[num_rows:]


def _batch_tokens(paged: PagedModel) -> int:
    """Returns the tokens of a batch. Each is copied for each of its experts, on the way in and on the way out."""
    copies = 2 * max(paged.facts.top_k_per_layer, default=1) + 2
    token_bytes = copies * int(paged.config.hidden_size) * paged.dtype.itemsize
    return max(1, min(BATCH_TOKENS, BATCH_BYTES // token_bytes))


# --- all experts in memory --------------------------------------------------------------------------------------------

BULK = "expert_pager_bulk"
"""A way to compute that is twice as fast on a CPU as the engine's own, which sorts and adds so that the result does not
depend on what had to be paged. This one adds up expert by expert, whose intermediates never leave the CPU's cache. The
two differ by rounding."""


@contextmanager
def experts_in_bulk(paged: PagedModel) -> Iterator[None]:
    """Makes the model compute in bulk in this context, if all experts fit into its slots and it computes in float32 on
    a CPU.
    """
    is_plain = paged.dtype == torch.float32 and paged.record is None
    if not paged.fully_resident or not is_plain or paged.device.type != "cpu":
        yield
        return
    keys = [ExpertKey(layer, expert) for layer, num in enumerate(paged.facts.routed_per_layer) for expert in range(num)]
    lease = paged.pager.reserve_pool(keys)
    assert lease is not None, "nobody else holds experts of this model"
    with lease:
        for layer in range(paged.facts.num_layers):
            lease.wait(layer)
        paged.model.set_experts_implementation(BULK)
        try:
            yield
        finally:
            paged.model.set_experts_implementation(experts.NAME)


def _run_in_bulk(module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Computes a layer's experts for transformers: [T, D]."""
    layer: experts.LayerExperts = module.paging
    slot_P = layer.pager.slots.slot_of_LE[layer.layer][index_TK].flatten()
    order_P = slot_P.argsort()
    token_P = order_P // index_TK.shape[1]
    weights_P = weights_TK.flatten()[order_P, None]
    counts = torch.bincount(slot_P, minlength=len(module.gate_up_proj)).tolist()
    out_TD = torch.zeros_like(hidden_TD)
    for slot, (token_N, weights_N) in enumerate(zip(token_P.split(counts), weights_P.split(counts), strict=True)):
        if len(token_N):
            gate_up_N = torch.mm(hidden_TD.index_select(0, token_N), module.gate_up_proj[slot].t())
            inner_N = module._apply_gate(gate_up_N).mul_(weights_N)
            out_TD.index_add_(0, token_N, torch.mm(inner_N, module.down_proj[slot].t()))
    return out_TD


ALL_EXPERTS_FUNCTIONS.register(BULK, _run_in_bulk)
