"""A client of the service, over gRPC. The one place of the command line that imports grpc."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import grpc
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc

from pager.cli.options import ClientTls, PoolAsk, Prompt
from pager.errors import PagerError
from pager.pools.named import NamedPool
from pager.types import ExpertPool, SamplingParams, TokenChunk
from pager.wire import (
    decode_pool,
    decode_response,
    encode_drift,
    encode_sampling,
    encode_source,
    set_size,
)


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
        request = pb.GenerateRequest(sampling=encode_sampling(sampling), pool=_policy(pool), **_prompt(prompt))
        if not has_max_tokens:
            request.sampling.ClearField("max_tokens")
        with self._translated():
            call = self._stub.Generate(request, metadata=self._metadata, timeout=self._timeout_s)
            try:
                for response in call:
                    yield decode_response(response)
            finally:
                call.cancel()  # type: ignore[no-untyped-call]

    def route(self, prompt: Prompt, pool: PoolAsk) -> tuple[pb.RouteResponse, ExpertPool | None]:
        """The reply, and its pool."""
        request = pb.RouteRequest(pool=_policy(pool), **_prompt(prompt))
        with self._translated():
            reply = self._stub.Route(request, metadata=self._metadata, timeout=self._timeout_s)
        return reply, decode_pool(reply.pool) if reply.HasField("pool") else None

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
        """The tenant's pools, and the names of those that cannot be read."""
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
                # A program that speaks something else, or waits for TLS, does not begin as gRPC does.
                other = "another program, or a service that takes TLS, has that port " if "SETTINGS" in details else ""
                raise PagerError(f"no service answers at {self.address}: {other}({details})") from None
            if code is grpc.StatusCode.UNIMPLEMENTED and not _is_ours(status):
                raise PagerError(
                    f"what answers at {self.address} is no expert-pager service, or one of another version ({details})"
                ) from None
            raise PagerError(f"{details} [{code.name}]") from None


def _is_ours(status: grpc.Call) -> bool:
    """An error that our service has put its name to has details; one that gRPC itself answers with has none."""
    return any(key == "grpc-status-details-bin" for key, _ in status.trailing_metadata() or ())


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
        wire.source = encode_source(ask.source)
    if ask.drift is not None:
        wire.drift.CopyFrom(encode_drift(ask.drift))
    if ask.size is not None:
        set_size(wire, ask.size)
    return wire


def _named(wire: pb.NamedPool) -> NamedPool:
    return NamedPool(
        wire.name, decode_pool(wire.pool), wire.method, wire.num_examples, wire.num_tokens, wire.model_fingerprint
    )


def _prompt(prompt: Prompt) -> dict[str, Any]:
    return {"text": prompt.encode()} if isinstance(prompt, str) else {"token_ids": pb.TokenIds(ids=prompt)}
