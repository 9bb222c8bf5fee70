"""Texts of the HTTP front: chat templates, tool calls, and the texts of single tokens.

Templates are rendered as transformers renders them, in a sandboxed Jinja, with the special tokens that the tokenizer's
settings name. This is done here because transformers imports torch.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import Tokenizer, decoders

from pager.errors import CheckpointError, ConfigError, InvalidRequest
from pager.gguf import is_gguf, read_gguf
from pager.reading import parse_json, read_bounded, reason_of
from pager.tokenizing import read_tokenizer, refuse_special

TEMPLATE_NAME = "chat_template.jinja"
SETTINGS_NAME = "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 1 << 20
MAX_RENDERED_CHARACTERS = 8 * 2**20
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function in an answer; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template of a model, and the names that it may use beside the messages."""

    source: str
    names: Mapping[str, str]
    refused: Sequence[str] = ()  # special tokens that messages may not spell

    @classmethod
    def read(cls, model: Path, file: Path | None = None) -> ChatTemplate | None:
        """Reads the template in `file`, else the model's own; returns None where it has none.

        Raises ConfigError for a `file` that cannot be read, CheckpointError for damaged settings of the model.
        """
        settings: dict[str, Any] = _settings_of_gguf(model) if is_gguf(model) else {}
        path = model / SETTINGS_NAME
        try:
            if path.exists():
                settings = parse_json(read_bounded(path, MAX_TEMPLATE_BYTES).decode())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {reason_of(error)}; fetch it again") from None
        source = settings.get("chat_template")
        if isinstance(source, list):  # a list of templates, each with a name
            source = next((each.get("template") for each in source if each.get("name") == "default"), None)
        chosen = file or (model / TEMPLATE_NAME if (model / TEMPLATE_NAME).exists() else None)
        if chosen is not None:
            try:
                source = read_bounded(chosen, MAX_TEMPLATE_BYTES).decode()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"the chat template {chosen} cannot be read: {reason_of(error)}") from None
        if not isinstance(source, str):
            return None
        return cls(source, {name: token for name in _SPECIAL if (token := _content(settings.get(name)))})

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        """Renders the messages as a prompt, up to where the assistant's answer begins. Raises InvalidRequest."""
        refuse_special(_texts([*messages, *(tools or ())]), self.refused, "messages")
        try:
            text = _compiled(self.source).render(
                messages=[_with_reasoning(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                documents=None,
                add_generation_prompt=True,
                **self.names,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            # A template refuses roles that it does not know, or an order of messages, in its author's words.
            reason = str(error) if isinstance(error, TemplateError) else type(error).__name__
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {reason[:200]}", field="messages"
            ) from None
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise InvalidRequest(f"the rendered messages have {len(text)} characters; send less", field="messages")
        return text


REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which messages carry reasoning; templates read one of the first two."""


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the message with its reasoning, if any, under both names that templates read."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    """Compiles a template with the names that transformers gives templates. Raises TemplateError."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _Dict(),
        "namespace": _CheckedNamespace,
    }
    return sandbox.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`. Jinja's own escapes what HTML would read as markup."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _GenerationBlocks(Extension):
    """The tags `{% generation %}` and `{% endgeneration %}`, between which templates for training mark answers."""

    tags = frozenset(("generation",))  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """`dict` in a template, of which nothing but its calls can be reached."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _CheckedNamespace(Namespace):
    """`namespace` in a template; no name in it may begin with an underscore, as those of Python's internals do."""

    def __init__(*args: Any, **named: Any) -> None:
        self, *items = args  # as in Jinja's, so that a template may use any name
        values = dict(*items, **named)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not keep {name[:60]!r}, which begins with an underscore, in a namespace")


def _texts(value: Any) -> Iterator[str]:
    """Yields every text, however deep, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield str(name)
            yield from _texts(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from _texts(each)


_GGUF_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _settings_of_gguf(model: Path) -> dict[str, Any]:
    """Returns the settings for templates that a GGUF file's metadata has. Raises CheckpointError."""
    metadata = read_gguf(model).metadata
    template, tokenizer = metadata.get("tokenizer.chat_template"), read_tokenizer(model)
    if not isinstance(template, str) or tokenizer is None:
        return {}
    ids = {name: metadata.get(f"tokenizer.ggml.{part}_token_id") for name, part in _GGUF_TOKENS.items()}
    tokens = {name: tokenizer.id_to_token(token_id) for name, token_id in ids.items() if type(token_id) is int}
    return {**tokens, "chat_template": template}


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


# --- tool calls -----------------------------------------------------------------------------------------------------


_TAGGED = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def _tagged_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Reads the calls of Hermes and Qwen: JSON with `name` and `arguments` between <tool_call> tags."""
    calls = []
    for found in _TAGGED.finditer(text):
        call = _call_in(found[1])
        if call is None:
            return text, []
        calls.append(call)
    return _TAGGED.sub("", text).strip() if calls else text, calls


def _call_in(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return ToolCall(new_call_id(), str(name), arguments if isinstance(arguments, str) else json.dumps(arguments))


def new_call_id() -> str:
    """Returns an id for a tool call."""
    return f"call_{uuid.uuid4().hex[:24]}"


PARSERS: Mapping[str, Callable[[str], tuple[str, list[ToolCall]]]] = {"<tool_call>": _tagged_calls}
"""By what a chat template has in it: from an answer's text to the text beside its calls, and the calls."""


def tool_parser(template: ChatTemplate) -> Callable[[str], tuple[str, list[ToolCall]]] | None:
    """Returns the parser for answers of a model with this template; None where no known one fits."""
    return next((parser for mark, parser in PARSERS.items() if mark in template.source), None)


def forced_call_schema(tools: Sequence[Mapping[str, Any]], name: str | None) -> str:
    """Returns the schema of an answer that must call the tool of that name, or any. Raises InvalidRequest."""
    functions = [tool["function"] for tool in tools]
    chosen = [each for each in functions if name is None or each["name"] == name]
    if not chosen:
        raise InvalidRequest(f"tool_choice names {str(name)[:64]!r}, which is not among `tools`", field="tool_choice")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": each["name"]},
                "arguments": each.get("parameters") or {"type": "object", "properties": {}},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for each in chosen
    ]
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


def forced_call(text: str) -> ToolCall | None:
    """Returns the call in an answer that `forced_call_schema` constrained; None for one that was cut short."""
    return _call_in(text)


# --- texts of single tokens -----------------------------------------------------------------------------------------


class TokenTexts:
    """The texts of single tokens. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self.of = lru_cache(maxsize=1 << 16)(self._of)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of consecutive tokens, special ones included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _of(self, token_id: int) -> tuple[str, bytes]:
        """Returns the text and the bytes of a token. A part of a character is written as in OpenAI's answers."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return "", b""
        if self._is_byte_level and token not in self._added:
            data = bytes(_byte_of()[character] for character in token if character in _byte_of())
        elif re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            data = bytes([int(token[3:5], 16)])
        else:
            data = token.replace("▁", " ").encode()
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Maps the characters of byte-level tokens to their bytes; printable characters stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
