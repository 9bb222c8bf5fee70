"""A client of the service, over gRPC. The one place of the command line that imports grpc."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import grpc
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc

from pager.cli.pool_options import PoolAsk
from pager.cli.prompt import Prompt
from pager.cli.tls import ClientTls
from pager.errors import PagerError
from pager.routing.named import NamedPool
from pager.types import (
    AnswerMode,
    Bytes,
    Count,
    Counts,
    DriftAction,
    DriftReport,
    ExpertPool,
    FinishReason,
    Full,
    Mass,
    PoolSource,
    SamplingParams,
    Share,
    TokenChunk,
    Usage,
)

_SOURCES = {
    PoolSource.PREFILL: pb.POOL_SOURCE_PREFILL,
    PoolSource.PREDICTION: pb.POOL_SOURCE_PREDICTION,
}
_MODES: dict[int, AnswerMode] = {
    pb.ANSWER_MODE_EXACT: "exact",
    pb.ANSWER_MODE_POOL: "pool",
    pb.ANSWER_MODE_DEGRADED: "degraded",
}
_FINISHES = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    pb.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
}


_ACTIONS = {DriftAction.WIDEN: pb.DRIFT_ACTION_WIDEN, DriftAction.EXACT: pb.DRIFT_ACTION_EXACT}


class Service:
    """A connection to one router service. Every method raises PagerError with the service's own words."""

    def __init__(self, address: str, tenant: str, timeout_s: float | None = None, tls: ClientTls | None = None) -> None:
        self.address = address
        self._metadata = (("x-tenant-id", tenant),)
        self._timeout_s = timeout_s
        self._channel = _channel(address, tls)
        self._stub = pb_grpc.ExpertPagerStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, pool: PoolAsk, *, has_max_tokens: bool = True
    ) -> Iterator[TokenChunk]:
        """Chunks as they arrive; the last one carries the usage. Closing the iterator cancels the request.

        Without `has_max_tokens` the service's default length is used.
        """
        request = pb.GenerateRequest(
            sampling=pb.SamplingParams(
                max_tokens=sampling.max_tokens if has_max_tokens else None,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
                stop=sampling.stop,
                ignore_eos=sampling.ignore_eos,
            ),
            pool=_policy(pool),
            **_prompt(prompt),
        )
        with self._translated():
            call = self._stub.Generate(request, metadata=self._metadata, timeout=self._timeout_s)
            try:
                for response in call:
                    yield _chunk(response)
            finally:
                call.cancel()

    def route(self, prompt: Prompt, pool: PoolAsk) -> tuple[pb.RouteResponse, ExpertPool | None]:
        """The reply, and its pool."""
        request = pb.RouteRequest(pool=_policy(pool), **_prompt(prompt))
        with self._translated():
            reply = self._stub.Route(request, metadata=self._metadata, timeout=self._timeout_s)
        return reply, pool_of(reply.pool) if reply.HasField("pool") else None

    def calibrate(
        self, name: str, examples: Sequence[str], pool: PoolAsk, method: str | None, *, replaces: bool
    ) -> NamedPool:
        request = pb.CalibrateRequest(
            name=name,
            examples=[pb.Example(text=text.encode()) for text in examples],
            pool=_policy(pool),
            method=method or "",
            replace=replaces,
        )
        with self._translated():
            reply = self._stub.Calibrate(request, metadata=self._metadata, timeout=self._timeout_s)
        return _named(reply.pool)

    def named_pools(self) -> tuple[list[NamedPool], list[str]]:
        """The tenant's pools, and the names of those that can not be read."""
        with self._translated():
            reply = self._stub.ListPools(pb.ListPoolsRequest(), metadata=self._metadata, timeout=self._timeout_s)
        return [_named(wire) for wire in reply.pools], list(reply.damaged)

    def delete_pool(self, name: str) -> bool:
        request = pb.DeletePoolRequest(name=name)
        with self._translated():
            reply = self._stub.DeletePool(request, metadata=self._metadata, timeout=self._timeout_s)
        return bool(reply.deleted)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            status = cast(grpc.Call, error)
            code, details = status.code(), status.details() or ""
            if code is grpc.StatusCode.UNAVAILABLE and not status.trailing_metadata():
                raise PagerError(f"no service answers at {self.address} ({details})") from None
            raise PagerError(f"{details} [{code.name}]") from None


def _channel(address: str, tls: ClientTls | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address)
    ca, identity = tls.read()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, identity, identity))


def _policy(ask: PoolAsk) -> pb.PoolPolicy | None:
    """None where nothing is asked, so that the service's defaults count."""
    if ask == PoolAsk():
        return None
    wire = pb.PoolPolicy(digest=ask.digest, name=ask.name)
    if ask.source:
        wire.source = _SOURCES[ask.source]
    if ask.drift is not None:
        drift = pb.DriftPolicy(
            threshold=ask.drift.threshold, action=_ACTIONS[ask.drift.action], window=ask.drift.window
        )
        wire.drift.CopyFrom(drift)
    match ask.size:
        case Full():
            wire.full.SetInParent()
        case Count(routed):
            wire.count = routed
        case Share(share):
            wire.share = share
        case Mass(mass, cap):
            wire.mass.CopyFrom(pb.Mass(mass=mass, cap=cap))
        case Counts(per_layer):
            wire.counts.CopyFrom(pb.LayerCounts(routed=per_layer))
        case Bytes(total):
            wire.bytes = total
    return wire


def pool_of(wire: pb.Pool) -> ExpertPool:
    covered = wire.covered_mass if wire.HasField("covered_mass") else None
    return ExpertPool(_layers(wire.layers), covered)


def _named(wire: pb.NamedPool) -> NamedPool:
    return NamedPool(
        wire.name, pool_of(wire.pool), wire.method, wire.num_examples, wire.num_tokens, wire.model_fingerprint
    )


def _layers(wire: Iterable[pb.LayerExperts]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(layer.experts) for layer in wire)


def _prompt(prompt: Prompt) -> dict[str, Any]:
    return {"text": prompt.encode()} if isinstance(prompt, str) else {"token_ids": pb.TokenIds(ids=prompt)}


def _chunk(response: pb.GenerateResponse) -> TokenChunk:
    usage = _usage(response.usage) if response.HasField("usage") else None
    return TokenChunk(response.request_id, tuple(response.token_ids), response.text, usage)


def _usage(wire: pb.Usage) -> Usage:
    return Usage(
        mode=_MODES[wire.mode],
        finish_reason=_FINISHES[wire.finish_reason],
        prompt_tokens=wire.prompt_tokens,
        completion_tokens=wire.completion_tokens,
        pool=pool_of(wire.pool) if wire.HasField("pool") else None,
        bytes_from_disk=wire.bytes_from_disk,
        bytes_from_host=wire.bytes_from_host,
        experts_hit=wire.experts_hit,
        experts_missed=wire.experts_missed,
        stall_s=wire.stall_seconds,
        out_of_pool_mass=wire.out_of_pool_mass,
        predicted_recall=wire.predicted_recall if wire.HasField("predicted_recall") else None,
        queue_s=wire.queue_seconds,
        time_to_first_token_s=wire.time_to_first_token_seconds,
        model_fingerprint=wire.model_fingerprint,
        drift=_drift(wire.drift) if wire.HasField("drift") else None,
    )


def _drift(wire: pb.DriftReport) -> DriftReport:
    exact_from = wire.exact_from if wire.HasField("exact_from") else None
    return DriftReport(wire.peak_mass, wire.widenings, wire.experts_added, exact_from)
