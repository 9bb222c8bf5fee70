"""The three ways to decode that are compared: plain transformers, `pager.load_model`, and the service's engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM
from transformers.generation import BaseStreamer

import pager
import pager.models  # plain transformers loads EMO through it
from pager.engine.engine import Engine
from pager.engine.interface import EngineLimits, Failure, StreamEvent
from pager.engine.loading import PagedModel, load_paged_model
from pager.planner import Budgets
from pager.routing.pool import largest_counts
from pager.types import (
    Count,
    ExpertPool,
    GenerateRequest,
    PoolPolicy,
    PoolSource,
    RoutingFacts,
    SamplingParams,
    Share,
    TokenChunk,
    Usage,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_IMPLEMENTATION = "grouped_mm"


@dataclass(frozen=True, slots=True)
class Decoded:
    """Decode steps of a whole batch, the prefill left out. `nbytes` were paged in meanwhile."""

    num_tokens: int
    seconds: float
    nbytes: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second, all rows together."""
        return self.num_tokens / self.seconds


Decode = Callable[[Sequence[Sequence[int]], int], Decoded]
"""`decode(prompts, num_steps)`: greedy, prompts of one length."""


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """Generation goes on after an end-of-sequence token."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def load_plain(path: Path, dtype: torch.dtype, implementation: str = "eager") -> PreTrainedModel:
    """As any user of transformers would, everything resident."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation=implementation)
    return endless(model.eval())


@contextmanager
def load_library(path: Path, **options: Any) -> Iterator[PreTrainedModel]:
    """`pager.load_model`, closed at the end."""
    model = pager.load_model(path, **options)
    try:
        yield endless(model)
    finally:
        model.expert_paging.close()


@contextmanager
def load_engine(path: Path, dtype: torch.dtype, budgets: Budgets, num_readers: int) -> Iterator[EngineRun]:
    """What a worker of the service runs, without its processes."""
    paged = load_paged_model(path, dtype=dtype, budgets=budgets, num_readers=num_readers)
    try:
        yield EngineRun(paged)
    finally:
        paged.close()


class StepClock(BaseStreamer):  # type: ignore[misc] # transformers is untyped here
    """When each step's tokens came: `generate` hands over the prompt, then a token of every row a step."""

    def __init__(self, after_prefill: Callable[[], None]) -> None:
        self._after_prefill = after_prefill
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if len(self.times_s) == 1:
            self._after_prefill()
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing: the last step has been put."""


@torch.inference_mode()
def decode_by_generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_steps: int, after_prefill: Callable[[], None]
) -> Decoded:
    """Decode steps of `model.generate`."""
    prompt_BN = torch.tensor(prompts)
    clock = StepClock(after_prefill)
    model.generate(
        prompt_BN,
        attention_mask=torch.ones_like(prompt_BN),
        max_new_tokens=num_steps + 1,
        do_sample=False,
        streamer=clock,
    )
    return Decoded(len(prompts) * num_steps, clock.times_s[-1] - clock.times_s[1])


def plain_decode(model: PreTrainedModel, implementation: str) -> Decode:
    """Prefill has an implementation of its own: the batched one would gather gigabytes of weights there."""

    def decode(prompts: Sequence[Sequence[int]], num_steps: int) -> Decoded:
        model.set_experts_implementation(PREFILL_IMPLEMENTATION)
        return decode_by_generate(model, prompts, num_steps, lambda: model.set_experts_implementation(implementation))

    return decode


def library_decode(model: PreTrainedModel) -> Decode:
    def decode(prompts: Sequence[Sequence[int]], num_steps: int) -> Decoded:
        marks: list[int] = []
        stats = model.expert_paging.pager.stats
        run = decode_by_generate(model, prompts, num_steps, lambda: marks.append(stats().bytes_from_disk))
        return Decoded(run.num_tokens, run.seconds, stats().bytes_from_disk - marks[0])

    return decode


class EngineRun:
    """An engine that is stepped here, so that its steps can be timed one by one."""

    def __init__(self, paged: PagedModel) -> None:
        self.paged = paged
        self._events: deque[StreamEvent] = deque()
        self._engine = Engine(paged, Tokenizer(BPE()), EngineLimits(), sink=self._events.extend)
        self._num_requests = 0

    def first_token(self, prompt: Sequence[int], policy: PoolPolicy) -> tuple[float, Usage]:
        """Seconds from submission to the first token, and what it cost."""
        started_s = time.perf_counter()
        self._submit(prompt, 1, policy)
        while True:
            for chunk in self._step():
                if chunk.usage is not None:
                    return time.perf_counter() - started_s, chunk.usage

    def decoder(self, policy: PoolPolicy) -> Decode:
        """Steps in which every row decodes and no prompt runs."""

        def decode(prompts: Sequence[Sequence[int]], num_steps: int) -> Decoded:
            # Rows start one step after another, so the first have to last longer.
            for prompt in prompts:
                self._submit(prompt, num_steps + len(prompts), policy)
            stats = self.paged.pager.stats
            started: set[str] = set()
            num_ended, num_timed, seconds, nbytes = 0, 0, 0.0, 0
            while num_ended < len(prompts):
                all_started, paged_before, step_started_s = len(started) == len(prompts), stats(), time.perf_counter()
                chunks = self._step()
                if all_started and len(chunks) == len(prompts):
                    seconds += time.perf_counter() - step_started_s
                    nbytes += stats().bytes_from_disk - paged_before.bytes_from_disk
                    num_timed += len(chunks)
                started |= {chunk.request_id for chunk in chunks}
                num_ended += sum(chunk.usage is not None for chunk in chunks)
            return Decoded(num_timed, seconds, nbytes)

        return decode

    def _submit(self, prompt: Sequence[int], num_tokens: int, policy: PoolPolicy) -> None:
        self._num_requests += 1
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        self._engine.submit(GenerateRequest(str(self._num_requests), "benchmark", tuple(prompt), sampling, policy))

    def _step(self) -> list[TokenChunk]:
        self._engine.step()
        chunks = []
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Failure):
                raise event.error
            chunks.append(event)
        return chunks


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


def fixed(pool: ExpertPool) -> PoolPolicy:
    return PoolPolicy(Count(max(map(len, pool.experts))), PoolSource.FIXED, pool)
