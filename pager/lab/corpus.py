"""Documents for measurements: read from JSON lines, cut, tokenized and sampled the same way everywhere."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pager.errors import InvalidRequest
from pager.reading import read_documents
from pager.tokenizing import encode_all


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


EVERY_DOCUMENT = 10**9


@dataclass(frozen=True, slots=True)
class Text:
    """A document of the evaluation: its first tokens, of which the prompt is the beginning."""

    domain: str
    name: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of a document is read: a prompt, and at least as many tokens after it, up to `context_tokens`."""

    prompt_tokens: int = 64
    context_tokens: int = 512

    def check(self, largest_context: int) -> Cut:
        """`self`, with a context that the model has. Raises InvalidRequest for a prompt that leaves no room."""
        context = min(self.context_tokens, largest_context)
        if not 0 < 2 * self.prompt_tokens <= context:
            raise InvalidRequest(
                f"a prompt of {self.prompt_tokens} tokens and as many after it do not fit into {context} tokens of "
                "context; choose a shorter prompt"
            )
        return Cut(self.prompt_tokens, context)


def read_texts(
    patterns: Sequence[str], tokenizer: Tokenizer, cut: Cut, *, max_documents: int | None = None, seed: int = 0
) -> list[Text]:
    """The documents that are long enough, of each domain at most `max_documents` drawn at random; a file a domain.

    Without special tokens. A larger draw of the same seed holds the smaller ones. Raises InvalidRequest for files
    without documents, and where all are too short.
    """
    documents = sample_documents(patterns, EVERY_DOCUMENT, seed)
    texts: list[Text] = []
    for domain in sorted({document.domain for document in documents}):
        of_domain = [document for document in documents if document.domain == domain]
        if max_documents is None:
            texts += _encode(of_domain, tokenizer, cut)
        else:
            of_domain.sort(key=lambda document: _place(document, seed))
            texts += _first(of_domain, tokenizer, cut, max_documents)
    if not texts:
        raise InvalidRequest(
            f"none of the {len(documents)} documents has {2 * cut.prompt_tokens} tokens; give longer ones or a shorter "
            "prompt"
        )
    return texts


def domains_of(texts: Sequence[Text]) -> list[str]:
    return sorted({text.domain for text in texts})


def digest_of(texts: Sequence[Text]) -> str:
    """Names the tokens: two evaluations with the same digest read the same."""
    digest = hashlib.blake2b(digest_size=12)
    for text in texts:
        digest.update(f"{text.domain}\0{' '.join(map(str, text.token_ids))}\0".encode())
    return digest.hexdigest()


def _encode(documents: Sequence[Document], tokenizer: Tokenizer, cut: Cut) -> list[Text]:
    """Those that are long enough."""
    encodings = encode_all(tokenizer, [document.text for document in documents], add_special_tokens=False)
    return [
        Text(document.domain, document.name, tuple(encoding.ids[: cut.context_tokens]))
        for document, encoding in zip(documents, encodings, strict=True)
        if len(encoding.ids) >= 2 * cut.prompt_tokens
    ]


def _first(documents: Sequence[Document], tokenizer: Tokenizer, cut: Cut, count: int) -> list[Text]:
    """The first `count` that are long enough; the others need not become tokens."""
    texts: list[Text] = []
    start = 0
    while len(texts) < count and start < len(documents):
        end = start + count - len(texts)
        texts += _encode(documents[start:end], tokenizer, cut)
        start = end
    return texts


def _place(document: Document, seed: int) -> bytes:
    """Where a document stands in the draw."""
    return hashlib.blake2b(f"{seed}\0{document.name}\0{document.text}".encode()).digest()
