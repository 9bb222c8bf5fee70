"""What a conversation's next turn costs when keys and values of its earlier turns are there, and when they are not.

python -m benchmarks.prefix [MODEL]  about a minute on 2 cores
python -m benchmarks.prefix --quick  a smoke run that writes no file
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer

from benchmarks.engine_run import EngineRun, fixed, load_engine, random_pools
from benchmarks.measure import alternate
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, figure, quieten, ratio
from pager.engine.interface import EngineLimits
from pager.memory import Budgets
from pager.types import PoolPolicy, Usage

MODEL = ROOT / "models" / "emo-tiny"
TEXTS = ("docs/architecture.md", "docs/concepts.md", "docs/deploy.md", "docs/runbook.md", "docs/log.md")
NUM_TURNS = 6
NUM_STRANGERS = 7
FIRST_TOKENS, USER_TOKENS, ANSWER_TOKENS = 512, 32, 32  # the first message with what it is about, and later ones
KV_MEMORY = "256MiB"
POOL_SHARE, EXPERT_MEMORY = 0.125, "25%"  # slots for two pools, which the conversations share
LARGEST = 0.25  # of the time to first token without the cache, at turns 2 to 6


@dataclass(slots=True)
class Conversation:
    """A user who writes on as soon as an answer has ended. Mutable."""

    prompt: list[int]
    policy: PoolPolicy
    words: Iterator[int]  # of the messages to come
    num_turns: int = 0
    asked_s: float = 0.0
    first_s: float = 0.0

    def ask(self, engine: EngineRun) -> str:
        """The request's name."""
        if self.num_turns:
            self.prompt += [next(self.words) for _ in range(USER_TOKENS)]
        self.num_turns += 1
        self.first_s, self.asked_s = 0.0, time.perf_counter()
        return engine.submit(self.prompt, ANSWER_TOKENS, self.policy)

    def read(self, delivered_s: float, token_ids: Sequence[int]) -> None:
        self.first_s = self.first_s or delivered_s
        self.prompt += token_ids


@dataclass(frozen=True, slots=True)
class Turn:
    first_token_s: float
    usage: Usage


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint with a tokenizer.")] = MODEL,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Short, and no file is written.")] = False,
) -> None:
    """Measure conversations with and without the prefix cache."""
    quieten()
    torch.set_num_threads(threads)
    report = Report(
        "prefix",
        f"{model.name}, bfloat16, {NUM_TURNS} turns: a first message of {FIRST_TOKENS} tokens, later ones of "
        f"{USER_TOKENS}, answers of {ANSWER_TOKENS}",
        conditions(threads=f"{threads} of torch"),
    )
    report.start()
    budgets = Budgets(expert_memory=EXPERT_MEMORY, host_memory=0, kv_memory=KV_MEMORY)
    with (
        load_engine(model, torch.bfloat16, budgets, 4, limits=EngineLimits(prefix_cache=True)) as cached,
        load_engine(model, torch.bfloat16, budgets, 4, limits=EngineLimits(prefix_cache=False)) as plain,
    ):
        report.add(table({"cached": cached, "plain": plain}, words_of(model), 1 if quick else rounds))
    if not quick:
        report.write(results)


def table(engines: Mapping[str, EngineRun], words: Sequence[int], num_rounds: int) -> Table:
    rows = []
    for num_strangers in (0, NUM_STRANGERS):
        runs: dict[str, Callable[[], list[Turn]]] = {
            way: partial(talk, engine, policies_of(engine), words, num_strangers, count(1000 * num_strangers))
            for way, engine in engines.items()
        }
        for run in runs.values():
            run()
        found = alternate(runs, num_rounds)
        for turn in range(NUM_TURNS):
            times = {way: [1e3 * talk[turn].first_token_s for talk in talks] for way, talks in found.items()}
            usages = [talk[turn].usage for talk in found["cached"]]
            share = statistics.median(times["cached"]) / statistics.median(times["plain"])
            rows.append(
                (
                    f"{'alone' if not num_strangers else f'among {num_strangers}'}, turn {turn + 1}",
                    str(usages[0].prompt_tokens),
                    str(usages[0].cached_prompt_tokens),
                    figure(times["plain"], 1),
                    figure(times["cached"], 1),
                    ratio(times["cached"], times["plain"]),
                    "-" if not turn else "ok" if share <= LARGEST else "more",
                    str(max(usage.experts_missed for usage in usages)),
                )
            )
    columns = (
        *("conversation", "prompt tokens", "of them cached", "first token ms, without", "with", "with / without"),
        *(f"at most {LARGEST}", "experts missed"),
    )
    notes = (
        f"Fixed pools have {POOL_SHARE:.1%} of the experts; there are slots for two of them, which all conversations "
        "share.",
        "The engine in this process. A stranger goes on as soon as it is answered, and starts over after its last.",
        f"{num_rounds} conversations each that take turns, after one that is not counted.",
    )
    return Table("Time to first token, by turn", columns, rows, notes)


def talk(
    engine: EngineRun, policies: Sequence[PoolPolicy], words: Sequence[int], num_strangers: int, seeds: Iterator[int]
) -> list[Turn]:
    """The turns of one conversation among others, which begin anew when they end. No text comes twice."""

    def begin() -> Conversation:
        number = next(seeds)
        start = 7919 * number % len(words)
        rest = chain(words[start:], words)
        return Conversation([next(rest) for _ in range(FIRST_TOKENS)], policies[number % len(policies)], rest)

    strangers = [begin() for _ in range(num_strangers)]
    subject = begin()
    asked = {each.ask(engine): each for each in (*strangers, subject)}
    turns: list[Turn] = []
    while asked:
        for delivered_s, chunk in engine.timed_step():
            each = asked[chunk.request_id]
            each.read(delivered_s, chunk.token_ids)
            if chunk.usage is None:
                continue
            del asked[chunk.request_id]
            if each is subject:
                turns.append(Turn(each.first_s - each.asked_s, chunk.usage))
            if len(turns) < NUM_TURNS:
                following = each if each.num_turns < NUM_TURNS else begin()
                asked[following.ask(engine)] = following
    return turns


def policies_of(engine: EngineRun) -> Sequence[PoolPolicy]:
    return [fixed(pool) for pool in random_pools(engine.paged.facts, POOL_SHARE, 2)]


def words_of(model: Path) -> list[int]:
    """Tokens of this repository's documents, one after the other."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [token for name in TEXTS for token in tokenizer.encode((ROOT / name).read_text(encoding="utf-8")).ids]


if __name__ == "__main__":
    typer.run(main)
