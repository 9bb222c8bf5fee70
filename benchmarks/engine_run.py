"""The service's engine, stepped by who measures it; and the pools that it is measured with."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from benchmarks.models import Decode, Decoded
from pager.cache.pager import CacheOptions
from pager.engine.engine import Engine
from pager.engine.interface import EngineLimits, EngineObserver, Failure, StreamEvent
from pager.engine.paged_model import PagedModel, load_paged_model
from pager.memory import Budgets
from pager.pools.pick import largest_counts
from pager.types import (
    Count,
    ExpertPool,
    GenerateRequest,
    PagingCounts,
    PoolPolicy,
    PoolSource,
    RoutingFacts,
    SamplingParams,
    Share,
    TokenChunk,
    Usage,
)


@contextmanager
def load_engine(
    path: Path,
    dtype: torch.dtype,
    budgets: Budgets,
    num_readers: int,
    *,
    limits: EngineLimits | None = None,
    bypass_page_cache: bool | None = None,
    in_place: bool | None = True,
    trace: Path | None = None,
) -> Iterator[EngineRun]:
    """What a worker of the service runs, without its processes; and by default without the prefix cache, as prompts
    are run again and again.
    """
    cache = CacheOptions(num_readers=num_readers, bypass_page_cache=bypass_page_cache, in_place=in_place)
    paged = load_paged_model(path, dtype=dtype, budgets=budgets, cache=cache, trace=trace)
    try:
        yield EngineRun(paged, _tokenizer(path), limits or EngineLimits(prefix_cache=False))
    finally:
        paged.close()


class ForwardClock(EngineObserver):
    """How long the model's forwards took. Mutable: only grows."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def stepped(self, seconds: float, forward_seconds: float, num_tokens: int) -> None:
        self.seconds += forward_seconds


class EngineRun:
    """An engine that is stepped here, so that its steps can be timed one by one."""

    def __init__(self, paged: PagedModel, tokenizer: Tokenizer, limits: EngineLimits) -> None:
        self.paged = paged
        self._forwards = ForwardClock()
        self._events: deque[tuple[float, StreamEvent]] = deque()
        self._engine = Engine(paged, tokenizer, limits, sink=self._take, observer=self._forwards)
        self._numbers = count(1)

    @property
    def forward_s(self) -> float:
        """The time of all forwards so far."""
        return self._forwards.seconds

    def first_token(
        self, prompt: Sequence[int], policy: PoolPolicy, predicted: ExpertPool | None = None
    ) -> tuple[float, Usage]:
        """Seconds from submission to the first token, and what it cost."""
        started_s = time.perf_counter()
        self.submit(prompt, 1, policy, predicted)
        while True:
            for chunk in self.step():
                if chunk.usage is not None:
                    return time.perf_counter() - started_s, chunk.usage

    def decoder(self, policy: PoolPolicy) -> Decode:
        """Steps in which every row decodes and no prompt runs."""

        def decode(prompts: Sequence[Sequence[int]], num_steps: int) -> Decoded:
            # Rows start one step after another, so the first have to last longer.
            for prompt in prompts:
                self.submit(prompt, num_steps + len(prompts), policy)
            stats = self.paged.pager.stats
            started: set[str] = set()
            num_ended, num_timed, seconds, forward_s, processor_s = 0, 0, 0.0, 0.0, 0.0
            paged = PagingCounts()
            while num_ended < len(prompts):
                all_started, paged_before, forward_before_s = len(started) == len(prompts), stats(), self.forward_s
                step_started_s, processor_before_s = time.perf_counter(), time.process_time()
                chunks = self.step()
                if all_started and len(chunks) == len(prompts):
                    seconds += time.perf_counter() - step_started_s
                    processor_s += time.process_time() - processor_before_s
                    forward_s += self.forward_s - forward_before_s
                    paged += stats().paging - paged_before.paging
                    num_timed += len(chunks)
                started |= {chunk.request_id for chunk in chunks}
                num_ended += sum(chunk.usage is not None for chunk in chunks)
            return Decoded(num_timed, seconds, paged.bytes_from_disk, forward_s, processor_s, paged.experts_missed)

        return decode

    def answer_all(self, requests: Sequence[tuple[Sequence[int], PoolPolicy]], num_tokens: int) -> list[Usage]:
        """What each answer of `num_tokens` cost, in the order in which they ended; all are submitted at once."""
        for prompt, policy in requests:
            self.submit(prompt, num_tokens, policy)
        usages: list[Usage] = []
        while len(usages) < len(requests):
            usages += [chunk.usage for chunk in self.step() if chunk.usage is not None]
        return usages

    def submit(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        policy: PoolPolicy,
        predicted: ExpertPool | None = None,
        tenant: str = "benchmark",
        logprobs: int | None = None,
        guaranteed_share: float = 0.0,
    ) -> str:
        """The request's name, which its chunks have too. May be called from any thread."""
        name = str(next(self._numbers))
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, logprobs=logprobs)
        request = GenerateRequest(
            name, tenant, tuple(prompt), sampling, policy, predicted=predicted, guaranteed_share=guaranteed_share
        )
        self._engine.submit(request)
        return name

    def step(self) -> list[TokenChunk]:
        """One step of the engine. Raises what failed a request."""
        return [chunk for _, chunk in self.timed_step()]

    def timed_step(self) -> list[tuple[float, TokenChunk]]:
        """One step, and when each chunk was delivered, by time.perf_counter: some are before the step's end."""
        self._engine.step()
        chunks = []
        while self._events:
            delivered_s, event = self._events.popleft()
            if isinstance(event, Failure):
                raise event.error
            chunks.append((delivered_s, event))
        return chunks

    def _take(self, events: list[StreamEvent]) -> None:
        now_s = time.perf_counter()
        self._events.extend((now_s, event) for event in events)


def _tokenizer(path: Path) -> Tokenizer:
    """The checkpoint's own; synthetic ones have none, and no text."""
    file = path / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.exists() else Tokenizer(BPE())


def random_pools(facts: RoutingFacts, share: float, num_pools: int, seed: int = 0) -> list[ExpertPool]:
    """Disjoint pools of `share` of the experts, drawn at random; as few as one where no more fit."""
    random = np.random.default_rng(seed)
    counts = largest_counts(Share(share), facts)
    orders = [random.permutation(num_routed) for num_routed in facts.routed_per_layer]
    return [
        ExpertPool(
            tuple(
                tuple(sorted(order[number * count : (number + 1) * count].tolist()))
                for order, count in zip(orders, counts, strict=True)
            )
        )
        for number in range(num_pools)
    ]


def pools_beside(pool: ExpertPool, facts: RoutingFacts, count: int) -> list[ExpertPool]:
    """Pools of that size that share no expert with it or with each other, drawn at random."""
    random = np.random.default_rng(0)
    layers = []
    for experts, num_routed in zip(pool.experts, facts.routed_per_layer, strict=True):
        rest = random.permutation(sorted(set(range(num_routed)) - set(experts))).tolist()
        layers.append([tuple(sorted(rest[n * len(experts) : (n + 1) * len(experts)])) for n in range(count)])
    return [ExpertPool(tuple(layer[n] for layer in layers)) for n in range(count)]


def fixed(pool: ExpertPool) -> PoolPolicy:
    return PoolPolicy(Count(max(map(len, pool.experts))), PoolSource.FIXED, pool)
