"""The prediction of a request's pool: remembered from a prompt that starts alike, or scored by a chain of passes.

A pass is a predictor: `PassPlan` chooses them from the settings and the files beside the checkpoint. Those that run the
model's trunk need torch, which is not imported here: their caller says how the trunk is loaded, and where it runs.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from pager.config import RouterConfig
from pager.errors import ConfigError, InvalidRequest, NotReady, PagerError
from pager.observe.tracing import note, span
from pager.pools.pick import pick_pool, resolve_size
from pager.predict.fitted import (
    PREDICTOR_NAME,
    Codebook,
    Codeword,
    FittedPredictor,
    LexicalPredictor,
    PredictorFile,
    TrunkScorer,
    wanted_by,
)
from pager.predict.learning import Learned, Observation, observed, revise
from pager.tokenizing import encode_all, longest_token_bytes, refuse_special
from pager.types import Bytes, ExpertPool, Full, PoolPolicy, PoolSize, PoolSource, RoutingFacts, RoutingScores, Usage
from router_service.hints import HintStore, Turn, pool_key, prefix_keys, turn_keys

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

Result = TypeVar("Result")

MIN_RECALL = 0.5  # of a prediction, below which another source is taken
REVISE_AFTER = 32  # observations
MAX_WAITING = 512  # observations, the latest
MIN_HELD = 0.75  # of the gate mass that a codeword's pool is expected to hold
MIN_JUDGED_TOKENS = 16  # of an answer, before its gate mass says anything
MIN_PREFILL_COVERAGE = 0.8  # of a pool that a prefill chose, by a codeword
LEXICAL = "lexical"  # the only pass that does not run the trunk
PREFILL = "prefill"  # follows the last pass: the worker's own choice, which is the reference
CODEBOOK = "codebook"  # the source of a pool that several prompts share
OWN = "own"  # of the pool of a prompt that no codeword covers, picked before its prefill
TURN = "turn"  # of the pool that the conversation had in its last turn


class Scorer(Protocol):
    """A routing-only pass. Called from another thread, one call at a time."""

    def scores(self, token_ids: Sequence[int], /) -> RoutingScores: ...


class TrunkHost(Protocol):
    """The runner of the trunk, which may have to start for it; called on the event loop (`router_service.trunk`)."""

    @property
    def is_ready(self) -> bool: ...
    def wake(self) -> None: ...
    async def ready(self) -> None:
        """Returns when the trunk can be used. Raises PagerError."""

    def rest(self) -> None:
        """Called now and then; it may end what nothing has needed for a while."""


class RecallEstimate(Protocol):
    """An estimate of the share of the prefill's pool that a pool of the same sizes, picked by these scores, holds."""

    def __call__(self, scores: RoutingScores, pool: ExpertPool, /) -> float: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a text; `ids` is left empty where there are more than the caller's limit."""

    num_tokens: int
    ids: Sequence[int]


class Encoder(Protocol):
    """The part of a tokenizer that the router needs. Called from several threads."""

    @property
    def longest_token_bytes(self) -> int:
        """The most bytes of text that one token can stand for."""

    def encode(self, text: str, most: int, /, *, add_special_tokens: bool = True) -> Encoded:
        """Returns the ids of at most `most` tokens. Must let other threads run meanwhile. Raises InvalidRequest."""


class FairThreads:
    """Threads that take work from one tenant after the other, however much of it waits.

    With two threads or more, no tenant has all of them, so that one tenant's long work never keeps all others waiting.
    One event loop owns the lines; admission bounds their length, and a cancelled caller leaves its line.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._most_of_one = max(1, num_threads - 1)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._running: Counter[str] = Counter()
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}  # the tenant whose turn is next comes first

    async def run(self, tenant: str, work: Callable[[], Result]) -> Result:
        """Returns or raises the result of `work` once it has had its turn. Work that has begun continues when the
        caller leaves.
        """
        loop = asyncio.get_running_loop()
        await self._turn(tenant, loop)
        job = self._threads.submit(work)

        def ended(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._leave, tenant)

        job.add_done_callback(ended)
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Waits for running work; what has not begun is cancelled."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def _turn(self, tenant: str, loop: asyncio.AbstractEventLoop) -> None:
        if tenant not in self._lines and self._has_room(tenant):
            self._running[tenant] += 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._lines.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(tenant, turn)
            else:  # the cancelled caller had just been given its turn
                self._leave(tenant)
            raise

    def _has_room(self, tenant: str) -> bool:
        return self._running.total() < self._num_threads and self._running[tenant] < self._most_of_one

    def _leave(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        while (following := next(filter(self._has_room, self._lines), None)) is not None:
            turn = self._lines[following][0]
            self._forget(following, turn)
            if following in self._lines:
                self._lines[following] = self._lines.pop(following)  # moves the tenant behind all others
            if not turn.done():
                self._running[following] += 1
                turn.set_result(None)

    def _forget(self, tenant: str, turn: asyncio.Future[None]) -> None:
        line = self._lines.get(tenant, deque())
        with suppress(ValueError):  # it was skipped already
            line.remove(turn)
        if not line:
            self._lines.pop(tenant, None)


@dataclass(frozen=True, slots=True)
class Passes:
    """The routing-only passes of a router.

    `available` maps each pass to its loader, from the least to the best; a pass is loaded when it is first used.
    `chain` lists the passes that score a prompt; each is used when the one before it is expected to recall less than
    `min_recall` of the prefill's pool. Without `estimate`, the first one is always good enough. Without any pass,
    requests are placed without a prediction. `codebook` holds the pools that prompts share, where the model has one.
    `trunk` runs the trunk for all passes but the lexical one; without it, they run it themselves.
    """

    available: Mapping[str, Callable[[], Scorer]] = field(default_factory=dict)
    chain: tuple[str, ...] = ()
    estimate: RecallEstimate | None = None
    min_recall: float = 0.0
    codebook: Codebook | None = None
    trunk: TrunkHost | None = None

    def __post_init__(self) -> None:
        assert set(self.chain) <= set(self.available)

    @property
    def judges_by_trunk(self) -> bool:
        """Tells whether the first pass runs the trunk, which then judges what a codeword covers."""
        return self.chain[:1] not in ((), (LEXICAL,))

    def check(self, policy: PoolPolicy) -> None:
        """Raises InvalidRequest for a policy that needs a pass where there is none."""
        check_source(policy, has_pass=bool(self.chain), has_codebook=self.codebook is not None)


def check_source(policy: PoolPolicy, *, has_pass: bool, has_codebook: bool) -> None:
    """Raises InvalidRequest for a policy that needs a pass or a codebook where there is none."""
    if policy.source is PoolSource.CODEBOOK and not has_codebook:
        raise InvalidRequest(
            "this service has no codebook; make one with `expert-pager fit-router`, and serve with another "
            "router.router than 'trunk' and 'prefill'",
            field="pool.source",
        )
    if not has_pass and policy.source is PoolSource.PREDICTION:
        raise _unscored("a predicted pool", "pool.source")
    if not has_pass and isinstance(policy.size, Bytes):
        raise _unscored("sharing bytes out over the layers", "pool.size.bytes")


class TextEncoder:
    """The tokenizer as the router needs it: other threads run while it works."""

    def __init__(self, tokenizer: Tokenizer | None, refused: Sequence[str] = ()) -> None:
        """`refused` are special tokens that texts of requests may not spell; a rendered template may."""
        self._tokenizer = tokenizer
        self._refused = refused
        self.longest_token_bytes = 1 if tokenizer is None else longest_token_bytes(tokenizer)

    def encode(self, text: str, most: int, /, *, add_special_tokens: bool = True) -> Encoded:
        if self._tokenizer is None:
            raise InvalidRequest("this model has no tokenizer; give the prompt as `token_ids`", field="text")
        if add_special_tokens:  # a rendered template has its own
            refuse_special([text], self._refused, "text")
        encoding = encode_all(self._tokenizer, [text], add_special_tokens=add_special_tokens)[0]
        # A list of millions of ids takes the GIL for tens of milliseconds to make, and nothing would read it.
        return Encoded(len(encoding), encoding.ids if len(encoding) <= most else ())


class Scoring:
    """Runs the tokenizer in some threads and the passes in one, tenants in turn, so that the event loop stays free.

    Admission bounds the work that waits for a thread; a cancelled caller leaves the line.
    """

    def __init__(
        self, available: Mapping[str, Callable[[], Scorer]], encoder: Encoder, trunk: TrunkHost | None = None
    ) -> None:
        self._available = available
        self._trunk = trunk
        self._loaded: dict[str, Scorer] = {}  # used only in the thread of the passes
        self._encoder = encoder
        self._passes = FairThreads(1, "scoring")
        # At least two: while one works on a text of megabytes, another serves other tenants.
        self._tokenizer = FairThreads(max(2, min(8, len(os.sched_getaffinity(0)) // 4)), "tokenizer")

    @property
    def methods(self) -> tuple[str, ...]:
        """Returns the passes, from the least to the best."""
        return tuple(self._available)

    async def encode(self, tenant: str, text: str, most: int, **options: bool) -> Encoded:
        """Returns the ids of at most `most` tokens; `options` are the encoder's. Raises InvalidRequest."""
        return await self._tokenizer.run(tenant, lambda: self._encoder.encode(text, most, **options))

    def has_now(self, name: str) -> bool:
        """Tells whether a pass can run without a wait for the trunk, which is woken if not."""
        if self._trunk is None or name == LEXICAL or self._trunk.is_ready:
            return True
        self._trunk.wake()
        return False

    async def has_soon(self, name: str) -> bool:
        """Tells whether a pass can run, after a wait for the trunk if need be."""
        if not self.has_now(name):
            assert self._trunk is not None, "it is what is waited for"
            try:
                await self._trunk.ready()
            except PagerError:  # which is in the log
                return False
        return True

    def rest(self) -> None:
        if self._trunk is not None:
            self._trunk.rest()

    async def scores(self, tenant: str, name: str, token_ids: Sequence[int]) -> RoutingScores:
        """Returns the scores of one pass. Raises InvalidRequest, NotReady."""
        if not self.has_now(name):
            assert self._trunk is not None, "it is what is waited for"
            await self._trunk.ready()  # not in the passes' thread, which others need meanwhile
        return await self._passes.run(tenant, lambda: self._pass(name).scores(token_ids))

    async def assigned(
        self, tenant: str, codebook: Codebook, token_ids: Sequence[int], size: PoolSize, *, by_trunk: bool
    ) -> tuple[RoutingScores, Codeword]:
        """Returns the lexical scores and the codeword that they assign, together with the trunk's where it counts.

        In the passes' thread, which so owns the codebook: a size that is new takes a pool for each codeword.
        """

        def assign() -> tuple[RoutingScores, Codeword]:
            scores = self._pass(LEXICAL).scores(token_ids)
            trunk = None
            with suppress(NotReady):  # the trunk's process ended; it is started again for the next prompt
                trunk = self._pass("trunk").scores(token_ids) if by_trunk else None
            return scores, codebook.assign(scores, size, trunk)

        return await self._passes.run(tenant, assign)

    def close(self) -> None:
        self._tokenizer.close()
        self._passes.close()

    def _pass(self, name: str) -> Scorer:
        if name not in self._loaded:
            self._loaded[name] = self._available[name]()
        return self._loaded[name]


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A prompt's scores and the pool chosen by them (None for all experts). `is_enough`: no better source is needed.

    `codeword` is the codebook's best one, where the codebook was used.
    """

    scores: RoutingScores
    pool: ExpertPool | None
    expected_recall: float | None
    is_enough: bool
    codeword: Codeword | None = None


class LearnedStore(Protocol):
    """The store in which routers share what traffic has taught the codebook of a model."""

    async def version(self) -> int | None:
        """The version that is there; None where there is none, or where it cannot be told."""

    async def load(self) -> Learned | None: ...

    async def save(self, learned: Learned, replaces: int) -> bool:
        """Saves the codewords; returns False where another version than `replaces` is stored, which stays."""


class TrafficCodebook:
    """The codebook in force, and what the next version is made of. Owned by the router's event loop.

    Requests in flight keep the pools that they were given. `on_revision` hears of every version that is taken over.
    """

    def __init__(
        self,
        codebook: Codebook,
        routed_per_layer: Sequence[int],
        store: LearnedStore | None = None,
        on_revision: Callable[[Learned], None] = lambda _: None,
        *,
        learns: bool = True,
    ) -> None:
        self.codebook = codebook
        self._learns = learns
        self._routed = tuple(routed_per_layer)
        self._store = store
        self.on_revision = on_revision
        self._learned = Learned()
        self._waiting: deque[Observation] = deque(maxlen=MAX_WAITING)
        self._num_others = 0

    def answered(self, codeword: Codeword | None, ran: PoolPolicy, usage: Usage) -> None:
        """Keeps what an answer says of the codebook. `codeword` was the best for its prompt, where it was asked."""
        if not self._learns or usage.pool is None or (usage.drift is not None and usage.drift.experts_added):
            return
        observation = None
        if codeword is not None:
            observation = observed(codeword, is_misfit=self._is_misfit(codeword, usage))
        elif ran.source is PoolSource.PREFILL:
            seen_O = wanted_by(usage.pool, self._routed)
            if self.codebook.best_coverage(seen_O) < MIN_PREFILL_COVERAGE:
                observation = Observation(seen_O, MIN_PREFILL_COVERAGE)
        if observation is None:
            self._num_others += 1
        else:
            self._waiting.append(observation)

    async def beat(self) -> None:
        """Takes over a version that another router has made, and makes one of its own once enough was seen."""
        if not self._learns:
            return
        replaces = self._learned.version
        if self._store is not None and (found := await self._store.version()) not in (None, replaces):
            replaces = found  # also a value that cannot be read
            shared = await self._store.load()
            if shared is not None:
                await self._take_over(shared)
        if len(self._waiting) < REVISE_AFTER:
            return
        seen, num_others = list(self._waiting), self._num_others
        made = await asyncio.to_thread(revise, self._learned, seen, self._routed, num_others)
        if self._store is None or await self._store.save(made, replaces):
            # What has come meanwhile stays; `maxlen` drops from the left, so what was folded in may be gone already.
            folded = set(map(id, seen))
            self._waiting = deque((each for each in self._waiting if id(each) not in folded), MAX_WAITING)
            self._num_others -= num_others
            await self._take_over(made)

    async def _take_over(self, learned: Learned) -> None:
        self.codebook = await asyncio.to_thread(self.codebook.with_learned, learned.names, learned.means)
        self._learned = learned
        self.on_revision(learned)

    def _is_misfit(self, codeword: Codeword, usage: Usage) -> bool:
        """Tells whether more of the gates' mass fell outside of the codeword's pool than is to be expected of it."""
        expected = None if codeword.pool is None else codeword.pool.covered_mass
        if not codeword.is_covered or expected is None or usage.completion_tokens < MIN_JUDGED_TOKENS:
            return False
        return 1 - usage.out_of_pool_mass < MIN_HELD * expected


class PassChain:
    """Takes the first pass whose pool is expected to be good enough. `on_escalation` is called with (from, to)."""

    def __init__(
        self,
        passes: Passes,
        scoring: Scoring,
        facts: RoutingFacts,
        on_escalation: Callable[[str, str], None],
        traffic: TrafficCodebook | None = None,
    ) -> None:
        """`traffic` has the codebook of `passes`, if there is one."""
        self.scoring = scoring
        self.traffic = traffic
        self._passes = passes
        self._facts = facts
        self._on_escalation = on_escalation

    @property
    def is_empty(self) -> bool:
        return not self._passes.chain

    def check(self, policy: PoolPolicy) -> None:
        """Raises InvalidRequest for a policy that needs a pass where there is none."""
        self._passes.check(policy)

    async def score(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> Scored:
        """Returns the best result that was tried; `is_enough` is False where only the prefill is better. Needs a pass.

        A prefill's choice is predicted from the prompt alone; other pools are for the whole of prompt and answer.
        """
        chain, size = self._passes.chain, policy.size
        for name, following in zip(chain, (*chain[1:], PREFILL), strict=True):
            with span("score", source=name, num_tokens=len(token_ids)):
                scores = await self.scoring.scores(tenant, name, token_ids)
            if policy.source is PoolSource.PREFILL and scores.of_prompt is not None:
                scores = scores.of_prompt
            scored = self._judged(scores, size)
            if scored.is_enough:
                break
            self._on_escalation(name, following)
            if following != PREFILL and not (self.must_score(policy) or self.scoring.has_now(following)):
                break  # the prefill chooses meanwhile
        return scored

    def has_now(self, policy: PoolPolicy) -> bool:
        """Tells whether to score a prompt now. One whose prefill may choose does not wait for the trunk to start."""
        return self.must_score(policy) or self.scoring.has_now(self._passes.chain[0])

    def must_score(self, policy: PoolPolicy) -> bool:
        """Tells whether a policy needs scores, so that its prompts wait until the trunk has been started."""
        return policy.source is not PoolSource.PREFILL or isinstance(policy.size, Bytes)

    async def share(self, tenant: str, token_ids: Sequence[int], size: PoolSize) -> Scored:
        """Returns the pool of the best codeword. Where none covers the prompt, the trunk picks one for it; without a
        trunk, `is_enough` is False.

        Needs a codebook, and a size below all experts.
        """
        assert self.traffic is not None, "checked before"
        with span("codebook"):
            codebook = self.traffic.codebook
            # Where the trunk cannot be loaded, the lexical scores judge alone.
            by_trunk = self._passes.judges_by_trunk and await self.scoring.has_soon("trunk")
            scores, codeword = await self.scoring.assigned(tenant, codebook, token_ids, size, by_trunk=by_trunk)
            note(codeword=codeword.name, coverage=round(codeword.coverage, 4))
        return Scored(scores, codeword.pool, None, codeword.pool is not None, codeword)

    def codeword_of(self, pool: ExpertPool, size: PoolSize) -> str:
        """Returns the name of the codeword whose pool of that size this is now; empty where it is no codeword's."""
        return "" if self.traffic is None else self.traffic.codebook.name_of(pool, size)

    def _judged(self, scores: RoutingScores, size: PoolSize) -> Scored:
        if isinstance(size, Full):
            return Scored(scores, None, None, is_enough=True)
        with span("pick"):
            pool = pick_pool(scores, size, self._facts)
            note(num_experts=pool.num_experts)
        if self._passes.estimate is None:
            return Scored(scores, pool, None, is_enough=True)
        expected = self._passes.estimate(scores, pool)
        return Scored(scores, pool, expected, expected >= self._passes.min_recall)


def _unscored(what: str, field: str) -> InvalidRequest:
    return InvalidRequest(
        f"{what} needs a routing-only pass, and this service runs none (router.router is 'prefill'); let the prefill "
        "choose a pool of a count, a share or a mass",
        field=field,
    )


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted pool. `pool` is None where nothing is predicted: for all experts, or where the prefill chooses.

    `policy` is sent to the worker: bytes are shared out over the layers, a codeword's pool is a fixed one, and the
    choice is left to the prefill where no pass is expected to be good enough. `codeword` is the codebook's best for the
    prompt, where the codebook was used.
    """

    pool: ExpertPool | None
    source: str  # "hint", "turn", "codebook", "own", "trunk" (whatever the scores say), "prefill", "fixed" or "full"
    policy: PoolPolicy
    codeword: Codeword | None = None
    took_s: float = 0.0
    kept: str = ""  # the name of the codeword whose pool a conversation keeps

    @property
    def covering(self) -> str:
        """Returns the name of the codeword whose pool this is; empty for any other pool."""
        return self.codeword.name if self.codeword is not None and self.codeword.is_covered else self.kept

    @property
    def home_key(self) -> str:
        """The name under which its pool recurs, for placement; empty for a pool of the prompt's own."""
        if self.source == TURN:
            return self.kept
        return "" if self.policy.fixed is None else home_key(self.policy.fixed, self.codeword)

    @property
    def placed_by(self) -> str:
        """Returns what kind of pool the request is placed by, as metrics name it."""
        return "codeword" if self.covering else "fixed" if self.home_key else "predicted"


def home_key(fixed: ExpertPool | None, codeword: Codeword | None) -> str:
    """Returns the name under which a pool recurs: its codeword's, or its digest; empty for a pool of a prompt's own."""
    if codeword is not None:
        return codeword.name if codeword.is_covered else ""
    return "" if fixed is None else fixed.digest


class Predictor:
    """Tokenizes prompts, scores them and predicts their pools, from observations of similar prompts or by a pass.

    Tenants are known only as a part of keys: one tenant's prompts never influence another's prediction, but for the
    codewords that are learned from all traffic.
    """

    def __init__(
        self,
        chain: PassChain,
        hints: HintStore,
        facts: RoutingFacts,
        fingerprint: str,
        keeping: Set[PoolSource] = frozenset({PoolSource.CODEBOOK}),
    ) -> None:
        """Makes the predictor. A conversation keeps a pool that is of one of the sources `keeping`."""
        self._keeping = keeping
        self._chain = chain
        self._hints = hints
        self._facts = facts
        self._fingerprint = fingerprint

    @property
    def methods(self) -> tuple[str, ...]:
        """Returns the passes that can score an example, from the least to the best."""
        return self._chain.scoring.methods

    async def encode(self, tenant: str, text: str, most: int, **options: bool) -> Encoded:
        """Returns the ids of at most `most` tokens; `options` are the encoder's. Raises InvalidRequest."""
        return await self._chain.scoring.encode(tenant, text, most, **options)

    async def scores(self, tenant: str, method: str, token_ids: Sequence[int]) -> RoutingScores:
        """Returns the scores of one pass, which is one of `methods`."""
        return await self._chain.scoring.scores(tenant, method, token_ids)

    async def scored(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> Scored | None:
        """Returns the prompt's scores and their pool; None where no pass runs. Raises InvalidRequest."""
        self._chain.check(policy)
        if self._chain.is_empty:
            return None
        codeword = None
        if policy.source is PoolSource.CODEBOOK and not isinstance(policy.size, Full):
            shared = await self._chain.share(tenant, token_ids, policy.size)
            if shared.is_enough:
                return shared
            codeword = shared.codeword
        # Route shows the prediction that Generate would use.
        scored = await self._chain.score(tenant, token_ids, replace(policy, source=PoolSource.PREDICTION))
        return replace(scored, codeword=codeword, is_enough=scored.is_enough and codeword is None)

    def close(self) -> None:
        """Waits for the running pass, and ends the threads."""
        self._chain.scoring.close()

    async def predict(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> Prediction:
        if policy.source is PoolSource.FIXED:
            return Prediction(policy.fixed, "fixed", policy)
        if isinstance(policy.size, Full):
            return Prediction(None, "full", policy)
        self._chain.check(policy)
        started = time.perf_counter()
        if (turn := await self.last_turn(tenant, token_ids, policy)) is not None:
            return replace(turn, took_s=time.perf_counter() - started)
        codeword = None
        if policy.source is PoolSource.CODEBOOK:
            codeword = (await self._chain.share(tenant, token_ids, policy.size)).codeword
            assert codeword is not None
            # The maps, and so their estimates of recall, do not describe a prompt that no codeword covers.
            policy = replace(policy, source=PoolSource.PREFILL)
        if codeword is not None and codeword.pool is not None:
            # Fixed: a worker that knows the pool before the prefill leases only what is missing.
            fixed = PoolPolicy(source=PoolSource.FIXED, fixed=codeword.pool, drift=policy.drift)
            prediction = Prediction(codeword.pool, CODEBOOK if codeword.is_covered else OWN, fixed)
        else:
            prediction = await self._predict(tenant, token_ids, policy)
        return replace(prediction, codeword=codeword, took_s=time.perf_counter() - started)

    async def _predict(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> Prediction:
        # A pool whose source is the prediction depends on the prompt alone, never on remembered pools; the same
        # holds for how bytes are shared out.
        observed = None
        if policy.source is PoolSource.PREFILL:
            observed = await self.observed(tenant, token_ids, policy)
        if observed is not None and not isinstance(policy.size, Bytes):
            return Prediction(observed, "hint", policy)
        if self._chain.is_empty or not self._chain.has_now(policy):
            return Prediction(None, PREFILL, policy)
        scored = await self._chain.score(tenant, token_ids, policy)
        resolved = replace(policy, size=resolve_size(policy.size, scored.scores, self._facts))
        if observed is not None:
            return Prediction(observed, "hint", resolved)
        if scored.is_enough:
            return Prediction(scored.pool, scored.scores.source, resolved)
        return Prediction(None, PREFILL, replace(resolved, source=PoolSource.PREFILL))

    async def last_turn(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> Prediction | None:
        """Returns the pool of the turn that this prompt continues; None where there is none, and for pools of a source
        that conversations do not keep. The keys and values of that turn hold under no other pool.
        """
        if policy.source not in self._keeping or isinstance(policy.size, Full):
            return None
        keys = turn_keys(self._fingerprint, policy.size, tenant, token_ids, is_asked=True)
        pool = await self._hints.find_pool(keys, token_ids) if keys else None
        if pool is None:
            return None
        fixed = PoolPolicy(source=PoolSource.FIXED, fixed=pool, drift=policy.drift)
        return Prediction(pool, TURN, fixed, kept=self._chain.codeword_of(pool, policy.size))

    async def observed(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> ExpertPool | None:
        """Returns the pool that a prefill chose for this prompt or a long prefix of it."""
        return await self._hints.find_pool(self._keys(tenant, token_ids, policy))

    @property
    def codewords(self) -> tuple[str, ...]:
        """The names of the codewords in force."""
        return () if self._chain.traffic is None else self._chain.traffic.codebook.names

    async def beat(self) -> None:
        """Brings the codebook up to what was learned; called about once a second."""
        self._chain.scoring.rest()
        if self._chain.traffic is not None:
            await self._chain.traffic.beat()

    async def learn(
        self,
        tenant: str,
        token_ids: Sequence[int],
        asked: PoolPolicy,
        prediction: Prediction,
        usage: Usage,
        answer_id: int | None = None,
    ) -> None:
        """Remembers the pool that an answer had, and what it says of the codebook. `asked` is the request's policy,
        `answer_id` is the first token of its first answer.
        """
        ran = prediction.policy
        if self._chain.traffic is not None and prediction.source != TURN:
            self._chain.traffic.answered(prediction.codeword, ran, usage)
        if usage.pool is None:
            return
        keys: tuple[str, ...] = (self._by_digest(tenant, usage.pool.digest),)
        # a widened pool is no longer the prompt's choice
        was_widened = usage.drift is not None and usage.drift.experts_added > 0
        if ran.source is PoolSource.PREFILL and not isinstance(ran.size, Full) and not was_widened:
            keys += self._keys(tenant, token_ids, asked)
        await self._hints.remember_pool(keys, usage.pool)
        if asked.source in self._keeping and not isinstance(asked.size, Full) and not was_widened:
            turns = turn_keys(self._fingerprint, asked.size, tenant, token_ids, is_asked=False)
            if turns and answer_id is not None:
                await self._hints.remember_pool(turns, usage.pool, Turn.of(token_ids, answer_id))

    async def remember(self, tenant: str, pool: ExpertPool) -> None:
        """Lets the tenant name the pool by its digest for a while."""
        await self._hints.remember_pool([self._by_digest(tenant, pool.digest)], pool)

    async def find_by_digest(self, tenant: str, digest: str) -> ExpertPool | None:
        return await self._hints.find_pool([self._by_digest(tenant, digest)])

    def _by_digest(self, tenant: str, digest: str) -> str:
        return pool_key(self._fingerprint, tenant, digest)

    def _keys(self, tenant: str, token_ids: Sequence[int], policy: PoolPolicy) -> tuple[str, ...]:
        return prefix_keys(self._fingerprint, policy.size, tenant, token_ids)


@dataclass(frozen=True, slots=True)
class PredictedModel:
    """The facts that passes need of the model whose pools they predict.

    `unread_gates` is the type of a model whose gates pick in ways of their own, which no pass reads; empty for others.
    """

    fingerprint: str
    facts: RoutingFacts
    unread_gates: str = ""


@dataclass(frozen=True, slots=True)
class PassPlan:
    """The passes that the settings and the files beside a checkpoint ask for. Made before anything slow is started."""

    name: str  # lexical, trunk, fitted or prefill
    is_chosen: bool  # by the settings
    min_recall: float | None  # None where the settings say nothing
    path: Path  # of the small file
    file: PredictorFile | None  # None where there is none, or where nothing needs it

    @classmethod
    def read(cls, model: Path, config: RouterConfig) -> Self:
        """Reads the small file of the model's folder.

        Raises ConfigError for a choice that would have no effect, CheckpointError for a damaged file.
        """
        path, name = model / PREDICTOR_NAME, config.router
        if name == "auto":
            name = "fitted" if path.exists() else "trunk"
        if name in ("lexical", "fitted") and not path.exists():
            raise ConfigError(
                f"router.router is {name!r}, and its file {path} is missing; make it with `expert-pager fit-router "
                f"{model} --documents FILE`, or serve with --predictor trunk"
            )
        if config.min_recall is not None and (name == "prefill" or not path.exists()):
            what = (
                "router.router is 'prefill', which predicts nothing"
                if name == "prefill"
                else f"its estimate needs {path}, which is missing"
            )
            raise ConfigError(f"router.min_recall would have no effect: {what}; leave it out")
        file = PredictorFile.load(path) if name != "prefill" and path.exists() else None
        return cls(name, config.router != "auto", config.min_recall, path, file)

    @property
    def begins_with_trunk(self) -> bool:
        return self.name in ("trunk", "fitted")

    @property
    def has_codebook(self) -> bool:
        return self.name in ("lexical", "fitted") and self.file is not None and self.file.has_codebook

    def check(self, policy: PoolPolicy) -> None:
        """Raises InvalidRequest for a policy that needs a pass where there will be none, as far as is known now."""
        check_source(policy, has_pass=self.name != "prefill", has_codebook=self.has_codebook)

    @property
    def stand_ins(self) -> dict[int, np.ndarray]:
        """The vectors that stand in for the experts of the trunk's layers; none where nothing was fitted."""
        return {} if self.file is None else self.file.stand_ins

    def passes(self, model: PredictedModel, trunk: Callable[[], TrunkScorer], host: TrunkHost | None = None) -> Passes:
        """Makes the passes for a model. `trunk` loads its trunk, with the stand-ins, and is called when it is first
        used; called again, it returns the same. `host` runs it, where it does not run in this process.

        Raises ConfigError for a model that no pass can read, CheckpointError for a file of another model.
        """
        if model.unread_gates and self.is_chosen and self.name != "prefill":
            raise ConfigError(
                f"router.router is {self.name!r}, and no predictor reads the gates of {model.unread_gates}, which "
                "pick in ways of their own; leave it out, so that each prompt's prefill chooses its pool"
            )
        if model.unread_gates and self.min_recall is not None:
            raise ConfigError(
                f"router.min_recall would have no effect: no predictor reads the gates of {model.unread_gates}; "
                "leave it out"
            )
        if model.unread_gates or self.name == "prefill":
            return Passes()
        file = self.file
        if file is None:
            return Passes({"trunk": trunk}, ("trunk",), trunk=host)
        file.check_model(model.fingerprint, self.path)
        available: dict[str, Callable[[], Scorer]] = {"lexical": cache(lambda: LexicalPredictor(file))}
        chain = {"lexical": ("lexical", "fitted"), "trunk": ("trunk",), "fitted": ("fitted",)}[self.name]
        min_recall = MIN_RECALL if self.min_recall is None else self.min_recall
        if self.name == "lexical" and min_recall == 0:
            chain = ("lexical",)  # every pool is good enough then, so the trunk is never used
        else:
            available |= {"trunk": trunk, "fitted": cache(lambda: FittedPredictor(file, trunk()))}
        codebook = Codebook.of(file, model.facts) if self.has_codebook else None
        return Passes(available, chain, file.expected_recall, min_recall, codebook, host)
