"""`expert-pager generate` and `expert-pager route`: one prompt, here or at a service."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pager.cli.options import (
    AnswerPoolOptions,
    AsJson,
    ExpertMemory,
    KvMemory,
    PoolOptions,
    Prompt,
    PromptOptions,
    bundled,
    busy,
    err,
    out,
    pool_dict,
    pool_text,
    print_json,
    usage_dict,
    usage_lines,
)
from pager.cli.pools import Place, PoolsFolder, find_named
from pager.memory import Budgets, format_bytes
from pager.reading import read_bounded, reason_of
from pager.sampling import MAX_GRAMMAR_BYTES, check_sampling
from pager.types import (
    CHOSEN_BY_SERVICE,
    ExpertPool,
    Grammar,
    GrammarKind,
    PoolAsk,
    SamplingParams,
    TokenChunk,
    TokenLogprobs,
)


@bundled
def route(
    prompt: PromptOptions,
    place: Place,
    pool: PoolOptions,
    router: Annotated[
        str | None,
        typer.Option(
            "--predictor", "--router", help="With --model: lexical, trunk, or fitted (default where it was fitted)."
        ),
    ] = None,
    pools: PoolsFolder = None,
    as_json: AsJson = False,
) -> None:
    """Predict a prompt's expert pool. No routed expert is loaded, nothing is generated.

    Examples:

    `expert-pager route "SELECT name FROM users" --model ./model --pool 12.5%`

    `expert-pager route "Whereas the parties agree" --server localhost:50051 --pool mass:0.9 --json`
    """
    place.check({"--predictor": router})
    asked, ask = prompt.read(), pool.ask()
    if place.server is not None:
        result = _routed_by_server(place, asked, ask)
    else:
        named = None if ask.name is None else find_named(pools, place.tenant, ask.name)
        with busy("loading"):
            routed = place.local().route(asked, ask, named, router or "auto")
        means = [list(map(float, mean)) for mean in routed.scores.mean_LR]
        scores = routed.scores
        result = _result(scores.source, scores.num_tokens, means, routed.pool, routed.expected_recall)
    if as_json:
        print_json({**result, "pool": pool_dict(result["pool"])})
    else:
        _print(result)


def _routed_by_server(place: Place, prompt: Prompt, ask: PoolAsk) -> dict[str, Any]:
    with place.service() as service:
        answer = service.route(prompt, ask)
    scores = list(map(list, answer.scores))
    result = _result(answer.source, answer.num_tokens, scores, answer.pool, answer.expected_recall)
    if answer.worker is not None:
        result["placement"] = {"worker": answer.worker, "missing_bytes": answer.missing_bytes}
    if answer.coverage is not None:
        result |= {"codeword": answer.codeword or None, "coverage": answer.coverage}
    return result


def _result(
    source: str, num_tokens: int, means: Sequence[list[float]], pool: ExpertPool | None, expected: float | None
) -> dict[str, Any]:
    return {
        "source": source, "num_tokens": num_tokens, "pool": pool, "expected_recall": expected, "scores": list(means)
    }  # fmt: skip


def _print(result: dict[str, Any]) -> None:
    pool: ExpertPool | None = result["pool"]
    if pool is None and result["source"] == "prefill":
        out.print(f"{result['num_tokens']} tokens; the worker's prefill chooses their pool", markup=False)
    else:
        out.print(
            f"{result['num_tokens']} tokens scored by the {result['source']} pass: {pool_text(pool)}", markup=False
        )
    if result["expected_recall"] is not None:
        out.print(f"expected to name {result['expected_recall']:.0%} of the prefill's own pool", markup=False)
    if "coverage" in result:
        found = f"the pool of codeword {result['codeword']}" if result["codeword"] else "no codeword's pool"
        out.print(f"{found}; the best codeword covers {result['coverage']:.1%} of what its own would", markup=False)
    if "placement" in result:
        missing = format_bytes(result["placement"]["missing_bytes"])
        out.print(f"would go to worker {result['placement']['worker']}, which lacks {missing} of it", markup=False)
    for layer, mean in enumerate(result["scores"]):
        if not mean:
            out.print(f"layer {layer:>2}  dense")
            continue
        order = sorted(range(len(mean)), key=lambda expert: (-mean[expert], expert))
        best = " ".join(f"{expert}:{mean[expert]:.0%}" for expert in order[:4])
        chosen = "" if pool is None else "  pool " + " ".join(map(str, pool.experts[layer]))
        out.print(f"layer {layer:>2}  most wanted {best}{chosen}", markup=False)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options for how tokens are drawn, and where an answer ends."""

    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most. Default: 128, or what fits.", metavar="N")
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: as the model's generation_config.json says, else 0.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens with this much probability. Default: the same.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Draw from this many tokens; 0 for all. Default: the same.")] = None
    seed: Annotated[int | None, typer.Option(help="Makes a draw repeatable.", metavar="N")] = None
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. May be repeated.", metavar="TEXT")] = (
        None
    )
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens with at least this share of the likeliest one's probability.")
    ] = None
    presence_penalty: Annotated[float, typer.Option(help="Subtracted once for tokens that the answer already has.")] = (
        0.0
    )
    frequency_penalty: Annotated[
        float, typer.Option(help="Subtracted for each time that the answer already has a token.")
    ] = 0.0
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens of prompt and answer are repeated less.")
    ] = None
    logprobs: Annotated[
        int | None, typer.Option(help="Show log-probabilities, with this many alternatives (0 to 20).", metavar="N")
    ] = None
    json_schema: Annotated[
        Path | None, typer.Option(help="Constrain the answer to the JSON schema in this file.", metavar="FILE")
    ] = None
    regex: Annotated[
        str | None, typer.Option(help="Constrain the answer to this regular expression.", metavar="REGEX")
    ] = None

    @property
    def unset(self) -> frozenset[str]:
        """The fields that the service, or the model's own settings, decide on."""
        return frozenset(name for name in CHOSEN_BY_SERVICE if getattr(self, name) is None)

    def read(self) -> SamplingParams:
        """Returns the sampling parameters. Raises InvalidRequest for values that no request may have."""
        given = {name: getattr(self, name) for name in CHOSEN_BY_SERVICE if name not in self.unset}
        sampling = SamplingParams(
            **given,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logprobs=self.logprobs,
            grammar=_grammar(self.json_schema, self.regex),
        )
        check_sampling(sampling)
        return sampling


@bundled
def generate(
    prompt: PromptOptions,
    place: Place,
    pool: AnswerPoolOptions,
    draw: SamplingOptions,
    expert_memory: ExpertMemory = None,
    kv_memory: KvMemory = None,
    pools: PoolsFolder = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, in this process or from a running service. The text goes to stdout, its cost to stderr.

    Examples:

    `expert-pager generate "def quicksort(" --model ./model --pool 12.5% --expert-memory 25%`

    `expert-pager generate "Shall I compare thee" --server localhost:50051 --temperature 0.8 --seed 1`

    `git diff | expert-pager generate --prompt-file - --model ./model --json`

    `expert-pager generate "The parties agree" --server localhost:50051 --pool-name law --drift 0.3`

    `expert-pager generate "A customer record: " --model ./model --json-schema customer.schema.json`
    """
    place.check({"--expert-memory": expert_memory, "--kv-memory": kv_memory})
    ask, asked, sampling = pool.ask(), prompt.read(), draw.read()
    if place.server is not None:
        chunks = _from_server(place, asked, sampling, draw.unset, ask)
    else:
        if ask.digest is not None:
            raise typer.BadParameter("--pool-digest names a pool that a service remembers; it needs --server")
        named = None if ask.name is None else find_named(pools, place.tenant, ask.name)
        budgets = Budgets(expert_memory=expert_memory, host_memory=0, kv_memory=kv_memory, max_running=1)
        with busy("loading"):
            local = place.local()
        chunks = _started(local.generate(asked, sampling, draw.unset, ask, named, budgets))
    _show(chunks, as_json)


def _grammar(json_schema: Path | None, regex: str | None) -> Grammar | None:
    if json_schema is not None and regex is not None:
        raise typer.BadParameter("--json-schema and --regex exclude each other; give only one")
    if regex is not None:
        return Grammar(GrammarKind.REGEX, regex)
    if json_schema is None:
        return None
    try:
        return Grammar(GrammarKind.JSON_SCHEMA, read_bounded(json_schema, MAX_GRAMMAR_BYTES).decode())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{json_schema} cannot be read: {reason_of(error)}") from None


def _from_server(
    place: Place, prompt: Prompt, sampling: SamplingParams, unset: frozenset[str], ask: PoolAsk
) -> Iterator[TokenChunk]:
    with place.service() as service, service.generate(prompt, sampling, ask, unset=unset) as answer:
        yield from answer


def _started(chunks: Iterator[TokenChunk]) -> Iterator[TokenChunk]:
    with busy("loading"):
        first = next(chunks)
    yield first
    yield from chunks


def _show(chunks: Iterator[TokenChunk], as_json: bool) -> None:
    text: list[str] = []
    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    usage = None
    first_s = None
    for chunk in chunks:
        if chunk.token_ids:
            first_s = first_s or time.perf_counter()
        text.append(chunk.text)
        ids += chunk.token_ids
        logprobs += chunk.logprobs
        usage = chunk.usage or usage
        if not as_json:
            print(chunk.text, end="", flush=True)
    if as_json:
        reported = {"logprobs": [asdict(token) for token in logprobs]} if logprobs else {}
        print_json({"text": "".join(text), "token_ids": ids, **reported, "usage": usage and usage_dict(usage)})
        return
    if ids and not any(text):
        print(json.dumps(ids), end="")  # a checkpoint without a tokenizer
    print(flush=True)
    for token in logprobs:
        top = " ".join(f"{id_}:{logprob:.3f}" for id_, logprob in zip(token.top_ids, token.top_logprobs, strict=True))
        err.print(f"token {token.token_id:>6}  log-probability {token.logprob:.3f}  {top}", style="dim", markup=False)
    if usage and first_s:
        for line in usage_lines(usage, usage.time_to_first_token_s + time.perf_counter() - first_s):
            err.print(line, style="dim", markup=False)
