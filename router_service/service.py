"""The public methods. Generate reads as the request's life: decode, admit, score, pick, place, stream."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import grpc
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc
from google.protobuf.message import Message

from pager.errors import Cancelled, DuplicateRequest, InvalidRequest, NotReady, SlowReader, WorkerLost
from pager.observe.logs import request_id, trace_context
from pager.observe.tracing import note, span, traceparent, tracestate
from pager.pools.named import NamedPool, check_name, mean_scores
from pager.pools.pick import pick_pool
from pager.types import Account, ExpertPool, GenerateRequest, PoolPolicy, PoolSize, PoolSource, TokenChunk, Usage
from pager.wire import encode_pool, encode_response
from router_service import encode, requests
from router_service.access_log import pool_label, tell
from router_service.admission import Admission, Context, Gate, deadline_of, refusing, remaining_s
from router_service.dispatch import Placement, check_deadline, place
from router_service.hints import HintStore
from router_service.message_bounds import MessageBounds
from router_service.metrics import RouterMetrics
from router_service.pools import PoolStore, name_in_use
from router_service.ports import ClusterPort, ModelInfo
from router_service.prediction import PassChain, Passes, Prediction, Predictor, Scored, Scoring
from router_service.requests import Intake, PoolByName, pool_policy
from router_service.ui import PoolLog, Watch


class StreamMeter:
    """Owns the times of one answer, and counts what its request uses at workers. Made when the call arrives.

    A context manager around the answer: its pace counts however it ends.
    """

    def __init__(self, metrics: RouterMetrics, tenant: str) -> None:
        self._metrics = metrics
        self._tenant = tenant
        self._arrived_s = time.perf_counter()
        self._first_s = self._last_s = 0.0
        self._num_tokens = 0
        self.has_started = False

    def seen(self, chunk: TokenChunk, predicted: ExpertPool | None) -> TokenChunk:
        """The chunk to send: a last one without the recall of its prediction gets it."""
        self.has_started = True
        now_s = time.perf_counter()
        if chunk.token_ids and not self._num_tokens:
            self._first_s = now_s
            self._metrics.first_token(self._tenant, now_s - self._arrived_s)
            tell(first_token_ms=round(1000 * (now_s - self._arrived_s), 1))
        if chunk.token_ids:
            self._last_s = now_s
        self._num_tokens += len(chunk.token_ids)
        tell(completion_tokens=self._num_tokens)
        usage = chunk.usage
        if usage is None:
            return chunk
        if usage.pool is not None and predicted is not None:
            self._metrics.predicted(predicted, usage.pool)
            if usage.predicted_recall is None:
                usage = replace(usage, predicted_recall=predicted.recall_of(usage.pool))
        return replace(chunk, usage=usage)

    def sent(self) -> None:
        self._metrics.sent.inc()

    def settled(self, account: Account) -> None:
        self._metrics.settled(self._tenant, account)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_tokens > 1:
            self._metrics.output_token(self._tenant, (self._last_s - self._first_s) / (self._num_tokens - 1))


async def send(context: grpc.aio.ServicerContext[Any, Any], message: Message, timeout_s: float) -> None:
    """Raises SlowReader when the client takes nothing for `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError:
        raise SlowReader(f"the client read nothing for {timeout_s:g} s; read faster") from None


class NamedPools:
    """A tenant sees its own pools only."""

    def __init__(
        self, model: ModelInfo, passes: Passes, scoring: Scoring, intake: Intake, store: PoolStore, gate: Gate
    ) -> None:
        self._model = model
        self._passes = passes
        self._scoring = scoring
        self._intake = intake
        self._store = store
        self._gate = gate

    async def calibrate(self, wire: pb.CalibrateRequest, context: Context, default: PoolSize) -> pb.CalibrateResponse:
        tenant = requests.tenant(context.invocation_metadata())
        ask = requests.calibrate_ask(wire, self._model, default)
        method = self._method(ask.method)
        tell(pool=f"named:{ask.name}")
        deadline_of(context)
        with self._gate.admit(tenant, wire.ByteSize()) as ticket:
            if not ask.replaces:
                await self._check_free(tenant, ask.name)  # before the work; `add` has the last word
            examples = []
            for index, example in enumerate(ask.examples):
                examples.append(await self._intake.example(tenant, example, index))
                self._gate.charge(ticket, len(examples[-1]))  # one by one: too many are refused before all are read
            tell(prompt_tokens=ticket.tokens)
            # One by one: the prompts of others take their turns in between.
            scored = [await self._scoring.scores(tenant, method, example) for example in examples]
            scores = await asyncio.to_thread(mean_scores, scored)
            pool = pick_pool(scores, ask.size, self._model.facts)
            named = NamedPool(ask.name, pool, method, len(examples), scores.num_tokens, self._model.fingerprint)
            await (self._store.replace if ask.replaces else self._store.add)(tenant, named)
        return pb.CalibrateResponse(pool=encode.named_pool(named))

    async def list_pools(self, context: Context) -> pb.ListPoolsResponse:
        listing = await self._store.all_of(requests.tenant(context.invocation_metadata()))
        response = pb.ListPoolsResponse(damaged=listing.damaged)
        for named in listing.pools:
            response.pools.append(encode.named_pool(named))
            await asyncio.sleep(0)  # hundreds of large pools take a while; others have their turns in between
        return response

    async def delete_pool(self, wire: pb.DeletePoolRequest, context: Context) -> pb.DeletePoolResponse:
        tenant = requests.tenant(context.invocation_metadata())
        return pb.DeletePoolResponse(deleted=await self._store.delete(tenant, check_name(wire.name)))

    def _method(self, asked: str | None) -> str:
        known = self._passes.available
        if not known:
            raise InvalidRequest(
                "this service runs no routing-only pass (router.router is 'prefill'), so it cannot score examples; "
                "make the pool with `expert-pager calibrate --model`, which can",
                field="method",
            )
        if asked is None:
            return list(known)[-1]
        if asked not in known:
            raise InvalidRequest(
                f"method {asked[:60]!r} cannot be had here; known are {', '.join(known)}", field="method"
            )
        return asked

    async def _check_free(self, tenant: str, name: str) -> None:
        if await self._store.find(tenant, name) is not None:
            raise name_in_use(name)


SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ExpertPager"].full_name


@dataclass(frozen=True, slots=True)
class Backend:
    """What the methods work with."""

    model: ModelInfo
    cluster: ClusterPort
    passes: Passes
    scoring: Scoring
    chain: PassChain
    predictor: Predictor
    hints: HintStore
    pools: PoolStore
    admission: Admission
    bounds: MessageBounds
    metrics: RouterMetrics
    default_pool: PoolPolicy
    live_pools: PoolLog
    watch: Watch
    write_timeout_s: float = 30.0


class ExpertPagerService(pb_grpc.ExpertPagerServicer):
    """Owns how many requests this router has at each worker."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._gate = Gate(backend.admission)
        self._intake = Intake(backend.model, backend.scoring, backend.predictor, backend.hints, backend.pools)
        self._pools = NamedPools(
            backend.model, backend.passes, backend.scoring, self._intake, backend.pools, self._gate
        )
        self._at_worker: Counter[str] = Counter()

    # --- Generate ---------------------------------------------------------------------------------------------------

    # It writes to the context, so that a client that reads nothing can be given up.
    async def Generate(self, wire: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override] # noqa: N802
        tenant = requests.tenant(context.invocation_metadata())
        meter = StreamMeter(self._backend.metrics, tenant)
        id_ = requests.id_of(wire)  # before anything that can be refused, so that a refusal is found by it
        request_id.set(id_)
        note(request_id=id_)
        ask = requests.ask(id_, wire, self._backend.model, self._backend.default_pool)
        tell(pool=pool_label(ask.pool))
        deadline_s = deadline_of(context)
        with self._gate.admit(tenant, wire.ByteSize()) as ticket:
            async with self._claimed(ask.id, tenant):
                request = await self._intake.request(ask, tenant, deadline_s)
                tell(prompt_tokens=len(request.prompt_token_ids))
                self._gate.charge(ticket, len(request.prompt_token_ids) + request.sampling.max_tokens)
                prediction = await self._predict(request)
                sent = replace(request, pool=prediction.policy)
                sent = replace(sent, traceparent=traceparent() or trace_context.get(), tracestate=tracestate())
                if prediction.policy.source is not PoolSource.FIXED:
                    sent = replace(sent, predicted=prediction.pool)
                name = ask.pool.name if isinstance(ask.pool, PoolByName) else ""
                with self._backend.live_pools.following(tenant, name, sent.pool, prediction.pool) as live, meter:
                    usage = await self._stream(sent, prediction, context, meter)
                    live.answered(usage)
                await self._learn(request, prediction, usage)

    @asynccontextmanager
    async def _claimed(self, id_: str, tenant: str) -> AsyncIterator[None]:
        """The id is this request's alone among its tenant's, at every router, until the block is left."""
        if not await self._backend.hints.claim(id_, tenant):
            raise DuplicateRequest(f"request id {id_!r} is in use; choose another", field="request_id")
        try:
            yield
        finally:
            await self._backend.hints.release(id_, tenant)

    async def _predict(self, request: GenerateRequest) -> Prediction:
        metrics = self._backend.metrics
        prediction = await self._backend.predictor.predict(request.tenant, request.prompt_token_ids, request.pool)
        if prediction.source not in ("full", "fixed"):
            metrics.route_seconds.labels(prediction.source).observe(prediction.took_s)
            if request.pool.source is PoolSource.PREFILL:
                metrics.hint_lookups.labels("hit" if prediction.source == "hint" else "miss").inc()
        return prediction

    async def _stream(
        self, request: GenerateRequest, prediction: Prediction, context: Context, meter: StreamMeter
    ) -> Usage:
        """Until the first chunk is out, the request of a worker that is lost or drains is placed once more."""
        lost: set[str] = set()
        while True:
            with nullcontext() if lost else refusing():
                placement = self._place(prediction.pool, lost)
                is_known = request.pool.source is not PoolSource.PREFILL  # else the pool is a guess
                check_deadline(placement.least_paging_s if is_known else 0.0, remaining_s(request.deadline_s))
            try:
                return await self._answer(request, placement, context, meter)
            except (WorkerLost, NotReady):  # gone, or about to go
                if meter.has_started or lost:
                    raise
                lost.add(placement.worker_id)
                self._backend.metrics.replacements.inc()

    def _place(self, pool: ExpertPool | None, exclude: set[str]) -> Placement:
        with span("place"):
            placement = place(
                pool,
                self._backend.cluster.workers(),
                in_flight=self._at_worker,
                exclude=exclude,
            )
            note(worker=placement.worker_id, missing_bytes=placement.missing_bytes)
            tell(worker=placement.worker_id)
        return placement

    async def _answer(
        self, request: GenerateRequest, placement: Placement, context: Context, meter: StreamMeter
    ) -> Usage:
        guess = request.predicted if request.pool.source is PoolSource.PREFILL else None
        self._at_worker[placement.worker_id] += 1  # before anything is waited for: who is placed meanwhile sees it
        try:
            await self._check_aborted(request)
            async with aclosing(self._backend.cluster.generate(placement.worker_id, request, meter)) as chunks:
                async for chunk in chunks:
                    if not meter.has_started:
                        # Again: an Abort may have looked for the request at the workers before it got there.
                        await self._check_aborted(request)
                    chunk = meter.seen(chunk, guess)
                    await send(context, encode_response(chunk), self._backend.write_timeout_s)
                    if chunk.usage is not None:
                        return chunk.usage
        finally:
            self._at_worker[placement.worker_id] -= 1
        raise WorkerLost("the worker's stream ended before the answer did; send the request again")

    async def _check_aborted(self, request: GenerateRequest) -> None:
        if await self._backend.hints.is_aborted(request.id, request.tenant):
            raise Cancelled("the request was aborted")

    async def _learn(self, request: GenerateRequest, prediction: Prediction, usage: Usage) -> None:
        if usage.predicted_recall is not None:
            self._backend.metrics.recall.labels(prediction.source).observe(usage.predicted_recall)
        ids = request.prompt_token_ids
        await self._backend.predictor.learn(request.tenant, ids, request.pool, prediction.policy, usage)

    # --- the others -------------------------------------------------------------------------------------------------

    async def Route(self, wire: pb.RouteRequest, context: Context) -> pb.RouteResponse:  # noqa: N802
        backend = self._backend
        tenant = requests.tenant(context.invocation_metadata())
        requests.check_model(wire.model, backend.model)
        asked = requests.prompt(wire, backend.model)
        asked_pool = pool_policy(wire.pool, backend.model, backend.default_pool)
        tell(pool=pool_label(asked_pool))
        deadline_of(context)
        with self._gate.admit(tenant, wire.ByteSize()) as ticket:
            prompt = await self._intake.prompt(tenant, asked)
            tell(prompt_tokens=len(prompt))
            self._gate.charge(ticket, len(prompt))
            policy = await self._intake.policy(asked_pool, tenant)
            backend.chain.check(policy)
            scored = None if backend.chain.is_empty else await backend.chain.score(tenant, prompt, policy.size)
            observed = None
            if policy.source is PoolSource.PREFILL:
                observed = await backend.predictor.observed(tenant, prompt, policy)
            return await self._routed(tenant, policy, len(prompt), scored, observed)

    async def _routed(
        self, tenant: str, policy: PoolPolicy, num_tokens: int, scored: Scored | None, observed: ExpertPool | None
    ) -> pb.RouteResponse:
        answer = pb.RouteResponse(scores=pb.Scores(source="prefill", num_tokens=num_tokens))
        pool = policy.fixed
        if scored is not None:
            answer.scores.CopyFrom(encode.scores(scored.scores))
            pool = pool or scored.pool
            if scored.expected_recall is not None:
                answer.expected_recall = scored.expected_recall
        if pool is not None:
            answer.pool.CopyFrom(encode_pool(pool))
            key = self._backend.predictor.by_digest(tenant, pool.digest)
            await self._backend.hints.remember_pool([key], pool)
        if observed is not None:
            answer.observed.CopyFrom(encode_pool(observed))
        is_left_to_prefill = policy.fixed is None and (scored is None or not scored.is_enough)
        try:
            placement = self._place(observed or (None if is_left_to_prefill else pool), set())
        except NotReady:
            return answer
        answer.placement.CopyFrom(pb.Placement(worker=placement.worker_id, missing_bytes=placement.missing_bytes))
        return answer

    async def Calibrate(self, wire: pb.CalibrateRequest, context: Context) -> pb.CalibrateResponse:  # noqa: N802
        return await self._pools.calibrate(wire, context, self._backend.default_pool.size)

    async def ListPools(self, wire: pb.ListPoolsRequest, context: Context) -> pb.ListPoolsResponse:  # noqa: N802
        return await self._pools.list_pools(context)

    async def DeletePool(self, wire: pb.DeletePoolRequest, context: Context) -> pb.DeletePoolResponse:  # noqa: N802
        return await self._pools.delete_pool(wire, context)

    async def Abort(self, wire: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        tenant = requests.tenant(context.invocation_metadata())
        id_ = requests.request_id(wire.request_id)
        request_id.set(id_)
        # Marked first: a request on its way to a worker looks for the mark once it has arrived.
        is_marked = await self._backend.hints.mark_aborted(id_, tenant)
        is_found = await self._backend.cluster.abort(id_, tenant)
        return pb.AbortResponse(aborted=is_marked or is_found)

    async def GetModel(self, wire: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        requests.check_model(wire.model, self._backend.model)
        return encode.model(self._backend.model, self._backend.cluster.workers())

    async def GetResidency(  # noqa: N802
        self, wire: pb.GetResidencyRequest, context: Context
    ) -> pb.GetResidencyResponse:
        model, mine = self._backend.model, self._backend.cluster.workers()
        known = {worker.id for worker in mine}
        workers = [encode.local_worker(worker, model) for worker in mine]
        for worker_id, holds in sorted((await self._backend.hints.residency()).items()):
            if worker_id not in known:
                workers.append(encode.remote_worker(worker_id, holds, model))
        return pb.GetResidencyResponse(workers=workers)
