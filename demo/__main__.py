"""Shows the whole service in a minute: starts it with room for a quarter of the experts, sends six prompts, stops it.

`python -m demo [MODEL]`; exit status 0 when everything worked.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.prompts import PROMPTS
from pager import Client, Count, SamplingParams, Share
from pager.cli.options import out, print_table
from pager.errors import PagerError
from pager.memory import format_bytes
from pager.types import ExpertPool, ModelInfo, PoolSize, Usage

MODEL = Path(__file__).parents[1] / "models" / "emo-tiny"
STOP_TIMEOUT_S = 60


class DemoError(Exception):
    """Something did not work; the message is for the reader."""


@dataclass(frozen=True, slots=True)
class AnswerCost:
    domain: str
    usage: Usage
    pool: ExpertPool
    seconds: float

    @property
    def hit_rate(self) -> float:
        paging = self.usage.paging
        return paging.experts_hit / paging.num_lookups if paging.num_lookups else 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--expert-memory", default="25%", help="memory for routed experts (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48)
    asked = parser.parse_args(arguments)
    try:
        with service(asked.model, asked.expert_memory) as ready:
            answers = ask_all(ready["address"], asked.max_tokens)
        print_summary(answers)
    except DemoError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except PagerError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    out.print("\ndemo: all six prompts answered, the service stopped cleanly", style="bold")
    return 0


@contextmanager
def service(model: Path, expert_memory: str) -> Iterator[dict[str, Any]]:
    """Runs `expert-pager serve` as a process.

    Yields its ready line; raises DemoError when it does not start or stop.
    """
    command = [sys.executable, "-m", "pager.cli", "serve", str(model), "--expert-memory", expert_memory]
    started_s = time.perf_counter()
    out.print(f"$ expert-pager serve {model} --expert-memory {expert_memory}", style="bold", markup=False)
    with tempfile.TemporaryFile("w+") as log:
        options = ["--port", "0", "--http-port", "0", "--metrics-port", "0", "--json"]
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("{")), None)
            if line is None:
                raise DemoError(f"the service did not start:\n{_text(log)}")
            ready = json.loads(line)
            plan = ready["plan"]
            out.print(
                f"ready after {time.perf_counter() - started_s:.1f} s on {ready['address']}: {plan['num_slots']} of "
                f"{plan['num_routed']} routed experts fit into {format_bytes(plan['slot_bytes'])} of slots",
                markup=False,
            )
            yield ready
            process.send_signal(signal.SIGTERM)
            status = process.wait(STOP_TIMEOUT_S)
            if status != 0:
                raise DemoError(f"the service stopped with status {status}:\n{_text(log)}")
        except subprocess.TimeoutExpired:
            raise DemoError(f"the service did not stop within {STOP_TIMEOUT_S} s:\n{_text(log)}") from None
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def ask_all(address: str, max_tokens: int) -> list[AnswerCost]:
    with Client(address, timeout_s=120) as client:
        size = choose_size(client.model())
        return [ask(client, domain, prompt, size, max_tokens) for domain, prompt in PROMPTS]


def choose_size(model: ModelInfo) -> PoolSize:
    """Returns an eighth of all experts, as the paper counts; for a small model the smallest legal pool."""
    facts = model.facts
    routed, shared = max(zip(facts.routed_per_layer, facts.shared_per_layer, strict=True))
    smallest = max(facts.top_k_per_layer)
    return Share(0.125) if (routed + shared) // 8 - shared >= smallest else Count(smallest)


def ask(client: Client, domain: str, prompt: str, size: PoolSize, max_tokens: int) -> AnswerCost:
    """Sends one prompt and prints its answer as it comes."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.7, top_p=0.95, seed=1)
    out.print(f"\n{domain}", style="bold cyan")
    out.print(prompt, end="", style="dim", markup=False)
    started_s = time.perf_counter()
    chunks = client.generate(prompt, sampling, size)
    for chunk in chunks:
        out.print(chunk.text, end="", markup=False)
    usage = chunks.usage
    if usage is None or usage.pool is None:
        raise DemoError(f"the stream of the {domain} prompt ended without its usage")
    answer = AnswerCost(domain, usage, usage.pool, time.perf_counter() - started_s)
    paged = format_bytes(usage.paging.bytes_paged)
    out.print(
        f"\n[pool {answer.pool.digest}: {answer.pool.num_experts} experts; {answer.hit_rate:.0%} were there already; "
        f"paged {paged}; {usage.completion_tokens} tokens in {answer.seconds:.2f} s]",
        style="green", markup=False,
    )  # fmt: skip
    return answer


def print_summary(answers: Sequence[AnswerCost]) -> None:
    rows = [
        (
            answer.domain,
            answer.pool.digest[:8],
            str(answer.pool.num_experts),
            f"{answer.pool.covered_mass or 0.0:.0%}",
            f"{answer.hit_rate:.0%}",
            format_bytes(answer.usage.paging.bytes_paged),
            f"{answer.usage.time_to_first_token_s * 1000:.0f} ms",
            str(answer.usage.completion_tokens),
        )
        for answer in answers
    ]
    out.print()
    columns = ("domain", "pool", "experts", "mass", "hits", "paged", "1st token", "tokens")
    print_table("six prompts, one service, room for a part of the experts", columns, rows)
    out.print(
        "mass: gate probability inside the pool; hits: experts of the pool that were in memory when the request came",
        style="dim", markup=False,
    )  # fmt: skip


def _text(log: Any) -> str:
    log.seek(0)
    return str(log.read())[-4000:]


if __name__ == "__main__":
    sys.exit(main())
