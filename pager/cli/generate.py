"""`expert-pager generate`: an answer to one prompt, here or from a service."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pager.cli.extras import serve_extra
from pager.cli.options import AsJson, Device, Dtype, ExpertMemory, KvMemory, Pool, resolve_device
from pager.cli.output import busy, err, pool_dict, print_json
from pager.cli.prompt import (
    Model,
    Prompt,
    PromptFile,
    PromptText,
    Server,
    Tenant,
    Timeout,
    TokenIds,
    one_place,
    read_prompt,
)
from pager.planner import Budgets
from pager.sampling_rules import check_sampling
from pager.types import ExpertPool, PoolPolicy, PoolSource, SamplingParams, TokenChunk, Usage
from pager.units import format_bytes


def generate(
    prompt: PromptText = None,
    model: Model = None,
    server: Server = None,
    pool: Pool = None,
    pool_source: Annotated[
        PoolSource | None,
        typer.Option(help="prefill: the worker's prefill chooses the pool; prediction: the routing-only pass does."),
    ] = None,
    pool_digest: Annotated[
        str | None, typer.Option(help="Use a pool this tenant was given before (with --server).", metavar="HEX")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most. Default: 128, or what fits.", metavar="N")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many tokens; 0 for all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes a draw repeatable.", metavar="N")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text. May be repeated.", metavar="TEXT")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    expert_memory: ExpertMemory = None,
    kv_memory: KvMemory = None,
    device: Device = "auto",
    dtype: Dtype = None,
    tenant: Tenant = "default",
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, in this process or from a running service. The text goes to stdout, its cost to stderr.

    Examples:

    `expert-pager generate "def quicksort(" --model ./model --pool 12.5% --expert-memory 25%`

    `expert-pager generate "Shall I compare thee" --server localhost:50051 --temperature 0.8 --seed 1`

    `git diff | expert-pager generate --prompt-file - --model ./model --json`
    """
    one_place(model, server)
    asked = read_prompt(prompt, prompt_file, token_ids)
    sampling = SamplingParams(
        max_tokens=128 if max_tokens is None else max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    check_sampling(sampling)
    has_max_tokens = max_tokens is not None
    if server is not None:
        chunks = _from_server(server, tenant, timeout, asked, sampling, has_max_tokens, pool, pool_source, pool_digest)
    else:
        assert model is not None
        if pool_digest is not None:
            raise typer.BadParameter("--pool-digest names a pool that a service remembers; it needs --server")
        budgets = Budgets(expert_memory=expert_memory, host_memory=0, kv_memory=kv_memory, max_running=1)
        chunks = _in_process(model, device, dtype, budgets, asked, sampling, has_max_tokens, pool, pool_source)
    _show(chunks, as_json)


def _from_server(
    server: str,
    tenant: str,
    timeout: float | None,
    prompt: Prompt,
    sampling: SamplingParams,
    has_max_tokens: bool,
    pool: str | None,
    source: PoolSource | None,
    digest: str | None,
) -> Iterator[TokenChunk]:
    with serve_extra("--server"):
        from pager.cli.remote import PoolAsk, Service
    from pager.routing.pool import parse_pool_size

    ask = PoolAsk(parse_pool_size(pool) if pool else None, source, digest)
    with Service(server, tenant, timeout) as service:
        yield from service.generate(prompt, sampling, ask, has_max_tokens=has_max_tokens)


def _in_process(
    model: Path,
    device: str,
    dtype: str | None,
    budgets: Budgets,
    prompt: Prompt,
    sampling: SamplingParams,
    has_max_tokens: bool,
    pool: str | None,
    source: PoolSource | None,
) -> Iterator[TokenChunk]:
    with busy("loading"):
        from pager.cli.local import Local
        from pager.routing.pool import parse_pool_size

        policy = PoolPolicy(parse_pool_size(pool), source or PoolSource.PREFILL)
        chunks = Local(model, resolve_device(device), dtype).generate(prompt, sampling, has_max_tokens, policy, budgets)
        first = next(chunks)
    yield first
    yield from chunks


def _show(chunks: Iterator[TokenChunk], as_json: bool) -> None:
    text: list[str] = []
    ids: list[int] = []
    usage = None
    first_s = None
    for chunk in chunks:
        first_s = first_s or time.perf_counter()
        text.append(chunk.text)
        ids += chunk.token_ids
        usage = chunk.usage or usage
        if not as_json:
            print(chunk.text, end="", flush=True)
    if as_json:
        print_json({"text": "".join(text), "token_ids": ids, "usage": usage and usage_dict(usage)})
        return
    if ids and not any(text):
        print(json.dumps(ids), end="")  # a checkpoint without a tokenizer
    print(flush=True)
    if usage and first_s:
        for line in usage_lines(usage, usage.time_to_first_token_s + time.perf_counter() - first_s):
            err.print(line, style="dim", markup=False)


def usage_dict(usage: Usage) -> dict[str, Any]:
    return {
        "mode": usage.mode,
        "finish_reason": str(usage.finish_reason),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "pool": pool_dict(usage.pool),
        "bytes_from_disk": usage.bytes_from_disk,
        "bytes_from_host": usage.bytes_from_host,
        "experts_hit": usage.experts_hit,
        "experts_missed": usage.experts_missed,
        "stall_s": usage.stall_s,
        "out_of_pool_mass": usage.out_of_pool_mass,
        "predicted_recall": usage.predicted_recall,
        "queue_s": usage.queue_s,
        "time_to_first_token_s": usage.time_to_first_token_s,
        "model_fingerprint": usage.model_fingerprint,
    }


def usage_lines(usage: Usage, elapsed_s: float) -> list[str]:
    """What an answer was and what it cost, for people."""
    lookups = usage.experts_hit + usage.experts_missed
    hits = f"{usage.experts_hit / lookups:.1%} of {lookups} expert look-ups" if lookups else "no expert look-ups"
    paged = f"{format_bytes(usage.bytes_from_disk)} from disk, {format_bytes(usage.bytes_from_host)} from host memory"
    return [
        f"{usage.mode}: {pool_text(usage.pool)}",
        f"hit {hits}; paged {paged}; stalled {usage.stall_s * 1000:.0f} ms",
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens ({usage.finish_reason}) in {elapsed_s:.2f} s, "
        f"first after {usage.time_to_first_token_s * 1000:.0f} ms",
    ]


def pool_text(pool: ExpertPool | None) -> str:
    if pool is None:
        return "all experts"
    mass = "" if pool.covered_mass is None else f", {pool.covered_mass:.1%} of the router's mass"
    return f"{pool.num_experts} experts in pool {pool.digest}{mass}"
