"""The HTTP front as clients see it: openai, litellm, langchain, curl, and those that mean no good."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import litellm
import openai
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from langchain_openai import ChatOpenAI

PROMPT = "SELECT name FROM users WHERE "
MESSAGES: Any = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Which hotel is open?"}]
CHAT_TEXT = "System: Answer briefly.\n\nUser: Which hotel is open?\n\nAssistant:"
MODEL = "emo-tiny"
SCHEMA = {
    "type": "object",
    "properties": {"open": {"type": "boolean"}, "rooms": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["open", "rooms"],
    "additionalProperties": False,
}


@pytest.fixture
def url(idle_service: Any) -> str:
    return str(idle_service.ready["http_url"])


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture
def golden(idle_service: Any) -> Callable[..., str]:
    """The greedy answer by gRPC, which the HTTP front has to give as well."""

    def answer(prompt: str, max_tokens: int, **options: Any) -> str:
        return str(idle_service.generate(prompt, max_tokens=max_tokens, ignore_eos=False, **options).text)

    return answer


def test_completions_are_those_of_grpc(client: openai.OpenAI, golden: Callable[..., str]) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    expected = golden(PROMPT, 24)
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == expected
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.usage.model_extra is not None
    assert whole.usage.model_extra["expert_pager"]["mode"] == "exact"
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    events = list(stream)
    assert "".join(event.choices[0].text for event in events if event.choices) == expected
    assert events[-1].usage is not None
    assert events[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_pool_by_size_and_by_name(
    client: openai.OpenAI, golden: Callable[..., str], idle_service: Any, url: str
) -> None:
    expected = golden(PROMPT, 16, pool=pb.PoolPolicy(share=0.125))
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    answer = client.completions.create(**asked, extra_body={"pool": "12.5%"})
    assert answer.choices[0].text == expected
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["expert_pager"]["mode"] == "pool"
    example = pb.Example(text=PROMPT.encode())
    idle_service.stub.Calibrate(pb.CalibrateRequest(name="sql", examples=[example], pool=pb.PoolPolicy(count=24)))
    try:
        cards = {card.id: card.model_extra or {} for card in client.models.list()}
        assert cards[f"{MODEL}:sql"]["parent"] == MODEL
        named = client.completions.create(**{**asked, "model": f"{MODEL}:sql"})
        assert named.choices[0].text == golden(PROMPT, 16, pool=pb.PoolPolicy(name="sql"))
    finally:
        idle_service.stub.DeletePool(pb.DeletePoolRequest(name="sql"))
    with pytest.raises(openai.NotFoundError, match="has no pool 'sql'"):
        client.completions.create(**{**asked, "model": f"{MODEL}:sql"})


def test_echo_with_log_probabilities_covers_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=1, temperature=0, echo=True, logprobs=2, seed=1
    )
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert choice.text.startswith(PROMPT)
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_several_prompts_and_answers(client: openai.OpenAI, golden: Callable[..., str]) -> None:
    prompts = [PROMPT, "def mean(values):"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=6, temperature=0, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [golden(each, 6) for each in prompts for _ in range(2)]
    ranked = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=6, n=1, best_of=3, seed=7)
    assert len(ranked.choices) == 1


def prefilled(service: Any) -> float:
    """The prompt tokens that the worker has run, or found in its cache."""
    return float(service.worker_metrics().total("expert_pager_prompt_tokens_total"))


@pytest.mark.parametrize("pool", ["12.5%", "full"])
def test_several_answers_come_from_one_prefill(client: openai.OpenAI, idle_service: Any, pool: str) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 1.0}
    asked |= {"extra_body": {"pool": pool}, "logprobs": 1}
    alone = [client.completions.create(**asked, seed=5 + index) for index in range(3)]
    before = prefilled(idle_service)
    together = client.completions.create(**asked, seed=5, n=3)
    assert together.usage is not None
    assert prefilled(idle_service) - before == together.usage.prompt_tokens
    assert [choice.text for choice in together.choices] == [each.choices[0].text for each in alone]
    assert together.usage.completion_tokens == sum(each.usage.completion_tokens for each in alone if each.usage)
    texts = ["", "", ""]
    for event in client.completions.create(**asked, seed=5, n=3, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in together.choices]
    echoed = client.completions.create(**asked, seed=5, n=3, echo=True)
    assert [choice.text for choice in echoed.choices] == [PROMPT + text for text in texts]
    assert len({json.dumps(choice.logprobs and choice.logprobs.token_logprobs[:3]) for choice in echoed.choices}) == 1
    drifting = client.completions.create(**asked | {"extra_body": {"pool": "12.5%", "drift": "0.9"}}, seed=5, n=3)
    assert len(drifting.choices) == 3


def test_every_chunk_has_a_usage_where_that_is_asked_for(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    for prompt in (PROMPT, [1, 2, 3]):
        asked: dict[str, Any] = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": 6,
            "n": 2,
            "extra_body": {"ignore_eos": True},
        }
        *events, last = client.completions.create(**asked, stream=True, stream_options=options)
        counted = [event.usage.completion_tokens for event in events if event.usage and event.choices[0].index == 1]
        assert counted == [1, 2, 3, 4, 5, 6]
        assert last.usage is not None
        assert {event.usage.prompt_tokens for event in events if event.usage} == {last.usage.prompt_tokens}
        assert (len(last.choices), last.usage.completion_tokens) == (0, 12)
    *chunks, whole = client.chat.completions.create(**ASK, stream=True, stream_options=options)
    assert whole.usage is not None
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage][-1] == whole.usage.completion_tokens
    assert {chunk.usage.prompt_tokens for chunk in chunks if chunk.usage} == {whole.usage.prompt_tokens}


def test_chat_runs_the_template(client: openai.OpenAI, golden: Callable[..., str]) -> None:
    expected = golden(CHAT_TEXT, 12)
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    assert whole.usage is not None
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    streamed = client.chat.completions.create(**asked, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in streamed) == expected


async def test_many_at_once_are_each_right(url: str, golden: Callable[..., str]) -> None:
    expected = golden(PROMPT, 16)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:

        async def one(index: int) -> str:
            asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
            if index % 2:
                return str((await client.completions.create(**asked)).choices[0].text)
            stream = await client.completions.create(**asked, stream=True)
            return "".join([event.choices[0].text async for event in stream])

        assert await asyncio.gather(*map(one, range(12))) == [expected] * 12


def test_responses_whole_and_streamed(client: openai.OpenAI, golden: Callable[..., str]) -> None:
    expected = golden("User: Which hotel is open?\n\nAssistant:", 12)
    asked: dict[str, Any] = {"model": MODEL, "input": "Which hotel is open?", "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**asked)
    assert whole.output_text.startswith(expected)
    with client.responses.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_other_clients_read_the_answers(url: str, golden: Callable[..., str]) -> None:
    expected = golden(CHAT_TEXT, 12)
    by_litellm = litellm.completion(
        model=f"openai/{MODEL}", api_base=f"{url}/v1", api_key="none", messages=MESSAGES, max_tokens=12, temperature=0
    )
    assert by_litellm.choices[0].message.content == expected
    options: dict[str, Any] = {"model": MODEL, "base_url": f"{url}/v1", "api_key": "none", "max_tokens": 12}
    chain = ChatOpenAI(**options, temperature=0)
    messages = [(each["role"], each["content"]) for each in MESSAGES]
    assert chain.invoke(messages).content == expected
    assert "".join(str(part.content) for part in chain.stream(messages)) == expected
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    done = subprocess.run(
        ["curl", "-sS", f"{url}/v1/chat/completions", "-H", "content-type: application/json", "-d", json.dumps(body)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == expected


def test_messages_of_anthropic(url: str, golden: Callable[..., str]) -> None:
    body = {"model": MODEL, "max_tokens": 12, "temperature": 0, "system": "Answer briefly.", "messages": MESSAGES[1:]}
    expected = golden(CHAT_TEXT, 12)
    status, answer = post(url, "/v1/messages", body)
    assert (status, answer["content"]) == (200, [{"type": "text", "text": expected}])
    assert answer["stop_reason"] in ("max_tokens", "end_turn")
    lines = post_text(url, "/v1/messages", body | {"stream": True})
    events = [json.loads(line[6:]) for line in lines if line[:6] == "data: "]
    assert "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta") == expected
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    status, counted = post(url, "/v1/messages/count_tokens", {"model": MODEL, "messages": MESSAGES[1:]})
    assert (status, counted["input_tokens"] > 3) == (200, True)
    status, error = post(url, "/v1/messages", {"model": MODEL, "messages": MESSAGES[1:]})
    assert (status, error["error"]["type"]) == (400, "invalid_request_error")


# --- what an answer is held to --------------------------------------------------------------------------------------

TOOL = {"name": "rooms", "description": "Counts free rooms.", "parameters": SCHEMA}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "hotel", "schema": SCHEMA, "strict": True}}
ASK: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 60, "temperature": 0}


def is_open_hotel(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"open", "rooms"} and isinstance(found["open"], bool) and 0 <= found["rooms"] <= 99


def test_answers_are_held_to_a_form(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(**ASK, response_format=FORM)
    assert chat.choices[0].finish_reason == "stop"
    assert is_open_hotel(chat.choices[0].message.content or "")
    streamed = client.chat.completions.create(**ASK, response_format=FORM, stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in streamed)
    assert text == chat.choices[0].message.content
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    by_regex = client.completions.create(**asked, extra_body={"guided_regex": "(id|name) = [0-9]{3}"})
    assert re.fullmatch("(id|name) = [0-9]{3}", by_regex.choices[0].text)
    by_rules = client.completions.create(**asked, extra_body={"guided_grammar": 'root ::= "id" | "name"'})
    assert by_rules.choices[0].text in ("id", "name")
    schema: Any = {"type": "json_schema", "name": "hotel", "schema": SCHEMA}
    response = client.responses.create(
        model=MODEL, input="Which hotel is open?", max_output_tokens=60, temperature=0, text={"format": schema}
    )
    assert response.status == "completed"
    assert is_open_hotel(response.output_text)


def test_an_answer_that_is_cut_says_so(client: openai.OpenAI) -> None:
    cut = client.chat.completions.create(**ASK | {"max_completion_tokens": 2}, response_format=FORM)
    assert cut.choices[0].finish_reason == "length"


def test_forced_calls_fit_their_tools(client: openai.OpenAI, url: str) -> None:
    tools: Any = [{"type": "function", "function": TOOL}]
    chosen: Any = {"type": "function", "function": {"name": "rooms"}}
    for choice in ("required", chosen):
        answer = client.chat.completions.create(**ASK, tools=tools, tool_choice=choice).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        (call,) = answer.message.model_dump()["tool_calls"]
        assert call["function"]["name"] == "rooms"
        assert is_open_hotel(call["function"]["arguments"])
    events = list(client.chat.completions.create(**ASK, tools=tools, tool_choice="required", stream=True))
    parts = [part for event in events for part in event.choices[0].delta.tool_calls or ()]
    assert is_open_hotel("".join((part.function and part.function.arguments) or "" for part in parts))
    assert events[-1].choices[0].finish_reason == "tool_calls"

    flat: Any = [{"type": "function", **TOOL}]
    response = client.responses.create(
        model=MODEL, input="x", max_output_tokens=60, temperature=0, tools=flat, tool_choice="required"
    )
    (item,) = response.output
    assert item.type == "function_call"
    assert is_open_hotel(item.arguments)

    body: dict[str, Any] = {"model": MODEL, "max_tokens": 60, "temperature": 0, "messages": MESSAGES[1:]}
    body |= {"tools": [{"name": "rooms", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}
    status, message = post(url, "/v1/messages", body)
    assert (status, message["stop_reason"]) == (200, "tool_use")
    (block,) = message["content"]
    assert is_open_hotel(json.dumps(block["input"]))
    lines = post_text(url, "/v1/messages", body | {"stream": True})
    deltas = [json.loads(line[6:]).get("delta", {}) for line in lines if line[:6] == "data: "]
    assert is_open_hotel("".join(delta.get("partial_json", "") for delta in deltas))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_regex": "(a"}, "guided_regex", "guided_regex"),
        ({"guided_grammar": "root ::= other"}, "guided_grammar", "guided_grammar"),
        ({"guided_json": {"oneOf": [{"type": "null"}]}}, "json_schema", "oneOf"),
        ({"guided_json": {"type": "object", "required": ["a"]}}, "json_schema", "describe it there"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "exclude each other"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_json", "one form"),
        ({"response_format": FORM | {"json_schema": {"schema": {"not": {}}}}}, "json_schema", "'not'"),
    ],
)
def test_a_form_that_cannot_be_held_is_refused(url: str, fields: dict[str, Any], param: str, message: str) -> None:
    status, answer = post(url, "/v1/completions", {"model": MODEL, "prompt": PROMPT, "max_tokens": 4} | fields)
    assert status == 400, answer
    assert message in answer["error"]["message"]
    assert answer["error"]["param"] == param


def test_the_call_of_the_readme(url: str, golden: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from openai import OpenAI\n.*?)```", readme, re.DOTALL)
    exec(example.replace("http://localhost:8080", url), {})
    text, experts = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert text == golden("SELECT name FROM users WHERE", 24, pool=pb.PoolPolicy(share=0.125))
    assert re.fullmatch(r"\d+ experts", experts)


REFUSED: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("/v1/completions", {"suffix": "x"}, 400, "suffix"),
    ("/v1/completions", {"no_such_field": 1}, 400, "no_such_field"),
    ("/v1/completions", {"temperature": -1}, 400, "temperature"),
    ("/v1/completions", {"temperature": "warm"}, 400, "temperature"),
    ("/v1/completions", {"model": "another"}, 404, "model"),
    ("/v1/completions", {"pool": "0.1%"}, 400, "pool"),
    ("/v1/completions", {"max_tokens": 100000}, 400, "max_tokens"),
    ("/v1/completions", {"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"n": 1000}, 400, "n"),
    ("/v1/completions", {"best_of": 2, "stream": True}, 400, "best_of"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": [99999999]}, 400, "prompt"),
    ("/v1/chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
    ("/tokenize", {"model": "", "prompt": ""}, 400, None),
]


@pytest.mark.parametrize(("path", "fields", "status", "param"), REFUSED)
def test_what_cannot_be_done_is_refused_by_its_name(
    url: str, path: str, fields: dict[str, Any], status: int, param: str | None
) -> None:
    base = {"model": MODEL, "prompt": PROMPT} if path == "/v1/completions" else {"model": MODEL}
    found, answer = post(url, path, base | fields)
    assert found == status, answer
    if param is not None:
        assert answer["error"]["param"] == param
    assert PROMPT not in json.dumps(answer)


def test_paths_and_methods_that_there_are_none_of(url: str) -> None:
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405)):
        assert request(url, method, path)[0] == status
    assert request(url, "GET", "/health")[0] == 200
    assert b"expert_pager_router_requests_total" in request(url, "GET", "/metrics")[1]
    assert b"<!doctype html>" in request(url, "GET", "/ui")[1]


def test_tokens_there_and_back(url: str) -> None:
    _, counted = post(url, "/tokenize", {"prompt": PROMPT})
    status, text = post(url, "/detokenize", {"tokens": counted["tokens"]})
    assert (status, text) == (200, {"prompt": PROMPT})


def test_bodies_and_heads_that_are_too_much(url: str, golden: Callable[..., str], client: openai.OpenAI) -> None:
    expected = golden(PROMPT, 8)
    place = urlsplit(url)
    assert post(url, "/v1/completions", b"x" * 10_000_000)[0] == 413
    assert post(url, "/v1/completions", b"[" * 100_000)[0] == 400
    assert post(url, "/v1/completions", b'{"model": NaN}')[0] == 400
    assert request(url, "POST", "/v1/completions", b"{}", {"content-type": "text/plain"})[0] == 400
    with socket.create_connection((place.hostname or "", place.port or 0), timeout=30) as bomb:
        bomb.sendall(b"GET /health HTTP/1.1\r\n" + b"".join(b"x-%d: %s\r\n" % (i, b"y" * 1000) for i in range(100)))
        assert bomb.recv(64).startswith(b"HTTP/1.1 4")
    half_open = [socket.create_connection((place.hostname or "", place.port or 0), timeout=30) for _ in range(50)]
    for each in half_open:
        each.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected
    for each in half_open:
        each.close()


def test_a_client_that_leaves_frees_what_its_request_held(url: str, idle_service: Any) -> None:
    place = urlsplit(url)
    body = json.dumps(
        {"model": MODEL, "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    )
    leaver = socket.create_connection((place.hostname or "", place.port or 0), timeout=60)
    leaver.sendall(head.encode() + b"\r\n" + body)
    assert leaver.recv(4096).startswith(b"HTTP/1.1 200")
    leaver.close()
    idle_service.wait_until_idle()  # long before 900 tokens could have been made


def test_a_reader_that_reads_nothing_is_given_up(url: str, idle_service: Any) -> None:
    place = urlsplit(url)
    idler = socket.socket()
    idler.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    idler.connect((place.hostname, place.port))
    idler.sendall(long_stream(logprobs=20))
    idle_service.wait_until_idle()  # which it only is when the stream was given up or fitted into the buffers
    idler.close()


def test_ids_come_back_and_name_the_request(url: str, idle_service: Any) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}
    found: list[Any] = []

    def ask() -> None:
        found.append(request(url, "POST", "/v1/completions", json.dumps(body).encode(), {"x-request-id": "mine-1"}))

    asking = threading.Thread(target=ask)
    asking.start()
    aborted = False
    while asking.is_alive() and not aborted:
        aborted = idle_service.stub.Abort(pb.AbortRequest(request_id="mine-1"), timeout=30).aborted
    asking.join(120)
    assert (aborted, found[0][0]) == (True, 499)
    assert found[0][2]["x-request-id"] == "mine-1"


# --- a client without a library -------------------------------------------------------------------------------------


def long_stream(**fields: Any) -> bytes:
    """A request for many tokens, as it goes over the wire."""
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True, **fields}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + body


def request(
    url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
    try:
        sent = {"content-type": "application/json"} if body is not None else {}
        connection.request(method, path, body, sent | (headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def post(url: str, path: str, body: dict[str, Any] | bytes) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer, _ = request(url, "POST", path, data)
    return status, json.loads(answer)


def post_text(url: str, path: str, body: dict[str, Any]) -> list[str]:
    return request(url, "POST", path, json.dumps(body).encode())[1].decode().splitlines()
