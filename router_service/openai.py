"""OpenAI's requests and answers: which fields are accepted, how they are passed to the pipeline, and how answers are
written.

Every field is accepted, accepted only at the one value that changes nothing, or refused by name; `docs/http.md` has the
table, which is made from these classes.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from pager.errors import InvalidRequest, PagerError
from pager.pools.drift import parse_drift
from pager.pools.pick import parse_pool_size
from pager.sampling import MAX_ANSWERS, check_sampling, check_vocabulary, filled
from pager.types import (
    DRAWN_BY,
    FinishReason,
    Grammar,
    GrammarKind,
    ModelInfo,
    PoolPolicy,
    SamplingParams,
    TokenChunk,
    TokenLogprobs,
    Usage,
)
from router_service.chat import ChatTemplate, TokenTexts, forced_call_schema
from router_service.requests import PoolByName, check_model, chosen_pool

MAX_CHOICES = MAX_ANSWERS
_OUTER_NAMES = {"pool.size": "pool", "pool.drift": "drift", "text": "prompt", "token_ids": "prompt"}
_NOT_HERE = {
    "moderation": "nothing is moderated",
    "prompt_cache_key": "prefixes are recognised by themselves",
    "prompt_cache_options": "prefixes are recognised by themselves",
    "prompt_cache_retention": "prefixes are recognised by themselves",
}
COMPLETION_TOKENS = 16  # for /v1/completions where max_tokens is absent, as in OpenAI's API
MAX_TOP_LOGPROBS = 20
MAX_AT_ONCE = 4096  # numbers and tokens of an answer whose JSON is built on the event loop
_ROLES = Literal["system", "developer", "user", "assistant", "tool"]


T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list that is read up to the first item which is wrong: an error for each of them would take seconds."""


class Strict(BaseModel):
    """A JSON object in which every key is known. The keys of `NEUTRAL` only accept values that change nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    REFUSED: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def read(cls, body: Any) -> Self:
        """Reads the object. Raises InvalidRequest, which names the field and never quotes the message."""
        if not isinstance(body, dict):
            raise InvalidRequest("the body is not a JSON object")
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            # For a value of several possible types, the error of the type that it comes closest to.
            where, message = max((_place(each, body), str(each["msg"])) for each in found)
            name = ".".join(where)[:200]
            raise InvalidRequest(f"`{name}`: {message}", field=name) from None

    @classmethod
    def names(cls) -> Mapping[str, FieldInfo]:
        """Returns the accepted fields, by their names in JSON."""
        return {info.alias or name: info for name, info in cls.model_fields.items()}

    @model_validator(mode="before")
    @classmethod
    def _look_at_names(cls, body: Any) -> Any:
        """Drops the keys that change nothing, and stops at the first that is refused or unknown."""
        if not isinstance(body, dict):
            return body
        known, kept = _names_of(cls), {}
        for name, value in body.items():
            if name in known:
                kept[name] = value
            elif name not in cls.REFUSED and name not in cls.NEUTRAL:
                raise PydanticCustomError(_KEY, "is not a field of this request", {"key": str(name)})
            elif value is not None and (name in cls.REFUSED or value not in cls.NEUTRAL[name]):
                raise PydanticCustomError(_KEY, "{reason}", {"key": name, "reason": cls.reason(name)})
        return kept

    @classmethod
    def reason(cls, name: str) -> str:
        """Returns why a key cannot have this value."""
        if name in cls.REFUSED:
            return f"is not supported: {cls.REFUSED[name]}"
        known = " or ".join(json.dumps(each) for each in cls.NEUTRAL[name] or (None,))
        return f"can only be {known} here; leave it out"


_KEY = "key"
_names_of = lru_cache(maxsize=None)(lambda cls: frozenset(cls.names()))


def _place(error: ErrorDetails, body: Any) -> tuple[str, ...]:
    """Returns the place of an error in the body. pydantic's own path also names the alternatives of a type, which are
    left out.
    """
    where, value = [], body
    for part in error["loc"]:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            where.append(str(part))
            value = value[part]  # type: ignore[index]
        elif error["type"] == "missing":
            where.append(str(part))
    key = error.get("ctx", {}).get("key") if error["type"] == _KEY else None
    return (*where, key[:100]) if key is not None else tuple(where)


class StreamOptions(Strict):
    """The options of a stream beside its chunks."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(
        default=False, description="as in vLLM: every chunk has the usage of its answer so far"
    )

    NEUTRAL: ClassVar = {"include_obfuscation": (False,)}


class JsonSchema(Strict):
    """A schema that an answer has to satisfy."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="every answer is held to the schema")


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar(GrammarKind.JSON_OBJECT)
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise InvalidRequest("`response_format.json_schema.schema` is missing", field="response_format")
        return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(self.json_schema.schema_))


class Function(Strict):
    """A function that an answer may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="a JSON schema")
    strict: bool | None = Field(default=None, description="every forced call is held to the schema")


class Tool(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    """The one tool that an answer must call."""

    type: Literal["function"]
    function: NamedFunction


class Sampled(Strict):
    """The fields that completions and chat share."""

    model: str = Field(description="the model, or MODEL:POOL for one of the tenant's named pools")
    temperature: float | None = Field(default=None, description="1 by default, as in OpenAI's API; 0 is greedy")
    top_p: float | None = Field(default=None, description="above 0, at most 1")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description=f"at most {MAX_CHOICES}; from one prefill")
    stream: bool | None = Field(default=None, description="server-sent events")
    stream_options: StreamOptions | None = None
    stop: str | Many[str] | None = Field(default=None, description="at most 16, of at most 256 characters each")
    seed: int | None = Field(default=None, description="answer i of several has seed + i")
    presence_penalty: float | None = Field(default=None, description="-2 to 2")
    frequency_penalty: float | None = Field(default=None, description="-2 to 2")
    logit_bias: dict[str, float] | None = Field(default=None, description="by token id, at most 1,024")
    user: str | None = Field(default=None, description="its digest is in the access log")
    response_format: ResponseFormat | None = Field(default=None, description="the answer is held to it")
    pool: str | int | float | None = Field(
        default=None, description="the pool's size, as with `--pool` on the command line"
    )
    drift: str | float | None = Field(default=None, description="as with `--drift` on the command line")
    top_k: int | None = Field(default=None, description="as vLLM's")
    min_p: float | None = Field(default=None, description="as vLLM's")
    min_tokens: int | None = Field(default=None, description="as vLLM's")
    repetition_penalty: float | None = Field(default=None, description="as vLLM's")
    stop_token_ids: Many[int] | None = Field(default=None, description="as vLLM's")
    ignore_eos: bool | None = Field(default=None, description="as vLLM's")
    guided_json: dict[str, Any] | str | None = Field(default=None, description="a JSON schema, as in vLLM")
    guided_regex: str | None = Field(default=None, description="as vLLM's")
    guided_grammar: str | None = Field(default=None, description="GBNF, as in vLLM")

    def sampling(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """Returns the sampling. Raises InvalidRequest for grammars that exclude each other and for biases of invalid
        token ids.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # vLLM writes -1 for off
            "seed": self.seed,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
        }
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            max_tokens=max_tokens,
            stop=stop,
            logit_bias=_biases(self.logit_bias or {}),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=self.grammar(),
        )

    def check(self) -> None:
        """Raises InvalidRequest for fields that have no effect beside each other."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` needs `stream`", field="stream_options")

    def grammar(self) -> Grammar | None:
        """Returns the one grammar of the answer. Raises InvalidRequest for more than one."""
        found = []
        if self.response_format is not None and (grammar := self.response_format.grammar) is not None:
            found.append(grammar)
        if self.guided_json is not None:
            schema = self.guided_json if isinstance(self.guided_json, str) else json.dumps(self.guided_json)
            found.append(Grammar(GrammarKind.JSON_SCHEMA, schema))
        if self.guided_regex is not None:
            found.append(Grammar(GrammarKind.REGEX, self.guided_regex))
        if self.guided_grammar is not None:
            found.append(Grammar(GrammarKind.EBNF, self.guided_grammar))
        if len(found) > 1:
            raise InvalidRequest(
                "an answer has one form; give only one of response_format and guided_*", field="guided_json"
            )
        return found[0] if found else None

    @property
    def user_digest(self) -> str | None:
        return None if self.user is None else digest(self.user)

    @property
    def counts_as_it_goes(self) -> bool:
        """Tells whether each chunk of a stream has a usage."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def digest(name: str) -> str:
    """Returns the digest that stands for a user's name in logs."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), bias) for token, bias in given.items())
    except ValueError:
        raise InvalidRequest("the keys of `logit_bias` are token ids", field="logit_bias") from None


Prompts = str | Many[str] | Many[int] | Many[Many[int]]


class CompletionRequest(Sampled):
    """The body of /v1/completions."""

    prompt: Prompts = Field(description="a text, token ids, or several of either", union_mode="left_to_right")
    max_tokens: int | None = Field(default=None, ge=0, description=f"{COMPLETION_TOKENS} by default; 0 with `echo`")
    echo: bool | None = Field(default=None, description="the answer includes the prompt, and so do `logprobs`")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CHOICES,
        description="the `n` of the highest mean log-probability; at least `n`, and not streamed",
    )

    REFUSED: ClassVar = {"suffix": "the model cannot fill in a gap"}

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise InvalidRequest(
                f"`best_of` is {self.best_of} and `n` is {self.n}: the best are chosen of at least as many",
                field="best_of",
            )
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise InvalidRequest("`best_of` cannot be streamed: the best is known only at the end", field="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("`max_tokens` 0 asks for nothing without `echo`", field="max_tokens")

    @property
    def has_max_tokens(self) -> bool:
        return self.max_tokens is not None

    def sampling_of(self, token_limit: int) -> SamplingParams:
        """Returns the sampling, with log-probabilities where answers are shown with them or chosen by them."""
        limit = min(COMPLETION_TOKENS, token_limit) if self.max_tokens is None else max(1, self.max_tokens)
        is_ranked = self.best_of is not None and self.best_of > (self.n or 1)
        logprobs = 0 if self.logprobs is None and is_ranked else self.logprobs
        return self.sampling(limit, logprobs, self.logprobs if self.echo else None)

    def prompts(self) -> list[str | list[int]]:
        """Returns each prompt by itself. Raises InvalidRequest for none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("`prompt` is empty; give at least one token", field="prompt")
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


class TextPart(Strict):
    """A part of a message; text is the only kind."""

    type: Literal["text", "input_text", "output_text"]
    text: str

    NEUTRAL: ClassVar = {"annotations": ([],), "cache_control": ()}


class CalledFunction(Strict):
    name: str
    arguments: str


class CalledTool(Strict):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One message of a conversation."""

    role: _ROLES
    content: str | Many[TextPart] | None = None
    name: str | None = None
    tool_calls: Many[CalledTool] | None = None
    tool_call_id: str | None = None

    NEUTRAL: ClassVar = {"refusal": (), "annotations": ([],), "function_call": (), "audio": ()}

    def for_template(self) -> dict[str, Any]:
        """Returns the message as chat templates read it: plain text, and arguments of calls as objects."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        made: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
        }
        if self.name is not None:
            made["name"] = self.name
        if self.tool_call_id is not None:
            made["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            made["tool_calls"] = [_called(call) for call in self.tool_calls]
        return made


def _called(call: CalledTool) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        raise InvalidRequest("`messages`: the arguments of a tool call are not JSON", field="messages") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class ChatRequest(Sampled):
    """The body of /v1/chat/completions."""

    messages: Many[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, description="as max_completion_tokens")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="by default, as many as fit")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Many[Tool] | None = Field(default=None, description="shown to the model by its chat template")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        default=None, description="with `required` or the name of a tool, the answer is held to the form of a call"
    )

    NEUTRAL: ClassVar = {
        "parallel_tool_calls": (True,),
        "store": (False,),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
        "modalities": (["text"],),
        "verbosity": ("medium",),
    }
    REFUSED: ClassVar = {
        "audio": "answers are text",
        "prediction": "nothing is drafted",
        "reasoning_effort": "the models served here have no such switch",
        "web_search_options": "nothing is searched",
        "functions": "use `tools`",
        "function_call": "use `tool_choice`",
        **_NOT_HERE,
        "safety_identifier": "use `user`",
    }

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                f"`max_tokens` is {self.max_tokens} and `max_completion_tokens` is {self.max_completion_tokens}; they "
                "mean the same, so leave one out",
                field="max_tokens",
            )

    @property
    def has_max_tokens(self) -> bool:
        return self.max_completion_tokens is not None or self.max_tokens is not None

    def sampling_of(self, token_limit: int) -> SamplingParams:
        """Returns the sampling. Raises InvalidRequest for alternatives without log-probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs`", field="top_logprobs")
        limit = self.max_completion_tokens or self.max_tokens or token_limit
        return self.sampling(limit, (self.top_logprobs or 0) if self.logprobs else None)

    @property
    def is_tool_forced(self) -> bool:
        return isinstance(self.tool_choice, NamedTool) or self.tool_choice == "required"

    def shown_tools(self) -> list[dict[str, Any]]:
        """Returns the tools that the template is given. Raises InvalidRequest for a choice without tools."""
        if not self.tools:
            if self.is_tool_forced or self.tool_choice == "auto":
                raise InvalidRequest("`tool_choice` needs `tools`", field="tool_choice")
            return []
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def grammar(self) -> Grammar | None:
        if not self.is_tool_forced:
            return super().grammar()
        if super().grammar() is not None:
            raise InvalidRequest("a forced tool call has its own form; leave response_format out", field="tool_choice")
        name = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return Grammar(GrammarKind.JSON_SCHEMA, forced_call_schema(self.shown_tools(), name))

    def prompt(self, template: ChatTemplate | None) -> str:
        """Renders the prompt. Raises InvalidRequest without a template, or where it refuses the messages."""
        if template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions, or serve it with --chat-template FILE",
                field="messages",
            )
        return template.render([message.for_template() for message in self.messages], self.shown_tools())


class TextFormat(Strict):
    """The form of an answer in /v1/responses."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="every answer is held to the schema")


class TextOptions(Strict):
    format: TextFormat | None = None

    NEUTRAL: ClassVar = {"verbosity": ("medium",)}


class ResponseTool(Strict):
    """A function in /v1/responses."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="a JSON schema")
    strict: bool | None = Field(default=None, description="every forced call is held to the schema")


class ResponseToolChoice(Strict):
    type: Literal["function"]
    name: str


class InputItem(Strict):
    """A message, a tool call, or a tool's result."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Many[TextPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None

    NEUTRAL: ClassVar = {"status": ("completed",)}

    def for_template(self) -> dict[str, Any]:
        """Returns the item as chat templates read it."""
        if self.type == "function_call":
            function = CalledFunction(name=self.name or "", arguments=self.arguments or "{}")
            return {
                "role": "assistant",
                "content": "",
                "tool_calls": [_called(CalledTool(id=self.call_id or "", function=function))],
            }
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id or "", "content": self.output or ""}
        if self.role is None:
            raise InvalidRequest("`input`: a message without a role", field="input")
        return Message(role=self.role, content=self.content).for_template()


class ResponsesRequest(Strict):
    """The body of /v1/responses; nothing is kept between two calls."""

    model: str = Field(description="the model, or MODEL:POOL for one of the tenant's named pools")
    input: str | Many[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, description="by default, as many as fit")
    temperature: float | None = Field(default=None, description="1 by default, as in OpenAI's API; 0 is greedy")
    top_p: float | None = None
    text: TextOptions | None = None
    tools: Many[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    stream: bool | None = None
    store: bool | None = Field(default=None, description="nothing is stored either way")
    user: str | None = Field(default=None, description="its digest is in the access log")
    pool: str | int | float | None = Field(
        default=None, description="the pool's size, as with `--pool` on the command line"
    )
    drift: str | float | None = Field(default=None, description="as with `--drift` on the command line")

    NEUTRAL: ClassVar = {
        "background": (False,),
        "include": ([],),
        "metadata": ({},),
        "parallel_tool_calls": (True,),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
        "top_logprobs": (0,),
        "stream_options": ({"include_obfuscation": False},),
    }
    REFUSED: ClassVar = {
        "previous_response_id": "nothing is stored; send the whole conversation as `input`",
        "conversation": "nothing is stored; send the whole conversation as `input`",
        "prompt": "there are no stored prompts; send `input`",
        "reasoning": "the models served here have no such switch",
        "max_tool_calls": "tools are called by the client",
        "access_programs": "access is by key",
        "image": "answers are text",
        "background_options": "nothing is run in the background",
        "context_management": "send less as `input`",
        **_NOT_HERE,
        "safety_identifier": "use `user`",
    }

    @property
    def has_max_tokens(self) -> bool:
        return self.max_output_tokens is not None

    @property
    def user_digest(self) -> str | None:
        return None if self.user is None else digest(self.user)

    @property
    def is_tool_forced(self) -> bool:
        return isinstance(self.tool_choice, ResponseToolChoice) or self.tool_choice == "required"

    def shown_tools(self) -> list[dict[str, Any]]:
        """Returns the tools that the template is given. Raises InvalidRequest for a choice without tools."""
        if not self.tools:
            if self.is_tool_forced or self.tool_choice == "auto":
                raise InvalidRequest("`tool_choice` needs `tools`", field="tool_choice")
            return []
        if self.tool_choice == "none":
            return []
        return [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in self.tools
        ]

    def sampling_of(self, token_limit: int) -> SamplingParams:
        given: dict[str, Any] = {} if self.top_p is None else {"top_p": self.top_p}
        return SamplingParams(
            **given,
            temperature=1.0 if self.temperature is None else self.temperature,
            max_tokens=self.max_output_tokens or token_limit,
            grammar=self._grammar(),
        )

    def _grammar(self) -> Grammar | None:
        if self.is_tool_forced:
            name = self.tool_choice.name if isinstance(self.tool_choice, ResponseToolChoice) else None
            return Grammar(GrammarKind.JSON_SCHEMA, forced_call_schema(self.shown_tools(), name))
        wanted = None if self.text is None else self.text.format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return Grammar(GrammarKind.JSON_OBJECT)
        if wanted.schema_ is None:
            raise InvalidRequest("`text.format.schema` is missing", field="text")
        return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(wanted.schema_))

    def prompt(self, template: ChatTemplate | None) -> str:
        """Renders the prompt. Raises InvalidRequest without a template, or where it refuses the messages."""
        if template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions, or serve it with --chat-template FILE",
                field="input",
            )
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else None
        return template.render(
            messages + (items if items is not None else [item.for_template() for item in self.input]),  # type: ignore[union-attr]
            self.shown_tools(),
        )


class TokenizeRequest(Strict):
    """The body of /tokenize."""

    model: str = ""
    prompt: str
    add_special_tokens: bool = True

    NEUTRAL: ClassVar = {"return_token_strs": (False,)}


class DetokenizeRequest(Strict):
    """The body of /detokenize."""

    model: str = ""
    tokens: Many[int]


# --- what is passed to the pipeline ---------------------------------------------------------------------------------


def model_and_pool(
    name: str, size: str | int | float | None, drift: str | float | None, model: ModelInfo, default: PoolPolicy
) -> PoolPolicy | PoolByName:
    """Returns the pool that `model`, `pool` and `drift` of a request name. Raises InvalidRequest or UnknownModel."""
    model_name, colon, pool_name = name.partition(":")
    check_model(model_name, model)
    asked_drift = parse_drift(None if drift is None else str(drift))
    if colon:
        if size is not None:
            raise InvalidRequest("`model` names a pool, whose size is fixed; leave `pool` out", field="pool")
        return PoolByName(pool_name, asked_drift)
    if size is None:
        return chosen_pool(default.size, default.source, asked_drift or default.drift, model)
    parsed = parse_pool_size(size)
    return chosen_pool(parsed, default.source, asked_drift or default.drift, model)


def checked(params: SamplingParams, model: ModelInfo, asked: Any = None) -> SamplingParams:
    """Returns a checked value; what `asked` leaves out, it has from the model's own settings. Raises InvalidRequest."""
    if asked is not None:
        unset = {name for name in DRAWN_BY if getattr(asked, name, None) is None}
        if not model.sampling.temperature:
            unset.discard("temperature")  # these APIs have a default of their own, which is not greedy
        params = filled(params, unset, model.sampling)
    check_sampling(params)
    check_vocabulary(params, model.vocab_size)
    return params


def in_json(error: PagerError) -> tuple[str, str | None]:
    """Returns the message and the field of an error, with fields named as in requests over HTTP."""
    message, name = error.message, error.field or ""
    for inner, outer in (("sampling.regex", "guided_regex"), ("sampling.ebnf", "guided_grammar"), ("sampling.", "")):
        message, name = message.replace(inner, outer), name.replace(inner, outer)
    for inner, outer in _OUTER_NAMES.items():
        if name == inner or name.startswith(f"{inner}."):
            return message, outer
    return message, name or None


def new_id(kind: str) -> str:
    """Returns an id for an answer, in the form of OpenAI's."""
    return f"{kind}-{uuid.uuid4().hex}"


# --- answers --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has arrived. Owned by the call that it belongs to."""

    index: int
    prompt: int  # the number of its prompt, where there are several
    prompt_ids: Sequence[int] = ()  # only where they are shown
    prompt_tokens: int = 0  # only where they are counted before the answer has ended
    texts: Many[str] = field(default_factory=list)
    token_ids: Many[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    usage: Usage | None = None

    def add(self, chunk: TokenChunk) -> None:
        """Adds the next chunk of the answer."""
        self.texts.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.prompt_logprobs.extend(chunk.prompt_logprobs)
        self.usage = chunk.usage or self.usage

    def part(self, chunk: TokenChunk) -> Choice:
        """Returns a choice with only the contents of a chunk; the prompt comes with the first one."""
        made = Choice(self.index, self.prompt, () if self.texts else self.prompt_ids)
        made.add(chunk)
        return made

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def finish_reason(self) -> str | None:
        return None if self.usage is None else finish_reason(self.usage)

    @property
    def usage_so_far(self) -> dict[str, int]:
        """The counts of its tokens until now, while it is incomplete."""
        num_tokens = len(self.token_ids)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self.prompt_tokens + num_tokens,
        }

    @property
    def is_large(self) -> bool:
        """Tells whether building its JSON takes so long that nothing else should wait for it."""
        logprobs = (each for part in (self.prompt_logprobs, self.logprobs) for each in part)
        return len(self.prompt_ids) + sum(1 + len(each.top_ids) for each in logprobs) > MAX_AT_ONCE

    @property
    def mean_logprob(self) -> float:
        return sum(each.logprob for each in self.logprobs) / max(1, len(self.logprobs))


def finish_reason(usage: Usage) -> str:
    return "length" if usage.finish_reason is FinishReason.LENGTH else "stop"


def usage_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Returns the tokens as OpenAI counts them (a prompt once, however many answers it has), and what was paged."""
    ended = [(choice.prompt, choice.usage) for choice in choices if choice.usage is not None]
    prompts = {prompt: usage.prompt_tokens for prompt, usage in ended}
    cached: dict[int, int] = {}  # what the first answer to a prompt found cached: later answers find what that one left
    for prompt, usage in ended:
        cached[prompt] = min(usage.cached_prompt_tokens, cached.get(prompt, usage.prompt_tokens))
    prompt_tokens, completion_tokens = sum(prompts.values()), sum(usage.completion_tokens for _, usage in ended)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        "expert_pager": paged([usage for _, usage in ended]),
    }


def paged(usages: Sequence[Usage]) -> dict[str, Any] | None:
    """Returns what was paged for answers; the pool and the mode are the first one's. None without one."""
    if not usages:
        return None
    first = usages[0]
    return {
        "mode": first.mode,
        "pool": None if first.pool is None else first.pool.digest,
        "pool_experts": None if first.pool is None else first.pool.num_experts,
        "codeword": first.codeword or None,
        "experts_hit": sum(usage.experts_hit for usage in usages),
        "experts_missed": sum(usage.experts_missed for usage in usages),
        "bytes_from_disk": sum(usage.bytes_from_disk for usage in usages),
        "bytes_from_host": sum(usage.bytes_from_host for usage in usages),
        "out_of_pool_mass": first.out_of_pool_mass,
        "stall_seconds": sum(usage.stall_s for usage in usages),
        "queue_seconds": first.queue_s,
        "time_to_first_token_seconds": first.time_to_first_token_s,
    }


def head(kind: str, id_: str, model: str) -> dict[str, Any]:
    """Returns the fields with which every object of an answer begins."""
    return {"id": id_, "object": kind, "created": int(time.time()), "model": model}


def completion_logprobs(
    texts: TokenTexts, logprobs: Sequence[TokenLogprobs], first: int | None = None, offset: int = 0
) -> dict[str, Any]:
    """Returns the log-probabilities. `first` is the id of a prompt's first token, which has no probability."""
    tokens: Many[str] = [] if first is None else [texts.of(first)[0]]
    values: list[float | None] = [None] * len(tokens)
    tops: list[dict[str, float] | None] = [None] * len(tokens)
    for each in logprobs:
        tokens.append(texts.of(each.token_id)[0])
        values.append(each.logprob)
        top = {texts.of(id_)[0]: value for id_, value in zip(each.top_ids, each.top_logprobs, strict=True)}
        tops.append(top | {tokens[-1]: each.logprob})
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets[: len(tokens)],
    }


def chat_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Returns the log-probabilities of an answer's tokens in the form of chat completions."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, data = texts.of(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            {
                **entry(each.token_id, each.logprob),
                "top_logprobs": [entry(*pair) for pair in zip(each.top_ids, each.top_logprobs, strict=True)],
            }
            for each in logprobs
        ],
        "refusal": None,
    }


# --- /v1/responses --------------------------------------------------------------------------------------------------


def response(
    asked: ResponsesRequest, id_: str, choice: Choice, text: str, calls: Sequence[Mapping[str, Any]], reason: str
) -> dict[str, Any]:
    """Returns the whole object of an answer that has ended or has just begun."""
    usage = choice.usage
    status = "in_progress" if usage is None else "incomplete" if reason == "length" else "completed"
    output: list[dict[str, Any]] = []
    if text or not calls:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        output.append({"type": "message", "id": f"msg_{id_}", "status": status, "role": "assistant", "content": [part]})
    for call in calls:
        function = call["function"]
        output.append(
            {"type": "function_call", "id": f"fc_{call['id']}", "call_id": call["id"], "status": status, **function}
        )
    body: dict[str, Any] = {
        "id": id_,
        "object": "response",
        "created_at": int(time.time()),
        "model": asked.model,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "error": None,
        "instructions": asked.instructions,
        "output": [] if usage is None else output,
        "parallel_tool_calls": True,
        "tool_choice": "auto" if asked.tool_choice is None else asked.model_dump()["tool_choice"],
        "tools": [] if asked.tools is None else [tool.model_dump() for tool in asked.tools],
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "metadata": {},
        "store": False,
    }
    if usage is not None:
        total = usage.prompt_tokens + usage.completion_tokens
        body["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": total,
            "expert_pager": paged([usage]),
        }
    return body


Event = tuple[str, dict[str, Any]]


class ResponseEvents:
    """The events of a streamed response, numbered in order. Text that `holds_back` keeps comes with the end."""

    def __init__(self, id_: str, snapshot: Callable[[], dict[str, Any]], *, holds_back: bool) -> None:
        self._snapshot = snapshot
        self._item_id = f"msg_{id_}"
        self._holds_back = holds_back
        self._number = 0

    def begin(self) -> list[Event]:
        """Returns the events before the first text."""
        events = [
            self._event("response.created", response=self._snapshot()),
            self._event("response.in_progress", response=self._snapshot()),
        ]
        return events if self._holds_back else [*events, *self._begin_message()]

    def delta(self, text: str) -> list[Event]:
        """Returns the event for new text."""
        return [self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])]

    def end(self) -> list[Event]:
        """Returns the events at the end of the answer."""
        whole, events = self._snapshot(), []
        for index, item in enumerate(whole["output"]):
            if item["type"] == "message":
                text = item["content"][0]["text"]
                if self._holds_back:
                    events += [*self._begin_message(), *self.delta(text)]
                events += [
                    self._event("response.output_text.done", **self._place, text=text, logprobs=[]),
                    self._event("response.content_part.done", **self._place, part=_part(text)),
                ]
            else:
                events += self._call(item, index)
            events.append(self._event("response.output_item.done", output_index=index, item=item))
        name = "response.incomplete" if whole["status"] == "incomplete" else "response.completed"
        return [*events, self._event(name, response=whole)]

    def _begin_message(self) -> list[Event]:
        item = {"type": "message", "id": self._item_id, "status": "in_progress", "role": "assistant", "content": []}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place, part=_part("")),
        ]

    def _call(self, item: Mapping[str, Any], index: int) -> list[Event]:
        begun = {**item, "status": "in_progress", "arguments": ""}
        place, arguments = {"item_id": item["id"], "output_index": index}, item["arguments"]
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=arguments),
        ]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, name: str, /, **fields: Any) -> Event:
        self._number += 1
        return name, {"type": name, "sequence_number": self._number - 1, **fields}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
