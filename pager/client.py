"""The client of the service, blocking (`Client`) and for asyncio (`AsyncClient`).

Values go in and come out; failures are the classes of `pager.errors`, with the service's own words and, in `status`,
the name of the gRPC status code. Nothing but grpc, protobuf and this package's values is needed.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import expert_pager_pb2_grpc as pb_grpc
from google.protobuf.message import DecodeError, Message
from google.rpc.status_pb2 import Status

from pager import wire
from pager.errors import Cancelled, DeadlineExceeded, InvalidRequest, NotReady, PagerError, ServiceUnreachable
from pager.types import (
    CHOSEN_BY_SERVICE,
    ModelInfo,
    NamedPool,
    PoolAsk,
    PoolListing,
    PoolSize,
    RouteAnswer,
    SamplingParams,
    ServiceStatus,
    TokenChunk,
    Usage,
    WorkerResidency,
)
from pager.wire import Prompt

Pool = PoolAsk | PoolSize | None
"""A size, all that can be asked of a pool, or None for the service's default."""

READY_POLL_S = 0.2
_DEFAULT_TENANT = "default"  # what the service takes where none is named: with a key, the key's
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Call(Generic[Value]):
    """One call of a unary method, and how its answer is read."""

    method: str
    request: Message
    decode: Callable[[Any], Value]


def _route(prompt: Prompt, pool: Pool) -> _Call[RouteAnswer]:
    return _Call("Route", wire.encode_route(prompt, _ask(pool)), wire.decode_route_answer)


def _calibrate(
    name: str, examples: Iterable[Prompt], pool: Pool, method: str | None, replaces: bool
) -> _Call[NamedPool]:
    request = wire.encode_calibrate(name, examples, _ask(pool), method, replaces=replaces)
    return _Call("Calibrate", request, lambda answer: wire.decode_named_pool(answer.pool))


def _list_pools() -> _Call[PoolListing]:
    return _Call("ListPools", pb.ListPoolsRequest(), wire.decode_listing)


def _delete_pool(name: str) -> _Call[bool]:
    return _Call("DeletePool", pb.DeletePoolRequest(name=name), lambda answer: bool(answer.deleted))


def _abort(request_id: str) -> _Call[bool]:
    return _Call("Abort", pb.AbortRequest(request_id=request_id), lambda answer: bool(answer.aborted))


def _model() -> _Call[ModelInfo]:
    return _Call("GetModel", pb.GetModelRequest(), wire.decode_model)


def _residency() -> _Call[tuple[WorkerResidency, ...]]:
    return _Call(
        "GetResidency", pb.GetResidencyRequest(), lambda answer: tuple(map(wire.decode_worker, answer.workers))
    )


def _status() -> _Call[ServiceStatus]:
    return _Call("GetResidency", pb.GetResidencyRequest(), wire.decode_service_status)


def _drain(worker: str | None) -> _Call[None]:
    what = pb.DrainRequest(router=True) if worker is None else pb.DrainRequest(worker=worker)
    return _Call("Drain", what, lambda _: None)


class _Client:
    """The base of both clients: the address, the metadata and how errors are read."""

    def __init__(self, address: str, tenant: str, timeout_s: float | None, api_key: str | None) -> None:
        if not tenant.isascii() or not tenant.isprintable():
            raise InvalidRequest(f"tenant {tenant[:80]!r} has characters beyond A-Z a-z 0-9 . _ -", field="x-tenant-id")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InvalidRequest("the API key has characters that none has", field="api_key")
        self.address = address
        self.timeout_s = timeout_s
        self._metadata: tuple[tuple[str, str], ...] = ()
        if tenant != _DEFAULT_TENANT:
            self._metadata += (("x-tenant-id", tenant),)
        if api_key is not None:
            self._metadata += (("authorization", f"Bearer {api_key}"),)

    def _options(self, timeout_s: float | None) -> dict[str, Any]:
        return {"metadata": self._metadata, "timeout": self.timeout_s if timeout_s is None else timeout_s}


class Client(_Client):
    """A blocking client of one service; safe to use from several threads.

    `tenant` is whose requests these are; `timeout_s` is the default deadline of every call, and `credentials` are those
    of a service with TLS (see `grpc.ssl_channel_credentials`), `api_key` is for a service that asks for one. Every
    method raises `PagerError`.
    """

    def __init__(
        self,
        address: str,
        *,
        tenant: str = "default",
        timeout_s: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
    ) -> None:
        super().__init__(address, tenant, timeout_s, api_key)
        if credentials is None:
            self._channel = grpc.insecure_channel(address)
        else:
            self._channel = grpc.secure_channel(address, credentials)
        self._stub: Any = pb_grpc.ExpertPagerStub(self._channel)
        self._health = self._channel.unary_unary(_HEALTH, _health_request, _is_serving)

    def close(self) -> None:
        """Closes the connection, and cancels the answers that are still being read."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        pool: Pool = None,
        *,
        has_max_tokens: bool = True,
        unset: Collection[str] = (),
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Starts an answer, to be iterated over.

        Without `sampling`, the service's default length is used, or what there is room for, and tokens are drawn as the
        model's own settings say. Fields of `sampling` that `unset` names are chosen by the service too, and so is its
        length with `has_max_tokens` False. Errors, also those of the request itself, are raised while the answer is
        read.
        """
        request = _generate(prompt, sampling, pool, _unset(sampling, has_max_tokens, unset), request_id)
        return Answer(self._stub.Generate(request, **self._options(timeout_s)), request.request_id, self.address)

    def route(self, prompt: Prompt, pool: Pool = None, *, timeout_s: float | None = None) -> RouteAnswer:
        """Predicts the pool of a prompt. Nothing is generated and nothing is paged."""
        return self._run(_route(prompt, pool), timeout_s)

    def calibrate(
        self,
        name: str,
        examples: Iterable[Prompt],
        pool: Pool = None,
        *,
        method: str | None = None,
        replaces: bool = False,
        timeout_s: float | None = None,
    ) -> NamedPool:
        """Makes a named pool of one to a hundred examples; `PoolAsk(name=name)` asks for it from then on."""
        return self._run(_calibrate(name, examples, pool, method, replaces), timeout_s)

    def list_pools(self, *, timeout_s: float | None = None) -> PoolListing:
        return self._run(_list_pools(), timeout_s)

    def delete_pool(self, name: str, *, timeout_s: float | None = None) -> bool:
        """Deletes a named pool; False where there is none."""
        return self._run(_delete_pool(name), timeout_s)

    def abort(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        """Ends a request of this tenant; False where none of that id is in flight."""
        return self._run(_abort(request_id), timeout_s)

    def model(self, *, timeout_s: float | None = None) -> ModelInfo:
        return self._run(_model(), timeout_s)

    def residency(self, *, timeout_s: float | None = None) -> tuple[WorkerResidency, ...]:
        """Which experts every worker holds right now."""
        return self._run(_residency(), timeout_s)

    def status(self, *, timeout_s: float | None = None) -> ServiceStatus:
        """The workers, as `residency` has them, and what is in flight."""
        return self._run(_status(), timeout_s)

    def drain_worker(self, worker: str, *, timeout_s: float | None = None) -> None:
        """Drains a worker: it refuses new requests, finishes those it has, and is started again. Returns at once.

        For operators.
        """
        self._run(_drain(worker), timeout_s)

    def drain_router(self, *, timeout_s: float | None = None) -> None:
        """Drains the router that answers, which then ends. Returns at once. For operators."""
        self._run(_drain(None), timeout_s)

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Returns when the service can answer. Raises NotReady when that takes longer than `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        while True:
            left_s = end_s - time.monotonic()
            try:
                if self._health(_SERVICE, timeout=max(left_s, 0.001), wait_for_ready=True):
                    return
            except grpc.RpcError as error:
                _check_may_become_ready(error, self.address)
            if left_s <= READY_POLL_S:
                raise _not_ready(self.address, timeout_s)
            time.sleep(READY_POLL_S)

    def _run(self, call: _Call[Value], timeout_s: float | None) -> Value:
        try:
            return call.decode(getattr(self._stub, call.method)(call.request, **self._options(timeout_s)))
        except grpc.RpcError as error:
            raise _translated(error, self.address) from None


class AsyncClient(_Client):
    """The same for asyncio; its methods are those of `Client`. To be made where the event loop runs."""

    def __init__(
        self,
        address: str,
        *,
        tenant: str = "default",
        timeout_s: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
    ) -> None:
        super().__init__(address, tenant, timeout_s, api_key)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials)
        self._stub: Any = pb_grpc.ExpertPagerStub(self._channel)
        self._health = self._channel.unary_unary(_HEALTH, _health_request, _is_serving)

    async def close(self) -> None:
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        pool: Pool = None,
        *,
        has_max_tokens: bool = True,
        unset: Collection[str] = (),
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncAnswer:
        """Starts an answer, to be iterated over with `async for`; see `Client.generate`."""
        request = _generate(prompt, sampling, pool, _unset(sampling, has_max_tokens, unset), request_id)
        return AsyncAnswer(self._stub.Generate(request, **self._options(timeout_s)), request.request_id, self.address)

    async def route(self, prompt: Prompt, pool: Pool = None, *, timeout_s: float | None = None) -> RouteAnswer:
        return await self._run(_route(prompt, pool), timeout_s)

    async def calibrate(
        self,
        name: str,
        examples: Iterable[Prompt],
        pool: Pool = None,
        *,
        method: str | None = None,
        replaces: bool = False,
        timeout_s: float | None = None,
    ) -> NamedPool:
        return await self._run(_calibrate(name, examples, pool, method, replaces), timeout_s)

    async def list_pools(self, *, timeout_s: float | None = None) -> PoolListing:
        return await self._run(_list_pools(), timeout_s)

    async def delete_pool(self, name: str, *, timeout_s: float | None = None) -> bool:
        return await self._run(_delete_pool(name), timeout_s)

    async def abort(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        return await self._run(_abort(request_id), timeout_s)

    async def model(self, *, timeout_s: float | None = None) -> ModelInfo:
        return await self._run(_model(), timeout_s)

    async def residency(self, *, timeout_s: float | None = None) -> tuple[WorkerResidency, ...]:
        return await self._run(_residency(), timeout_s)

    async def status(self, *, timeout_s: float | None = None) -> ServiceStatus:
        return await self._run(_status(), timeout_s)

    async def drain_worker(self, worker: str, *, timeout_s: float | None = None) -> None:
        await self._run(_drain(worker), timeout_s)

    async def drain_router(self, *, timeout_s: float | None = None) -> None:
        await self._run(_drain(None), timeout_s)

    async def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        end_s = time.monotonic() + timeout_s
        while True:
            left_s = end_s - time.monotonic()
            try:
                if await self._health(_SERVICE, timeout=max(left_s, 0.001), wait_for_ready=True):
                    return
            except grpc.RpcError as error:
                _check_may_become_ready(error, self.address)
            if left_s <= READY_POLL_S:
                raise _not_ready(self.address, timeout_s)
            await asyncio.sleep(READY_POLL_S)

    async def _run(self, call: _Call[Value], timeout_s: float | None) -> Value:
        try:
            return call.decode(await getattr(self._stub, call.method)(call.request, **self._options(timeout_s)))
        except grpc.RpcError as error:
            raise _translated(error, self.address) from None


class _Stream:
    """The answer to one request, on its way. Its last chunk carries the usage.

    Of several answers (`SamplingParams.n`) each chunk has the `index`, and the last one of each a usage of its own.
    """

    def __init__(self, call: Any, request_id: str, address: str) -> None:
        self.request_id = request_id
        self.usage: Usage | None = None
        self._call = call
        self._address = address

    def cancel(self) -> None:
        """Ends the request, at its worker too. An answer that has ended stays as it is."""
        self._call.cancel()

    def _seen(self, message: pb.GenerateResponse) -> TokenChunk:
        chunk = wire.decode_response(message)
        self.usage = chunk.usage or self.usage
        return chunk


def _texts(chunks: Iterable[TokenChunk]) -> list[str]:
    found = {0: ""}
    for chunk in chunks:
        found[chunk.index] = found.get(chunk.index, "") + chunk.text
    return [found[index] for index in sorted(found)]


class Answer(_Stream):
    """An iterator over the chunks of an answer; as a context, it ends the request when the block is left."""

    def __iter__(self) -> Iterator[TokenChunk]:
        return self

    def __next__(self) -> TokenChunk:
        try:
            return self._seen(next(self._call))
        except grpc.RpcError as error:
            raise _translated(error, self._address) from None

    def text(self) -> str:
        """Reads to the end, and returns the text from here on; of several answers the first one's."""
        return self.texts()[0]

    def texts(self) -> list[str]:
        """Reads to the end, and returns the text of each answer from here on."""
        return _texts(self)

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class AsyncAnswer(_Stream):
    """The same for `async for` and `async with`."""

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self

    async def __anext__(self) -> TokenChunk:
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise _translated(error, self._address) from None
        except asyncio.CancelledError:
            if self._call.cancelled() and not _is_being_cancelled():
                raise Cancelled("the request was cancelled here") from None
            raise
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise StopAsyncIteration
        return self._seen(message)

    async def text(self) -> str:
        """Reads to the end, and returns the text from here on; of several answers the first one's."""
        return (await self.texts())[0]

    async def texts(self) -> list[str]:
        """Reads to the end, and returns the text of each answer from here on."""
        return _texts([chunk async for chunk in self])

    async def __aenter__(self) -> AsyncAnswer:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


# --- requests -------------------------------------------------------------------------------------------------------


def _generate(
    prompt: Prompt, sampling: SamplingParams | None, pool: Pool, unset: Collection[str], request_id: str | None
) -> pb.GenerateRequest:
    """A request with an id of its own, by which it can be aborted while nothing of it has arrived yet."""
    return wire.encode_generate(
        prompt,
        sampling or SamplingParams(),
        _ask(pool),
        request_id=uuid.uuid4().hex if request_id is None else request_id,
        unset=unset,
    )


def _unset(sampling: SamplingParams | None, has_max_tokens: bool, unset: Collection[str]) -> Collection[str]:
    if sampling is None:
        return CHOSEN_BY_SERVICE
    return unset if has_max_tokens else {*unset, "max_tokens"}


def _ask(pool: Pool) -> PoolAsk:
    if pool is None:
        return PoolAsk()
    return pool if isinstance(pool, PoolAsk) else PoolAsk(size=pool)


# --- readiness ------------------------------------------------------------------------------------------------------

# grpc.health.v1 in the few bytes that are needed of it: its package of stubs would bind the client to one release of
# protobuf, and to another one than the caller may have.
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVICE = pb.DESCRIPTOR.services_by_name["ExpertPager"].full_name


def _health_request(service: str) -> bytes:
    """A HealthCheckRequest: its first field is the service's name, here shorter than 128 bytes."""
    return b"\n" + bytes([len(service)]) + service.encode()


def _is_serving(response: bytes) -> bool:
    """Tells whether a HealthCheckResponse has the status SERVING, which is 1, in its first field."""
    return response == b"\x08\x01"


def _check_may_become_ready(error: Any, address: str) -> None:
    """Raises for what waiting does not mend. A service that has just begun to listen does not know its name yet."""
    code = grpc.StatusCode
    if error.code() not in (code.UNAVAILABLE, code.DEADLINE_EXCEEDED, code.NOT_FOUND):
        raise _translated(error, address) from None


def _not_ready(address: str, timeout_s: float) -> NotReady:
    return NotReady(f"the service at {address} was not ready within {timeout_s:g} s; look at its log, or wait longer")


# --- errors ---------------------------------------------------------------------------------------------------------

_OF_GRPC: dict[grpc.StatusCode, tuple[type[PagerError], str]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: (DeadlineExceeded, "the answer was not complete in time; allow more time"),
    grpc.StatusCode.CANCELLED: (Cancelled, "the request was cancelled here, or its connection was closed"),
}


def _translated(error: Any, address: str) -> PagerError:
    """The service's own error; for what gRPC itself fails with, the nearest one."""
    code, details = error.code(), error.details() or ""
    trailing = dict(error.trailing_metadata() or ())
    found = _in_details(trailing.get("grpc-status-details-bin"))
    if found is None and code is grpc.StatusCode.UNAVAILABLE:
        # A program that speaks something else, or waits for TLS, does not begin as gRPC does.
        other = "another program, or a service that takes TLS, has that port " if "SETTINGS" in details else ""
        return ServiceUnreachable(f"no service answers at {address}: {other}({details})")
    if found is None and code is grpc.StatusCode.UNIMPLEMENTED:
        return PagerError(
            f"what answers at {address} is no expert-pager service, or one of another version ({details})"
        )
    if found is None:
        kind, message = _OF_GRPC.get(code, (PagerError, details))
        found = kind(message)
    found.status = code.name
    return found


def _in_details(data: str | bytes | None) -> PagerError | None:
    if not isinstance(data, bytes):
        return None
    try:
        return wire.decode_status(Status.FromString(data))
    except DecodeError:
        return None
