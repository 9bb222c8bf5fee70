"""The examples that a named pool is made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pager.errors import InvalidRequest, PagerError
from pager.reading import document_of, read_lines, reason_of

_LINES = (".jsonl", ".ndjson")
MAX_CHARACTERS = 1 << 26


def read_examples(path: Path) -> list[str]:
    """JSON lines with a "text" each, or one plain text; gzipped where the name ends in .gz.

    A file is taken for JSON lines where its name says so or its first line is such an object. Raises InvalidRequest.
    """
    lines = list(_bounded_lines(path))
    written = [(number, line) for number, line in lines if line.strip()]
    if not written:
        raise InvalidRequest(f"{path} has no examples; it is empty")
    if not path.name.removesuffix(".gz").endswith(_LINES) and not _is_example(written[0][1]):
        return ["".join(line for _, line in lines)]
    examples = []
    for number, line in written:
        example = document_of(line, f"line {number} of {path}")["text"]
        if not example:
            raise InvalidRequest(f'line {number} of {path} has an empty "text"; leave it out')
        examples.append(example)
    return examples


def _bounded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Raises InvalidRequest, also for more than a calibration ever reads."""
    num_characters = 0
    try:
        for number, line in read_lines(path):
            num_characters += len(line)
            if num_characters > MAX_CHARACTERS:
                raise InvalidRequest(f"{path} has more than the {MAX_CHARACTERS} characters that examples may have")
            yield number, line
    except PagerError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read: {reason_of(error)}") from None


def _is_example(line: str) -> bool:
    try:
        document_of(line, "")
    except InvalidRequest:
        return False
    return True
