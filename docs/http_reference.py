"""The tables of docs/http.md, made from the classes that read requests: `python -m docs.http_reference`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from router_service import anthropic, openai
from router_service.openai import Strict

PAGE = Path(__file__).parent / "http.md"
MARK = "<!-- Below: made by `make docs` from the classes that read requests; a test compares. -->\n"
REQUESTS: tuple[tuple[str, type[Strict]], ...] = (
    ("POST /v1/completions", openai.CompletionRequest),
    ("POST /v1/chat/completions", openai.ChatRequest),
    ("POST /v1/responses", openai.ResponsesRequest),
    ("POST /v1/messages", anthropic.MessagesRequest),
    ("POST /v1/messages/count_tokens", anthropic.CountRequest),
    ("POST /tokenize", openai.TokenizeRequest),
    ("POST /detokenize", openai.DetokenizeRequest),
)
_NAMES: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", Any: "anything"}


def page(current: str) -> str:
    """The page with its tables as the classes are now; what stands above them is kept."""
    return current.partition(MARK)[0] + MARK + tables()


def tables() -> str:
    """A table for each request, then one for each kind of object within them."""
    lines: list[str] = []
    for title, cls in REQUESTS:
        lines += ["", f"### {title}", "", *_table(cls)]
    lines += ["", "### Objects within requests"]
    for name, cls in _objects().items():
        lines += ["", f"#### {name}", "", *_table(cls)]
    return "\n".join(lines) + "\n"


def _table(cls: type[Strict]) -> list[str]:
    return ["| field | | value | |", "|---|---|---|---|", *_rows(cls)]


def _rows(cls: type[Strict]) -> Iterator[str]:
    for name, info in cls.names().items():
        status = "done, required" if info.is_required() else "done"
        yield f"| `{name}` | {status} | {_value(info)} | {info.description or ''} |"
    for name in cls.NEUTRAL:
        yield f"| `{name}` | one value | | {cls.reason(name).partition(' here')[0]} |"
    for name in cls.REFUSED:
        yield f"| `{name}` | 400 | | {cls.reason(name)} |"


def _value(info: FieldInfo) -> str:
    shown = _shown(info.annotation)
    bounds = {type(each).__name__: each for each in info.metadata}
    least, most = getattr(bounds.get("Ge"), "ge", None), getattr(bounds.get("Le"), "le", None)
    if least is None:
        return shown
    return f"{shown} from {least}" if most is None else f"{shown} from {least} to {most}"


def _shown(annotation: Any) -> str:
    """A type, as readers of JSON call it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _shown(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_shown(each) for each in arguments if each is not types.NoneType)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(each)}`" for each in arguments)
    if origin is list:
        return f"list of {_shown(arguments[0])}"
    if origin is dict:
        return "object"
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return f"[{_name(annotation)}](#{_name(annotation).lower().replace(' ', '-').replace(chr(39), '')})"
    return _NAMES[annotation]


def _name(cls: type[Strict]) -> str:
    """Both interfaces have messages and tools."""
    return f"Anthropic's {cls.__name__}" if cls.__module__ == anthropic.__name__ else cls.__name__


def _objects() -> dict[str, type[Strict]]:
    """The classes that requests are made of, by their names on the page, in the order in which they are met."""
    left: list[Any] = [cls for _, cls in REQUESTS]
    found: dict[str, type[Strict]] = {}
    while left:
        each = left.pop(0)
        if isinstance(each, type) and issubclass(each, Strict):
            if _name(each) in found:
                continue
            if each not in dict(REQUESTS).values():
                found[_name(each)] = each
            left += [info.annotation for info in each.names().values()]
        else:
            left += get_args(each)
    return found


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
