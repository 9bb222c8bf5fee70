"""The tokenizer of a checkpoint: read from its file and applied to texts, with errors that a user can act on.

The tokenizers library is written in Rust, and where its authors did not expect a failure (a regular expression that
gives up, say) it raises a PanicException, which is not an Exception: it would end a thread, or a whole command.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Encoding, Tokenizer, decoders

from pager.errors import CheckpointError, InvalidRequest
from pager.reading import check_text, read_bounded, reason_of

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 1 << 28
"""Several times the largest vocabularies there are."""


_MOST_NORMALIZED = 4  # NFKC makes one byte of four (𝐀 becomes A); every other normalisation makes texts longer


class TokenizerPanic(Exception):
    """A failure inside of the tokenizers library that it raises as a PanicException."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turns a PanicException raised in the block into a TokenizerPanic."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise TokenizerPanic(str(error)) from None


def is_panic(error: BaseException) -> bool:
    """Tells a PanicException by its name, because its class is in no module that could be imported."""
    return type(error).__module__ == "pyo3_runtime"


def read_tokenizer(model: Path) -> Tokenizer | None:
    """Reads the tokenizer of a checkpoint's folder; None without one. Raises CheckpointError if it cannot be read."""
    path = model / TOKENIZER_NAME
    if not path.exists():
        return None
    try:
        data = read_bounded(path, MAX_TOKENIZER_BYTES)
        with panics_as_errors():
            tokenizer = Tokenizer.from_buffer(data)
            # What a training script left on would cut or fill up prompts without a word.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}; fetch it again") from None
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {error}; fetch it again") from None


def longest_token_bytes(tokenizer: Tokenizer) -> int:
    """Returns an upper bound of the bytes of text that one token stands for: N tokens have at most N times as many.

    Holds for tokenizers that keep every byte of a text (byte-level ones, and those with byte fallback).
    """
    is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)  # a character of a token is a byte of text
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    longest = max(
        (
            len(token) if is_byte_level and token not in added else len(token.encode())
            for token in tokenizer.get_vocab(with_added_tokens=True)
        ),
        default=1,
    )
    return longest if tokenizer.normalizer is None else longest * _MOST_NORMALIZED


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> Encoding:
    """Turns a text into tokens. Raises InvalidRequest for text that the tokenizer fails on."""
    return encode_all(tokenizer, [text], add_special_tokens=add_special_tokens, fast=False)[0]


def encode_all(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = True, fast: bool = True
) -> list[Encoding]:
    """Tokenizes texts; `fast` leaves out the offsets. Raises InvalidRequest, which quotes only the texts' lengths."""
    for text in texts:
        check_text(text, "the text")
    encode_batch = tokenizer.encode_batch_fast if fast else tokenizer.encode_batch
    try:
        with panics_as_errors():
            return list(encode_batch(list(texts), add_special_tokens=add_special_tokens))
    except TokenizerPanic:
        length = max(map(len, texts))
        raise InvalidRequest(
            f"the model's tokenizer fails on this text ({length} characters): one of its rules gives up; "
            "a shorter or more regular text may pass"
        ) from None
