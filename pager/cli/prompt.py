"""Where a prompt comes from."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pager.errors import InvalidRequest
from pager.reading import check_text, read_bounded, reason_of

Prompt = str | tuple[int, ...]
MAX_BYTES = 1 << 26  # a prompt in a file

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
    return check_text(text, "the prompt")


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
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if name == "-" else read_bounded(name, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InvalidRequest(f"prompt file {name} cannot be read: {reason_of(error)}") from None
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"the prompt has more than the {MAX_BYTES} bytes that one may have")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the prompt is not UTF-8: byte {error.start} ({error.reason})") from None
