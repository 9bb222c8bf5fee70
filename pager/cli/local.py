"""Generation and routing in this process: no service, no ray, no grpc."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE

from pager import tokenizing
from pager.cli.options import (
    Prompt,
)
from pager.config import RouterConfig
from pager.engine.engine import Engine
from pager.engine.interface import EngineLimits, Failure, StreamEvent
from pager.engine.paged_model import load_paged_model
from pager.errors import InvalidRequest
from pager.lab.methods import current_name, method_of, select
from pager.lab.recording import Probe
from pager.memory import Budgets, resolve_device
from pager.models.open_model import OpenModel
from pager.pools.drift import check_can_drift
from pager.pools.pick import check_example, check_num_examples, mean_scores, pick_pool, pool_for, resolve_size
from pager.predict.trunk import TrunkPredictor
from pager.sampling import filled
from pager.store.checkpoint import Checkpoint
from pager.tokenizing import read_tokenizer
from pager.types import (
    Bytes,
    ExpertPool,
    Full,
    GenerateRequest,
    NamedPool,
    PoolAsk,
    PoolPolicy,
    PoolSize,
    PoolSource,
    RoutingScores,
    SamplingParams,
    TokenChunk,
)
from router_service.prediction import Passes, PassPlan, PredictedModel

DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """The outcome of a routing-only pass: `pool` None means all experts, `expected_recall` None no fitted estimate."""

    scores: RoutingScores
    pool: ExpertPool | None
    expected_recall: float | None


@dataclass(frozen=True, slots=True)
class Local:
    """A checkpoint to run in this process."""

    model: Path
    device: str
    dtype: str | None

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        unset: Collection[str],
        ask: PoolAsk,
        named: NamedPool | None,
        budgets: Budgets,
    ) -> Iterator[TokenChunk]:
        """Yields chunks, the last one with the usage. `unset` fields of `sampling` are as the model's own settings say.
        `named` is the pool of `ask.name`. Raises PagerError.
        """
        tokenizer = self._tokenizer()
        ids = encode(tokenizer, prompt)
        policy = self._policy(ids, ask, named)
        paged = load_paged_model(self.model, device=self.device, dtype=self.dtype, budgets=budgets)
        try:
            events: deque[StreamEvent] = deque()
            engine = Engine(paged, tokenizer or _silent(), EngineLimits(), sink=events.extend)
            sampling = filled(sampling, unset, paged.default_sampling)
            if "max_tokens" in unset:
                room = paged.config.max_position_embeddings - len(ids)
                sampling = replace(sampling, max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)))
            engine.submit(GenerateRequest("cli", "default", ids, sampling, policy))
            yield from _until_last(engine, events)
        finally:
            paged.close()

    def route(self, prompt: Prompt, ask: PoolAsk, named: NamedPool | None = None, router: str = "auto") -> Routed:
        """Returns the scores that a routing-only pass gives the prompt, and the pool that `ask` makes of them."""
        ids = encode(self._tokenizer(), prompt)
        if router not in ("auto", "lexical", "trunk", "fitted"):
            raise InvalidRequest(f"--predictor is one of lexical, trunk and fitted, not {router!r}")
        with self._open() as opened:
            _check_ids(ids, opened)
            passes = self._passes(opened, router)
            if not passes.chain:
                raise InvalidRequest(
                    f"no predictor reads the gates of {opened.family.model_type}, which pick in ways of their own; let "
                    "the prompt's prefill choose: `generate --pool SIZE`, with a number or a share of the experts",
                    field="pool.source",
                )
            scores = passes.available[passes.chain[0]]().scores(ids)
            if named is not None:
                return Routed(scores, pool_for(named, opened.checkpoint.fingerprint, opened.facts), None)
            if ask.size is None or isinstance(ask.size, Full):
                return Routed(scores, None, None)
            pool = pick_pool(scores, ask.size, opened.facts)
            return Routed(scores, pool, passes.estimate(scores, pool) if passes.estimate else None)

    def calibrate(
        self,
        name: str,
        examples: Sequence[str],
        size: PoolSize,
        method: str | None,
        sample: Sequence[str],
        budgets: Budgets,
    ) -> NamedPool:
        """Makes a pool from examples; `sample` has the documents that the method `frequency` counts over. Raises
        PagerError.

        Without a method, it uses the one that a service would: the best routing-only pass; where none was fitted, the
        mean of a whole run.
        """
        check_num_examples(len(examples))
        if isinstance(size, Full):
            raise InvalidRequest("a pool of all experts needs no examples; give a size below `full` with --pool")
        if method is not None:
            method = current_name(method)
            method_of(method)
        tokenizer = self._tokenizer()
        with self._open() as opened:
            token_ids = [encode(tokenizer, text) for text in examples]
            for index, ids in enumerate(token_ids):
                check_example(index, len(ids), int(opened.config.max_position_embeddings))
            passes = self._passes(opened)
            method = method or ("fitted" if "fitted" in passes.available else "mean")
            if method in passes.available:
                scores = mean_scores([passes.available[method]().scores(ids) for ids in token_ids])
                pool = pick_pool(scores, size, opened.facts)
            else:
                pool = self._select(method, token_ids, size, [encode(tokenizer, text) for text in sample], budgets)
            return NamedPool(name, pool, method, len(examples), sum(map(len, token_ids)), opened.checkpoint.fingerprint)

    def _select(
        self,
        method: str,
        examples: Sequence[tuple[int, ...]],
        size: PoolSize,
        sample: Sequence[tuple[int, ...]],
        budgets: Budgets,
    ) -> ExpertPool:
        paged = load_paged_model(self.model, device=self.device, dtype=self.dtype, budgets=budgets)
        try:
            return select(method, Probe(paged, sample=sample), examples, size)
        finally:
            paged.close()

    def _policy(self, ids: tuple[int, ...], ask: PoolAsk, named: NamedPool | None) -> PoolPolicy:
        """Returns the request's policy, with the values that the service would have filled in."""
        if named is not None:
            with self._open() as opened:
                fixed = pool_for(named, opened.checkpoint.fingerprint, opened.facts)
            return PoolPolicy(source=PoolSource.FIXED, fixed=fixed, drift=ask.drift)
        policy = check_can_drift(PoolPolicy(ask.size or Full(), ask.source or PoolSource.PREFILL, drift=ask.drift))
        if policy.source is PoolSource.CODEBOOK and not isinstance(policy.size, Full):
            return self._shared(ids, policy)
        if policy.source is PoolSource.PREDICTION:
            return replace(policy, fixed=self.route(ids, ask).pool)
        if isinstance(policy.size, Bytes):
            with self._open() as opened:
                return replace(policy, size=resolve_size(policy.size, self.route(ids, ask).scores, opened.facts))
        return policy

    def _shared(self, ids: tuple[int, ...], policy: PoolPolicy) -> PoolPolicy:
        """The pool of the codeword that covers the prompt, else one of its own. Raises InvalidRequest."""
        with self._open() as opened:
            passes = self._passes(opened)
            passes.check(policy)
            assert passes.codebook is not None
            scores, trunk = (passes.available[name]().scores(ids) for name in ("lexical", "trunk"))
            codeword = passes.codebook.assign(scores, policy.size, trunk)
            return PoolPolicy(source=PoolSource.FIXED, fixed=codeword.pool, drift=policy.drift)

    def _passes(self, opened: OpenModel, router: str = "auto") -> Passes:
        planned = PassPlan.read(self.model, RouterConfig(router=router, device=self.device))
        unread = "" if opened.family.gates_are_known else opened.family.model_type
        model = PredictedModel(opened.checkpoint.fingerprint, opened.facts, unread)
        return planned.passes(
            model, cache(lambda: TrunkPredictor(opened, resolve_device(self.device), planned.stand_ins))
        )

    def _tokenizer(self) -> Tokenizer | None:
        """Returns the model's tokenizer, None for a model without one. Raises CheckpointError for what is no model."""
        tokenizer = read_tokenizer(self.model)
        if tokenizer is None:
            Checkpoint.open(self.model).close()
        return tokenizer

    @contextmanager
    def _open(self) -> Iterator[OpenModel]:
        opened = OpenModel.open(self.model, self.dtype)
        with opened.checkpoint:
            yield opened


def _check_ids(ids: Sequence[int], opened: OpenModel) -> None:
    if not ids:
        raise InvalidRequest("the prompt is empty; give at least one token", field="prompt")
    vocabulary = int(opened.config.vocab_size)
    if max(ids) >= vocabulary:
        raise InvalidRequest(f"token id {max(ids)} is outside the vocabulary of {vocabulary}", field="prompt")


def encode(tokenizer: Tokenizer | None, prompt: Prompt) -> tuple[int, ...]:
    """Returns the prompt's token ids. Raises InvalidRequest for text without a tokenizer."""
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise InvalidRequest("this checkpoint has no tokenizer.json; give the prompt with --token-ids")
    return tuple(tokenizing.encode_all(tokenizer, [prompt])[0].ids)


def _silent() -> Tokenizer:
    """Returns the tokenizer of a checkpoint that has none: every id has an empty text."""
    return Tokenizer(BPE())


def _until_last(engine: Engine, events: deque[StreamEvent]) -> Iterator[TokenChunk]:
    while True:
        if not engine.step():
            time.sleep(0.001)  # a grammar is being compiled
        while events:
            event = events.popleft()
            if isinstance(event, Failure):
                raise event.error
            yield event
            if event.usage is not None:
                return
