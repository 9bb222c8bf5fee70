"""The subject of measurements: a model, and documents that are read from files of JSON lines, sampled, cut and
tokenized.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pager.engine.paged_model import PagedModel, load_paged_model
from pager.errors import InvalidRequest, PagerError
from pager.lab.recording import Forwards, GateMeans, PooledOutcome, Probe, experts_in_bulk
from pager.memory import Budgets
from pager.models.open_model import OpenModel
from pager.predict.fitted import PREDICTOR_NAME, FittedPredictor, LexicalPredictor, PredictorFile
from pager.predict.trunk import TrunkPredictor
from pager.reading import document_of, read_documents, read_lines, reason_of
from pager.tokenizing import encode_all, read_tokenizer
from pager.types import RoutingScores


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `name` is its "id", or else its file and line."""

    domain: str
    name: str
    text: str


def tokenizer_of(model: Path) -> Tokenizer:
    """Returns the tokenizer of a checkpoint. Raises InvalidRequest where there is none, CheckpointError for a damaged
    one.
    """
    tokenizer = read_tokenizer(model)
    if tokenizer is None:
        raise InvalidRequest(f"{model} has no tokenizer.json, which is needed to tokenize documents")
    return tokenizer


def files_of(patterns: Sequence[str]) -> list[Path]:
    """Returns the files that patterns name, sorted, each once. Raises InvalidRequest for a pattern that names none."""
    found: set[Path] = set()
    for pattern in patterns:
        files = [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
        if not files:
            raise InvalidRequest(f"no file matches {pattern!r}; give files of JSON lines", field="documents")
        found.update(files)
    return sorted(found)


def documents_of(file: Path) -> Iterator[Document]:
    """Yields the documents of a file that have text; their domain is the file's name up to its first dot.

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
        raise InvalidRequest(f"the {sum(map(len, files.values()))} files contain no document with text")
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
    """Yields the lines of a file. Raises InvalidRequest, also for more than a calibration ever reads."""
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
        """Returns `self`, with a context that the model has. Raises InvalidRequest for a prompt that leaves no room."""
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
    """Returns the domains of texts, sorted."""
    return sorted({text.domain for text in texts})


def digest_of(texts: Sequence[Text]) -> str:
    """Returns a digest of the tokens: two evaluations with the same digest read the same tokens."""
    digest = hashlib.blake2b(digest_size=12)
    for text in texts:
        digest.update(f"{text.domain}\0{' '.join(map(str, text.token_ids))}\0".encode())
    return digest.hexdigest()


def _encode(documents: Sequence[Document], tokenizer: Tokenizer, cut: Cut) -> list[Text]:
    """Returns the tokens of those documents that are long enough."""
    encodings = encode_all(tokenizer, [document.text for document in documents], add_special_tokens=False)
    return [
        Text(document.domain, document.name, tuple(encoding.ids[: cut.context_tokens]))
        for document, encoding in zip(documents, encodings, strict=True)
        if len(encoding.ids) >= 2 * cut.prompt_tokens
    ]


def _first(documents: Sequence[Document], tokenizer: Tokenizer, cut: Cut, count: int) -> list[Text]:
    """Returns the tokens of the first `count` documents that are long enough, without tokenizing the others."""
    texts: list[Text] = []
    start = 0
    while len(texts) < count and start < len(documents):
        end = start + count - len(texts)
        texts += _encode(documents[start:end], tokenizer, cut)
        start = end
    return texts


def _place(document: Document, seed: int) -> bytes:
    """Returns the place of a document in the draw."""
    return hashlib.blake2b(f"{seed}\0{document.name}\0{document.text}".encode()).digest()


# --- the model under evaluation ---------------------------------------------------------------------------------------


FEW_EXAMPLES = 5  # per domain, for the methods that the paper gives one to five
SAMPLE_PER_DOMAIN = 20  # documents over which the global frequency is counted
OTHERS_PER_DOMAIN = 16  # documents that take turns to be the one example of their domain
PERCENTS = (50.0, 25.0, 12.5, 6.25)


def parse_percents(text: str) -> tuple[float, ...]:
    """Parses pool sizes in percent of a layer's experts, from "25,12.5%". Raises InvalidRequest."""
    try:
        percents = tuple(float(part) for part in text.replace("%", "").split(","))
    except ValueError:
        percents = ()
    if not percents or not all(0 < percent <= 100 for percent in percents):
        raise InvalidRequest(f"--sizes {text!r} is not a list of percentages above 0 and up to 100, like 25,12.5")
    return percents


@dataclass(frozen=True, slots=True)
class EvaluationAsk:
    """The parameters of an evaluation: its model, documents and methods. `methods` None: all that are available."""

    model: Path
    documents: tuple[str, ...]
    calibration: tuple[str, ...] = ()
    methods: tuple[str, ...] | None = None
    percents: tuple[float, ...] = PERCENTS
    cut: Cut = field(default_factory=Cut)
    max_documents: int | None = None
    calibration_documents: int = 160
    expert_memory: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    resamples: int = 1000


class Subject:
    """The model and its texts. Results that were computed once are kept; nothing else in it changes."""

    def __init__(
        self,
        path: Path,
        paged: PagedModel,
        texts: Sequence[Text],
        cut: Cut,
        *,
        calibration: Sequence[Text] = (),
        seed: int = 0,
    ) -> None:
        """Takes the model and texts. `calibration` are other documents of the same domains; empty where none were
        given.
        """
        self.path = path
        self.paged = paged
        self.facts = paged.facts
        self.texts = tuple(texts)
        self.cut = cut
        self.seed = seed
        self.forwards = Forwards(paged, cut.prompt_tokens)
        self.ids = [text.token_ids for text in texts]
        self.prompts = [text.token_ids[: cut.prompt_tokens] for text in texts]
        self.domains = domains_of(texts)
        self._calibration: dict[str, list[tuple[int, ...]]] = {domain: [] for domain in domains_of(calibration)}
        for text in calibration:
            self._calibration[text.domain].append(text.token_ids)
        self._predicted: dict[str, list[RoutingScores]] = {}

    def calibration(self, domain: str) -> Sequence[tuple[int, ...]]:
        """Returns the other documents of a domain. Raises InvalidRequest where there are none."""
        found = self._calibration.get(domain, [])
        if not found:
            given = "no calibration documents were given" if not self._calibration else f"none are of {domain!r}"
            raise InvalidRequest(
                f"this method chooses from other documents of a domain, and {given}; give --calibration"
            )
        return found

    @property
    def is_calibrated(self) -> bool:
        return all(self._calibration.get(domain) for domain in self.domains)

    @cached_property
    def predictor_file(self) -> PredictorFile | None:
        """Returns the maps fitted to this checkpoint; None where there are none. Raises CheckpointError for damaged
        ones.
        """
        present = (self.path / PREDICTOR_NAME).is_file()
        return PredictorFile.load(self.path, self.paged.fingerprint) if present else None

    @cached_property
    def full(self) -> tuple[list[PooledOutcome], list[GateMeans]]:
        """The outcome of every text with all experts, and the mean gate probabilities."""
        return self.forwards.full(self.ids)

    @cached_property
    def calibration_means(self) -> Mapping[str, Sequence[RoutingScores]]:
        """The mean gate probabilities of each calibration document, over all of it."""
        return {domain: self._mean_scores(self.calibration(domain)) for domain in self.domains}

    @cached_property
    def probe(self) -> Probe:
        """Returns the probe of the methods that need more than scores.

        `frequency` counts over all domains' calibration documents.
        """
        sample = [ids for domain in self.domains for ids in self.calibration(domain)[:SAMPLE_PER_DOMAIN]]
        return Probe(self.paged, sample=sample)

    @cached_property
    def easy_ep(self) -> Mapping[str, RoutingScores]:
        """Returns EASY-EP's scores of a few examples of each domain, valid for every size."""
        examples = {domain: self.few(domain) for domain in self.domains}
        return {
            domain: RoutingScores(self.probe.easy_ep(few), "easy-ep", sum(map(len, few)))
            for domain, few in examples.items()
        }

    def few(self, domain: str) -> Sequence[tuple[int, ...]]:
        """Returns as many examples of a domain as the paper gives a method."""
        return self.calibration(domain)[:FEW_EXAMPLES]

    def predicted(self, source: str) -> Sequence[RoutingScores]:
        """Returns the scores that a routing-only pass gives each prompt. Raises InvalidRequest as `router` does."""
        if source not in self._predicted:
            score = self.router(source)
            self._predicted[source] = [score(prompt) for prompt in self.prompts]
        return self._predicted[source]

    def router(self, source: str) -> Callable[[Sequence[int]], RoutingScores]:
        """Returns the routing-only pass of this name. Raises InvalidRequest where the checkpoint has none fitted."""
        if source == "trunk":
            return self._trunk.scores
        if self.predictor_file is None:
            raise InvalidRequest(
                f"{self.path} has no {PREDICTOR_NAME}, which {source!r} needs; run expert-pager fit-router"
            )
        if source == "lexical":
            return LexicalPredictor(self.predictor_file).scores
        return FittedPredictor(self.predictor_file, self._trunk).scores

    def one_example_each(self) -> list[tuple[int, ...]]:
        """Returns one other document of its domain for every text: of the calibration where given, else of the
        texts.
        """
        turns = dict.fromkeys(self.domains, 0)
        return [self._another(text, turns) for text in self.texts]

    def _another(self, text: Text, turns: dict[str, int]) -> tuple[int, ...]:
        found = self._calibration.get(text.domain) or [
            other.token_ids for other in self.texts if other.domain == text.domain
        ]
        others = [ids for ids in found[: OTHERS_PER_DOMAIN + 1] if ids != text.token_ids]
        if not others:
            raise InvalidRequest(f"domain {text.domain!r} has one document only, and none to calibrate on")
        turns[text.domain] += 1
        return others[turns[text.domain] % min(len(others), OTHERS_PER_DOMAIN)]

    @cached_property
    def _trunk(self) -> TrunkPredictor:
        opened = OpenModel.open(self.path, self.paged.dtype)
        with opened.checkpoint:
            return TrunkPredictor(
                opened, self.paged.device, self.predictor_file.stand_ins if self.predictor_file else None
            )

    def _mean_scores(self, texts: Sequence[tuple[int, ...]]) -> list[RoutingScores]:
        means = self.forwards.means(texts)
        return [RoutingScores(mean.whole_LR, "mean", len(ids)) for mean, ids in zip(means, texts, strict=True)]


@contextmanager
def open_subject(ask: EvaluationAsk, tokenizer: Tokenizer) -> Iterator[tuple[Subject, list[Text]]]:
    """Opens the model with its texts and the calibration texts, and closes it at the end.

    Experts that do not fit into memory are paged. Raises InvalidRequest, CheckpointError, BudgetError.
    """
    budgets = Budgets(expert_memory=ask.expert_memory)
    paged = load_paged_model(ask.model, device=ask.device, dtype=ask.dtype, budgets=budgets)
    try:
        cut = ask.cut.check(int(paged.config.max_position_embeddings))
        texts = read_texts(ask.documents, tokenizer, cut, max_documents=ask.max_documents, seed=ask.seed)
        calibration: list[Text] = []
        if ask.calibration:
            calibration = read_texts(
                ask.calibration, tokenizer, cut, max_documents=ask.calibration_documents, seed=ask.seed
            )
        with experts_in_bulk(paged):
            yield Subject(ask.model, paged, texts, cut, calibration=calibration, seed=ask.seed), calibration
    finally:
        paged.close()
