"""Anthropic's messages: which fields are accepted, how they are passed to the pipeline, and how answers are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from pager.errors import InvalidRequest, PagerError
from pager.types import FinishReason, Grammar, GrammarKind, SamplingParams, Usage
from router_service.chat import ChatTemplate, ToolCall, forced_call_schema
from router_service.openai import Many, Strict, in_json, paged


class Block(Strict):
    """A part of a message: a text, a tool call, or a tool's result."""

    type: Literal["text", "tool_use", "tool_result"]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Many[Block] | None = None
    is_error: bool | None = Field(default=None, description="templates cannot mark errors; say it in the content")

    NEUTRAL: ClassVar = {"cache_control": ({"type": "ephemeral"},), "citations": ()}


class Message(Strict):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str | Many[Block]


class Tool(Strict):
    """A tool that an answer may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None

    NEUTRAL: ClassVar = {"cache_control": ({"type": "ephemeral"},)}


class ToolChoice(Strict):
    """The choice whether an answer may, must or must not call a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None

    NEUTRAL: ClassVar = {"disable_parallel_tool_use": (False,)}


class Metadata(Strict):
    user_id: str | None = None


class CountRequest(Strict):
    """The body of /v1/messages/count_tokens."""

    model: str = Field(description="the model, or MODEL:POOL for one of the tenant's named pools")
    messages: Many[Message] = Field(min_length=1)
    system: str | Many[Block] | None = None
    tools: Many[Tool] | None = None
    tool_choice: ToolChoice | None = None

    NEUTRAL: ClassVar = {"thinking": ({"type": "disabled"},)}

    @property
    def is_tool_forced(self) -> bool:
        return self.tool_choice is not None and self.tool_choice.type in ("any", "tool")

    def shown_tools(self) -> list[dict[str, Any]]:
        """Returns the tools as templates read them. Raises InvalidRequest for a forced call without tools."""
        if not self.tools:
            if self.is_tool_forced:
                raise InvalidRequest("`tool_choice` needs `tools`", field="tool_choice")
            return []
        if self.tool_choice is not None and self.tool_choice.type == "none":
            return []
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                },
            }
            for tool in self.tools
        ]

    def prompt(self, template: ChatTemplate | None) -> str:
        """Renders the prompt. Raises InvalidRequest without a template, or where it refuses the messages."""
        if template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions, or serve it with --chat-template FILE",
                field="messages",
            )
        messages = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        for message in self.messages:
            messages.extend(_for_template(message))
        return template.render(messages, self.shown_tools())


class MessagesRequest(CountRequest):
    """The body of /v1/messages."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(default=None, description="1 by default, as in Anthropic's API; 0 is greedy")
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Many[str] | None = None
    stream: bool | None = None
    metadata: Metadata | None = Field(default=None, description="a digest of user_id is in the access log")
    pool: str | int | float | None = Field(
        default=None, description="the pool's size, as with `--pool` on the command line"
    )
    drift: str | float | None = Field(default=None, description="as with `--drift` on the command line")

    NEUTRAL: ClassVar = {**CountRequest.NEUTRAL, "service_tier": ("auto", "standard_only")}
    REFUSED: ClassVar = {
        "container": "nothing is executed",
        "mcp_servers": "nothing is called",
        "context_management": "use less",
    }

    @property
    def has_max_tokens(self) -> bool:
        return True

    def sampling(self) -> SamplingParams:
        given: dict[str, Any] = {"top_p": self.top_p, "top_k": self.top_k}
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            temperature=1.0 if self.temperature is None else self.temperature,
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences or ()),
            grammar=self._grammar(),
        )

    def _grammar(self) -> Grammar | None:
        if not self.is_tool_forced or self.tool_choice is None:
            return None
        return Grammar(GrammarKind.JSON_SCHEMA, forced_call_schema(self.shown_tools(), self.tool_choice.name))


def _text(content: str | list[Block] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.text or "" for block in content)


def _for_template(message: Message) -> list[dict[str, Any]]:
    """Returns a message as templates read it; tool results become messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    made: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": block.tool_use_id or "", "content": _text(block.content)}
        for block in message.content
        if block.type == "tool_result"
    ]
    calls = [
        {
            "id": block.id or "",
            "type": "function",
            "function": {"name": block.name or "", "arguments": block.input or {}},
        }
        for block in message.content
        if block.type == "tool_use"
    ]
    text = "".join(block.text or "" for block in message.content if block.type == "text")
    if text or calls:
        said: dict[str, Any] = {"role": message.role, "content": text}
        made.append(said | ({"tool_calls": calls} if calls else {}))
    return made


def stop_reason(usage: Usage, calls: bool) -> str:
    """Returns why the answer ended, in Anthropic's words."""
    if usage.finish_reason is FinishReason.LENGTH:
        return "max_tokens"
    return "tool_use" if calls else "end_turn"


def usage_of(usage: Usage) -> dict[str, Any]:
    """Returns the counts of tokens, and what was paged."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_prompt_tokens,
        "cache_read_input_tokens": usage.cached_prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "expert_pager": paged([usage]),
    }


def tool_use(call: ToolCall) -> dict[str, Any]:
    """Returns a tool call as a block of an answer."""
    return {"type": "tool_use", "id": call.id.replace("call_", "toolu_"), "name": call.name, "input": _object(call)}


def _object(call: ToolCall) -> Any:
    try:
        return json.loads(call.arguments)
    except ValueError:
        return {}


def error_body(error: PagerError, status: int) -> dict[str, Any]:
    """Returns an error as Anthropic's clients read it."""
    kinds: Mapping[int, str] = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
    return {"type": "error", "error": {"type": kinds.get(status, "api_error"), "message": in_json(error)[0]}}
