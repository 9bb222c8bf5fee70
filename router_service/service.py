"""The public methods. Generate reads as the request's life: decode, admit, score, pick, place, stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace

from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc

from pager.errors import Cancelled, DuplicateRequest, NotReady, WorkerLost
from pager.logs import request_id, trace_context
from pager.tracing import note, span, traceparent, tracestate
from pager.types import ExpertPool, GenerateRequest, PoolPolicy, PoolSource, Usage
from pager.wire import encode_pool, encode_response
from router_service import decode, encode
from router_service.access_log import pool_label, tell
from router_service.admission import Admission
from router_service.calibration import NamedPools
from router_service.decode_pools import PoolByName, pool_policy
from router_service.dispatch import Placement, check_deadline, place
from router_service.gate import Context, Gate, deadline_of, refusing, remaining_s
from router_service.hints import HintStore
from router_service.intake import Intake
from router_service.message_bounds import MessageBounds
from router_service.metrics import RouterMetrics
from router_service.pool_store import PoolStore
from router_service.ports import ClusterPort, ModelInfo
from router_service.prediction import Prediction, Predictor
from router_service.scoring import PassChain, Passes, Scored, Scoring
from router_service.streams import StreamMeter, send
from router_service.ui_pools import PoolLog
from router_service.ui_watch import Watch

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
        tenant = decode.tenant(context.invocation_metadata())
        meter = StreamMeter(self._backend.metrics, tenant)
        id_ = decode.id_of(wire)  # before anything that can be refused, so that a refusal is found by it
        request_id.set(id_)
        note(request_id=id_)
        ask = decode.ask(id_, wire, self._backend.model, self._backend.default_pool)
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
        if prediction.source not in ("none", "fixed"):
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
        tenant = decode.tenant(context.invocation_metadata())
        decode.check_model(wire.model, backend.model)
        asked = decode.prompt(wire, backend.model)
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
        answer = pb.RouteResponse(scores=pb.Scores(source="fused", num_tokens=num_tokens))
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
        tenant = decode.tenant(context.invocation_metadata())
        id_ = decode.request_id(wire.request_id)
        request_id.set(id_)
        # Marked first: a request on its way to a worker looks for the mark once it has arrived.
        is_marked = await self._backend.hints.mark_aborted(id_, tenant)
        is_found = await self._backend.cluster.abort(id_, tenant)
        return pb.AbortResponse(aborted=is_marked or is_found)

    async def GetModel(self, wire: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        decode.check_model(wire.model, self._backend.model)
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
