"""The tokenizer of a checkpoint: texts to ids, with errors that a user can act on, and ids to text as they come.

The tokenizers library is written in Rust, and where its authors did not expect a failure (a regular expression that
gives up, say) it raises a PanicException, which is not an Exception: it would end a thread, or a whole command.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer, decoders

from pager.errors import CheckpointError, InvalidRequest
from pager.gguf import GPT_OSS, is_gguf, read_gguf
from pager.reading import check_text, not_a_pointer, one_line, read_bounded, read_json_file, reason_of

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
_ADDED_NAME = "added_tokens.json"
_OTHER_TOKENIZER_FILES = (
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tiktoken.model", "tekken.json",
)  # fmt: skip
_CONTROL = 3  # a type of tokens in GGUF files
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
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
    """Reads the tokenizer of a checkpoint's folder: `tokenizer.json`, and tokens that other files add to it. Without
    that file, what transformers makes of those that are there, or of a GGUF file; None where there are none.

    Raises CheckpointError if it cannot be read, or where there is no such folder.
    """
    if is_gguf(model):
        return _of_gguf(model)
    if not model.is_dir():
        raise CheckpointError(
            f"{model} is not a directory; give the folder of a downloaded or packed checkpoint, or a GGUF file"
        )
    path = model / TOKENIZER_NAME
    if not path.exists():
        found = [name for name in _OTHER_TOKENIZER_FILES if (model / name).exists()]
        return _converted(model, found) if found else None
    try:
        data = not_a_pointer(read_bounded(path, MAX_TOKENIZER_BYTES))
        with panics_as_errors():
            tokenizer = Tokenizer.from_buffer(data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}; fetch it again") from None
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {error}; fetch it again") from None
    _add_tokens(tokenizer, model)
    return _whole(tokenizer)


def _whole(tokenizer: Tokenizer) -> Tokenizer:
    """Turns off truncation and padding, which a training script may have left on: they would alter prompts silently."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _converted(model: Path, found: Sequence[str]) -> Tokenizer:
    """The tokenizer that transformers makes of other files."""
    from transformers import AutoTokenizer  # seconds to import, and seldom needed

    try:
        for name in found:
            not_a_pointer(read_bounded(model / name, MAX_TOKENIZER_BYTES))
        with panics_as_errors():
            made = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        return _whole(made.backend_tokenizer)
    except Exception as error:  # every family's tokenizer fails in its own way
        raise CheckpointError(
            f"{model} has no {TOKENIZER_NAME}, and transformers makes none of {', '.join(found)} ({one_line(error)}); "
            f"save one with AutoTokenizer.from_pretrained(...).save_pretrained(...), or remove these files to serve "
            "token ids alone"
        ) from None


def _of_gguf(path: Path) -> Tokenizer | None:
    """The tokenizer that transformers makes of a GGUF file's metadata."""
    file = read_gguf(path)  # which checks what transformers' reader trusts
    if "tokenizer.ggml.model" not in file.metadata:
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer reads the configuration first, and fails at the scaled positions of gpt-oss.
    kind: Any = PreTrainedTokenizerFast if file.architecture == GPT_OSS else AutoTokenizer
    try:
        with panics_as_errors():
            made = kind.from_pretrained(
                file.path.parent, gguf_file=file.path.name, local_files_only=True, trust_remote_code=False
            )
            tokenizer = made.backend_tokenizer
            types = file.metadata.get("tokenizer.ggml.token_type")
            tokenizer.add_special_tokens(_control_tokens(tokenizer, types if isinstance(types, list) else []))
        return _whole(tokenizer)
    except Exception as error:  # every kind of tokenizer fails in its own way
        raise CheckpointError(
            f"transformers makes no tokenizer of {path}: {one_line(error)}; install a later transformers, or fetch the "
            "checkpoint that it was made from"
        ) from None


def _control_tokens(tokenizer: Tokenizer, types: Sequence[int]) -> list[AddedToken]:
    """The tokens that a file calls control tokens and that the tokenizer, as transformers 5.17 makes it, would cut."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    control = (tokenizer.id_to_token(token_id) for token_id, kind in enumerate(types) if kind == _CONTROL)
    return [
        AddedToken(token, special=True, normalized=False)
        for token in control
        if token and token not in known and token.isascii()
    ]


def _add_tokens(tokenizer: Tokenizer, model: Path) -> None:
    """Adds what `added_tokens.json` and the tokenizer's settings list beside it. Raises CheckpointError."""
    settings, legacy = (_object(model / name) for name in (SETTINGS_NAME, _ADDED_NAME))
    described = settings.get("added_tokens_decoder")  # as transformers, which looks at the older file without it only
    special = {_content(value) for name, value in settings.items() if name.endswith("_token")}
    listed: dict[int, AddedToken] = {}
    try:
        for content, token_id in legacy.items() if described is None else ():
            listed[int(token_id)] = AddedToken(content, special=content in special, normalized=False)
        for token_id, token in (described or {}).items():
            flags = {name: bool(token.get(name, False)) for name in _TOKEN_FLAGS}
            listed[int(token_id)] = AddedToken(_content(token), **flags)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{model / SETTINGS_NAME} or {_ADDED_NAME} lists added tokens that are none ({error}); fetch them again"
        ) from None
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token_id, token in sorted(listed.items()):
        if token.content in known:
            continue
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{model} adds the token {token.content!r} as {token_id}, and {TOKENIZER_NAME} has it, or room for it, "
                f"at {tokenizer.token_to_id(token.content)}; the files are not of the same tokenizer, fetch them again"
            )


def _object(path: Path) -> dict[str, Any]:
    try:
        value = read_json_file(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}; fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again")
    return value


def _content(token: Any) -> str:
    """A token as settings write it: its text, or an object that has it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def special_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts that a tokenizer reads as special tokens."""
    return tuple(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)


def refuse_special(texts: Iterable[str], special: Sequence[str], field: str) -> None:
    """Raises InvalidRequest for a text that spells one of these special tokens."""
    for text in texts:
        found = next((each for each in special if each in text), None)
        if found is not None:
            raise InvalidRequest(
                f"a text spells the special token {found!r}, which texts of requests may not hold in this service "
                "(model.special_tokens); write it in another way",
                field=field,
            )


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


# --- ids to text ------------------------------------------------------------------------------------------------------
#
# Token ids to text as they come: whole characters only, cut at a stop string.


WINDOW_TOKENS = 4
"""How many of the last tokens can bear on what the next one reads as: a character that is still open has three."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
ANCHOR = "a"  # stands before a token where it matters only that something does
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
WRONG_BYTE = "<0xFF>"  # no character has it
CONTINUATIONS = ("\u0122", "\u00bf")  # bytes 0x80 and 0xBF as byte-level tokenizers write them


class TokenTexts:
    """The texts of one tokenizer's tokens. Immutable; all requests of an engine share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decoder = tokenizer.decoder
        self._special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
        self._bytes: dict[int | None, int] = {}
        if self.text(["<0xE2>", "<0x82>", "<0xAC>"]) == "\N{EURO SIGN}":  # it falls back to bytes
            spelled = ((byte, token) for byte, token in enumerate(BYTE_TOKENS) if token not in self._special)
            self._bytes = {tokenizer.token_to_id(token): byte for byte, token in spelled}

    def token(self, token_id: int) -> str | None:
        """The token as its tokenizer writes it; None for one without text: a special one, or an id without a token."""
        token = self.tokenizer.id_to_token(token_id)
        return None if token is None or token in self._special else str(token)

    def text(self, tokens: Sequence[str]) -> str:
        """Returns what the tokens read as in a row, as `Tokenizer.decode` has it."""
        return " ".join(tokens) if self._decoder is None else str(self._decoder.decode(list(tokens)))

    def byte(self, token_id: int) -> int | None:
        """The byte that the token stands for, where the tokenizer falls back to bytes."""
        return self._bytes.get(token_id)

    def finished(self, tokens: Sequence[str]) -> str:
        """The text without the character that the last tokens have begun and the next may finish.

        It is open where one byte more would belong to it, that is, not add a character.
        """
        text = self.text(tokens)
        if not text.endswith(REPLACEMENT):
            return text
        is_open = any(len(self.text([*tokens, byte])) == len(text) for byte in CONTINUATIONS)
        return text[:-1] if is_open else text


class Detokenizer:
    """The text of one request's output, piece by piece; a token costs the decoding of a few, however many came before.

    The pieces add up to what decoding prompt and output at once gives after the prompt's text. None ends within a
    character: what may still become one is held back, three bytes at most. One rule differs: where a run of byte tokens
    is no UTF-8, decoding at once turns every byte of the run into a replacement character; here only those from the
    first wrong one on become one, as the characters before it have been shown by then.
    """

    def __init__(self, texts: TokenTexts, prompt_token_ids: Sequence[int] = ()) -> None:
        self._texts = texts
        self._window: list[str] = []  # the tokens before the open bytes that what follows depends on
        self._open = b""  # of byte tokens: what may still become a character
        self._is_broken = False  # the run of byte tokens has one that does not add up
        self._begin_after(prompt_token_ids)
        self._shown = self._text()  # of `_text`; the prompt's counts as shown

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty where a character is still open."""
        byte = self._texts.byte(token_id)
        if byte is not None:
            return self._feed_byte(byte)
        token = self._texts.token(token_id)
        if token is None:
            return ""
        text = self._end_bytes() if self._open else ""
        self._is_broken = False
        self._window.append(token)
        text += self._advance(self._texts.finished(self._window))
        if len(self._window) > 2 * WINDOW_TOKENS:
            del self._window[:-WINDOW_TOKENS]
            self._shown = self._texts.finished(self._window)
        return text

    def flush(self) -> str:
        """Returns what is left when no more tokens come: replacement characters for one that stayed open."""
        text = self._advance(self._text())
        self._open = b""
        return text

    def _begin_after(self, prompt_token_ids: Sequence[int]) -> None:
        """Starts as if the prompt had been fed, at the cost of its end."""
        run = bytearray()
        for token_id in reversed(prompt_token_ids):
            byte = self._texts.byte(token_id)
            if byte is not None and not self._window:
                run.append(byte)
            elif (token := self._texts.token(token_id)) is not None:
                self._window.insert(0, token)
                if len(self._window) == WINDOW_TOKENS:
                    break
        run.reverse()
        num_finished = _num_finished(run)
        self._is_broken = num_finished is None
        self._open = b"" if num_finished is None else bytes(run[num_finished:])
        if len(run) > len(self._open):
            self._window = self._instead_of_bytes()

    def _feed_byte(self, byte: int) -> str:
        self._open += bytes([byte])
        if not self._is_broken:
            num_finished = _num_finished(self._open)
            if num_finished == 0:
                return ""
            self._is_broken = num_finished is None
        return self._end_bytes()

    def _end_bytes(self) -> str:
        """Shows the open bytes, be they a character by now or not."""
        text = self._advance(self._text())
        self._window, self._open = self._instead_of_bytes(), b""
        self._shown = self._text()
        return text

    def _instead_of_bytes(self) -> list[str]:
        """Returns what stands for byte tokens that are shown. After a wrong one, all bytes that follow are wrong."""
        return [ANCHOR, WRONG_BYTE] if self._is_broken else [ANCHOR]

    def _text(self) -> str:
        return self._texts.text(self._window + [BYTE_TOKENS[byte] for byte in self._open])

    def _advance(self, text: str) -> str:
        """Returns what of `text`, the window's, was not shown yet."""
        new = text[_num_common(self._shown, text) :]
        if new:
            self._shown = text
        return new


def _num_finished(data: bytes | bytearray) -> int | None:
    """Returns how many of these bytes make whole characters; None where the others cannot become one."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start if error.reason == "unexpected end of data" else None
    return len(data)


def _num_common(text: str, other: str) -> int:
    """The length of the beginning that both share."""
    if other.startswith(text):
        return len(text)
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (one, another) in pairs if one != another), len(other))


class StopMatcher:
    """Finds the first stop string in text that comes in pieces, and holds back what might be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """The text that is safe to show. After a stop string: what precedes it, then nothing more."""
        if not self._stops or self.is_stopped:
            return "" if self.is_stopped else text
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.is_stopped = True
            safe, self._held = self._held[: min(found)], ""
            return safe
        keep = len(self._held) - self._longest_open_prefix()
        safe, self._held = self._held[:keep], self._held[keep:]
        return safe

    def flush(self) -> str:
        """Returns what was held back, when no more text comes."""
        safe, self._held = self._held, ""
        return safe

    def _longest_open_prefix(self) -> int:
        longest_stop = max(map(len, self._stops))
        for length in range(min(len(self._held), longest_stop - 1), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
