"""`expert-pager generate` and `expert-pager route`: one prompt, here or at a service."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from tokenizers import Tokenizer
from tokenizers.models import BPE

from pager import tokenizing
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
from pager.config import RouterConfig
from pager.engine.engine import Engine
from pager.engine.interface import EngineLimits, Failure, StreamEvent
from pager.engine.paged_model import load_paged_model
from pager.errors import InvalidRequest
from pager.lab.methods import current_name, method_of, select
from pager.lab.recording import Probe
from pager.memory.plan import Budgets
from pager.memory.units import format_bytes
from pager.models.open_model import OpenModel
from pager.pools.drift import check_can_drift
from pager.pools.pick import check_example, check_num_examples, mean_scores, pick_pool, pool_for, resolve_size
from pager.reading import read_bounded, reason_of
from pager.sampling import MAX_GRAMMAR_BYTES, check_sampling, filled
from pager.tokenizing import read_tokenizer
from pager.types import (
    CHOSEN_BY_SERVICE,
    Bytes,
    ExpertPool,
    Full,
    GenerateRequest,
    Grammar,
    GrammarKind,
    NamedPool,
    PoolAsk,
    PoolPolicy,
    PoolSize,
    PoolSource,
    RoutingScores,
    SamplingParams,
    TokenChunk,
    TokenLogprobs,
)
from router_service.prediction import build_passes


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


# --- in this process: no service, no ray, no grpc ---------------------------------------------------------------------


DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """The outcome of a routing-only pass: `pool` None means all experts, `expected_recall` None no fitted estimate."""

    scores: RoutingScores
    pool: ExpertPool | None
    expected_recall: float | None


@dataclass(frozen=True, slots=True)
class Local:
    """A checkpoint to run in this process."""

    model: Path
    device: str
    dtype: str | None

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        unset: Collection[str],
        ask: PoolAsk,
        named: NamedPool | None,
        budgets: Budgets,
    ) -> Iterator[TokenChunk]:
        """Yields chunks, the last one with the usage. `unset` fields of `sampling` are as the model's own settings say.
        `named` is the pool of `ask.name`. Raises PagerError.
        """
        tokenizer = read_tokenizer(self.model)
        ids = encode(tokenizer, prompt)
        policy = self._policy(ids, ask, named)
        paged = load_paged_model(self.model, device=self.device, dtype=self.dtype, budgets=budgets)
        try:
            events: deque[StreamEvent] = deque()
            engine = Engine(paged, tokenizer or _silent(), EngineLimits(), sink=events.extend)
            sampling = filled(sampling, unset, paged.default_sampling)
            if "max_tokens" in unset:
                room = paged.config.max_position_embeddings - len(ids)
                sampling = replace(sampling, max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)))
            engine.submit(GenerateRequest("cli", "default", ids, sampling, policy))
            yield from _until_last(engine, events)
        finally:
            paged.close()

    def route(self, prompt: Prompt, ask: PoolAsk, named: NamedPool | None = None, router: str = "auto") -> Routed:
        """Returns the scores that a routing-only pass gives the prompt, and the pool that `ask` makes of them."""
        ids = encode(read_tokenizer(self.model), prompt)
        if router not in ("auto", "lexical", "trunk", "fitted"):
            raise InvalidRequest(f"--predictor is one of lexical, trunk and fitted, not {router!r}")
        with self._open() as opened:
            _check_ids(ids, opened)
            passes = build_passes(opened, RouterConfig(router=router, device=self.device))
            scores = passes.available[passes.chain[0]]().scores(ids)
            if named is not None:
                return Routed(scores, pool_for(named, opened.checkpoint.fingerprint, opened.facts), None)
            if ask.size is None or isinstance(ask.size, Full):
                return Routed(scores, None, None)
            pool = pick_pool(scores, ask.size, opened.facts)
            return Routed(scores, pool, passes.estimate(scores, pool) if passes.estimate else None)

    def calibrate(
        self,
        name: str,
        examples: Sequence[str],
        size: PoolSize,
        method: str | None,
        sample: Sequence[str],
        budgets: Budgets,
    ) -> NamedPool:
        """Makes a pool from examples; `sample` has the documents that the method `frequency` counts over. Raises
        PagerError.

        Without a method, it uses the one that a service would: the best routing-only pass; where none was fitted, the
        mean of a whole run.
        """
        check_num_examples(len(examples))
        if isinstance(size, Full):
            raise InvalidRequest("a pool of all experts needs no examples; give a size below `full` with --pool")
        if method is not None:
            method = current_name(method)
            method_of(method)
        tokenizer = read_tokenizer(self.model)
        with self._open() as opened:
            token_ids = [encode(tokenizer, text) for text in examples]
            for index, ids in enumerate(token_ids):
                check_example(index, len(ids), int(opened.config.max_position_embeddings))
            passes = build_passes(opened, RouterConfig(device=self.device))
            method = method or ("fitted" if "fitted" in passes.available else "mean")
            if method in passes.available:
                scores = mean_scores([passes.available[method]().scores(ids) for ids in token_ids])
                pool = pick_pool(scores, size, opened.facts)
            else:
                pool = self._select(method, token_ids, size, [encode(tokenizer, text) for text in sample], budgets)
            return NamedPool(name, pool, method, len(examples), sum(map(len, token_ids)), opened.checkpoint.fingerprint)

    def _select(
        self,
        method: str,
        examples: Sequence[tuple[int, ...]],
        size: PoolSize,
        sample: Sequence[tuple[int, ...]],
        budgets: Budgets,
    ) -> ExpertPool:
        paged = load_paged_model(self.model, device=self.device, dtype=self.dtype, budgets=budgets)
        try:
            return select(method, Probe(paged, sample=sample), examples, size)
        finally:
            paged.close()

    def _policy(self, ids: tuple[int, ...], ask: PoolAsk, named: NamedPool | None) -> PoolPolicy:
        """Returns the request's policy, with the values that the service would have filled in."""
        if named is not None:
            with self._open() as opened:
                fixed = pool_for(named, opened.checkpoint.fingerprint, opened.facts)
            return PoolPolicy(source=PoolSource.FIXED, fixed=fixed, drift=ask.drift)
        policy = check_can_drift(PoolPolicy(ask.size or Full(), ask.source or PoolSource.PREFILL, drift=ask.drift))
        if policy.source is PoolSource.CODEBOOK and not isinstance(policy.size, Full):
            return self._shared(ids, policy)
        if policy.source is PoolSource.PREDICTION:
            return replace(policy, fixed=self.route(ids, ask).pool)
        if isinstance(policy.size, Bytes):
            with self._open() as opened:
                return replace(policy, size=resolve_size(policy.size, self.route(ids, ask).scores, opened.facts))
        return policy

    def _shared(self, ids: tuple[int, ...], policy: PoolPolicy) -> PoolPolicy:
        """The pool of the codeword that covers the prompt, else one of its own. Raises InvalidRequest."""
        with self._open() as opened:
            passes = build_passes(opened, RouterConfig(device=self.device))
            passes.check(policy)
            assert passes.codebook is not None
            scores, trunk = (passes.available[name]().scores(ids) for name in ("lexical", "trunk"))
            codeword = passes.codebook.assign(scores, policy.size, trunk)
            return PoolPolicy(source=PoolSource.FIXED, fixed=codeword.pool, drift=policy.drift)

    @contextmanager
    def _open(self) -> Iterator[OpenModel]:
        opened = OpenModel.open(self.model, self.dtype)
        with opened.checkpoint:
            yield opened


def _check_ids(ids: Sequence[int], opened: OpenModel) -> None:
    if not ids:
        raise InvalidRequest("the prompt is empty; give at least one token", field="prompt")
    vocabulary = int(opened.config.vocab_size)
    if max(ids) >= vocabulary:
        raise InvalidRequest(f"token id {max(ids)} is outside the vocabulary of {vocabulary}", field="prompt")


def encode(tokenizer: Tokenizer | None, prompt: Prompt) -> tuple[int, ...]:
    """Returns the prompt's token ids. Raises InvalidRequest for text without a tokenizer."""
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise InvalidRequest("this checkpoint has no tokenizer.json; give the prompt with --token-ids")
    return tuple(tokenizing.encode_all(tokenizer, [prompt])[0].ids)


def _silent() -> Tokenizer:
    """Returns the tokenizer of a checkpoint that has none: every id has an empty text."""
    return Tokenizer(BPE())


def _until_last(engine: Engine, events: deque[StreamEvent]) -> Iterator[TokenChunk]:
    while True:
        if not engine.step():
            time.sleep(0.001)  # a grammar is being compiled
        while events:
            event = events.popleft()
            if isinstance(event, Failure):
                raise event.error
            yield event
            if event.usage is not None:
                return
