"""A line of JSON: what it has, and that whatever is logged it stays a line."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest

from pager.cluster import ray_session
from pager.observe import logs

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def root() -> Iterator[None]:
    """The test runner's own handlers are there again afterwards."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.captureWarnings(False)


def test_a_line_has_the_ids_of_the_call_that_it_is_about(root: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "router")
    log = logging.getLogger("expert_pager.router")
    log.info("outside of a call")
    logs.request_id.set("r-1")
    logs.trace_context.set(TRACEPARENT)
    log.info("took %d ms", 5, extra=logs.facts(code="OK", took_ms=5, missing=None))
    logs.request_id.set("")
    logs.trace_context.set("")
    outside, inside = map(json.loads, capsys.readouterr().err.splitlines())
    assert outside.keys() == {"time", "level", "source", "logger", "message"}
    assert (inside["source"], inside["level"], inside["logger"]) == ("router", "INFO", "expert_pager.router")
    assert (inside["message"], inside["code"], inside["took_ms"]) == ("took 5 ms", "OK", 5)
    assert (inside["request_id"], inside["trace_id"]) == ("r-1", TRACE)
    assert "missing" not in inside


def test_lines_and_errors_of_several_lines_are_one(root: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "worker-0")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logging.getLogger("x").exception("a\nb \u2028 c")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry["message"] == "a\nb \u2028 c"
    assert entry["exception"].endswith("ValueError: first\nsecond")


def test_text_names_its_source(root: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "worker-1")
    logging.getLogger("x").warning("hm")
    assert capsys.readouterr().err.endswith(" W worker-1 x: hm\n")


@pytest.mark.parametrize(
    "given",
    [
        "",
        "00-zz",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        b"\x00",
    ],
)
def test_a_call_without_a_legal_trace_gets_one(given: Any) -> None:
    made = [logs.traceparent_of([("other", "1"), ("traceparent", given)]) for _ in range(2)]
    assert made[0] != made[1]
    assert all(len(logs.trace_id_of(each)) == 32 for each in made)
    assert logs.trace_id_of("nonsense") == logs.trace_id_of(None) == ""


def test_the_callers_trace_is_kept() -> None:
    assert logs.traceparent_of([("traceparent", TRACEPARENT)]) == TRACEPARENT
    assert logs.trace_id_of(TRACEPARENT) == TRACE


def test_what_workers_wrote_is_passed_on_as_it_is_and_the_rest_is_wrapped(
    root: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("json", "router")
    line = '{"source": "worker-0", "message": "ready"}'
    ray_session._pass_on("json", {"lines": [line, "Fatal: {", "{not json", " "], "actor_name": "WorkerActor", "pid": 7})
    mine, *wrapped = [json.loads(each) for each in capsys.readouterr().err.splitlines()]
    assert mine == json.loads(line)
    assert [each["message"] for each in wrapped] == ["Fatal: {", "{not json"]
    assert {each["logger"] for each in wrapped} == {"expert_pager.ray"}
    assert all((each["actor"], each["pid"]) == ("WorkerActor", 7) for each in wrapped)


def test_what_is_passed_on_leaves_no_room_for_another_threads_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        """To which another thread writes a line whenever it can."""

        def write(self, text: str) -> int:
            return super().write(text + '{"message": "from another"}\n')

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    ray_session._pass_on("json", {"lines": ['{"message": "ready"}'] * 2})
    said = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    assert said == ["ready", "from another"] * 2


@pytest.mark.parametrize("kind", ["json", "text"])
def test_what_ray_says_itself_is_a_log_line_and_the_end_of_a_worker_is_not_said_twice(
    root: None, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    logs.configure(kind, "router")
    died = "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot"
    for line in (died, "\x1b[33mThe node with node id 5 is\nlow on memory\x1b[0m"):
        ray_session._pass_on(kind, {"lines": [line], "pid": "raylet", "is_err": False})
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert "Ray's raylet: The node with node id 5 is low on memory" in line
    assert "\x1b" not in line
    assert line.startswith("{") == (kind == "json")


def test_lines_of_workers_have_one_prefix_and_no_colours(root: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "router")
    line = "2026-11-30 10:10:18,426 I worker-0 pager.cluster.worker: ready"
    ray_session._pass_on("text", {"lines": [f"\x1b[36m{line}\x1b[0m"], "actor_name": "WorkerActor", "pid": 7})
    assert capsys.readouterr() == ("", f"{line}\n")


def test_other_libraries_are_heard_from_warnings_on(root: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "router")
    for name in ("pager.cluster.worker", "expert_pager.ray", "router_service.server"):
        logging.getLogger(name).info("own")
    logging.getLogger("another.library").info("cache stats:")
    logging.getLogger("another").warning("heard")
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in said] == ["own", "own", "own", "heard"]


async def test_a_call_that_has_ended_is_no_error_of_the_service(root: None, capsys: pytest.CaptureFixture[str]) -> None:
    """gRPC itself refuses a call whose compression a server does not take, and then has nowhere to send the status
    that the server has for it.
    """
    logged: list[str] = []

    def first(record: logging.LogRecord) -> bool:
        logged.append(record.getMessage())
        return True

    async def refuse(messages: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "not here")

    grpc_log = logging.getLogger(logs.GRPC)
    before = grpc_log.filters[:]
    grpc_log.filters[:] = [first]
    server = grpc.aio.server(options=(("grpc.compression_enabled_algorithms_bitset", 1),))
    handlers = {"Refuse": grpc.stream_stream_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()

    def call() -> None:
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/test.Service/Refuse", bytes, bytes)(b"x" * 10_000, compression=grpc.Compression.Gzip)

    try:
        logs.configure("text", "router")
        end_s = time.monotonic() + 120
        while not logged and time.monotonic() < end_s:
            await asyncio.to_thread(call)
        assert "ExecuteBatchError" in logged[0]
        grpc_log.error("Unexpected [ValueError] raised by servicer method")
    finally:
        await server.stop(None)
        grpc_log.filters[:] = before
    said = [line for line in capsys.readouterr().err.splitlines() if logs.GRPC in line]
    assert [line.rpartition(": ")[2] for line in said] == ["Unexpected [ValueError] raised by servicer method"]
