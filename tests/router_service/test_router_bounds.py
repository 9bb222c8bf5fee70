"""No request keeps the event loop: what is too much is refused by its bytes, and what is legal is taken in pieces."""

from __future__ import annotations

import asyncio
import gc
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from pager.cluster.placement import WorkerView
from pager.errors import InvalidRequest
from pager.observe.metrics import INTERVAL_S, LoopLag, leave_out_of_collections
from pager.pools.pick import encode_named
from pager.tokenizing import read_tokenizer
from pager.types import ExpertPool, ModelInfo, NamedPool, PoolPolicy, RoutingFacts, RoutingScores
from router_service import server
from router_service.pools import MAX_POOLS_OF_TENANT
from router_service.prediction import Passes, TextEncoder
from router_service.requests import (
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    MAX_UNZIPPED_BYTES,
    _fields,
    unzipped,
)
from tests.router_service.conftest import InProcessCluster, Running
from tests.support.values import some

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PREFIX = "/expert_pager.v1.ExpertPager/"
MAX_HELD_S = 0.05
TOO_MANY = MAX_MESSAGE_BYTES // 2 - 64  # fields of two bytes in one message
TEXT = b"SELECT name FROM users WHERE id = 1; "

# A large model: what a request may legally be, it may be here.
LAYERS, ROUTED, CONTEXT = 64, 255, 1 << 17
LARGE = RoutingFacts((ROUTED + 1,) * LAYERS, (1,) * LAYERS, (8,) * LAYERS)


class LargeScorer:
    def scores(self, token_ids: Any, /) -> RoutingScores:
        return RoutingScores((np.full(ROUTED, 1 / ROUTED),) * LAYERS, "trunk", len(token_ids))


@dataclass(frozen=True)
class Case:
    """A call as bytes, and why it is refused (None: it is answered)."""

    method: str
    data: bytes
    reason: str | None
    field: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass
class Large:
    """A service with a large model, and the longest time that a call kept its event loop, in CPU time of its thread."""

    service: Any
    encoder: TextEncoder
    held_s: list[float] = field(default_factory=list)

    async def call(self, method: str, data: bytes, metadata: Any = ()) -> Any:
        """From another thread, so that only the server's work is measured."""
        return await asyncio.to_thread(_call, self.service.server.port, method, data, metadata)


def _call(port: int, method: str, data: bytes, metadata: Any) -> Any:
    options = (("grpc.max_metadata_size", 1 << 20), ("grpc.use_local_subchannel_pool", 1))
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        try:
            list(channel.unary_stream(method, None, None)(data, metadata=metadata, timeout=120))
        except grpc.RpcError as error:
            return error
    return None


def reason_of(error: Any) -> tuple[str | None, str | None]:
    """ErrorInfo's reason, and the field at fault."""
    if error is None:
        return None, None
    status = rpc_status.from_call(error)
    if status is None:
        return f"{error.code()} without details", None
    info, bad = ErrorInfo(), BadRequest()
    status.details[0].Unpack(info)
    for detail in status.details[1:]:
        detail.Unpack(bad)
    return info.reason, bad.field_violations[0].field if bad.field_violations else None


@asynccontextmanager
async def large_service(
    serve: Any, make_cluster: Any, make_worker: Any, model: Any, **choices: Any
) -> AsyncIterator[Large]:
    tokenizer = read_tokenizer(Path(__file__).parents[2] / "models" / "emo-tiny")
    encoder = TextEncoder(tokenizer)
    choices |= {
        "model": replace(model, context_length=CONTEXT, kv_token_limit=CONTEXT, vocab_size=1 << 17, facts=LARGE),
        "cluster": make_cluster(views={"w0": make_worker("w0", resident=(0,) * LAYERS)}),
        "passes": Passes({"trunk": LargeScorer}, ("trunk",)),
        "encoder": encoder,
        "default_pool": PoolPolicy(),
    }
    async with serve(**choices) as service:
        large = Large(service, encoder)
        # CPU time, so that other programs do not count; sleeping takes none of it, which the probe expects.
        clock_s = [0.0]

        def clock() -> float:
            clock_s[0] += INTERVAL_S
            return time.thread_time() + clock_s[0]

        lag = LoopLag(large.held_s.append, clock)
        leave_out_of_collections()  # as a router does
        try:
            await lag.start()
            yield large
            await lag.stop()
        finally:
            gc.unfreeze()


def generate(**fields: Any) -> bytes:
    given = {"token_ids": pb.TokenIds(ids=[1]), "sampling": pb.SamplingParams(max_tokens=1), **fields}
    if "text" in given:
        del given["token_ids"]
    return pb.GenerateRequest(**given).SerializeToString()


def ids(count: int) -> pb.TokenIds:
    return pb.TokenIds(ids=range(count))


def wrapped(kind: Any, name: str, content: bytes) -> bytes:
    """A message whose field `name` has these bytes."""
    wide = pb.GenerateRequest(text=content).SerializeToString()
    tag = kind.DESCRIPTOR.fields_by_name[name].number << 3 | 2
    return bytes([tag]) + wide[1:]


def calibrate(*examples: pb.Example, **fields: Any) -> bytes:
    pool = pb.PoolPolicy(count=16)
    return pb.CalibrateRequest(name="law", examples=examples, pool=pool, **fields).SerializeToString()


def fixed(*layers: range) -> pb.PoolPolicy:
    return pb.PoolPolicy(experts=pb.FixedPool(layers=[pb.LayerExperts(experts=layer) for layer in layers]))


def cases() -> dict[str, Case]:
    one = pb.Example(token_ids=ids(1))
    generate_path, calibrate_path = f"{PREFIX}Generate", f"{PREFIX}Calibrate"
    huge = (TEXT * (MAX_MESSAGE_BYTES // len(TEXT)))[: MAX_MESSAGE_BYTES - 64]
    stops = wrapped(pb.GenerateRequest, "sampling", b"\x32\x00" * TOO_MANY)
    layers = wrapped(pb.GenerateRequest, "pool", wrapped(pb.PoolPolicy, "experts", b"\x0a\x00" * (TOO_MANY - 8)))
    counts = pb.PoolPolicy(counts=pb.LayerCounts(routed=[8] * LAYERS))
    return {
        "a text of 8 MiB": Case(generate_path, generate(text=huge), "PROMPT_TOO_LONG", "text"),
        "a text of 8 MiB to Route": Case(
            f"{PREFIX}Route", pb.RouteRequest(text=huge).SerializeToString(), "PROMPT_TOO_LONG", "text"
        ),
        "a text that is tokenized": Case(generate_path, generate(text=huge[: 1 << 19]), "PROMPT_TOO_LONG", "text"),
        "all ids that fit": Case(generate_path, generate(token_ids=ids(CONTEXT - 1)), None),
        "all ids that fit, to Route": Case(
            f"{PREFIX}Route",
            pb.RouteRequest(token_ids=ids(CONTEXT - 1), pool=pb.PoolPolicy(count=16)).SerializeToString(),
            None,
        ),
        "a million ids": Case(
            generate_path, generate(token_ids=pb.TokenIds(ids=[1] * (1 << 20))), "PROMPT_TOO_LONG", "token_ids"
        ),
        "ids of 8 MiB": Case(
            generate_path, generate(token_ids=pb.TokenIds(ids=[1 << 28] * 1_600_000)), "PROMPT_TOO_LONG", "token_ids"
        ),
        "four million stop strings": Case(generate_path, stops, "INVALID_ARGUMENT", "sampling"),
        "the most stop strings": Case(
            generate_path, generate(sampling=pb.SamplingParams(max_tokens=1, stop=["é" * 256] * 16)), None
        ),
        "one long stop string": Case(
            generate_path, generate(sampling=pb.SamplingParams(stop=["x" * (8 << 20)]))[: 8 << 20], "INVALID_ARGUMENT"
        ),
        "four million layers": Case(generate_path, layers, "INVALID_ARGUMENT", "pool"),
        "a pool of all experts": Case(generate_path, generate(pool=fixed(*[range(ROUTED)] * LAYERS)), None),
        "a pool of twice as many layers": Case(
            generate_path, generate(pool=fixed(*[range(8)] * 2 * LAYERS)), "INVALID_ARGUMENT", "pool.fixed"
        ),
        "a count for every layer": Case(
            f"{PREFIX}Route", pb.RouteRequest(token_ids=ids(9), pool=counts).SerializeToString(), None
        ),
        "four million fields": Case(generate_path, b"\x0a\x00" * TOO_MANY, "INVALID_ARGUMENT"),
        "four million examples": Case(calibrate_path, b"\x1a\x00" * TOO_MANY, "INVALID_ARGUMENT"),
        "101 examples": Case(calibrate_path, calibrate(*[one] * 101), "INVALID_ARGUMENT", "examples"),
        "100 long examples": Case(calibrate_path, calibrate(*[pb.Example(token_ids=ids(5000))] * 100), None),
        "100 examples of 8 MiB": Case(
            calibrate_path,
            calibrate(*[pb.Example(token_ids=ids(30_000))] * 100, replace=True),
            "PROMPT_TOO_LONG",
            "prompt",
        ),
        "an example beyond the context": Case(
            calibrate_path, calibrate(pb.Example(text=huge)), "PROMPT_TOO_LONG", "examples"
        ),
        "a long id to abort": Case(
            f"{PREFIX}Abort", pb.AbortRequest(request_id="x" * (1 << 22)).SerializeToString(), "INVALID_ARGUMENT"
        ),
        "more than a message may have": Case(generate_path, b"x" * (MAX_MESSAGE_BYTES + 1), "INVALID_ARGUMENT"),
        "half a message": Case(generate_path, generate(text=b"abcdef" * 100)[:100], "INVALID_ARGUMENT"),
        "a long name to the health check": Case(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest(service="x" * (1 << 22)).SerializeToString(),
            "INVALID_ARGUMENT",
        ),
        "a long question to the reflection": Case(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\x0a\x00" * (2 * TOO_MANY), None
        ),
        "a method that is not there": Case(f"{PREFIX}Guess", b"x" * (1 << 22), "UNKNOWN_METHOD"),
        "large metadata": Case(
            generate_path, generate(), "INVALID_ARGUMENT", "metadata", (("x-notes", "n" * 2 * MAX_METADATA_BYTES),)
        ),
        "many metadata": Case(
            generate_path, generate(), "INVALID_ARGUMENT", "metadata", tuple((f"k{n}", "v" * 9) for n in range(1400))
        ),
    }


CASES = cases()


@pytest.mark.slow
async def test_no_request_keeps_the_event_loop(
    serve: Callable[..., Any],
    make_cluster: type[InProcessCluster],
    make_worker: Callable[..., WorkerView],
    model: ModelInfo,
) -> None:
    """Each of `CASES`: how it ends, and for how long at most it kept the loop."""
    wrong = []
    async with large_service(serve, make_cluster, make_worker, model) as large:
        assert await large.call(f"{PREFIX}Generate", generate()) is None  # what is done once is done
        for name, case in CASES.items():
            large.held_s.clear()
            error = await large.call(case.method, case.data, case.metadata)
            await asyncio.sleep(2 * INTERVAL_S)
            held_s, found = max(large.held_s), reason_of(error)
            if held_s > MAX_HELD_S or found != (case.reason, case.field):
                wrong.append(f"{name}: {found}, {held_s:.3f} s, {error and error.details()}")
        assert not wrong, "\n".join(wrong)
        assert large.service.pipeline.admission.num_requests == 0


async def test_a_list_of_many_large_pools_does_not_keep_it_either(
    serve: Callable[..., Any],
    make_cluster: type[InProcessCluster],
    make_worker: Callable[..., WorkerView],
    model: ModelInfo,
    tmp_path: Path,
) -> None:
    pool = ExpertPool((tuple(range(0, ROUTED, 2)),) * LAYERS)
    async with large_service(serve, make_cluster, make_worker, model, pools_path=tmp_path) as large:
        for number in range(MAX_POOLS_OF_TENANT):
            named = NamedPool(f"pool-{number}", pool, "trunk", 1, 1, "f" * 16)
            (tmp_path / f"default@{named.name}.json").write_bytes(encode_named(named))
        large.held_s.clear()
        assert await large.call(f"{PREFIX}ListPools", b"") is None
        await asyncio.sleep(2 * INTERVAL_S)
        assert max(large.held_s) < MAX_HELD_S


async def test_a_text_is_tokenized_beside_the_event_loop(
    serve: Callable[..., Any],
    make_cluster: type[InProcessCluster],
    make_worker: Callable[..., WorkerView],
    model: ModelInfo,
) -> None:
    async with large_service(serve, make_cluster, make_worker, model) as large:
        text = (TEXT * (1 << 16))[: 1 << 21]
        call = asyncio.create_task(large.call(f"{PREFIX}Generate", generate(text=text)))
        while not large.service.pipeline.admission.num_requests:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        large.held_s.clear()
        error = await call
        assert reason_of(error) == ("PROMPT_TOO_LONG", "text")
        assert "680155 tokens" in str(some(error).details())
        # It takes more than half a second of one core; whatever else the machine does, it does to both.
        assert len(large.held_s) >= 5, "the loop stood still while the text was tokenized"


async def test_a_refusal_names_bytes_bound_and_what_to_do(service: Running) -> None:
    call = service.stub.Generate(pb.GenerateRequest(text=b"a" * 49))
    with pytest.raises(grpc.aio.AioRpcError, match="49 bytes") as caught:
        await call.read()
    message = str(caught.value.details())
    assert "no text of more than 48 bytes" in message
    assert message.endswith("cut it")


async def test_fields_are_found_as_protobuf_writes_them() -> None:
    message = pb.CalibrateRequest(
        model="m" * 300, name="n", examples=[pb.Example(text=b"x" * 70_000)] * 2, replace=True
    )
    found = list(_fields(message.SerializeToString()))
    assert [number for number, _, _ in found] == [1, 2, 3, 3, 6]
    assert [end - start for _, start, end in found] == [300, 1, *[message.examples[0].ByteSize()] * 2, 1]


async def test_a_message_that_never_comes_ends_the_call(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READ_TIMEOUT_S", 0.2)

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    with pytest.raises(grpc.aio.AioRpcError, match="did not arrive within") as caught:
        await service.channel.stream_unary(f"{PREFIX}GetModel", None, None)(nothing())
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


# --- what gRPC ends by itself ---------------------------------------------------------------------------------------


async def dropped(service: Any, reason: str, count: int) -> None:
    async with asyncio.timeout(60):
        while service.metric("dropped_calls_total", reason=reason) != count:  # noqa: ASYNC110 - the pulse counts
            await asyncio.sleep(0.02)


COMPRESSIONS = (grpc.Compression.Gzip, grpc.Compression.Deflate)


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_compressed_messages_are_unzipped_within_a_bound_of_their_own(service: Any, compression: Any) -> None:
    legal = pb.RouteRequest(token_ids=ids(40)).SerializeToString()
    call = service.channel.unary_unary(f"{PREFIX}Route", response_deserializer=pb.RouteResponse.FromString)
    plain, unzipped = await call(legal), await call(legal, compression=compression)
    assert unzipped.scores == plain.scores
    assert unzipped.scores.num_tokens == 40
    for num_bytes in (MAX_UNZIPPED_BYTES + 1, 4 * MAX_MESSAGE_BYTES):  # the second is more than gRPC receives
        with pytest.raises(grpc.aio.AioRpcError, match="when decompressed; send it uncompressed") as caught:
            await call(b"\n" + b"x" * (num_bytes - 1), compression=compression)
        assert reason_of(caught.value)[0] == "INVALID_ARGUMENT"
    assert service.metric("dropped_calls_total", reason="no_message") == 0


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:20] + b"\xff" * 20, lambda data: data[:2]]
)
@pytest.mark.parametrize("wbits", [31, 15])
def test_a_damaged_compressed_message_is_refused(damage: Any, wbits: int) -> None:
    zipper = zlib.compressobj(wbits=wbits)
    whole = zipper.compress(bytes(range(256)) * 4) + zipper.flush()
    assert unzipped(whole) == bytes(range(256)) * 4
    with pytest.raises(InvalidRequest, match="cannot be parsed"):
        unzipped(damage(whole))


def test_what_is_not_compressed_is_left_as_it_is() -> None:
    for message in (b"", b"x", b"\x1f", b"\x1f\x8c", generate(text=TEXT), b"\x78\x9b" + bytes(20)):
        assert unzipped(message) is message


async def test_a_storm_of_compressed_messages_takes_little_time_and_memory(
    serve: Any, make_cluster: Any, make_worker: Any, model: Any
) -> None:
    bomb = zlib.compress(b"\n" + bytes(MAX_MESSAGE_BYTES), wbits=31)
    async with large_service(serve, make_cluster, make_worker, model) as large:
        process = psutil.Process()
        before = process.memory_info().rss
        errors = await asyncio.gather(*(large.call(f"{PREFIX}Generate", bomb) for _ in range(100)))
        assert {reason_of(error)[0] for error in errors} == {"INVALID_ARGUMENT"}
        assert process.memory_info().rss - before < 100 * 2**20
        assert max(large.held_s, default=0) < MAX_HELD_S


async def test_messages_beyond_what_grpc_receives_are_counted(service: Running) -> None:
    huge = b"x" * (2 * MAX_MESSAGE_BYTES + 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.channel.unary_unary(f"{PREFIX}GetModel", None, None)(huge)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await dropped(service, "no_message", 1)
    assert service.metric("requests_total", method="GetModel", code="INVALID_ARGUMENT") == 1
    await service.stub.GetModel(pb.GetModelRequest())


async def get_model_often(service: Any, count: int) -> list[grpc.StatusCode]:
    """Calls that come while the loop is away, from another thread, and how they end."""
    path = f"{PREFIX}GetModel"
    channel = grpc.insecure_channel(f"127.0.0.1:{service.server.port}")
    call = channel.unary_unary(path, pb.GetModelRequest.SerializeToString, None)
    calls = [call.future(pb.GetModelRequest(), timeout=120) for _ in range(count)]
    time.sleep(1)  # noqa: ASYNC251 - the loop is away
    codes = [await asyncio.to_thread(each.code) for each in calls]
    channel.close()
    return codes


async def test_calls_that_grpc_ends_unseen_are_counted(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (("grpc.server.max_pending_requests", 10), ("grpc.server.max_pending_requests_hard_limit", 10))
    monkeypatch.setattr(server, "_OPTIONS", few)
    monkeypatch.setattr(server, "NUM_LOOKS", 4)
    async with serve() as service:
        codes = await get_model_often(service, 100)
        num_cancelled = codes.count(grpc.StatusCode.CANCELLED)
        assert num_cancelled > 50
        await dropped(service, "unseen", num_cancelled)


@pytest.mark.slow
async def test_calls_that_wait_for_the_loop_are_answered(service: Running) -> None:
    """By default gRPC cancels some of more than a thousand, with nothing but CANCELLED."""
    assert set(await get_model_often(service, 4000)) == {grpc.StatusCode.OK}
