"""The examples that a named pool is made from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from pager.errors import InvalidRequest

_LINES = (".jsonl", ".ndjson")


def read_examples(path: Path) -> list[str]:
    """JSON lines with a "text" each, or one plain text; gzipped where the name ends in .gz.

    A file is taken for JSON lines where its name says so or its first line is such an object. Raises InvalidRequest.
    """
    text = _text(path)
    name = path.name.removesuffix(".gz")
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise InvalidRequest(f"{path} has no examples; it is empty")
    if not name.endswith(_LINES) and _example(lines[0][1]) is None:
        return [text]
    examples = []
    for number, line in lines:
        example = _example(line)
        if example is None:
            raise InvalidRequest(f'line {number} of {path} is not a JSON object with a "text" of its own')
        examples.append(example)
    return examples


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8: byte {error.start} ({error.reason})") from None
    except (OSError, EOFError) as error:
        raise InvalidRequest(f"{path} can not be read: {getattr(error, 'strerror', None) or error}") from None


def _example(line: str) -> str | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    text = value.get("text") if isinstance(value, dict) else None
    return text if isinstance(text, str) and text else None
