"""Where a prompt comes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pager.errors import InvalidRequest

Prompt = str | tuple[int, ...]

PromptText = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt.")]
PromptFile = Annotated[
    str | None, typer.Option(help="Read the prompt from a UTF-8 file, or from stdin with '-'.", metavar="FILE")
]
TokenIds = Annotated[str | None, typer.Option(help="A prompt of token ids: '1,2,3'.", metavar="IDS")]


def read_prompt(text: str | None, file: str | None, token_ids: str | None) -> Prompt:
    """The one prompt given. Raises typer.BadParameter unless it is exactly one, InvalidRequest for bad text or ids."""
    if sum(given is not None for given in (text, file, token_ids)) != 1:
        raise typer.BadParameter("give the prompt once: as an argument, with --prompt-file or with --token-ids")
    if token_ids is not None:
        return _ids(token_ids)
    if file is not None:
        return _file(file)
    assert text is not None
    return text


def _ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise InvalidRequest(f"--token-ids takes whole numbers such as '1,2,3', not {text[:60]!r}") from None
    if any(not 0 <= token_id < 2**32 for token_id in ids):
        raise InvalidRequest(f"token id {min(ids) if min(ids) < 0 else max(ids)} is not in any vocabulary")
    return ids


def _file(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode()
    except OSError as error:
        raise InvalidRequest(f"prompt file {name} can not be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the prompt is not UTF-8: byte {error.start} ({error.reason})") from None
