"""One engine in a process of its own, which `peers` starts and asks: a JSON line for each question and each answer.

It runs in the environment of its engine, where ours may be missing, so that each class imports what it needs itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

Prompts = Sequence[Sequence[int]]
Taken = tuple[float, float]
"""Seconds by the clock, and processor time of all threads of the process."""
NUM_TOP = 20
KV_MEMORY = "64MiB"
MAX_ROWS, CONTEXT_TOKENS = 8, 1024


class Engine(Protocol):
    """An engine with its model loaded. It decodes greedily, and past any end of a text."""

    def top(self, prompt: Sequence[int]) -> list[int]:
        """Returns the NUM_TOP likeliest tokens after the prompt, likeliest first."""
        ...

    def decode(self, prompts: Prompts, num_steps: int) -> Taken:
        """Returns what `num_steps` steps of all rows together take, their prompts left out."""
        ...

    def prefill(self, prompt: Sequence[int]) -> Taken:
        """Returns what it takes until the first token."""
        ...


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    @property
    def taken(self) -> Taken:
        return time.perf_counter() - self._started[0], time.process_time() - self._started[1]


class Ours:
    """The engine of the service, in process. Exact, or with a share of the experts that each prompt chooses."""

    def __init__(
        self, path: Path, num_threads: int, opened: ExitStack, memory: str | None, pool: float | None = None
    ) -> None:
        import torch

        from benchmarks.engine_run import load_engine
        from pager.memory import NUM_READERS, Budgets
        from pager.types import PoolPolicy, Share

        torch.set_num_threads(num_threads)
        budgets = Budgets(memory, 0, KV_MEMORY, max_running=MAX_ROWS)
        self._policy = PoolPolicy() if pool is None else PoolPolicy(Share(pool))
        self._run = opened.enter_context(load_engine(path, torch.bfloat16, budgets, NUM_READERS))

    def top(self, prompt: Sequence[int]) -> list[int]:
        self._run.submit(prompt, 1, self._policy, logprobs=NUM_TOP)
        while True:
            for chunk in self._run.step():
                if chunk.logprobs:
                    return list(chunk.logprobs[0].top_ids)

    def decode(self, prompts: Prompts, num_steps: int) -> Taken:
        decoded = self._run.decoder(self._policy)(prompts, num_steps)
        if not decoded.num_tokens:
            return self._decode_by_turns(prompts, num_steps)
        part = num_steps * len(prompts) / decoded.num_tokens
        return part * decoded.seconds, part * decoded.processor_s

    def _decode_by_turns(self, prompts: Prompts, num_steps: int) -> Taken:
        """Counts the steps in which any row decodes: a small memory does not run all of them at once."""
        for prompt in prompts:
            self._run.submit(prompt, 1 + num_steps, self._policy)
        started: set[str] = set()
        num_ended, seconds, processor_s = 0, 0.0, 0.0
        while num_ended < len(prompts):
            clock = Clock()
            chunks = self._run.step()
            if any(chunk.request_id in started for chunk in chunks):
                seconds, processor_s = seconds + clock.taken[0], processor_s + clock.taken[1]
            started |= {chunk.request_id for chunk in chunks}
            num_ended += sum(chunk.usage is not None for chunk in chunks)
        return seconds, processor_s

    def prefill(self, prompt: Sequence[int]) -> Taken:
        clock = Clock()
        self._run.first_token(prompt, self._policy)
        return clock.taken


class Transformers:
    """`generate` of plain transformers with its fastest experts implementation, or of `pager.load_model`."""

    def __init__(self, path: Path, num_threads: int, opened: ExitStack, memory: str | None, *, plain: bool) -> None:
        import torch

        from benchmarks.decode import IMPLEMENTATIONS
        from benchmarks.models import PREFILL_IMPLEMENTATION, load_library, load_plain
        from benchmarks.report import quieten

        quieten()
        torch.set_num_threads(num_threads)
        self._implementations = IMPLEMENTATIONS if plain else ()
        self._prefill = PREFILL_IMPLEMENTATION
        self._fastest: dict[int, str] = {}
        dtype = torch.bfloat16
        self._model = (
            load_plain(path, dtype)
            if plain
            else opened.enter_context(load_library(path, dtype=dtype, expert_memory=memory))
        )

    def top(self, prompt: Sequence[int]) -> list[int]:
        import torch

        self._use(self._prefill)
        with torch.inference_mode():
            tokens: list[int] = self._model(torch.tensor([prompt])).logits[0, -1].topk(NUM_TOP).indices.tolist()
        return tokens

    def decode(self, prompts: Prompts, num_steps: int) -> Taken:
        if self._implementations and len(prompts) not in self._fastest:
            few = max(2, num_steps // 4)
            times = {name: self._decode(prompts, few, name)[0] for name in self._implementations for _ in range(2)}
            self._fastest[len(prompts)] = min(times, key=lambda name: times[name])
        return self._decode(prompts, num_steps, self._fastest.get(len(prompts), ""))

    def prefill(self, prompt: Sequence[int]) -> Taken:
        import torch

        self._use(self._prefill)
        prompt_1N = torch.tensor([prompt])
        clock = Clock()
        self._model.generate(prompt_1N, attention_mask=torch.ones_like(prompt_1N), max_new_tokens=1, do_sample=False)
        return clock.taken

    def _decode(self, prompts: Prompts, num_steps: int, implementation: str) -> Taken:
        from benchmarks.models import decode_by_generate

        clocks: list[Clock] = []

        def begin() -> None:
            self._use(implementation)
            clocks.append(Clock())

        self._use(self._prefill)
        decoded = decode_by_generate(self._model, prompts, num_steps, begin)
        return decoded.seconds, clocks[0].taken[1]

    def _use(self, implementation: str) -> None:
        if self._implementations:
            self._model.set_experts_implementation(implementation)


class LlamaCpp:
    """llama.cpp by its prebuilt libraries, the file mapped, a pool of threads that stays."""

    def __init__(self, path: Path, num_threads: int, opened: ExitStack, folder: str) -> None:
        from benchmarks.llama_cpp import Libraries, LlamaModel

        self._model = opened.enter_context(LlamaModel(Libraries(Path(folder)), path, num_threads, CONTEXT_TOKENS))

    def decode(self, prompts: Prompts, num_steps: int) -> Taken:
        step = self._model.begin(prompts)
        clock = Clock()
        for _ in range(num_steps):
            step()
        return clock.taken

    def prefill(self, prompt: Sequence[int]) -> Taken:
        clock = Clock()
        self._model.begin([prompt])
        return clock.taken

    def top(self, prompt: Sequence[int]) -> list[int]:
        tokens: list[int] = (-self._model.logits(prompt)).argsort()[:NUM_TOP].tolist()
        return tokens


class Vllm:
    """vLLM on a CPU, its engine stepped in this process."""

    def __init__(self, path: Path, num_threads: int, opened: ExitStack, **options: Any) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        import vllm

        self._params: Callable[..., Any] = vllm.SamplingParams
        self._num_requests = 0
        self._engine: Any = vllm.LLM(
            model=str(path),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=CONTEXT_TOKENS,
            max_num_seqs=MAX_ROWS,
            max_logprobs=NUM_TOP,
            enable_prefix_caching=False,
            **options,
        ).llm_engine

    def top(self, prompt: Sequence[int]) -> list[int]:
        self._submit(prompt, 1, logprobs=NUM_TOP)
        answers: list[Any] = []
        while not answers:
            answers = self._engine.step()
        chances = answers[0].outputs[0].logprobs[0]
        return sorted(chances, key=lambda token: -chances[token].logprob)[:NUM_TOP]

    def decode(self, prompts: Prompts, num_steps: int) -> Taken:
        for prompt in prompts:
            self._submit(prompt, num_steps + 1)
        while len(self._engine.step()) < len(prompts):
            pass
        clock = Clock()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return clock.taken

    def prefill(self, prompt: Sequence[int]) -> Taken:
        clock = Clock()
        self._submit(prompt, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return clock.taken

    def _submit(self, prompt: Sequence[int], num_tokens: int, **more: Any) -> None:
        self._num_requests += 1
        params = self._params(max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False, **more)
        self._engine.add_request(str(self._num_requests), {"prompt_token_ids": list(prompt)}, params)


class Fastllm:
    """fastllm, its experts in memory or on disk with a cache of them in memory.

    In 16 bits it computes in float16: with bfloat16 its answers are another model's.
    """

    def __init__(self, path: Path, num_threads: int, opened: ExitStack, cache_bytes: int | None) -> None:
        from ftllm import llm

        llm.set_cpu_threads(num_threads)
        llm.set_device_map("cpu")
        llm.set_device_map("cpu" if cache_bytes is None else "disk", True)
        if cache_bytes is not None:
            llm.set_moe_cpu_cache(cache_bytes)
        self._model: Any = llm.model(str(path), dtype="float16")
        self._model.set_atype("float16")
        self._library: Any = llm.fastllm_lib
        self._vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]

    def top(self, prompt: Sequence[int]) -> list[int]:
        logits = (ctypes.c_float * (4 * self._vocabulary))()
        self._library.fetch_response_logits_llm_model(
            self._model.model, self._launched(prompt, 1, reports=True), logits
        )
        return sorted(range(self._vocabulary), key=lambda token: -logits[token])[:NUM_TOP]

    def decode(self, prompts: Prompts, num_steps: int) -> Taken:
        """Rows start one after the other, so that the steps are counted in which all have a token."""
        handles = [self._launched(prompt, num_steps + 1 + len(prompts)) for prompt in prompts]
        clock = Clock()
        times: list[list[Taken]] = [[] for _ in handles]
        while handles:
            going_on = []
            for row, handle in enumerate(handles):
                if self._fetch(handle) >= 0:
                    times[row].append(clock.taken)
                    going_on.append(handle)
            handles = going_on if len(going_on) == len(handles) else [each for each in going_on if self._drained(each)]
        started, ended = max(row[0] for row in times), min(row[-1] for row in times)
        num_timed = min(sum(started < at <= ended for at in row) for row in times)
        part = num_steps / num_timed
        return part * (ended[0] - started[0]), part * (ended[1] - started[1])

    def prefill(self, prompt: Sequence[int]) -> Taken:
        clock = Clock()
        handle = self._launched(prompt, 1)
        self._fetch(handle)
        taken = clock.taken
        self._drained(handle)
        return taken

    def _launched(self, prompt: Sequence[int], num_tokens: int, *, reports: bool = False) -> int:
        tokens, one = (ctypes.c_int * len(prompt))(*prompt), ctypes.c_float(1)
        handle: int = self._library.launch_response_llm_model(
            *(self._model.model, len(prompt), tokens, num_tokens, num_tokens, False, one, 1, one, one, reports, 0, None)
        )
        return handle

    def _fetch(self, handle: int) -> int:
        token: int = self._library.fetch_response_llm_model(self._model.model, handle)
        return token

    def _drained(self, handle: int) -> bool:
        while self._fetch(handle) >= 0:
            pass
        return False


KINDS: Mapping[str, Callable[..., Engine]] = {
    "engine": Ours,
    "load_model": lambda *args, **options: Transformers(*args, **options, plain=False),
    "transformers": lambda *args, **options: Transformers(*args, **options, plain=True),
    "llama.cpp": LlamaCpp,
    "vllm": Vllm,
    "fastllm": Fastllm,
}


def main() -> None:
    """`KIND PATH THREADS OPTIONS`, the last one in JSON. What the engine prints goes to stderr."""
    kind, path, num_threads, options = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    with ExitStack() as opened:
        engine = KINDS[kind](Path(path), int(num_threads), opened, **json.loads(options))
        answer("ready")
        for line in sys.stdin:
            method, *arguments = json.loads(line)
            answer(getattr(engine, method)(*arguments))
    answers.flush()
    os._exit(0)  # some of the engines hang in their threads


if __name__ == "__main__":
    main()
