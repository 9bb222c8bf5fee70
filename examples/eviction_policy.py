"""Write an eviction policy of your own and compare it with the others, on a recorded trace and in the cache itself.

Run it from the repository: `python examples/eviction_policy.py [MODEL]`. It needs `pip install '.[serve]'`.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

import pager
from pager.cache.index import POLICIES
from pager.cache.trace import Trace, read_trace
from pager.engine.paged_model import load_paged_model
from pager.lab.replay import replay_all
from pager.memory import Budgets, format_bytes
from pager.types import ExpertKey, PoolPolicy, Share

MODEL = Path(__file__).parents[1] / "models" / "emo-tiny"
PROMPTS = (
    'def merge_sorted(left, right):\n    """Merge two sorted lists."""\n    result = []\n',
    "Rough winds do shake the darling buds of May,\nAnd summer's lease hath all too short a date:\n",
    "SELECT name, price FROM products WHERE price > 10 ORDER BY price",
    "Aspirin after surgery: a randomized trial\nBackground: We compared the effect of daily aspirin with",
)
BUDGET = 0.25  # of all routed experts


class SegmentedLRU:
    """Evicts experts that were used once before those that were used again; among equals, the least recently used.

    A policy is pure: it knows keys, and no tensors, devices or times.
    """

    def __init__(self) -> None:
        self._uses: Counter[ExpertKey] = Counter()
        self._once: dict[ExpertKey, None] = {}  # evictable, in the order in which they were let go of
        self._again: dict[ExpertKey, None] = {}

    def use(self, key: ExpertKey) -> None:
        self._uses[key] += 1

    def add(self, key: ExpertKey) -> None:
        segment = self._again if self._uses[key] > 1 else self._once
        segment[key] = None

    def remove(self, key: ExpertKey) -> None:
        segment = self._again if key in self._again else self._once
        del segment[key]

    def victims(self) -> Iterator[ExpertKey]:
        """All evictable experts, the next victim first."""
        yield from self._once
        yield from self._again

    def __len__(self) -> int:
        return len(self._once) + len(self._again)


def record(model: str | Path, prompts: Sequence[Sequence[int]]) -> Trace:
    """A trace of the prompts' prefills, under a budget for all experts, so that it depends on the prompts alone.

    A service records the same with `expert-pager serve --trace FOLDER`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl.gz"
        paged = load_paged_model(model, budgets=Budgets(expert_memory="100%"), trace=path)
        for token_ids in [*prompts, *reversed(prompts)]:
            document = paged.routing(PoolPolicy(Share(0.125)))
            with torch.inference_mode(), paged.step([document], prefill=True):
                paged.model(input_ids=torch.tensor([token_ids]), use_cache=False)
        paged.close()
        return read_trace(path)


def main(model: str | Path = MODEL) -> None:
    POLICIES["segmented-lru"] = SegmentedLRU  # in the project itself: a line in pager/cache/index.py
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]

    trace = record(model, prompts)
    header = trace.header
    print(f"replay of {len(trace.accesses)} accesses with room for {BUDGET:.0%} of the experts:")
    for result in replay_all(trace, int(BUDGET * header.num_experts)):
        waited = format_bytes(result.misses * header.expert_bytes)
        print(f"  {result.policy:<13} {result.hit_rate:6.1%} hits, waits for {waited}")

    print("the cache itself, with the policy by its name:")
    with (
        pager.load_model(model, expert_memory=BUDGET, pool_size="12.5%", policy="segmented-lru") as paged,
        torch.inference_mode(),
    ):
        for token_ids in [*prompts, *reversed(prompts)]:
            paged(input_ids=torch.tensor([token_ids]), use_cache=False)
        stats = paged.expert_paging.pager.stats()
    paging = stats.paging
    read = format_bytes(paging.bytes_from_disk)
    print(f"  {paging.experts_missed} misses, {stats.evictions} evictions, {read} read")


if __name__ == "__main__":
    main(*sys.argv[1:])
