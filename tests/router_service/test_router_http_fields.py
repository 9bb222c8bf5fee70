"""Fields of HTTP requests: each is taken, taken at one value, or refused by its name, also within other objects."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from pager.errors import InvalidRequest, PagerError
from pager.types import FinishReason, PagingCounts, Usage
from router_service import anthropic, openai
from router_service.api import Api
from router_service.chat import ChatTemplate
from router_service.openai import Strict

MODEL = {"model": "m"}
TURN = {"role": "user", "content": "x"}
SMALLEST: dict[type[Strict], dict[str, Any]] = {
    openai.CompletionRequest: MODEL | {"prompt": "x"},
    openai.ChatRequest: MODEL | {"messages": [TURN]},
    openai.ResponsesRequest: MODEL | {"input": "x"},
    openai.TokenizeRequest: {"prompt": "x"},
    openai.DetokenizeRequest: {"tokens": [1]},
    anthropic.CountRequest: MODEL | {"messages": [TURN]},
    anthropic.MessagesRequest: MODEL | {"messages": [TURN], "max_tokens": 1},
}
KEYS = [(cls, name) for cls in SMALLEST for name in (*cls.REFUSED, *cls.NEUTRAL)]


def refused(cls: type[Strict], body: Any) -> tuple[str | None, str]:
    """The field at fault, and the message."""
    with pytest.raises(InvalidRequest) as caught:
        cls.read(body)
    return caught.value.field, caught.value.message


@pytest.mark.parametrize(("cls", "name"), KEYS)
def test_a_key_is_refused_unless_it_changes_nothing(cls: type[Strict], name: str) -> None:
    smallest = SMALLEST[cls]
    assert cls.read(smallest | {name: None}) == cls.read(smallest)
    for value in cls.NEUTRAL.get(name, ()):
        assert cls.read(smallest | {name: value}) == cls.read(smallest)
    field, message = refused(cls, smallest | {name: "another"})
    assert field == name
    assert message == f"`{name}`: {cls.reason(name)}"


@pytest.mark.parametrize("cls", SMALLEST)
def test_a_key_that_there_is_none_of_is_refused(cls: type[Strict]) -> None:
    assert refused(cls, SMALLEST[cls] | {"colour": "red"}) == ("colour", "`colour`: is not a field of this request")


def test_a_message_of_an_earlier_answer_is_taken_as_it_came() -> None:
    answer: dict[str, Any] = {"role": "assistant", "content": "y", "refusal": None, "annotations": [], "audio": None}
    read = openai.ChatRequest.read(MODEL | {"messages": [TURN, answer, TURN]})
    assert read.messages[1].for_template() == {"role": "assistant", "content": "y"}
    cached = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    body = MODEL | {"max_tokens": 1, "messages": [{"role": "user", "content": cached}]}
    assert anthropic.MessagesRequest.read(body).messages[0].content[0].text == "x"  # type: ignore[union-attr]


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
WRONG: list[tuple[type[Strict], dict[str, Any], str]] = [
    (openai.ChatRequest, {"messages": [TURN, {"role": "user", "content": [IMAGE]}]}, "messages.1.content.0.image_url"),
    (openai.ChatRequest, {"messages": [{"content": "x"}]}, "messages.0.role"),
    (openai.ChatRequest, {"messages": [TURN | {"refusal": "no"}]}, "messages.0.refusal"),
    (openai.ChatRequest, {"messages": []}, "messages"),
    (openai.ChatRequest, {"tool_choice": "perhaps"}, "tool_choice"),
    (openai.ChatRequest, {"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
    (openai.CompletionRequest, {"prompt": [1, "x"]}, "prompt.1"),
    (openai.CompletionRequest, {"prompt": 1.5}, "prompt"),
    (openai.CompletionRequest, {"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    (openai.CompletionRequest, {"logit_bias": {"5": "much"}}, "logit_bias.5"),
]


@pytest.mark.parametrize(("cls", "fields", "place"), WRONG)
def test_an_error_names_the_place_in_the_body(cls: type[Strict], fields: dict[str, Any], place: str) -> None:
    field, message = refused(cls, SMALLEST[cls] | fields)
    assert field == place
    assert message.startswith(f"`{place}`: ")
    assert "example.com" not in message


def test_usage_says_which_tokens_of_a_prompt_were_cached() -> None:
    """Of several answers to a prompt, those of the first: the others find what it left. Anthropic leaves them out."""

    def usage(prompt_tokens: int, cached: int) -> Usage:
        stop, paging = FinishReason.STOP, PagingCounts()
        return Usage(
            "exact", stop, prompt_tokens, 5, None, paging, 0.0, None, 0.0, 0.0, "f", cached_prompt_tokens=cached
        )

    choices = [
        openai.Choice(0, 0, usage=usage(40, 32)),
        openai.Choice(1, 0, usage=usage(40, 16)),
        openai.Choice(2, 1, usage=usage(30, 0)),
    ]
    told = openai.usage_of(choices)
    assert (told["prompt_tokens"], told["prompt_tokens_details"]) == (70, {"cached_tokens": 16})
    told = anthropic.usage_of(usage(40, 32))
    assert (told["input_tokens"], told["cache_read_input_tokens"]) == (8, 32)


# --- what the table calls done is done --------------------------------------------------------------------------------

SAMPLED = (
    *("temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "user", "response_format", "pool", "drift", "top_k", "min_p", "min_tokens", "repetition_penalty"),
    *("stop_token_ids", "ignore_eos", "guided_json", "guided_regex", "guided_grammar", "max_tokens", "logprobs"),
)
DONE: dict[type[Strict], tuple[str, ...]] = {
    openai.CompletionRequest: (*SAMPLED, "prompt", "best_of", "echo"),
    openai.ChatRequest: (*(*SAMPLED, "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice"),),
    openai.ResponsesRequest: (
        *("input", "instructions", "max_output_tokens", "temperature", "top_p", "text", "tools", "tool_choice"),
        *("stream", "pool", "drift"),
    ),
}
SCHEMA = {"type": "object", "properties": {}}
CHANGING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "stop": ["x"],
    "seed": 3,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "logit_bias": {"1": 2.0},
    "response_format": {"type": "json_object"},
    "top_k": 3,
    "min_p": 0.1,
    "min_tokens": 1,
    "repetition_penalty": 1.5,
    "stop_token_ids": [1],
    "ignore_eos": True,
    "guided_json": SCHEMA,
    "guided_regex": "a",
    "guided_grammar": 'root ::= "a"',
    "max_tokens": 7,
    "max_completion_tokens": 7,
    "max_output_tokens": 7,
    "text": {"format": {"type": "json_object"}},
}
"""Values of fields that say how an answer is sampled. All others are about the answer's form or the prompt."""
OTHERS = {
    *("model", "prompt", "messages", "input", "instructions", "n", "best_of", "stream", "stream_options", "echo"),
    *("user", "pool", "drift", "tools", "tool_choice", "logprobs", "top_logprobs", "store"),
}


@pytest.mark.parametrize("cls", DONE)
def test_the_fields_of_the_apis_are_taken(cls: type[Strict]) -> None:
    assert set(DONE[cls]) <= set(cls.names())


@pytest.mark.parametrize("cls", DONE)
def test_no_field_is_taken_and_ignored(cls: Any) -> None:
    plain = cls.read(SMALLEST[cls]).sampling_of(100)
    for name in set(cls.names()) - OTHERS:
        assert cls.read(SMALLEST[cls] | {name: CHANGING[name]}).sampling_of(100) != plain, name


def test_log_probabilities_are_asked_for_by_each_api_in_its_way() -> None:
    completion, chat = SMALLEST[openai.CompletionRequest], SMALLEST[openai.ChatRequest]
    asked = openai.CompletionRequest.read(completion | {"logprobs": 3, "echo": True}).sampling_of(100)
    assert (asked.logprobs, asked.prompt_logprobs) == (3, 3)
    assert openai.CompletionRequest.read(completion | {"best_of": 2}).sampling_of(100).logprobs == 0
    assert openai.ChatRequest.read(chat | {"logprobs": True, "top_logprobs": 2}).sampling_of(100).logprobs == 2


TOO_LONG = "x" * 100
REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "fewer answers than are wanted": ("completions", {"n": 3, "best_of": 2}, "best_of", "of at least as many"),
    "options of no stream": ("completions", {"stream_options": {"include_usage": True}}, "stream_options", "`stream`"),
    "of a chat": ("chat/completions", {"stream_options": {}}, "stream_options", "needs `stream`"),
    "two bounds": ("chat/completions", {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "leave one out"),
    "less than no bound": ("completions", {"top_k": -2}, "top_k", "must lie between 0"),
    "a long prompt": ("completions", {"prompt": TOO_LONG}, "prompt", "the prompt has 100 tokens"),
    "long ids": ("completions", {"prompt": [1] * 100}, "prompt", "the prompt has 100 tokens"),
    "long messages": ("chat/completions", {"messages": [TURN | {"content": TOO_LONG}]}, "messages", "100 tokens"),
    "a long input": ("responses", {"input": TOO_LONG}, "input", "the prompt has 100 tokens"),
    "a size": ("completions", {"pool": "200%"}, "pool", "share"),
    "a threshold": ("completions", {"drift": "7"}, "drift", "threshold"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_an_error_names_the_field_as_the_request_does(service: Any, case: str) -> None:
    path, fields, param, message = REFUSED[case]
    prompts: dict[str, dict[str, Any]] = {"completions": {"prompt": "x"}, "chat/completions": {"messages": [TURN]}}
    async with over_http(service) as client:
        answer = await client.post(f"/v1/{path}", json={"model": "tiny"} | prompts.get(path, {}) | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


async def test_paths_and_methods_that_there_are_none_of_are_told_apart(service: Any) -> None:
    async with over_http(service) as client:
        wrong_method, wrong_path = await client.put("/v1/completions"), await client.get("/v2")
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    assert wrong_method.json()["error"] == {
        "message": "PUT is no method of '/v1/completions'; send POST",
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_allowed",
    }
    assert (wrong_path.status_code, wrong_path.json()["error"]["code"]) == (404, "unknown_path")
    assert "there is nothing at '/v2'; there is /detokenize, " in wrong_path.json()["error"]["message"]


@asynccontextmanager
async def over_http(service: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the front, without a socket."""
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    app = Api(service.pipeline, None, template, 30.0).app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as client:
        yield client


@pytest.mark.parametrize(
    ("path", "fields", "begins"),
    [
        ("completions", {"prompt": "abcd"}, "data: "),
        ("chat/completions", {"messages": [TURN | {"content": "abcd"}]}, "data: "),
        ("messages", {"messages": [TURN | {"content": "abcd"}]}, "event: error\ndata: "),
    ],
)
async def test_a_stream_that_fails_ends_with_an_error_that_its_clients_notice(
    service: Any, lost: Callable[[], PagerError], path: str, fields: dict[str, Any], begins: str
) -> None:
    service.cluster.fail = {worker: [(2, lost())] for worker in service.cluster.views}
    async with over_http(service) as client:
        body = {"model": "tiny", "max_tokens": 4, "stream": True} | fields
        answer = await client.post(f"/v1/{path}", json=body)
    *_, last = answer.text.strip().split("\n\n")
    assert last.startswith(begins)
    assert json.loads(last.removeprefix(begins))["error"]["message"] == "the worker died"
