"""The pipeline of a request: admit, claim, encode, predict, place, stream, learn.

Every front calls it with plain values and turns its errors into its own. It knows no gRPC, no HTTP and no protobuf.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Self

from pager.cluster.placement import ClusterPort, Placement, check_deadline, place
from pager.errors import Cancelled, DeadlineExceeded, DuplicateRequest, InvalidRequest, NotReady, WorkerLost
from pager.observe.logs import request_id, trace_context
from pager.observe.tracing import note, span, traceparent, tracestate
from pager.pools.pick import check_name, mean_scores, pick_pool
from pager.types import (
    Account,
    ExpertPool,
    GenerateRequest,
    ModelInfo,
    NamedPool,
    PagingCounts,
    PoolListing,
    PoolPolicy,
    PoolSource,
    RouteAnswer,
    TokenChunk,
    Usage,
    WorkerResidency,
)
from router_service.access_log import pool_label, tell
from router_service.admission import Admission, Caller, Quotas, refusing, remaining_s
from router_service.hints import Claims, HintStore, all_workers
from router_service.metrics import RouterMetrics
from router_service.pools import PoolStore, name_in_use
from router_service.prediction import LearnedStore, Prediction, Predictor, home_key
from router_service.requests import Ask, CalibrateAsk, Intake, PoolByName, RouteAsk, check_model, no_such_pool
from router_service.requests import request_id as check_request_id
from router_service.ui import PoolLog

Send = Callable[[TokenChunk], Awaitable[None]]
"""Passes a chunk on to the front's client. Raises SlowReader for a client that does not read."""


@dataclass(frozen=True, slots=True)
class Call:
    """The caller of a call, the size of its message, and its deadline. Made when the call arrives."""

    tenant: str
    num_bytes: int
    deadline_s: float | None = None  # on the monotonic clock
    arrived_s: float = field(default_factory=time.perf_counter)
    caller: Caller | None = None  # None if the caller has no bounds of its own

    def check_deadline(self) -> None:
        """Raises DeadlineExceeded once the deadline has passed."""
        if self.deadline_s is not None and self.deadline_s <= time.monotonic():
            with refusing():
                raise DeadlineExceeded("the deadline had passed when the request arrived; allow more time")


@dataclass(frozen=True, slots=True)
class Stores:
    """The stores that the routers of a service share: hints, claims of request ids, tenants' named pools, callers'
    quotas, and what the codebook has learned (None where this process alone learns it).
    """

    hints: HintStore
    claims: Claims
    pools: PoolStore
    quotas: Quotas = field(default_factory=Quotas)
    learned: LearnedStore | None = None

    async def close(self) -> None:
        await self.hints.close()
        await self.claims.close()
        await self.pools.close()
        await self.quotas.close()


class StreamMeter:
    """The times of one answer, and the counts of what its request uses at workers.

    A context manager around the answer, so that the pace of its tokens is recorded however it ends.
    """

    def __init__(self, metrics: RouterMetrics, call: Call, codeword: str = "") -> None:
        """Makes the meter. `codeword` names the pool of the answer; the worker knows that pool as a fixed one."""
        self._metrics = metrics
        self._codeword = codeword
        self._tenant = call.tenant
        self._arrived_s = call.arrived_s
        self._first_s = self._last_s = 0.0
        self._tokens_of: Counter[int] = Counter()  # by the number of the answer
        self.first_id: int | None = None  # the first token of the first answer
        self.num_tokens = 0
        self.paging = PagingCounts()  # each answer's usage has what was paged since the one before it ended
        self.has_started = False

    def seen(self, chunk: TokenChunk, predicted: ExpertPool | None) -> TokenChunk:
        """Returns the chunk to send: a last one without the recall of its prediction gets it."""
        self.has_started = True
        now_s = time.perf_counter()
        if chunk.token_ids and not self.num_tokens:
            self._first_s = now_s
            self._metrics.first_token(self._tenant, now_s - self._arrived_s)
            tell(first_token_ms=round(1000 * (now_s - self._arrived_s), 1))
        if chunk.token_ids:
            self._last_s = now_s
            self._tokens_of[chunk.index] += len(chunk.token_ids)
            if chunk.index == 0 and self.first_id is None:
                self.first_id = chunk.token_ids[0]
            self.num_tokens += len(chunk.token_ids)
            self._metrics.served.tokens += len(chunk.token_ids)
        tell(completion_tokens=self.num_tokens)
        usage = chunk.usage
        if usage is None:
            return chunk
        self.paging += usage.paging
        if usage.pool is not None and predicted is not None:
            if chunk.is_last:
                self._metrics.predicted(predicted, usage.pool)
            if usage.predicted_recall is None:
                usage = replace(usage, predicted_recall=predicted.recall_of(usage.pool))
        return replace(chunk, usage=replace(usage, codeword=self._codeword))

    def sent(self) -> None:
        self._metrics.sent.inc()

    def settled(self, account: Account) -> None:
        self._metrics.settled(self._tenant, account)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        longest = max(self._tokens_of.values(), default=0)
        if longest > 1:
            self._metrics.output_token(self._tenant, (self._last_s - self._first_s) / (longest - 1))


class Pipeline:
    """The methods of the service. Owns the counts of the requests that this router has at each worker.

    Each raises PagerErrors that name the field at fault. A tenant sees only its own ids, pools and hints.
    """

    def __init__(
        self,
        model: ModelInfo,
        default_pool: PoolPolicy,
        *,
        cluster: ClusterPort,
        predictor: Predictor,
        stores: Stores,
        admission: Admission,
        metrics: RouterMetrics,
        live_pools: PoolLog,
    ) -> None:
        self.model = model
        self.default_pool = default_pool
        self.cluster = cluster
        self.stores = stores
        self.admission = admission
        self.metrics = metrics
        self._predictor = predictor
        self._live_pools = live_pools
        self._intake = Intake(model, predictor, stores.pools)
        self._at_worker: Counter[str] = Counter()

    # --- generate ---------------------------------------------------------------------------------------------------

    async def generate(self, call: Call, ask: Ask, send: Send) -> None:
        """Sends the answer in chunks; the last one has the usage. Cancelling it cancels the request on its worker."""
        tell(pool=pool_label(ask.pool))
        call.check_deadline()
        with self.admission.enter(call.tenant, call.num_bytes, call.caller) as ticket:
            async with self._claimed(ask.id, call.tenant):
                request = await self._intake.request(ask, call.tenant, call.deadline_s)
                tell(prompt_tokens=len(request.prompt_token_ids))
                ticket.charge(len(request.prompt_token_ids) + request.sampling.n * request.sampling.max_tokens)
                await self._charge(call, len(request.prompt_token_ids))
                prediction = await self._predict(request)
                sent = replace(request, pool=prediction.policy)
                sent = replace(sent, traceparent=traceparent() or trace_context.get(), tracestate=tracestate())
                if call.caller is not None:
                    sent = replace(sent, priority=call.caller.priority, weight=call.caller.weight)
                    sent = replace(sent, guaranteed_share=call.caller.guaranteed_share)
                if prediction.policy.source is not PoolSource.FIXED:
                    sent = replace(sent, predicted=prediction.pool)
                name = ask.pool.name if isinstance(ask.pool, PoolByName) else ""
                meter = StreamMeter(self.metrics, call, prediction.covering)
                shown = (call.tenant, name, sent.pool, prediction.pool, prediction.covering)
                try:
                    adapter = self.metrics.adapters.following(name, lambda: meter.has_started)
                    with self._live_pools.following(*shown) as live, adapter, meter:
                        usage = await self._stream(sent, prediction, send, meter)
                        live.answered(replace(usage, paging=meter.paging))
                finally:
                    if call.caller is not None:
                        await self.stores.quotas.answer(call.caller, meter.num_tokens)
                await self._learn(request, prediction, usage, meter.first_id)

    async def _charge(self, call: Call, num_tokens: int) -> None:
        """Counts tokens of a prompt among those of its caller. Raises QuotaExceeded or PromptTooLong."""
        if call.caller is not None:
            await self.stores.quotas.prompt(call.caller, num_tokens)

    @asynccontextmanager
    async def _claimed(self, id_: str, tenant: str) -> AsyncIterator[None]:
        """Holds the id for this request within its tenant, at every router, until the block is left."""
        if not await self.stores.claims.claim(id_, tenant):
            raise DuplicateRequest(f"request id {id_!r} is in use; choose another", field="request_id")
        try:
            yield
        finally:
            await self.stores.claims.release(id_, tenant)

    async def _predict(self, request: GenerateRequest) -> Prediction:
        prediction = await self._predictor.predict(request.tenant, request.prompt_token_ids, request.pool)
        if prediction.source not in ("full", "fixed"):
            self.metrics.route_seconds.labels(prediction.source).observe(prediction.took_s)
            if request.pool.source is PoolSource.PREFILL:
                self.metrics.hint_lookups.labels("hit" if prediction.source == "hint" else "miss").inc()
        if prediction.kept:
            self.metrics.got_pool_of(prediction.kept)
            tell(codeword=prediction.kept)
        if prediction.codeword is not None:
            self.metrics.shared(prediction.codeword)
            tell(codeword=prediction.covering or "none", coverage=round(prediction.codeword.coverage, 3))
        return prediction

    async def _stream(self, request: GenerateRequest, prediction: Prediction, send: Send, meter: StreamMeter) -> Usage:
        """Streams the answer. Before its first chunk, a request whose worker is lost or drains is placed once more."""
        lost: set[str] = set()
        while True:
            with nullcontext() if lost else refusing():
                placement = self._place(prediction.pool, lost, prediction.home_key)
                if prediction.pool is not None:
                    self.metrics.placed(prediction.placed_by, placement.missing_bytes)
                is_known = request.pool.source is not PoolSource.PREFILL  # otherwise the pool is a guess
                check_deadline(placement.least_paging_s if is_known else 0.0, remaining_s(request.deadline_s))
            try:
                return await self._answer(request, placement, send, meter)
            except (WorkerLost, NotReady):  # the worker is gone, or about to go
                if meter.has_started or lost:
                    raise
                lost.add(placement.worker_id)
                self.metrics.replacements.inc()

    def _place(self, pool: ExpertPool | None, exclude: set[str], home_key: str) -> Placement:
        with span("place"):
            workers, in_flight = self.cluster.workers(), self._at_worker
            placement = place(pool, workers, in_flight=in_flight, exclude=exclude, home_key=home_key)
            note(worker=placement.worker_id, missing_bytes=placement.missing_bytes)
            tell(worker=placement.worker_id)
        return placement

    async def _answer(self, request: GenerateRequest, placement: Placement, send: Send, meter: StreamMeter) -> Usage:
        guess = request.predicted if request.pool.source is PoolSource.PREFILL else None
        self._at_worker[placement.worker_id] += 1  # before any wait, so that requests placed meanwhile see it
        try:
            await self._check_aborted(request)
            async with aclosing(self.cluster.generate(placement.worker_id, request, meter)) as chunks:
                async for chunk in chunks:
                    if not meter.has_started:
                        # Checked again: an Abort may have come to the workers before the request did.
                        await self._check_aborted(request)
                    chunk = meter.seen(chunk, guess)
                    await send(chunk)
                    if chunk.usage is not None and chunk.is_last:
                        return chunk.usage
        finally:
            self._at_worker[placement.worker_id] -= 1
        raise WorkerLost("the worker's stream ended before the answer did; send the request again")

    async def _check_aborted(self, request: GenerateRequest) -> None:
        if await self.stores.claims.is_aborted(request.id, request.tenant):
            raise Cancelled("the request was aborted")

    async def _learn(
        self, request: GenerateRequest, prediction: Prediction, usage: Usage, answer_id: int | None
    ) -> None:
        if usage.predicted_recall is not None:
            self.metrics.recall.labels(prediction.source).observe(usage.predicted_recall)
        ids = request.prompt_token_ids
        await self._predictor.learn(request.tenant, ids, request.pool, prediction, usage, answer_id)

    async def beat(self) -> None:
        """Tells the other routers of this one's workers, and learns from them and from traffic; about once a second."""
        ready = [worker for worker in self.cluster.workers() if worker.state == "ready"]
        await self.stores.hints.report(ready)
        await self._predictor.beat()

    async def abort(self, tenant: str, id_: str) -> bool:
        """Returns whether the tenant has a request of this id in flight, here or at another router, and ends it."""
        request_id.set(check_request_id(id_))
        # Marked first: a request on its way to a worker checks for the mark once it has arrived.
        is_marked = await self.stores.claims.mark_aborted(id_, tenant)
        is_found = await self.cluster.abort(id_, tenant)
        return is_marked or is_found

    # --- routing and named pools ------------------------------------------------------------------------------------

    async def route(self, call: Call, ask: RouteAsk) -> RouteAnswer:
        """Scores a prompt, and places it, without running it."""
        tenant = call.tenant
        tell(pool=pool_label(ask.pool))
        call.check_deadline()
        with self.admission.enter(tenant, call.num_bytes, call.caller) as ticket:
            prompt = await self._intake.prompt(tenant, ask.prompt)
            tell(prompt_tokens=len(prompt))
            ticket.charge(len(prompt))
            await self._charge(call, len(prompt))
            policy = await self._intake.policy(ask.pool, tenant)
            scored = await self._predictor.scored(tenant, prompt, policy)
            observed, home = None, home_key(policy.fixed, None if scored is None else scored.codeword)
            if policy.source is PoolSource.PREFILL:
                observed = await self._predictor.observed(tenant, prompt, policy)
            elif (turn := await self._predictor.last_turn(tenant, prompt, policy)) is not None:
                observed, home = turn.pool, turn.home_key
            pool = policy.fixed or (scored.pool if scored is not None else None)
            if pool is not None:
                await self._predictor.remember(tenant, pool)
            is_left_to_prefill = policy.fixed is None and (scored is None or not scored.is_enough)
            try:
                known = observed or (None if is_left_to_prefill else pool)
                placement = self._place(known, set(), home)
            except NotReady:
                placement = None
        answer = RouteAnswer("prefill", len(prompt), pool=pool, observed=observed)
        if scored is not None:
            answer = replace(
                answer,
                source=scored.scores.source,
                num_tokens=scored.scores.num_tokens,
                scores=tuple(mean_R.tolist() for mean_R in scored.scores.mean_LR),
                expected_recall=scored.expected_recall,
            )
            if scored.codeword is not None:
                name = scored.codeword.name if scored.codeword.is_covered else ""
                answer = replace(answer, codeword=name, coverage=scored.codeword.coverage)
        if placement is None:
            return answer
        return replace(answer, worker=placement.worker_id, missing_bytes=placement.missing_bytes)

    async def calibrate(self, call: Call, ask: CalibrateAsk) -> NamedPool:
        """Makes a named pool of the tenant's from examples, and keeps it."""
        tenant = call.tenant
        method = self._method(ask.method)
        tell(pool=f"named:{ask.name}")
        call.check_deadline()
        with self.admission.enter(tenant, call.num_bytes, call.caller) as ticket:
            if not ask.replaces and await self.stores.pools.find(tenant, ask.name) is not None:
                raise name_in_use(ask.name)  # before the work; `add` decides finally
            examples = []
            for index, example in enumerate(ask.examples):
                examples.append(await self._intake.example(tenant, example, index))
                ticket.charge(len(examples[-1]))  # one by one: too many are refused before all are read
                await self._charge(call, len(examples[-1]))
            tell(prompt_tokens=ticket.tokens)
            # One by one: the prompts of others take their turns in between.
            scored = [await self._predictor.scores(tenant, method, example) for example in examples]
            scores = await asyncio.to_thread(mean_scores, scored)
            pool = pick_pool(scores, ask.size, self.model.facts)
            named = NamedPool(ask.name, pool, method, len(examples), scores.num_tokens, self.model.fingerprint)
            await (self.stores.pools.replace if ask.replaces else self.stores.pools.add)(tenant, named)
        return named

    async def list_pools(self, tenant: str) -> PoolListing:
        """Returns the tenant's named pools."""
        return await self.stores.pools.all_of(tenant)

    async def delete_pool(self, tenant: str, name: str) -> bool:
        """Deletes a pool; returns False when the tenant had no pool of this name."""
        return await self.stores.pools.delete(tenant, check_name(name))

    def _method(self, asked: str | None) -> str:
        known = self._predictor.methods
        if not known:
            raise InvalidRequest(
                "this service runs no routing-only pass (router.router is 'prefill'), so it cannot score examples; "
                "make the pool with `expert-pager calibrate --model` instead",
                field="method",
            )
        if asked is None:
            return known[-1]
        if asked not in known:
            raise InvalidRequest(
                f"method {asked[:60]!r} is not available here; these are: {', '.join(known)}", field="method"
            )
        return asked

    async def get_pool(self, tenant: str, name: str) -> NamedPool:
        """Returns the tenant's pool of this name. Raises UnknownPool."""
        found = await self.stores.pools.find(tenant, check_name(name))
        if found is None:
            raise no_such_pool(name)
        return found

    async def tokenize(self, call: Call, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Returns the tokens of a text that is short enough to be a prompt. Raises InvalidRequest or PromptTooLong."""
        if not text:
            raise InvalidRequest("the text is empty; give at least one token", field="prompt")
        with self.admission.enter(call.tenant, call.num_bytes, call.caller):
            return await self._intake.encoded(call.tenant, text, add_special_tokens=add_special_tokens)

    # --- the model and its workers ----------------------------------------------------------------------------------

    def get_model(self, name: str) -> ModelInfo:
        """Returns the served model; an empty name stands for it. Raises UnknownModel for another."""
        check_model(name, self.model)
        ready = [worker for worker in self.cluster.workers() if worker.state == "ready"]
        num_slots = max((worker.num_slots for worker in ready), default=0)
        return replace(self.model, num_slots=num_slots, codewords=self._predictor.codewords)

    async def drain_worker(self, name: str) -> None:
        """Drains a worker: it refuses new requests, finishes those it has, and is started again.

        Raises UnknownWorker or NotReady.
        """
        await self.cluster.retire(name)

    async def residency(self) -> list[WorkerResidency]:
        """Returns what this router's workers hold, as last reported, and what other routers report of theirs."""
        return await all_workers(self.cluster.workers(), self.stores.hints)
