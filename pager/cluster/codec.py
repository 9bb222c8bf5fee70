"""Between the project's values and `worker.proto`, both ways. The only module that knows both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

from expert_pager.v1 import worker_pb2 as pb

from pager.errors import PagerError
from pager.types import (
    AnswerMode,
    Bytes,
    Count,
    Counts,
    DriftAction,
    DriftPolicy,
    DriftReport,
    ExpertKey,
    ExpertPool,
    FinishReason,
    Full,
    GenerateRequest,
    Mass,
    PagingTotals,
    PoolPolicy,
    PoolSize,
    PoolSource,
    SamplingParams,
    Share,
    TokenChunk,
    Usage,
)

# --- requests -------------------------------------------------------------------------------------------------------


def encode_request(request: GenerateRequest, ticket: int) -> pb.Submit:
    sampling = request.sampling
    return pb.Submit(
        ticket=ticket,
        request_id=request.id,
        tenant=request.tenant,
        prompt_token_ids=request.prompt_token_ids,
        sampling=pb.Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            stop=sampling.stop,
            ignore_eos=sampling.ignore_eos,
        ),
        pool=_encode_policy(request.pool),
        deadline_unix_s=request.deadline_unix_s,
        predicted=encode_pool(request.predicted),
        traceparent=request.traceparent,
        tracestate=request.tracestate,
    )


def decode_request(message: pb.Submit) -> GenerateRequest:
    sampling = message.sampling
    return GenerateRequest(
        id=message.request_id,
        tenant=message.tenant,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed if sampling.HasField("seed") else None,
            stop=tuple(sampling.stop),
            ignore_eos=sampling.ignore_eos,
        ),
        pool=_decode_policy(message.pool),
        deadline_unix_s=message.deadline_unix_s if message.HasField("deadline_unix_s") else None,
        predicted=decode_pool(message.predicted) if message.HasField("predicted") else None,
        traceparent=message.traceparent or None,
        tracestate=message.tracestate or None,
    )


def _encode_policy(policy: PoolPolicy) -> pb.PoolPolicy:
    message = pb.PoolPolicy(source=policy.source.value, fixed=encode_pool(policy.fixed))
    match policy.size:
        case Count(routed):
            message.routed = routed
        case Share(share):
            message.share = share
        case Mass(mass, cap):
            message.mass.CopyFrom(pb.Mass(mass=mass, cap=cap))
        case Counts(per_layer):
            message.counts.CopyFrom(pb.LayerCounts(routed=per_layer))
        case Bytes():
            raise AssertionError("the router shares bytes out over the layers before a worker sees them")
        case Full():
            pass
    if policy.drift is not None:
        drift = policy.drift
        message.drift.CopyFrom(
            pb.DriftPolicy(threshold=drift.threshold, action=drift.action.value, window=drift.window)
        )
    return message


def _decode_policy(message: pb.PoolPolicy) -> PoolPolicy:
    return PoolPolicy(
        size=_decode_size(message),
        source=PoolSource(message.source),
        fixed=decode_pool(message.fixed) if message.HasField("fixed") else None,
        drift=_decode_drift(message.drift) if message.HasField("drift") else None,
    )


def _decode_drift(message: pb.DriftPolicy) -> DriftPolicy:
    return DriftPolicy(message.threshold, DriftAction(message.action), message.window)


def _decode_size(message: pb.PoolPolicy) -> PoolSize:
    match message.WhichOneof("size"):
        case "routed":
            return Count(message.routed)
        case "share":
            return Share(message.share)
        case "mass":
            return Mass(message.mass.mass, message.mass.cap if message.mass.HasField("cap") else None)
        case "counts":
            return Counts(tuple(message.counts.routed))
    return Full()


def encode_pool(pool: ExpertPool | None) -> pb.ExpertPool | None:
    if pool is None:
        return None
    return pb.ExpertPool(
        layers=[pb.LayerExperts(experts=layer) for layer in pool.experts], covered_mass=pool.covered_mass
    )


def decode_pool(message: pb.ExpertPool) -> ExpertPool:
    return ExpertPool(
        experts=tuple(tuple(layer.experts) for layer in message.layers),
        covered_mass=message.covered_mass if message.HasField("covered_mass") else None,
    )


# --- answers --------------------------------------------------------------------------------------------------------


def encode_chunk(chunk: TokenChunk, ticket: int) -> pb.Chunk:
    return pb.Chunk(
        ticket=ticket,
        token_ids=chunk.token_ids,
        text=chunk.text,
        usage=None if chunk.usage is None else _encode_usage(chunk.usage),
    )


def decode_chunk(message: pb.Chunk, request_id: str) -> TokenChunk:
    usage = _decode_usage(message.usage) if message.HasField("usage") else None
    return TokenChunk(request_id, tuple(message.token_ids), message.text, usage)


def _encode_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        mode=usage.mode,
        finish_reason=usage.finish_reason.value,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        pool=encode_pool(usage.pool),
        bytes_from_disk=usage.bytes_from_disk,
        bytes_from_host=usage.bytes_from_host,
        experts_hit=usage.experts_hit,
        experts_missed=usage.experts_missed,
        stall_s=usage.stall_s,
        out_of_pool_mass=usage.out_of_pool_mass,
        predicted_recall=usage.predicted_recall,
        queue_s=usage.queue_s,
        time_to_first_token_s=usage.time_to_first_token_s,
        model_fingerprint=usage.model_fingerprint,
        drift=None if usage.drift is None else _encode_report(usage.drift),
    )


def _decode_usage(message: pb.Usage) -> Usage:
    return Usage(
        mode=cast(AnswerMode, message.mode),
        finish_reason=FinishReason(message.finish_reason),
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        pool=decode_pool(message.pool) if message.HasField("pool") else None,
        bytes_from_disk=message.bytes_from_disk,
        bytes_from_host=message.bytes_from_host,
        experts_hit=message.experts_hit,
        experts_missed=message.experts_missed,
        stall_s=message.stall_s,
        out_of_pool_mass=message.out_of_pool_mass,
        predicted_recall=message.predicted_recall if message.HasField("predicted_recall") else None,
        queue_s=message.queue_s,
        time_to_first_token_s=message.time_to_first_token_s,
        model_fingerprint=message.model_fingerprint,
        drift=_decode_report(message.drift) if message.HasField("drift") else None,
    )


def _encode_report(report: DriftReport) -> pb.DriftReport:
    return pb.DriftReport(
        peak_mass=report.peak_mass,
        widenings=report.widenings,
        experts_added=report.experts_added,
        exact_from=report.exact_from,
    )


def _decode_report(message: pb.DriftReport) -> DriftReport:
    exact_from = message.exact_from if message.HasField("exact_from") else None
    return DriftReport(message.peak_mass, message.widenings, message.experts_added, exact_from)


# --- errors ---------------------------------------------------------------------------------------------------------

_FACTS = ("needed", "slots")  # what PoolTooLarge says beside its message


def encode_error(error: PagerError) -> pb.Error:
    facts = {name: getattr(error, name) for name in _FACTS if hasattr(error, name)}
    key = getattr(error, "key", None)
    if isinstance(key, ExpertKey):
        facts |= {"layer": key.layer, "expert": key.expert}
    return pb.Error(
        reason=error.reason,
        message=error.message,
        field=error.field,
        retry_after_s=error.retry_after_s,
        facts=facts,
    )


def decode_error(message: pb.Error) -> PagerError:
    """The same class with the same facts. An unknown reason becomes a plain PagerError (internal)."""
    kind = _kinds().get(message.reason, PagerError)
    error = kind.__new__(kind)
    PagerError.__init__(
        error,
        message.message,
        field=message.field if message.HasField("field") else None,
        retry_after_s=message.retry_after_s if message.HasField("retry_after_s") else None,
    )
    facts = dict(message.facts)
    if "expert" in facts:
        error.__dict__["key"] = ExpertKey(facts.pop("layer"), facts.pop("expert"))
    error.__dict__.update(facts)
    return error


def _kinds() -> dict[str, type[PagerError]]:
    return {kind.reason: kind for kind in _subclasses(PagerError)}


def _subclasses(kind: type[PagerError]) -> Iterator[type[PagerError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


# --- residency ------------------------------------------------------------------------------------------------------


def encode_bitmap(experts: Sequence[int]) -> bytes:
    """Little-endian bitmap with bit e set for each expert id."""
    return bytes_of_bitmap(sum(1 << expert for expert in set(experts)))


def bytes_of_bitmap(bitmap: int) -> bytes:
    return bitmap.to_bytes(math.ceil(bitmap.bit_length() / 8), "little")


def paging_of(load: pb.Load) -> PagingTotals:
    return PagingTotals(load.experts_hit, load.experts_missed, load.bytes_from_disk, load.bytes_from_host)


def decode_bitmap(data: bytes) -> int:
    return int.from_bytes(data, "little")
