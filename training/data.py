"""Turns `<domain>.<split>.jsonl.gz` files into packed rows of tokens.

A row is filled with documents up to its last token: no padding. A document longer than a row is cut into pieces, each
a document of its own. Position ids restart at 0 with every document; nothing else marks where one begins.
Legend: R rows, N tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pager.lab.corpus import documents_of

EOS = "<|endoftext|>"
PAD = "<|padding|>"
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of tokens: `tokens_RN` with `positions_RN`, which are 0 where a document starts."""

    tokens_RN: Ids
    positions_RN: Ids

    def __len__(self) -> int:
        return len(self.tokens_RN)

    def save(self, path: Path) -> None:
        np.savez(path, tokens=self.tokens_RN.astype(np.uint16), positions=self.positions_RN.astype(np.uint16))

    @classmethod
    def load(cls, path: Path) -> PackedRows:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["tokens"].astype(np.int32), arrays["positions"].astype(np.int32))


def domains_of(corpus: Path, split: str) -> list[str]:
    """Lists the domains of a split. Raises FileNotFoundError where there is no such split."""
    names = sorted(path.name.split(".")[0] for path in corpus.glob(f"*.{split}.jsonl.gz"))
    if not names:
        raise FileNotFoundError(f"no *.{split}.jsonl.gz in {corpus}")
    return names


def read_texts(corpus: Path, domain: str, split: str) -> Iterator[str]:
    """The texts of a domain. Raises InvalidRequest, which names file and line."""
    return (document.text for document in documents_of(corpus / f"{domain}.{split}.jsonl.gz"))


def train_tokenizer(corpus: Path, vocab_size: int, max_chars_per_domain: int = 2_000_000) -> Tokenizer:
    """Trains a byte-level BPE over equal amounts of text from every domain; token 0 is EOS and token 1 is padding."""

    def sample() -> Iterator[str]:
        for domain in domains_of(corpus, "train"):
            budget = max_chars_per_domain
            for text in read_texts(corpus, domain, "train"):
                if budget <= 0:
                    break
                budget -= len(text)
                yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def documents(
    corpus: Path, domain: str, split: str, tokenizer: Tokenizer, context: int, rng: np.random.Generator
) -> list[Ids]:
    """Returns the domain's documents in shuffled pieces of at most `context` tokens; the last of each ends with EOS."""
    eos = tokenizer.token_to_id(EOS)
    pieces: list[Ids] = []
    for encoding in tokenizer.encode_batch_fast(list(read_texts(corpus, domain, split)), add_special_tokens=False):
        ids = np.asarray([*encoding.ids, eos], dtype=np.int32)
        pieces += [ids[start : start + context] for start in range(0, len(ids), context)]
    return [pieces[i] for i in rng.permutation(len(pieces))]


def pack(pieces: list[Ids], context: int) -> PackedRows:
    """Fills rows in order.

    A piece that crosses a row's end is cut there; its rest is dropped, as is an unfilled row.
    """
    rows: list[list[Ids]] = [[]]
    room = context
    for piece in pieces:
        rows[-1].append(piece[:room])
        room -= len(rows[-1][-1])
        if not room:
            rows.append([])
            room = context
    rows.pop()
    return PackedRows(
        np.stack([np.concatenate(row) for row in rows]),
        np.stack([np.concatenate([np.arange(len(piece), dtype=np.int32) for piece in row]) for row in rows]),
    )


def balanced(corpus: Path, split: str, tokenizer: Tokenizer, context: int, seed: int) -> PackedRows:
    """Mixes the domains of one epoch, each with as many tokens as the smallest."""
    rng = np.random.default_rng(seed)
    by_domain = [documents(corpus, name, split, tokenizer, context, rng) for name in domains_of(corpus, split)]
    share = min(sum(map(len, pieces)) for pieces in by_domain)
    mixed: list[Ids] = []
    for pieces in by_domain:
        ends = np.cumsum([len(piece) for piece in pieces])
        mixed += pieces[: int(np.searchsorted(ends, share)) + 1]
    return pack([mixed[i] for i in rng.permutation(len(mixed))], context)
