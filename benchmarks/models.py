"""Two ways to decode that are compared: plain transformers and `pager.load_model`. The third is `engine_run.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation import BaseStreamer

import pager
import pager.models  # plain transformers loads EMO through it
from pager.types import PagingCounts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_IMPLEMENTATION = "grouped_mm"


@dataclass(frozen=True, slots=True)
class Decoded:
    """Decode steps of a whole batch, the prefill left out. `nbytes` were paged in meanwhile, and `num_missed` experts
    were in no slot when they were wanted.

    `forward_s` of the time were the model's forwards, `processor_s` is what all threads of the process took; 0 where
    nobody looked.
    """

    num_tokens: int
    seconds: float
    nbytes: int = 0
    forward_s: float = 0.0
    processor_s: float = 0.0
    num_missed: int = 0

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
        marks: list[PagingCounts] = []
        stats = model.expert_paging.pager.stats
        run = decode_by_generate(model, prompts, num_steps, lambda: marks.append(stats().paging))
        paged = stats().paging - marks[0]
        return Decoded(run.num_tokens, run.seconds, paged.bytes_from_disk, num_missed=paged.experts_missed)

    return decode
