"""A few documents of each domain, from JSON lines: `{"text": ..., "id": ...}` a line, a file a domain, or gzipped."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pager.errors import InvalidRequest
from pager.reading import read_documents


@dataclass(frozen=True, slots=True)
class Document:
    domain: str
    name: str
    text: str


def sample_documents(patterns: Sequence[str], max_documents: int, seed: int) -> list[Document]:
    """At most `max_documents` of each domain, each equally likely; domains by name, documents in the order of files.

    The domain is the file's name up to its first dot. The same for the same seed. Raises InvalidRequest.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted({Path(found) for pattern in patterns for found in glob.glob(pattern, recursive=True)}):
        if path.is_file():
            files.setdefault(path.name.partition(".")[0], []).append(path)
    if not files:
        raise InvalidRequest(
            f"no file matches {', '.join(map(repr, patterns))}; give JSON lines files, a file a domain"
        )
    found = [document for domain in sorted(files) for document in _sample(domain, files[domain], max_documents, seed)]
    if not found:
        raise InvalidRequest(f"the {sum(map(len, files.values()))} files hold no document with text")
    return found


def _sample(domain: str, files: Sequence[Path], max_documents: int, seed: int) -> list[Document]:
    """A reservoir: a corpus larger than memory passes through."""
    random = np.random.default_rng([seed, *domain.encode()])
    kept: list[tuple[int, Document]] = []
    for number, document in enumerate(_documents(domain, files)):
        if len(kept) < max_documents:
            kept.append((number, document))
        elif (place := int(random.integers(number + 1))) < max_documents:
            kept[place] = (number, document)
    return [document for _, document in sorted(kept, key=lambda pair: pair[0])]


def _documents(domain: str, files: Sequence[Path]) -> Iterator[Document]:
    for path in files:
        for number, value in read_documents(path):
            if value["text"].strip():
                yield Document(domain, str(value.get("id", f"{path.name}, line {number}")), value["text"])
