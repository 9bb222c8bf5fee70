"""From the project's values to protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from expert_pager.v1 import expert_pager_pb2 as pb

from pager.pools.named import NamedPool
from pager.types import RoutingScores
from pager.wire import encode_pool
from router_service.hints import WorkerHolds
from router_service.ports import ModelInfo, WorkerPort

if TYPE_CHECKING:
    from router_service.service import Routed


def named_pool(value: NamedPool) -> pb.NamedPool:
    return pb.NamedPool(
        name=value.name,
        pool=encode_pool(value.pool),
        method=value.method,
        num_examples=value.num_examples,
        num_tokens=value.num_tokens,
        model_fingerprint=value.fingerprint,
    )


def scores(value: RoutingScores) -> pb.Scores:
    layers = [pb.LayerScores(mean=mean_R.tolist()) for mean_R in value.mean_LR]
    return pb.Scores(source=value.source, num_tokens=value.num_tokens, layers=layers)


def routed(value: Routed) -> pb.RouteResponse:
    answer = pb.RouteResponse(scores=pb.Scores(source="prefill", num_tokens=value.num_tokens))
    if value.scores is not None:
        answer.scores.CopyFrom(scores(value.scores))
    if value.expected_recall is not None:
        answer.expected_recall = value.expected_recall
    if value.pool is not None:
        answer.pool.CopyFrom(encode_pool(value.pool))
    if value.observed is not None:
        answer.observed.CopyFrom(encode_pool(value.observed))
    if (at := value.placement) is not None:
        answer.placement.CopyFrom(pb.Placement(worker=at.worker_id, missing_bytes=at.missing_bytes))
    return answer


def model(value: ModelInfo, workers: Sequence[WorkerPort]) -> pb.GetModelResponse:
    facts = value.facts
    per_layer = zip(facts.routed_per_layer, facts.shared_per_layer, facts.top_k_per_layer, strict=True)
    return pb.GetModelResponse(
        name=value.name,
        fingerprint=value.fingerprint,
        context_length=value.context_length,
        kv_token_limit=value.kv_token_limit,
        vocab_size=value.vocab_size,
        tokenizer=pb.Tokenizer(class_name=value.tokenizer_class, sha256=value.tokenizer_sha256),
        pool_sizes=pb.PoolSizes(
            min_routed=max(facts.top_k_per_layer, default=0),
            max_routed=max(facts.routed_per_layer, default=0),
            slots=max((worker.num_slots for worker in workers if worker.state == "ready"), default=0),
            layers=[pb.LayerFacts(routed=routed, shared=shared, top_k=top_k) for routed, shared, top_k in per_layer],
        ),
        plan=value.plan,
    )


def local_worker(worker: WorkerPort, model: ModelInfo) -> pb.WorkerResidency:
    return _worker(worker.id, worker.state, holds(worker), model, remote=False)


def remote_worker(worker_id: str, value: WorkerHolds, model: ModelInfo) -> pb.WorkerResidency:
    return _worker(worker_id, "ready", value, model, remote=True)


def holds(worker: WorkerPort) -> WorkerHolds:
    return WorkerHolds(worker.waiting, worker.running, worker.num_slots, worker.expert_bytes, tuple(worker.resident))


def _worker(worker_id: str, state: str, value: WorkerHolds, model: ModelInfo, *, remote: bool) -> pb.WorkerResidency:
    held = value.resident or (0,) * model.facts.num_layers  # a worker that has not loaded says nothing of its layers
    masks = zip(held, model.facts.routed_per_layer, strict=True)
    return pb.WorkerResidency(
        worker=worker_id,
        state=state,
        waiting=value.waiting,
        running=value.running,
        slots=value.num_slots,
        expert_bytes=value.expert_bytes,
        resident_experts=sum(mask.bit_count() for mask in value.resident),
        resident=[mask.to_bytes((routed + 7) // 8, "little") for mask, routed in masks],
        remote=remote,
    )
