"""A real engine on the small golden checkpoint, with a tokenizer whose every token is two letters."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from pager.cache.pager import CacheOptions
from pager.engine.engine import Engine
from pager.engine.interface import EngineLimits, EngineObserver, Failure, StreamEvent
from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import PagerError
from pager.memory import Budgets
from pager.types import ExpertKey, ExpertPool, GenerateRequest, PoolPolicy, SamplingParams, TokenChunk, Usage
from tests.support.checkpoints import letters_tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CHECKPOINT = GOLDEN / "ckpt_emo_tiny"
EXPERT_BYTES = 3 * 64 * 32 * 4
VOCABULARY = 256


class Driver:
    """Steps an engine by hand and keeps what came out, by request."""

    def __init__(
        self,
        paged: PagedModel,
        limits: EngineLimits,
        observer: EngineObserver | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.paged = paged
        self.engine = Engine(paged, tokenizer or letters_tokenizer(), limits, sink=self._sink, observer=observer)
        self.chunks: dict[str, list[TokenChunk]] = {}
        self.failures: dict[str, PagerError] = {}
        self.order_of_first_tokens: list[str] = []
        self._numbers = itertools.count()

    def _sink(self, events: list[StreamEvent]) -> None:
        for event in events:
            if isinstance(event, Failure):
                assert event.request_id not in self.failures
                self.failures[event.request_id] = event.error
                continue
            if event.request_id not in self.chunks:
                self.order_of_first_tokens.append(event.request_id)
            self.chunks.setdefault(event.request_id, []).append(event)

    def submit(self, prompt: Sequence[int], pool: PoolPolicy | None = None, **options: Any) -> str:
        """Options of SamplingParams and GenerateRequest, by name."""
        names = ("tenant", "id", "deadline_s", "predicted", "priority", "weight", "is_watched", "guaranteed_share")
        fields = {name: options.pop(name) for name in names if name in options}
        fields.setdefault("id", f"request-{next(self._numbers)}")
        fields.setdefault("tenant", "t")
        sampling = SamplingParams(**{"ignore_eos": True, **options})
        request = GenerateRequest(
            prompt_token_ids=tuple(prompt), sampling=sampling, pool=pool or PoolPolicy(), **fields
        )
        self.engine.submit(request)
        return request.id

    def finish(self, max_steps: int = 3000) -> None:
        """Steps until nothing is in flight."""
        for _ in range(max_steps):
            self.engine.step()
            status = self.engine.status()
            if status.running + status.waiting == 0:
                return
        raise AssertionError(f"still in flight after {max_steps} steps: {self.engine.status()}")

    def tokens(self, request_id: str) -> list[int]:
        return [token for chunk in self.chunks.get(request_id, []) for token in chunk.token_ids]

    def text(self, request_id: str) -> str:
        return "".join(chunk.text for chunk in self.chunks[request_id])

    def usage(self, request_id: str) -> Usage:
        *others, last = self.chunks[request_id]
        assert all(chunk.usage is None for chunk in others)
        assert last.usage is not None
        return last.usage

    def assert_nothing_held(self) -> None:
        """Reads that nobody waits for any more, as those of a prediction or a failed prompt, end first."""
        counts = enumerate(self.paged.facts.experts_per_layer)
        every = [ExpertKey(layer, expert) for layer, count in counts for expert in range(count)]
        give_up_s = time.monotonic() + 60
        while self.paged.pager.prefetch_pending(every):
            assert time.monotonic() < give_up_s, "reads go on and on"
            time.sleep(0.001)
        status, stats = self.engine.status(), self.paged.pager.stats()
        assert (status.running, status.waiting, status.kv_blocks_used) == (0, 0, 0)
        assert (stats.held_bytes, stats.reserved_bytes) == (0, 0)
        assert self.engine._blocks.num_places_used == 0
        self.paged.pager.check_integrity()


@contextmanager
def drivers() -> Iterator[Callable[..., Driver]]:
    opened: list[PagedModel] = []

    def make(
        num_slots: int = 60,
        *,
        path: Path = CHECKPOINT,
        kv_memory: str = "4MiB",
        observer: EngineObserver | None = None,
        tokenizer: Tokenizer | None = None,
        in_place: bool | None = None,
        **limits: Any,
    ) -> Driver:
        budgets = Budgets(expert_memory=num_slots * EXPERT_BYTES, kv_memory=kv_memory)
        cache = CacheOptions(in_place=in_place)
        opened.append(load_paged_model(path, dtype=torch.float32, budgets=budgets, cache=cache))
        if "prefill_chunk_tokens" in limits:  # of prompts that are alone, too
            limits.setdefault("lone_chunk_tokens", limits["prefill_chunk_tokens"])
        return Driver(opened[-1], EngineLimits(**limits), observer, tokenizer)

    yield make
    for paged in opened:
        paged.close()


@pytest.fixture
def make_driver() -> Iterator[Callable[..., Driver]]:
    """`make_driver(num_slots=60, path=..., observer=..., tokenizer=..., **limits)`."""
    with drivers() as make:
        yield make


@pytest.fixture(scope="module")
def make_lasting_driver() -> Iterator[Callable[..., Driver]]:
    """The same, of a driver that the tests of a module share."""
    with drivers() as make:
        yield make


@pytest.fixture
def random_prompt() -> Callable[[int, int], list[int]]:
    """`random_prompt(seed, length)`."""

    def make(seed: int, length: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    return make


@pytest.fixture
def random_pool() -> Callable[..., ExpertPool]:
    """`random_pool(seed, count=3)`: so many of the 15 routed experts in each of the 4 layers."""

    def make(seed: int, count: int = 3) -> ExpertPool:
        generator = torch.Generator().manual_seed(seed)
        layers = (torch.randperm(15, generator=generator)[:count].sort().values.tolist() for _ in range(4))
        return ExpertPool(tuple(map(tuple, layers)))

    return make
