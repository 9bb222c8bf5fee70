"""Documents for measurements and for fitting: read from files of JSON lines, sampled, cut and tokenized."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pager.errors import InvalidRequest, PagerError
from pager.reading import document_of, read_documents, read_lines, reason_of
from pager.tokenizing import encode_all, read_tokenizer


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `name` is its "id", or else the file and line that it stands in."""

    domain: str
    name: str
    text: str


def tokenizer_of(model: Path) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises InvalidRequest where there is none, CheckpointError for a damaged one."""
    tokenizer = read_tokenizer(model)
    if tokenizer is None:
        raise InvalidRequest(f"{model} has no tokenizer.json, which documents need to become tokens")
    return tokenizer


def files_of(patterns: Sequence[str]) -> list[Path]:
    """The files that patterns name, sorted, each once. Raises InvalidRequest for a pattern that names none."""
    found: set[Path] = set()
    for pattern in patterns:
        files = [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
        if not files:
            raise InvalidRequest(f"no file matches {pattern!r}; give files of JSON lines", field="documents")
        found.update(files)
    return sorted(found)


def documents_of(file: Path) -> Iterator[Document]:
    """The documents of a file that have text; their domain is the file's name up to its first dot.

    Raises InvalidRequest, which names file and line.
    """
    domain = file.name.partition(".")[0]
    for number, value in read_documents(file):
        if value["text"].strip():
            yield Document(domain, str(value.get("id", f"{file.name}, line {number}")), value["text"])


def sample_documents(patterns: Sequence[str], max_documents: int, seed: int) -> list[Document]:
    """Draws at most `max_documents` of each domain, each equally likely; by domain, then in the order of files.

    The same for the same seed. Raises InvalidRequest.
    """
    files: dict[str, list[Path]] = {}
    for path in files_of(patterns):
        files.setdefault(path.name.partition(".")[0], []).append(path)
    found: list[Document] = []
    for domain in sorted(files):
        documents = (document for file in files[domain] for document in documents_of(file))
        kept = _reservoir(documents, max_documents, np.random.default_rng([seed, *domain.encode()]))
        found += [document for _, document in sorted(kept, key=lambda pair: pair[0])]
    if not found:
        raise InvalidRequest(f"the {sum(map(len, files.values()))} files hold no document with text")
    return found


def sample_texts(patterns: Sequence[str], max_documents: int, seed: int) -> list[str]:
    """Draws at most `max_documents` texts, as many of each file or all it has, mixed.

    The same for the same seed. Raises InvalidRequest.
    """
    files = files_of(patterns)
    each = max(1, max_documents // len(files))
    random = np.random.default_rng(seed)
    texts = [document.text for file in files for _, document in _reservoir(documents_of(file), each, random)]
    return [texts[index] for index in random.permutation(len(texts))][:max_documents]


def _reservoir(documents: Iterable[Document], count: int, random: np.random.Generator) -> list[tuple[int, Document]]:
    """Draws `count` of the documents with their numbers, each as likely as any other.

    One pass: a corpus larger than memory passes through.
    """
    kept: list[tuple[int, Document]] = []
    for number, document in enumerate(documents):
        if number < count:
            kept.append((number, document))
        elif (place := int(random.integers(number + 1))) < count:
            kept[place] = (number, document)
    return kept


MAX_CHARACTERS = 1 << 26  # of a file of examples


def read_examples(path: Path) -> list[str]:
    """Reads examples for a pool: JSON lines with a "text" each, or one plain text; unzipped where the name ends in .gz.

    A file is taken for JSON lines where its name says so or its first line is such an object. Raises InvalidRequest.
    """
    lines = list(_bounded_lines(path))
    written = [(number, line) for number, line in lines if line.strip()]
    if not written:
        raise InvalidRequest(f"{path} has no examples; it is empty")
    if not path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")) and not _is_example(written[0][1]):
        return ["".join(line for _, line in lines)]
    examples = []
    for number, line in written:
        example = document_of(line, f"line {number} of {path}")["text"]
        if not example:
            raise InvalidRequest(f'line {number} of {path} has an empty "text"; leave it out')
        examples.append(example)
    return examples


def _bounded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file. Raises InvalidRequest, also for more than a calibration ever reads."""
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


EVERY_DOCUMENT = 10**9


@dataclass(frozen=True, slots=True)
class Text:
    """A document of the evaluation: its first tokens, of which the prompt is the beginning."""

    domain: str
    name: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a document that is read: a prompt, and at least as many tokens after it, up to `context_tokens`."""

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
    """Reads the documents that are long enough, of each domain at most `max_documents` drawn at random.

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
    """The domains of texts, sorted."""
    return sorted({text.domain for text in texts})


def digest_of(texts: Sequence[Text]) -> str:
    """A name of the tokens: two evaluations with the same digest read the same."""
    digest = hashlib.blake2b(digest_size=12)
    for text in texts:
        digest.update(f"{text.domain}\0{' '.join(map(str, text.token_ids))}\0".encode())
    return digest.hexdigest()


def _encode(documents: Sequence[Document], tokenizer: Tokenizer, cut: Cut) -> list[Text]:
    """The tokens of those documents that are long enough."""
    encodings = encode_all(tokenizer, [document.text for document in documents], add_special_tokens=False)
    return [
        Text(document.domain, document.name, tuple(encoding.ids[: cut.context_tokens]))
        for document, encoding in zip(documents, encodings, strict=True)
        if len(encoding.ids) >= 2 * cut.prompt_tokens
    ]


def _first(documents: Sequence[Document], tokenizer: Tokenizer, cut: Cut, count: int) -> list[Text]:
    """The tokens of the first `count` documents that are long enough; the others need not become tokens."""
    texts: list[Text] = []
    start = 0
    while len(texts) < count and start < len(documents):
        end = start + count - len(texts)
        texts += _encode(documents[start:end], tokenizer, cut)
        start = end
    return texts


def _place(document: Document, seed: int) -> bytes:
    """The place of a document in the draw."""
    return hashlib.blake2b(f"{seed}\0{document.name}\0{document.text}".encode()).digest()
