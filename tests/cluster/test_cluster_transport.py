"""Tokens between a worker and its routers, over real sockets, with a scripted engine in place of a model."""

import asyncio
import contextlib
import gc
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from expert_pager.v1 import worker_pb2 as pb

from pager.cluster.tokens import INTRODUCTION_TIMEOUT_S, MAX_COMMAND_BYTES, TokenServer, WorkerLink, frame, read_frame
from pager.engine.scheduler import RequestBounds
from pager.errors import Cancelled, DuplicateRequest, InvalidRequest, PagerError, SlowReader, WorkerLost
from pager.observe.metrics import INTERVAL_S, LoopLag, leave_out_of_collections
from pager.threads import LoopThread
from pager.types import (
    Account,
    ExpertPool,
    FinishReason,
    GenerateRequest,
    PagingCounts,
    PoolPolicy,
    PoolSource,
    SamplingParams,
    TokenChunk,
    Usage,
)
from tests.support.waiting import eventually

TOKEN = "let me in"


NOTHING = Account()


@dataclass(frozen=True)
class Failure:
    request_id: str
    error: PagerError
    tenant: str
    account: Account = NOTHING


@dataclass
class ScriptedEngine:
    """Answers only when the test says so; remembers what it was asked."""

    server: TokenServer | None = None
    open: dict[tuple[str, str], GenerateRequest] = field(default_factory=dict)  # by id and tenant
    cancelled: list[str] = field(default_factory=list)

    def submit(self, request: GenerateRequest) -> None:
        if request.sampling.max_tokens < 0:
            raise InvalidRequest("max_tokens must be positive", field="max_tokens")
        self.open[request.id, request.tenant] = request

    def cancel(self, request_id: str, tenant: str) -> bool:
        if self.open.pop((request_id, tenant), None) is None:
            return False
        self.cancelled.append(request_id)
        self.step(Failure(request_id, Cancelled("cancelled"), tenant))
        return True

    def runs(self, request_id: str) -> bool:
        return any(open_id == request_id for open_id, _ in self.open)

    def step(self, *events: TokenChunk | Failure) -> None:
        """From a thread of its own, as the engine does it."""
        assert self.server is not None
        thread = threading.Thread(target=self.server.deliver, args=(list(events),))
        thread.start()
        thread.join()

    def finish(self, *request_ids: str, tenant: str = "t") -> None:
        for request_id in request_ids:
            del self.open[request_id, tenant]
        self.step(*(chunk(request_id, "end", last=True, tenant=tenant) for request_id in request_ids))


def request(request_id: str, max_tokens: int = 8, tenant: str = "t") -> GenerateRequest:
    return GenerateRequest(request_id, tenant, (1, 2, 3), SamplingParams(max_tokens=max_tokens), PoolPolicy())


def chunk(request_id: str, text: str, *, last: bool = False, tenant: str = "t") -> TokenChunk:
    usage = Usage("exact", FinishReason.STOP, 3, 1, None, PagingCounts(), 0.0, None, 0.0, 0.0, "f") if last else None
    return TokenChunk(request_id, (7,), text, usage, tenant)


@dataclass
class Transport:
    engine: ScriptedEngine
    server: TokenServer
    address: str
    links: list[WorkerLink] = field(default_factory=list)
    loads: list[pb.Load] = field(default_factory=list)

    async def link(self, *, token: str = TOKEN, buffer_chunks: int = 64) -> WorkerLink:
        link = WorkerLink(self.address, token, buffer_chunks=buffer_chunks, on_load=self.loads.append)
        self.links.append(link)
        await link.attach()
        return link


@pytest.fixture(params=["tcp", "unix"])
async def transport(request: pytest.FixtureRequest, tmp_path: object) -> AsyncIterator[Transport]:
    engine = ScriptedEngine()
    server = TokenServer(TOKEN)
    engine.server = server
    bind = "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/worker.sock"
    found = Transport(engine, server, await server.start(bind, engine, lambda: pb.Load(waiting=len(engine.open))))
    yield found
    for link in found.links:
        await link.close()
    await server.stop()


async def collect(answer: AsyncIterator[TokenChunk]) -> list[str]:
    return [piece.text async for piece in answer]


async def test_answers_of_one_step_reach_their_own_readers(transport: Transport) -> None:
    first, second = await transport.link(), await transport.link()
    readers = [
        asyncio.create_task(collect(link.generate(request(name))))
        for link, name in ((first, "a"), (first, "b"), (second, "c"))
    ]
    await eventually(lambda: len(transport.engine.open) == 3)
    transport.engine.step(chunk("a", "1"), chunk("b", "2"), chunk("c", "3"))
    transport.engine.step(chunk("c", "4"))
    transport.engine.finish("a", "b", "c")
    assert await asyncio.gather(*readers) == [["1", "end"], ["2", "end"], ["3", "4", "end"]]
    assert (first.num_open, second.num_open) == (0, 0)


@pytest.mark.parametrize("last", [False, True])
async def test_a_chunk_that_cannot_be_encoded_fails_its_own_request(transport: Transport, last: bool) -> None:
    """Half of a pair is no text that protobuf takes."""
    link = await transport.link()
    readers = [asyncio.create_task(collect(link.generate(request(request_id)))) for request_id in "abc"]
    await eventually(lambda: len(transport.engine.open) == 3)
    if last:
        del transport.engine.open["b", "t"]
    transport.engine.step(chunk("a", "1"), chunk("b", "half \ud800", last=last), chunk("c", "3"))
    with pytest.raises(PagerError, match="internal error") as caught:
        await readers[1]
    assert caught.value.reason == "INTERNAL"
    assert transport.engine.cancelled == ([] if last else ["b"])
    transport.engine.finish("a", "c")
    assert [await readers[0], await readers[2]] == [["1", "end"], ["3", "end"]]
    again = asyncio.create_task(collect(link.generate(request("b"))))
    await eventually(lambda: transport.engine.runs("b"))
    transport.engine.finish("b")
    assert await again == ["end"]


async def test_an_error_that_cannot_be_encoded_fails_its_request_all_the_same(transport: Transport) -> None:
    link = await transport.link()
    readers = [asyncio.create_task(collect(link.generate(request(request_id)))) for request_id in "ab"]
    await eventually(lambda: len(transport.engine.open) == 2)
    transport.engine.step(Failure("a", PagerError("no file \udcff"), "t"), chunk("b", "2"))
    with pytest.raises(PagerError, match="internal error"):
        await readers[0]
    transport.engine.finish("b")
    assert await readers[1] == ["2", "end"]


async def test_a_wrong_token_is_refused(transport: Transport) -> None:
    with pytest.raises(WorkerLost, match="own routers"):
        await transport.link(token="guess")


@pytest.mark.parametrize("answer", [frame(b"\xff" * 9), b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", frame(b"")])
async def test_what_is_no_worker_is_a_lost_worker(answer: bytes) -> None:
    """Where a worker has gone, its port may be another program's."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        if answer:
            await reader.read()
            ends.set()
        writer.close()

    ends = asyncio.Event()
    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        link = WorkerLink(f"127.0.0.1:{port}", TOKEN, buffer_chunks=64, on_load=lambda _: None)
        with pytest.raises(WorkerLost, match="did not accept a stream"):
            await link.attach()
        if answer:
            async with asyncio.timeout(60):  # it closes its end
                await ends.wait()


@contextlib.asynccontextmanager
async def connection(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that has said nothing yet."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def push_of(reader: asyncio.StreamReader) -> pb.Push | None:
    received = await read_frame(reader)
    return None if received is None else pb.Push.FromString(received)


async def test_nothing_of_a_connection_without_the_token_is_read(transport: Transport) -> None:
    command = frame(pb.Command(submit=pb.Submit(request_id="a", tenant="t")))
    for first in (frame(b"guess"), frame(b""), frame(b"\xff" * 200)):
        async with connection(transport.address) as (reader, writer):
            writer.write(first + command)
            push = await push_of(reader)
            assert push is None or "own routers" in push.refusal  # the system may drop it when the connection ends
            assert await push_of(reader) is None
    async with connection(transport.address) as (reader, writer):
        writer.write((1 << 31).to_bytes(4, "big") + TOKEN.encode())  # a frame that would take 2 GiB
        push = await push_of(reader)
        assert push is None or "own routers" in push.refusal
    assert not transport.engine.open
    assert transport.loads == []


async def test_a_connection_that_does_not_introduce_itself_is_ended(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pager.cluster.tokens.INTRODUCTION_TIMEOUT_S", 0.05)
    async with connection(transport.address) as (reader, writer):
        writer.write(frame(TOKEN.encode())[:-1])
        push = await push_of(reader)
        assert push is not None
        assert "own routers" in push.refusal
        assert await push_of(reader) is None


@pytest.mark.parametrize("bad", [b"\xff" * 100, b"\xff" * (MAX_COMMAND_BYTES + 1)])
async def test_what_is_no_command_ends_its_own_stream_only(transport: Transport, bad: bytes) -> None:
    link = await transport.link()
    other = asyncio.create_task(collect(link.generate(request("a"))))
    await eventually(lambda: transport.engine.runs("a"))
    async with connection(transport.address) as (reader, writer):
        writer.write(frame(TOKEN.encode()) + frame(pb.Command(submit=pb.Submit(request_id="b", tenant="t", ticket=1))))
        await eventually(lambda: transport.engine.runs("b"))
        writer.write(frame(bad))
        push = await push_of(reader)
        assert push is not None
        assert push.HasField("load")
        while await push_of(reader) is not None:
            pass
    await eventually(lambda: transport.engine.cancelled == ["b"])
    transport.engine.finish("a")
    assert await other == ["end"]


async def test_a_command_has_a_bound_and_a_request_beyond_it_fails_alone(transport: Transport) -> None:
    link = await transport.link()
    other = asyncio.create_task(collect(link.generate(request("a"))))
    await eventually(lambda: transport.engine.runs("a"))
    huge = replace(request("huge"), prompt_token_ids=(1 << 20,) * (MAX_COMMAND_BYTES // 3))
    with pytest.raises(InvalidRequest, match="shorten its prompt"):
        await collect(link.generate(huge))
    assert link.num_open == 1
    transport.engine.finish("a")
    assert await other == ["end"]


async def test_a_router_that_reads_late_gets_everything_in_order(transport: Transport) -> None:
    """More than the system holds for a connection: the engine's thread goes on, and the event loop sends the rest."""
    async with connection(transport.address) as (reader, writer):
        writer.write(frame(TOKEN.encode()))
        writer.write(frame(pb.Command(submit=pb.Submit(request_id="a", tenant="t", ticket=1))))
        await eventually(lambda: transport.engine.runs("a"))
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        texts = [f"{number} " * 50_000 for number in range(60)]
        for text in texts:
            transport.engine.step(chunk("a", text))
        transport.engine.finish("a")
        await transport.server.announce_drain()
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        found: list[pb.Chunk] = []
        while not found or not found[-1].HasField("usage"):
            push = await push_of(reader)
            assert push is not None
            found += push.step.chunks
        assert [each.text for each in found] == [*texts, "end"]
        push = await push_of(reader)
        assert push is not None
        assert push.HasField("load")


async def test_a_router_that_reads_nothing_is_given_up(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pager.cluster.tokens.MAX_UNREAD_STEPS", 8)
    link = await transport.link()
    other = asyncio.create_task(collect(link.generate(request("b"))))
    async with connection(transport.address) as (reader, writer):
        writer.write(frame(TOKEN.encode()))
        writer.write(frame(pb.Command(submit=pb.Submit(request_id="a", tenant="t", ticket=1))))
        await eventually(lambda: len(transport.engine.open) == 2)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(60):
            transport.engine.step(chunk("a", "x" * 2**20))
        await eventually(lambda: transport.engine.cancelled == ["a"])
    transport.engine.finish("b")
    assert await other == ["end"]


async def test_a_step_is_sent_by_the_engines_own_thread(tmp_path: Path) -> None:
    """It reaches the router while the worker's event loop is held."""
    thread = LoopThread("tokens")
    server, go_on = TokenServer(TOKEN), threading.Event()
    engine = ScriptedEngine(server)
    address = thread.run(server.start(f"unix:{tmp_path}/worker.sock", engine, pb.Load))
    link = WorkerLink(address, TOKEN, buffer_chunks=64, on_load=lambda _: None)
    try:
        await link.attach()
        answer = link.generate(request("a"))
        first = asyncio.ensure_future(anext(answer))
        await eventually(lambda: engine.runs("a"))
        thread.loop.call_soon_threadsafe(go_on.wait, 120)
        engine.step(chunk("a", "1"))
        assert (await asyncio.wait_for(first, 60)).text == "1"
        assert not go_on.is_set()
        await answer.aclose()
    finally:
        go_on.set()
        await link.close()
        thread.run(server.stop())
        thread.stop()


async def test_both_ends_of_a_connection_between_machines_notice_that_the_other_is_gone() -> None:
    engine, server = ScriptedEngine(), TokenServer(TOKEN)
    address = await server.start("127.0.0.1:0", engine, pb.Load)
    link = WorkerLink(address, TOKEN, buffer_chunks=64, on_load=lambda _: None)
    try:
        await link.attach()
        (stream,) = server._streams
        assert link._writer is not None
        for end in (stream._socket, link._writer.get_extra_info("socket")):
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle_s, interval_s, num_probes = (
                end.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle_s + interval_s * num_probes <= 40
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 40_000
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        await link.close()
        await server.stop()


async def test_what_was_delivered_is_sent_before_a_stream_ends(transport: Transport) -> None:
    link = await transport.link(buffer_chunks=1024)
    reader = asyncio.create_task(collect(link.generate(request("a"))))
    await eventually(lambda: transport.engine.runs("a"))
    for number in range(200):
        transport.engine.step(chunk("a", f"{number} " * 5_000))
    transport.engine.finish("a")
    await transport.server.finish(60)
    assert len(await reader) == 201
    await asyncio.wait_for(link.broken.wait(), 60)


async def test_a_connection_that_says_nothing_does_not_hold_up_the_end(transport: Transport) -> None:
    async with connection(transport.address) as (reader, _):
        await eventually(lambda: transport.server._connections)
        before_s = time.monotonic()
        await transport.server.finish(600)
        assert time.monotonic() - before_s < INTRODUCTION_TIMEOUT_S
        assert await push_of(reader) is None


async def test_a_refused_request_raises_the_engines_error(transport: Transport) -> None:
    link = await transport.link()
    with pytest.raises(InvalidRequest, match="max_tokens must be positive") as caught:
        await collect(link.generate(request("a", max_tokens=-1)))
    assert caught.value.field == "max_tokens"


async def test_leaving_the_iterator_cancels_on_the_worker(transport: Transport) -> None:
    link = await transport.link()
    answer = link.generate(request("a"))
    async with contextlib.aclosing(answer):
        first = asyncio.ensure_future(anext(answer))
        await eventually(lambda: transport.engine.runs("a"))
        transport.engine.step(chunk("a", "1"))
        assert (await first).text == "1"
    await eventually(lambda: transport.engine.cancelled == ["a"])


async def test_an_id_in_use_is_refused_and_free_again_after_its_end(transport: Transport) -> None:
    one, other = await transport.link(), await transport.link()
    reader = asyncio.create_task(collect(one.generate(request("a"))))
    await eventually(lambda: transport.engine.runs("a"))
    with pytest.raises(DuplicateRequest):
        await collect(other.generate(request("a")))
    transport.engine.finish("a")
    assert await reader == ["end"]
    again = asyncio.create_task(collect(other.generate(request("a"))))
    await eventually(lambda: transport.engine.runs("a"))
    transport.engine.finish("a")
    assert await again == ["end"]


async def test_an_id_is_its_tenants_own(transport: Transport) -> None:
    """Another tenant that takes the id of a running request is served, and neither hears of the other."""
    one, other = await transport.link(), await transport.link()
    mine = asyncio.create_task(collect(one.generate(request("a", tenant="mine"))))
    yours = asyncio.create_task(collect(other.generate(request("a", tenant="yours"))))
    await eventually(lambda: len(transport.engine.open) == 2)
    transport.engine.step(chunk("a", "to me", tenant="mine"), chunk("a", "to you", tenant="yours"))
    assert not await one.abort("a", "spy")
    assert await one.abort("a", "yours")
    with pytest.raises(Cancelled):
        await yours
    transport.engine.finish("a", tenant="mine")
    assert await mine == ["to me", "end"]


class Heard:
    """What a request's observer was told."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.accounts: list[Account] = []

    def sent(self) -> None:
        self.num_sent += 1

    def settled(self, account: Account) -> None:
        self.accounts.append(account)


async def test_what_a_request_has_used_is_told_once_however_it_ends(transport: Transport) -> None:
    link, heard = await transport.link(), {name: Heard() for name in ("whole", "left", "failed", "refused")}
    used = Account(3, 2, PagingCounts(4, 5, 100, 200, 0.25), 0.5)
    readers = {
        name: asyncio.create_task(collect(link.generate(request(name, 8 if name != "refused" else -1), heard[name])))
        for name in heard
    }
    await eventually(lambda: len(transport.engine.open) == 3)
    transport.engine.step(chunk("left", "1"))
    readers["left"].cancel()
    await asyncio.gather(readers["left"], return_exceptions=True)
    assert heard["left"].accounts == [], "the worker has the last word"
    await eventually(lambda: transport.engine.cancelled == ["left"])
    transport.engine.step(Failure("failed", Cancelled("cancelled"), "t", used))
    transport.engine.finish("whole")
    await asyncio.gather(*readers.values(), return_exceptions=True)
    await eventually(lambda: heard["left"].accounts)
    assert {name: each.accounts for name, each in heard.items()} == {
        "whole": [Account(3, 1, PagingCounts(), 0.0)],
        "left": [NOTHING],
        "failed": [used],
        "refused": [],
    }
    assert [each.num_sent for each in heard.values()] == [1] * 4


async def test_a_request_that_the_transport_failed_is_accounted_for_when_the_engine_ends_it(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no such token")

    link, heard = await transport.link(), Heard()
    reader = asyncio.create_task(collect(link.generate(request("a"), heard)))
    await eventually(lambda: transport.engine.runs("a"))
    monkeypatch.setattr("pager.cluster.tokens.add_chunk", fails)
    transport.engine.step(chunk("a", "1"))
    with pytest.raises(PagerError, match="internal error"):
        await reader
    await eventually(lambda: heard.accounts)
    assert heard.accounts == [NOTHING]


async def test_leaving_the_iterator_cancels_the_tenants_own_request(transport: Transport) -> None:
    link = await transport.link()
    mine = asyncio.create_task(collect(link.generate(request("a", tenant="mine"))))
    yours = asyncio.create_task(collect(link.generate(request("a", tenant="yours"))))
    await eventually(lambda: len(transport.engine.open) == 2)
    yours.cancel()
    await eventually(lambda: list(transport.engine.open) == [("a", "mine")])
    transport.engine.finish("a", tenant="mine")
    assert await mine == ["end"]


async def test_a_late_piece_of_a_cancelled_request_never_reaches_a_new_one_of_the_same_id(transport: Transport) -> None:
    link = await transport.link()
    old = asyncio.create_task(collect(link.generate(request("a"))))
    await eventually(lambda: transport.engine.runs("a"))
    transport.engine.finish("a")  # on its way while the reader leaves
    old.cancel()
    await asyncio.gather(old, return_exceptions=True)
    new = asyncio.create_task(collect(link.generate(request("a"))))
    await eventually(lambda: transport.engine.runs("a"))
    transport.engine.step(chunk("a", "new"))
    transport.engine.finish("a")
    assert await new == ["new", "end"]


async def test_a_slow_reader_is_cut_off_and_others_are_not(transport: Transport) -> None:
    link = await transport.link(buffer_chunks=4)
    slow, quick = link.generate(request("slow")), link.generate(request("quick"))
    got: list[str] = []

    async def read_quickly() -> None:
        async for piece in quick:
            got.append(piece.text)

    reader = asyncio.create_task(read_quickly())
    first = asyncio.ensure_future(anext(slow))
    await eventually(lambda: len(transport.engine.open) == 2)
    for index in range(6):
        transport.engine.step(chunk("slow", str(index)), chunk("quick", str(index)))
        await eventually(lambda: len(got) > index)  # noqa: B023 - awaited before the next
    assert (await first).text == "0"
    await eventually(lambda: transport.engine.cancelled == ["slow"])
    with pytest.raises(SlowReader):
        await collect(slow)
    transport.engine.finish("quick")
    await reader
    assert got == ["0", "1", "2", "3", "4", "5", "end"]


async def test_a_router_that_goes_takes_only_its_own_requests_with_it(transport: Transport) -> None:
    leaving, staying = await transport.link(), await transport.link()
    lost = asyncio.create_task(collect(leaving.generate(request("lost"))))
    kept = asyncio.create_task(collect(staying.generate(request("kept"))))
    await eventually(lambda: len(transport.engine.open) == 2)
    await leaving.close()
    await eventually(lambda: transport.engine.cancelled == ["lost"])
    with pytest.raises(WorkerLost):
        await lost
    transport.engine.finish("kept")
    assert await kept == ["end"]


async def test_a_worker_that_goes_ends_every_answer(transport: Transport) -> None:
    link = await transport.link()
    readers = [asyncio.create_task(collect(link.generate(request(name)))) for name in "abc"]
    await eventually(lambda: len(transport.engine.open) == 3)
    await transport.server.stop()
    for outcome in await asyncio.gather(*readers, return_exceptions=True):
        assert isinstance(outcome, WorkerLost)
        assert outcome.retry_after_s
    await asyncio.wait_for(link.broken.wait(), 60)
    with pytest.raises(WorkerLost):
        await collect(link.generate(request("d")))


async def test_abort_works_through_another_router_but_not_for_another_tenant(transport: Transport) -> None:
    mine, other = await transport.link(), await transport.link()
    reader = asyncio.create_task(collect(mine.generate(request("a", tenant="mine"))))
    await eventually(lambda: transport.engine.runs("a"))
    assert not await other.abort("a", "someone else")
    assert await other.abort("a", "mine")
    assert not await other.abort("a", "mine")
    with pytest.raises(Cancelled):
        await reader


async def test_load_is_pushed_when_it_changes(transport: Transport) -> None:
    link = await transport.link()
    assert [load.waiting for load in transport.loads] == [0]
    reader: Awaitable[list[str]] = asyncio.create_task(collect(link.generate(request("a"))))
    await eventually(lambda: transport.loads[-1].waiting == 1)
    transport.engine.finish("a")
    await reader


# --- the worker's loop ----------------------------------------------------------------------------------------------


async def test_no_request_keeps_the_token_loop() -> None:
    """The largest that a router lets through to a large model: a context of ids, all experts as its pool, all stops."""
    held_s: list[float] = []
    slept_s = 0.0

    def clock() -> float:
        """CPU time of the loop's thread, so that other programs do not count, and the sleep that the probe expects."""
        nonlocal slept_s
        slept_s += INTERVAL_S
        return time.thread_time() + slept_s

    context, layers = 1 << 17, 64
    intake = RequestBounds(context, context, context)

    class CheckingEngine(ScriptedEngine):
        def submit(self, request: GenerateRequest) -> None:
            intake.check(request)
            super().submit(request)

    thread = LoopThread("tokens")
    server, lag = TokenServer(TOKEN), LoopLag(held_s.append, clock)
    engine = CheckingEngine(server)
    address = thread.run(server.start("127.0.0.1:0", engine, pb.Load))
    leave_out_of_collections()  # as a worker does
    thread.run(lag.start())
    link = WorkerLink(address, TOKEN, buffer_chunks=64, on_load=lambda _: None)
    try:
        await link.attach()
        pool = ExpertPool((tuple(range(255)),) * layers)
        sampling = SamplingParams(max_tokens=1, stop=("é" * 256,) * 16)
        large = GenerateRequest(
            "large", "t", tuple(range(context - 1)), sampling, PoolPolicy(source=PoolSource.FIXED, fixed=pool)
        )
        answer = asyncio.create_task(collect(link.generate(replace(large, predicted=pool, tracestate="k=v," * 100))))
        await eventually(lambda: engine.runs("large"))
        last = chunk("large", "end", last=True)
        assert last.usage is not None
        engine.step(replace(last, usage=replace(last.usage, pool=pool)))
        assert await answer == ["end"]
        seen = len(held_s)
        await eventually(lambda: len(held_s) > seen + 1)
        assert engine.open["large", "t"].pool.fixed == pool
        assert max(held_s) < 0.05
    finally:
        await link.close()
        thread.run(lag.stop())
        thread.run(server.stop())
        thread.stop()
        gc.unfreeze()


async def test_several_answers_end_one_by_one_and_are_settled_once(transport: Transport) -> None:
    observer, link = Heard(), await transport.link(buffer_chunks=2)
    asked = replace(request("a"), sampling=SamplingParams(n=3))
    found: list[TokenChunk] = []

    async def read() -> None:
        async for piece in link.generate(asked, observer):
            found.append(piece)

    reading = asyncio.create_task(read())
    await eventually(lambda: transport.engine.runs("a"))
    parts = [replace(chunk("a", f"{index}"), index=index, num_going_on=2) for index in range(3)]
    transport.engine.step(*parts, *parts)  # six at once: two for each answer
    for num_going_on, index in ((2, 1), (1, 2), (0, 0)):
        transport.engine.step(part_of("a", index, num_going_on))
    await asyncio.wait_for(reading, 30)
    assert [(piece.index, piece.text) for piece in found[6:]] == [(1, "end"), (2, "end"), (0, "end")]
    assert [piece.is_last for piece in found] == [False] * 8 + [True]
    (account,) = observer.accounts
    assert (account.prompt_tokens, account.completion_tokens, account.paging.experts_hit) == (3, 9, 3)
    assert link.num_open == 0


def part_of(request_id: str, index: int, num_going_on: int, text: str = "end") -> TokenChunk:
    """The last chunk of one of several answers: three tokens, and as many hits as its index says."""
    last = chunk(request_id, text, last=True)
    assert last.usage is not None
    usage = replace(last.usage, completion_tokens=3, paging=PagingCounts(experts_hit=index))
    return replace(last, usage=usage, index=index, num_going_on=num_going_on)


async def test_the_workers_log_counts_the_tokens_of_all_answers(
    transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    link = await transport.link()
    reading = asyncio.create_task(collect(link.generate(replace(request("a"), sampling=SamplingParams(n=2)))))
    await eventually(lambda: transport.engine.runs("a"))
    with caplog.at_level(logging.INFO, "pager.cluster.tokens"):
        transport.engine.step(part_of("a", 1, 1), part_of("a", 0, 0))
        await reading
    (record,) = [record for record in caplog.records if "outcome=stop" in record.getMessage()]
    assert record.facts["completion_tokens"] == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [0, 1, 2])
async def test_a_request_of_several_answers_of_which_one_cannot_be_sent_is_settled_once_and_whole(
    transport: Transport, bad: int
) -> None:
    """Whichever of the three it is: half of a pair is no text that protobuf takes."""
    observer, link = Heard(), await transport.link()
    asked = replace(request("a"), sampling=SamplingParams(n=3))
    reading = asyncio.create_task(collect(link.generate(asked, observer)))
    await eventually(lambda: transport.engine.runs("a"))
    del transport.engine.open["a", "t"]  # the engine has ended it before it can be cancelled
    transport.engine.step(
        *(part_of("a", index, 2 - index, "half \ud800" if index == bad else "end") for index in range(3))
    )
    with pytest.raises(PagerError, match="internal error"):
        await reading
    await eventually(lambda: observer.accounts)
    again = asyncio.create_task(collect(link.generate(request("a"))))
    await eventually(lambda: transport.engine.runs("a"))
    transport.engine.finish("a")
    await again
    assert [(each.completion_tokens, each.paging.experts_hit) for each in observer.accounts] == [(9, 3)]
