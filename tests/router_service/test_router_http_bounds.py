"""No HTTP request keeps the event loop, and no connection is kept that sends nothing: whatever clients send."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from expert_pager.v1 import expert_pager_pb2 as pb

from pager.errors import InvalidRequest
from pager.observe.metrics import INTERVAL_S
from pager.sampling import MAX_PROMPT_LOGPROBS
from pager.tokenizing import read_tokenizer
from pager.types import TokenChunk, TokenLogprobs
from router_service import http as front
from router_service.admission import AdmissionLimits
from router_service.api import Api
from router_service.chat import ChatTemplate, TokenTexts
from router_service.http import HEAD_TIMEOUT_S, MAX_BODY_BYTES, HttpServer
from router_service.requests import MAX_JSON_CONTAINERS, MAX_JSON_KEYS, MAX_JSON_VALUES, check_json
from tests.router_service.test_router_bounds import CONTEXT, MAX_HELD_S, large_service
from tests.support.files import EMO_TINY
from tests.support.values import some

pytestmark = pytest.mark.alone

COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
MODEL = '{"model":"tiny","max_tokens":1'
PROMPT = f'{MODEL},"prompt":'
TURNS = f'{MODEL},"messages":'
ONE_TURN = f'{TURNS}[{{"role":"user","content":"x"}}]'


def many(item: Any) -> str:
    """A list of as many items as a body may have: its JSON."""
    text = item if isinstance(item, str) else json.dumps(item)
    counts = (text.count("{") + text.count("["), text.count(":"), text.count(",") + 1)
    most = (MAX_JSON_CONTAINERS - 16, MAX_JSON_KEYS - 16, MAX_JSON_VALUES - 16)
    num_items = min(each // count for each, count in zip(most, counts, strict=True) if count)
    return "[" + ",".join([text] * min(num_items, (MAX_BODY_BYTES - 500) // (len(text) + 1))) + "]"


def pairs(count: int) -> str:
    return "{" + ",".join(f'"{number}":{number}' for number in range(count)) + "}"


def long(text: str) -> str:
    return '"' + text * ((MAX_BODY_BYTES - 500) // len(text)) + '"'


@dataclass(frozen=True)
class Case:
    path: str
    body: str
    status: int = 400


QUOTE, BACKSLASH = '"', "\\"
NO_ARGUMENTS = {"id": "", "function": {"name": "", "arguments": ""}}
NULLS = {str(number): {"type": "null"} for number in range(2500)}
INPUT = '{"model":"tiny","max_output_tokens":1,"input":'
CASES = {
    "a long text": Case(COMPLETIONS, f"{PROMPT}{long('SELECT name; ')}}}"),
    "a text of escapes": Case(COMPLETIONS, f"{PROMPT}{long(BACKSLASH + 'u00e9')}}}"),
    "a text of quotes and braces": Case(COMPLETIONS, f"{PROMPT}{long(BACKSLASH + QUOTE + '{[:,')}}}"),
    "as many ids as fit": Case(COMPLETIONS, f"{PROMPT}{json.dumps([99999] * (CONTEXT - 1))}}}", 200),
    "too many ids": Case(COMPLETIONS, f"{PROMPT}{many(99999)}}}"),
    "a list of a million": Case(COMPLETIONS, f"{PROMPT}[{'1,' * (MAX_BODY_BYTES // 2 - 99)}1]}}"),
    "objects as ids": Case(COMPLETIONS, f"{PROMPT}{many({})}}}"),
    "numbers as ids": Case(COMPLETIONS, f"{PROMPT}{many(1.5e9)}}}"),
    "lists of ids": Case(COMPLETIONS, f"{PROMPT}{many([1, 2])}}}"),
    "a million lists": Case(COMPLETIONS, f"{PROMPT}[{'[],' * (MAX_BODY_BYTES // 3 - 99)}[]]}}"),
    "empty texts": Case(COMPLETIONS, f"{PROMPT}{many(QUOTE * 2)}}}"),
    "a deep list": Case(COMPLETIONS, "[" * MAX_BODY_BYTES),
    "deep lists": Case(COMPLETIONS, f"{PROMPT}{many('[' * 99 + ']' * 99)}}}"),
    "a long number": Case(COMPLETIONS, f"{PROMPT}{'9' * (MAX_BODY_BYTES - 500)}}}"),
    "no JSON": Case(COMPLETIONS, "x" * MAX_BODY_BYTES),
    "many biases": Case(COMPLETIONS, f'{PROMPT}"x","logit_bias":{pairs(MAX_JSON_KEYS - 16)}}}'),
    "many unknown keys": Case(COMPLETIONS, f"{MODEL},{pairs(MAX_JSON_KEYS - 16)[1:]}"),
    "many keys": Case(COMPLETIONS, f"{MODEL},{pairs(100_000)[1:]}"),
    "many stop strings": Case(COMPLETIONS, f'{PROMPT}"x","stop":{many(QUOTE * 2)}}}'),
    "a wide schema": Case(COMPLETIONS, f'{PROMPT}"x","guided_json":{pairs(MAX_JSON_KEYS - 16)}}}'),
    "a schema with a long list": Case(COMPLETIONS, f'{PROMPT}"x","guided_json":{{"enum":{many(1)}}}}}'),
    "a schema as text": Case(COMPLETIONS, f'{PROMPT}"x","guided_json":{long("[] ")}}}'),
    "the largest schema": Case(COMPLETIONS, f'{PROMPT}"x","guided_json":{json.dumps({"properties": NULLS})}}}', 200),
    "a long expression": Case(COMPLETIONS, f'{PROMPT}"x","guided_regex":{long("(a|b)*")}}}'),
    "many turns": Case(CHAT, f"{TURNS}{many({'role': 'user'})}}}", 200),
    "turns of parts": Case(CHAT, f'{TURNS}[{{"role":"user","content":{many({"type": "text", "text": "a"})}}}]}}', 200),
    "turns that are none": Case(CHAT, f"{TURNS}{many({})}}}"),
    "turns that are numbers": Case(CHAT, f"{TURNS}{many(1)}}}"),
    "a long turn": Case(CHAT, f'{TURNS}[{{"role":"user","content":{long("a b ")}}}]}}'),
    "many tools": Case(CHAT, f'{ONE_TURN},"tools":{many({"type": "function", "function": {"name": "a"}})}}}', 200),
    "many calls": Case(CHAT, f'{TURNS}[{{"role":"assistant","tool_calls":{many(NO_ARGUMENTS)}}}]}}', 200),
    "input of many items": Case(RESPONSES, f"{INPUT}{many({'role': 'user'})}}}", 200),
    "input of nothing": Case(RESPONSES, f"{INPUT}{many({})}}}"),
    "many blocks": Case(MESSAGES, f'{TURNS}[{{"role":"user","content":{many({"type": "text"})}}}]}}', 200),
    "many messages": Case(MESSAGES, f"{TURNS}{many({'role': 'user', 'content': 'a'})}}}", 200),
    "ids to be decoded": Case("/detokenize", f'{{"tokens":{json.dumps([1] * CONTEXT)}}}', 200),
    "a text to be counted": Case("/tokenize", f'{{"prompt":{long("SELECT ")}}}'),
}


@asynccontextmanager
async def fronted(pipeline: Any) -> AsyncIterator[HttpServer]:
    template = some(ChatTemplate.read(EMO_TINY))
    server = HttpServer(Api(pipeline, TokenTexts(some(read_tokenizer(EMO_TINY))), template, 30.0).app())
    await server.start("127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.stop()


def post(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.slow
async def test_no_body_keeps_the_event_loop(
    serve: Callable[..., Any], make_cluster: Any, make_worker: Callable[..., Any], model: Any
) -> None:
    """Each of `CASES`: how it ends, and for how long at most it kept the loop."""
    wrong = []
    async with (
        large_service(serve, make_cluster, make_worker, model) as large,
        fronted(large.service.pipeline) as server,
    ):
        for path in (COMPLETIONS, CHAT, RESPONSES, MESSAGES):  # what is done once is done
            await asyncio.to_thread(post, server.port, path, f"{ONE_TURN}}}".encode())
        for name, case in CASES.items():
            body = case.body.encode()
            assert len(body) <= MAX_BODY_BYTES, name
            large.held_s.clear()
            status, answer = await asyncio.to_thread(post, server.port, case.path, body)
            await asyncio.sleep(2 * INTERVAL_S)
            held_s = max(large.held_s)
            print(f"{name:30} {len(body):8} {status} {held_s:.3f} s {answer[:90]!r}")
            if held_s > MAX_HELD_S or status != case.status:
                wrong.append(f"{name}: {status}, {held_s:.3f} s, {answer[:200]!r}")
        assert not wrong, "\n".join(wrong)
        assert large.service.pipeline.admission.num_requests == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
async def test_what_is_within_strings_does_not_count(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router_service.requests._SCANNED_BYTES", size)
    monkeypatch.setattr("router_service.requests._MOST_OF", {b"{": 2, b"[": 2, b":": 3, b",": 3})
    for text in ("{[:,{[:,{[:,", '"{"{"{"{', '\\"{\\"{\\"{\\', "\\\\\\", "é{,{,{,{,"):
        await check_json(json.dumps({"a": text, text: 1}, ensure_ascii=False).encode())
    wrong: Any
    for wrong in ([[], [], []], {"a": {"b": {"c": 1}}}, {"a\\": 1, '"': 1, "c": 1, "d": 1}, [1, 2, 3, 4, 5]):
        with pytest.raises(InvalidRequest, match="the body has more than"):
            await check_json(json.dumps(wrong).encode())


# --- connections ----------------------------------------------------------------------------------------------------

WHOLE = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def health(connection: Connection) -> bytes:
    """The head and the body of an answer on a connection that stays open."""
    reader, writer = connection
    writer.write(WHOLE)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    return head + await reader.readexactly(int(length.split()[1]))


async def test_a_head_that_never_ends_ends_the_connection(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "HEAD_TIMEOUT_S", 1.0)
    async with fronted(service.pipeline) as server, asyncio.timeout(HEAD_TIMEOUT_S):
        new, used, idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        for each in (used, idle):
            assert (await health(each)).startswith(b"HTTP/1.1 200")
        for _, writer in (new, used):
            writer.write(WHOLE[:20])
        started_s = time.monotonic()
        assert [await reader.read() for reader, _ in (new, used)] == [b"", b""]
        assert time.monotonic() - started_s > 0.5
        assert (await health(idle)).startswith(b"HTTP/1.1 200")  # one that is only quiet is kept
        for _, writer in (new, used, idle):
            writer.close()


async def test_a_thousand_connections_are_each_answered(service: Any) -> None:
    async with fronted(service.pipeline) as server, asyncio.timeout(240):
        quiet = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(1000)]
        answers = await asyncio.gather(*(health(each) for each in quiet))
        assert {answer[:15] for answer in answers} == {b"HTTP/1.1 200 OK"}
        status, _ = await asyncio.to_thread(
            post, server.port, COMPLETIONS, b'{"model":"tiny","prompt":"x","max_tokens":3}'
        )
        assert status == 200
        for _, writer in quiet:
            writer.close()


async def test_an_answer_carries_the_ids_of_its_request(service: Any) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with fronted(service.pipeline) as server, asyncio.timeout(60):

        def head() -> Any:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", "/v1/models", headers={"x-request-id": "mine", "traceparent": trace})
            answer = connection.getresponse()
            answer.read()
            connection.close()
            return answer.headers

        headers = await asyncio.to_thread(head)
        assert headers["x-request-id"] == "mine"
        assert headers["traceparent"].split("-")[1] == trace.split("-")[1]


async def test_a_head_of_many_headers_is_refused(service: Any) -> None:
    async with fronted(service.pipeline) as server, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(WHOLE[:-2] + b"".join(b"x-%d: y\r\n" % number for number in range(10_000)))
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
        writer.close()


# --- answers --------------------------------------------------------------------------------------------------------


async def test_log_probabilities_of_a_long_prompt_do_not_keep_it_either(
    serve: Callable[..., Any], make_cluster: Any, make_worker: Callable[..., Any], model: Any
) -> None:
    """Whole and streamed."""
    num_tokens = MAX_PROMPT_LOGPROBS // 16
    logprobs = tuple(TokenLogprobs(number % 4000, -1.5, (1, 2, 3), (-0.5, -1.25, -2.0)) for number in range(num_tokens))

    class Reporting(make_cluster):  # type: ignore[misc]
        async def generate(self, *arguments: Any) -> AsyncIterator[TokenChunk]:
            async for chunk in super().generate(*arguments):
                yield replace(chunk, prompt_logprobs=logprobs if chunk.usage else ())

    fields = {"model": "tiny", "max_tokens": 1, "echo": True, "logprobs": 3, "prompt": [1] * (CONTEXT - 1)}
    async with (
        large_service(serve, Reporting, make_worker, model) as large,
        fronted(large.service.pipeline) as server,
    ):
        for is_streamed in (False, True):
            body = json.dumps(fields | {"stream": is_streamed}).encode()
            large.held_s.clear()
            status, answer = await asyncio.to_thread(post, server.port, COMPLETIONS, body)
            await asyncio.sleep(2 * INTERVAL_S)
            assert (status, answer.count(b"-1.5")) == (200, 2 * num_tokens)
            assert max(large.held_s) < MAX_HELD_S


NUM_STREAMS, NUM_TOKENS = 256, 40


@pytest.mark.slow
async def test_256_streams_of_events_cost_no_more_than_those_of_grpc(serve: Callable[..., Any], model: Any) -> None:
    """By processor time, client and service together: the time on a clock is others' on a busy machine."""
    prompt = "SELECT name FROM users WHERE id = 12345; "[:NUM_TOKENS]
    sampling = pb.SamplingParams(max_tokens=NUM_TOKENS)
    limits = AdmissionLimits(max_requests_per_tenant=NUM_STREAMS)
    roomy = replace(model, context_length=256, kv_token_limit=256)
    async with serve(model=roomy, limits=limits) as service, fronted(service.pipeline) as server:
        body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": NUM_TOKENS, "stream": True}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        asked = head.encode() + b"content-type: application/json\r\n\r\n" + body

        async def by_http() -> str:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(asked)
            lines = (await reader.read()).decode().splitlines()
            writer.close()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert "data: [DONE]" in lines
            return "".join(event["choices"][0]["text"] for event in events)

        async def by_grpc() -> str:
            return "".join(
                [
                    each.text
                    async for each in service.stub.Generate(pb.GenerateRequest(prompt=prompt, sampling=sampling))
                ]
            )

        costs: dict[str, float] = {}
        for name, call in (("grpc", by_grpc), ("http", by_http), ("grpc", by_grpc), ("http", by_http)):
            started_s = time.process_time()
            texts = await asyncio.gather(*(call() for _ in range(NUM_STREAMS)))
            took_s = time.process_time() - started_s
            costs[name] = min(took_s, costs.get(name, took_s))
            assert set(texts) == {prompt}
        assert costs["http"] <= 1.5 * costs["grpc"], "room for what other processes do to the caches"
        assert costs["http"] / NUM_STREAMS / NUM_TOKENS < 1e-3
