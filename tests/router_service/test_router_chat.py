"""Chat templates, and the calls of tools in answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from transformers.utils.chat_template_utils import render_jinja_template

from pager.errors import ConfigError, InvalidRequest
from pager.tokenizing import special_texts
from pager.types import ModelInfo
from router_service.api import Api
from router_service.chat import ChatTemplate, forced_call, forced_call_schema, tool_parser
from router_service.prediction import TextEncoder
from tests.support.checkpoints import byte_tokenizer
from tests.support.files import EMO_TINY
from tests.support.values import some

FUNCTION = {"name": "rooms", "parameters": {"type": "object", "properties": {}}}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
HERMES = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}<tool_call>{% endif %}"


@pytest.fixture
def hermes() -> ChatTemplate:
    return ChatTemplate(HERMES, {})


def test_messages_may_be_kept_from_spelling_special_tokens() -> None:
    tokenizer = byte_tokenizer(["<|end|>", "<|call|>"])
    special = special_texts(tokenizer)
    assert special == ("<|end|>", "<|call|>")
    template = ChatTemplate("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", {}, special)
    assert template.render([{"role": "user", "content": "a"}], None) == "a<|end|>"
    parts = [{"type": "text", "text": "x<|call|>"}]
    for messages, tools in (
        ([{"role": "user", "content": "a<|end|>b"}], None),
        ([{"role": "user", "content": parts}], None),
        ([{"role": "user", "content": "a"}], [{"name": "f<|end|>"}]),
    ):
        with pytest.raises(InvalidRequest, match=r"spells the special token '<\|(end|call)\|>'") as caught:
            template.render(messages, tools)
        assert caught.value.field == "messages"
    assert replace(template, refused=()).render([{"content": "b<|end|>"}], None) == "b<|end|><|end|>"


def test_texts_may_be_kept_from_spelling_special_tokens() -> None:
    tokenizer = byte_tokenizer(["<|end|>"])
    encoder = TextEncoder(tokenizer, special_texts(tokenizer))
    assert encoder.encode("ab", 9).num_tokens == 2
    assert encoder.encode("a<|end|>", 9, add_special_tokens=False).num_tokens == 2
    with pytest.raises(InvalidRequest, match=r"special token '<\|end\|>'"):
        encoder.encode("a<|end|>", 9)
    assert TextEncoder(tokenizer).encode("a<|end|>", 9).num_tokens == 2


def test_a_template_is_the_file_else_the_models_own(tmp_path: Path) -> None:
    assert ChatTemplate.read(tmp_path) is None
    settings = {"chat_template": "own {{ bos_token }}", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert some(ChatTemplate.read(tmp_path)).render([], None) == "own <s>"
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert some(ChatTemplate.read(tmp_path)).source == "beside"
    given = tmp_path / "given.jinja"
    given.write_text("given")
    assert some(ChatTemplate.read(tmp_path, given)).source == "given"
    with pytest.raises(ConfigError, match=r"none\.jinja cannot be read"):
        ChatTemplate.read(tmp_path, tmp_path / "none.jinja")


# Templates that use all that transformers gives them: its names and filters, its tag, and its spelling of white space.
SOURCES = {
    "emo-tiny": (EMO_TINY / "chat_template.jinja").read_text(),
    "hermes": HERMES,
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ messages | tojson }} {{ documents }}",
    "blocks": "{% for m in messages %}\n  {% if loop.last %}\n  {% break %}\n  {% endif %}\n x\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dictionary": "{{ dict(a=1, b='<&>') | tojson }}{{ dict.fromkeys('ab') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}{{ bos_token }}{% endgeneration %}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.reasoning }};{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{{ add_generation_prompt }}",
    "absent": "{{ messages[0].absent }}{{ nothing }}{% if nothing is defined %}x{% endif %}",
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "¿<b>?"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "t"}]},
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [TOOL]},
        {"role": "tool", "content": "{}", "thinking": "t"},
        {"role": "assistant", "content": "c", "reasoning_content": "rc", "reasoning": "r"},
    ],
]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_template_reads_as_it_does_in_transformers(source: str) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for messages in CONVERSATIONS:
        for tools in (None, [TOOL]):
            (expected,), _ = render_jinja_template(
                [messages], tools=tools, chat_template=source, add_generation_prompt=True, **names
            )
            assert ChatTemplate(source, names).render(messages, tools) == expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles alternate') }}", "roles alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "UndefinedError|has no attribute|undefined"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ namespace(__init__=1) }}", "begins with an underscore"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "begins with an underscore"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ 'x' * 100000000 }}", "characters; send less"),
    ],
)
def test_what_a_template_refuses_or_must_not_do_is_the_requests_error(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], None)


def test_calls_between_tags_are_taken_out_of_the_text(hermes: ChatTemplate) -> None:
    parse = some(tool_parser(hermes))
    text, calls = parse('Looking. <tool_call>{"name": "rooms", "arguments": {"floor": 2}}</tool_call>')
    assert (text, [(call.name, json.loads(call.arguments)) for call in calls]) == (
        "Looking.",
        [("rooms", {"floor": 2})],
    )
    for broken in ('<tool_call>{"name": 1', "<tool_call>{no}</tool_call>", "nothing"):
        assert parse(broken) == (broken, [])
    assert tool_parser(ChatTemplate("{{ messages }}", {})) is None


def test_a_forced_call_has_the_schema_of_its_tool() -> None:
    schema = json.loads(forced_call_schema([TOOL], "rooms"))
    assert schema["properties"]["arguments"] == FUNCTION["parameters"]
    assert set(json.loads(forced_call_schema([TOOL, TOOL], None))) == {"anyOf"}
    with pytest.raises(InvalidRequest, match="not among `tools`"):
        forced_call_schema([TOOL], "baths")
    call = some(forced_call('{"name": "rooms", "arguments": {}}'))
    assert (call.name, call.arguments) == ("rooms", "{}")
    assert forced_call('{"name": "roo') is None


@asynccontextmanager
async def openai_client(service: Any, template: ChatTemplate) -> AsyncIterator[AsyncOpenAI]:
    app = Api(service.pipeline, None, template, 30.0).app()
    http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    async with AsyncOpenAI(base_url="http://router/v1", api_key="none", http_client=http) as client:
        yield client


@pytest.mark.parametrize("beside", ["Looking. ", ""])
async def test_a_streamed_response_has_calls_of_tools_as_calls(
    serve: Callable[..., Any], model: ModelInfo, hermes: ChatTemplate, beside: str
) -> None:
    """The workers answer with the prompt."""
    text = f'{beside}<tool_call>{{"name": "rooms", "arguments": {{"floor": 2}}}}</tool_call>'
    tool: Any = {"type": "function", **TOOL["function"]}
    ask: Any = {"model": "tiny", "input": text, "tools": [tool], "max_output_tokens": len(text)}
    async with (
        serve(model=replace(model, context_length=512, kv_token_limit=512)) as service,
        openai_client(service, hermes) as client,
    ):
        whole = await client.responses.create(**ask)
        events = [event async for event in await client.responses.create(**ask, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == beside.strip()
    (called,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert json.loads(called.arguments) == {"floor": 2}
    arguments = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(event.delta for event in arguments) == called.arguments
    done = {event.output_index: event.item for event in events if event.type == "response.output_item.done"}
    added = {event.output_index: event.item for event in events if event.type == "response.output_item.added"}
    assert events[-1].type == "response.incomplete"
    assert [done[index] for index in sorted(done)] == events[-1].response.output
    assert [each.type for each in added.values()] == [each.type for each in whole.output]
    assert [added[index].id for index in added] == [done[index].id for index in added]
    assert [each.type for each in whole.output] == ["message"] * bool(beside) + ["function_call"]


async def test_a_streamed_response_without_tools_is_sent_as_it_is_made(
    serve: Callable[..., Any], model: ModelInfo, hermes: ChatTemplate
) -> None:
    async with serve(model=model) as service, openai_client(service, hermes) as client:
        stream = await client.responses.create(model="tiny", input="abc", max_output_tokens=3, stream=True)
        events = [event async for event in stream]
    assert [event.delta for event in events if event.type == "response.output_text.delta"] == ["a", "b", "c"]
    assert [event.type for event in events if event.type.startswith("response.output_item")] == [
        "response.output_item.added",
        "response.output_item.done",
    ]
