"""Generation and routing in this process: no service, no ray, no grpc."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE

from pager.cli.prompt import Prompt
from pager.engine.engine import Engine
from pager.engine.interface import EngineLimits, Failure, StreamEvent
from pager.engine.loading import load_paged_model
from pager.engine.trunk_router import TrunkRouter
from pager.errors import CheckpointError, InvalidRequest
from pager.planner import Budgets
from pager.routing.pool import pick_pool
from pager.types import (
    ExpertPool,
    Full,
    GenerateRequest,
    PoolPolicy,
    PoolSize,
    PoolSource,
    RoutingScores,
    SamplingParams,
    TokenChunk,
)

DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Local:
    """A checkpoint to run in this process."""

    model: Path
    device: str
    dtype: str | None

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, has_max_tokens: bool, pool: PoolPolicy, budgets: Budgets
    ) -> Iterator[TokenChunk]:
        """Chunks as they come; the last one carries the usage. Raises PagerError."""
        tokenizer = read_tokenizer(self.model)
        ids = encode(tokenizer, prompt)
        if pool.source is PoolSource.PREDICTION:
            pool = replace(pool, fixed=self.route(ids, pool.size)[1])
        paged = load_paged_model(self.model, device=self.device, dtype=self.dtype, budgets=budgets)
        try:
            events: deque[StreamEvent] = deque()
            engine = Engine(paged, tokenizer or _silent(), EngineLimits(), sink=events.extend)
            if not has_max_tokens:
                room = paged.config.max_position_embeddings - len(ids)
                sampling = replace(sampling, max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)))
            engine.submit(GenerateRequest("cli", "default", ids, sampling, pool))
            yield from _until_last(engine, events)
        finally:
            paged.close()

    def route(self, prompt: Prompt, size: PoolSize) -> tuple[RoutingScores, ExpertPool | None]:
        """The trunk's scores for the prompt, and the pool that `size` makes of them (None for all experts)."""
        ids = encode(read_tokenizer(self.model), prompt)
        if not ids:
            raise InvalidRequest("the prompt is empty; give at least one token", field="prompt")
        router = TrunkRouter.load(self.model, device=self.device, dtype=self.dtype)
        vocabulary = int(router.config.vocab_size)
        if max(ids) >= vocabulary:
            raise InvalidRequest(f"token id {max(ids)} is outside the vocabulary of {vocabulary}", field="prompt")
        scores = router.scores(ids)
        return scores, None if isinstance(size, Full) else pick_pool(scores, size, router.facts)


def read_tokenizer(model: Path) -> Tokenizer | None:
    """None where the checkpoint has none. Raises CheckpointError for one that can not be read."""
    path = model / "tokenizer.json"
    if not path.exists():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from None


def encode(tokenizer: Tokenizer | None, prompt: Prompt) -> tuple[int, ...]:
    """Raises InvalidRequest for text without a tokenizer."""
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise InvalidRequest("this checkpoint has no tokenizer.json; give the prompt with --token-ids")
    return tuple(tokenizer.encode(prompt).ids)


def _silent() -> Tokenizer:
    """For a checkpoint without a tokenizer: every id has an empty text."""
    return Tokenizer(BPE())


def _until_last(engine: Engine, events: deque[StreamEvent]) -> Iterator[TokenChunk]:
    while True:
        engine.step()
        while events:
            event = events.popleft()
            if isinstance(event, Failure):
                raise event.error
            yield event
            if event.usage is not None:
                return
