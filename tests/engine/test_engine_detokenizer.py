import os
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pager.tokenizing import Detokenizer, StopMatcher, TokenTexts
from tests.support.values import some

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["\u2581", "\u2581the", "\u2581pri", "ce", "\u2581\u2581", "a", ".", "\u20ac", "\ufffd", "\u2581\ufffd"]


def byte_level() -> Tokenizer:
    """GPT-2's kind. Some tokens end within a character, or hold the end of one and the beginning of the next."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    merges = [
        ("\u0120", "\u00e2"),
        ("\u0122", "\u00e2"),
        ("\u00ac", "a"),
        ("\u00ef", "\u00bf"),
        ("\u00ef\u00bf", "\u00bd"),
    ]
    vocabulary |= {"".join(pair): len(alphabet) + i for i, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_added(tokenizer)


def llama() -> Tokenizer:
    """Byte fallback as Llama and Mixtral have it: the first space of a text is dropped."""
    tokenizer = Tokenizer(models.BPE(fallback_vocabulary(), [("c", "e")], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(content=" ", left=1, right=0)
    space = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), strip])
    return with_added(tokenizer)


def gemma() -> Tokenizer:
    """Byte fallback without a space to drop."""
    tokenizer = Tokenizer(models.BPE(fallback_vocabulary(), [("c", "e")], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    space = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse()])
    return with_added(tokenizer)


def unigram() -> Tokenizer:
    """Byte fallback under a Unigram model, with spaces as sentencepiece has them."""
    pieces = [("<unk>", 0.0), *((piece, -2.0) for piece in fallback_vocabulary())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    return with_added(tokenizer)


def metaspace() -> Tokenizer:
    """Its byte tokens are text like any other: nothing decodes them."""
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((piece, -2.0) for piece in fallback_vocabulary())], unk_id=0)
    )
    tokenizer.decoder = decoders.Metaspace()
    return with_added(tokenizer)


def word_piece() -> Tokenizer:
    pieces = ["[UNK]", "the", "pri", "##ce", ".", "do", "not", "'", "s", "\ufffd", "##\ufffd"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return with_added(tokenizer)


def word_ends() -> Tokenizer:
    """What a token reads as depends on whether one follows."""
    pieces = ["the</w>", "pri", "ce</w>", ".</w>", "</w>", "\ufffd"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return with_added(tokenizer)


def words() -> Tokenizer:
    """Without a decoder."""
    return with_added(Tokenizer(models.WordLevel({"the": 0, "price": 1, "\ufffd": 2, "is": 3}, unk_token="the")))


def fallback_vocabulary() -> dict[str, int]:
    return {piece: i for i, piece in enumerate([*BYTES, *PIECES, "c", "e"])}


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens([AddedToken("<added>", normalized=False), "<added \u20ac>"])
    return tokenizer


KINDS: dict[str, Tokenizer] = {
    make.__name__: make() for make in (byte_level, llama, gemma, unigram, metaspace, word_piece, word_ends, words)
}
FALL_BACK = ("llama", "gemma", "unigram")
TEXTS = {kind: TokenTexts(tokenizer) for kind, tokenizer in KINDS.items()}


def pieces_of(kind: str, output: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    """The pieces, the last one from the flush."""
    detokenizer = Detokenizer(TEXTS[kind], prompt)
    pieces = [detokenizer.feed(token_id) for token_id in output]
    return [*pieces, detokenizer.flush()]


def decode_at_once(kind: str, ids: Sequence[int]) -> str:
    """`Tokenizer.decode`, but that a run of byte tokens keeps the characters before its first wrong byte."""
    tokenizer = KINDS[kind]
    if kind not in FALL_BACK:
        return str(tokenizer.decode(ids))
    visible = [token for token in map(TEXTS[kind].token, ids) if token is not None]
    parts: list[str] = []
    for run in runs(visible):
        data = bytes(int(token[3:5], 16) for token in run) if run[0] in BYTES else b""
        try:
            data.decode()
            parts += run
        except UnicodeDecodeError as error:
            parts += run[: error.start]
            parts += ["\ufffd"] * (len(run) - error.start)  # a token that is no byte, and not the run's any more
    return str(tokenizer.decoder.decode(parts))


def runs(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Byte tokens in a row together, others alone."""
    run: list[str] = []
    for token in tokens:
        if token in BYTES:
            run.append(token)
            continue
        if run:
            yield run
        run = []
        yield [token]
    if run:
        yield run


def after_prompt(prompt_text: str, text: str) -> str:
    return text[len(os.path.commonprefix((prompt_text, text))) :]  # noqa: RUF071 - of characters


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, many of them bytes that make, or fail to make, characters; ids without a token, too."""
    tokenizer = KINDS[kind]
    one = st.integers(0, tokenizer.get_vocab_size() + 2).map(lambda token_id: [token_id])
    names = {"byte_level": byte_letters, "llama": byte_tokens, "gemma": byte_tokens, "unigram": byte_tokens}
    if kind in names:
        data = st.one_of(
            st.text("a\u00e9\u20ac\U0001d11e\ufffd\u2581 ", max_size=3).map(str.encode), st.binary(max_size=4)
        )
        spell = names[kind]
        one = st.one_of(one, data.map(lambda some: [tokenizer.token_to_id(token) for token in spell(some)]))
    return st.lists(one, max_size=8).map(lambda lists: [token_id for ids in lists for token_id in ids])


def byte_tokens(data: bytes) -> list[str]:
    return [BYTES[byte] for byte in data]


def byte_letters(data: bytes) -> list[str]:
    """As GPT-2 writes bytes: those that can be printed as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in data]


SPELL: dict[str, Callable[[bytes], list[str]]] = {"byte_level": byte_letters, **dict.fromkeys(FALL_BACK, byte_tokens)}


def spelled(kind: str, data: bytes) -> list[int]:
    return [id_of(kind, token) for token in SPELL[kind](data)]


def id_of(kind: str, token: str) -> int:
    return some(KINDS[kind].token_to_id(token))


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_pieces_add_up_to_what_decoding_at_once_gives_after_the_prompt(kind: str, data: st.DataObject) -> None:
    prompt, output = data.draw(ids_of(kind)), data.draw(ids_of(kind))
    expected = after_prompt(decode_at_once(kind, prompt), decode_at_once(kind, prompt + output))
    assert "".join(pieces_of(kind, output, prompt)) == expected


@pytest.mark.parametrize("kind", FALL_BACK)
@given(st.data())
def test_byte_tokens_that_add_up_read_as_decode_has_them(kind: str, data: st.DataObject) -> None:
    """So that the rule for broken runs is all that differs from `Tokenizer.decode`."""
    text = data.draw(st.text("a\u00e9\u20ac\U0001d11e\ufffd \n", max_size=6))
    lone = data.draw(st.lists(st.integers(0x80, 0xFF).map(lambda byte: bytes([byte])), max_size=3))
    ids = [id_of(kind, "ce"), *spelled(kind, text.encode()), id_of(kind, "ce")]
    for byte in lone:
        ids += [*spelled(kind, byte), id_of(kind, "a")]
    assert "".join(pieces_of(kind, ids)) == KINDS[kind].decode(ids)
    assert "".join(pieces_of(kind, ids)).startswith(f"ce{text}ce")


@pytest.mark.parametrize("kind", SPELL)
@given(st.text("a\u00e9\u20ac\U0001d11e\ufffd \n", max_size=12))
def test_a_character_is_shown_with_its_last_byte(kind: str, text: str) -> None:
    pieces = pieces_of(kind, spelled(kind, text.encode()), prompt=spelled(kind, b"."))
    expected = [piece for character in text for piece in [""] * (len(character.encode()) - 1) + [character]]
    assert pieces == [*expected, ""]


@pytest.mark.parametrize("kind", SPELL)
@pytest.mark.parametrize("broken", [b"\x80", b"\xff", b"\xe2\x82\x28", b"\xed\xa0", b"\xf0\x9f\xe2", b"\xc0\x80"])
def test_bytes_that_can_become_no_character_are_shown_as_soon_as_that_is_known(kind: str, broken: bytes) -> None:
    """All but what a byte-level tokenizer may still take for the beginning of another one."""
    before = spelled(kind, b".")
    *_, last = pieces_of(kind, spelled(kind, broken), before)
    begun = kind == "byte_level" and broken.endswith(b"\xe2")
    assert last == ("\ufffd" if begun else "")
    joined = "".join(pieces_of(kind, spelled(kind, broken), [id_of(kind, "a")]))
    assert joined == KINDS[kind].decode([id_of(kind, "a"), *spelled(kind, broken)])[1:]


@pytest.mark.parametrize("kind", SPELL)
def test_an_open_character_is_flushed_as_decode_has_it_once(kind: str) -> None:
    detokenizer = Detokenizer(TEXTS[kind])
    ids = spelled(kind, "\u20ac".encode()[:2])
    assert [detokenizer.feed(token_id) for token_id in ids] == ["", ""]
    assert detokenizer.flush() == KINDS[kind].decode(ids)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("kind", SPELL)
def test_a_character_that_the_prompt_began_is_shown_whole_and_nothing_else_of_the_prompt(kind: str) -> None:
    begun, rest = spelled(kind, b"the \xe2\x82"), spelled(kind, b"\xac b")
    assert pieces_of(kind, rest, prompt=begun) == ["\u20ac", " ", "b", ""]
    wrong = "b" if kind == "byte_level" else "\ufffd"  # where bytes are tokens of their own, the run is broken
    assert pieces_of(kind, spelled(kind, b"b"), prompt=begun) == [wrong, ""]
    word = id_of(kind, "<added>")
    assert pieces_of(kind, [word], prompt=begun) == ["<added>", ""]
    assert pieces_of(kind, [], prompt=begun) == [""]


def test_a_token_of_the_prompt_that_ends_within_a_character_is_not_repeated() -> None:
    """Byte-level vocabularies have tokens of a space and the first byte of a character."""
    space_and_first = id_of("byte_level", "\u0120\u00e2")
    rest = spelled("byte_level", "\u20ac".encode()[1:])
    assert "".join(pieces_of("byte_level", rest, prompt=[space_and_first])) == "\u20ac"
    assert "".join(pieces_of("byte_level", [space_and_first, *rest])) == " \u20ac"


class CountingTexts(TokenTexts):
    """Counts the tokens that are decoded."""

    num_decoded = 0

    def text(self, tokens: Sequence[str]) -> str:
        self.num_decoded += len(tokens)
        return super().text(tokens)


@pytest.mark.parametrize("kind", SPELL)
@pytest.mark.parametrize("data", [b"\x80", b"\xff", b"\xe2", b"\xe2\x82", b"a\xff", "\u20ac".encode(), b"the "])
def test_the_work_for_a_token_does_not_grow(kind: str, data: bytes) -> None:
    texts = CountingTexts(KINDS[kind])
    detokenizer = Detokenizer(texts, spelled(kind, data) * 4000)
    assert texts.num_decoded < 40
    num_shown = 0
    for number, token_id in enumerate(spelled(kind, data) * (4000 // len(data)), start=1):
        before = texts.num_decoded
        num_shown += len(detokenizer.feed(token_id))
        assert texts.num_decoded - before < 60
        assert num_shown >= (number - 3) // 4, "nothing is kept for the end"


def test_special_tokens_and_ids_without_a_token_have_no_text_and_part_no_character() -> None:
    for kind in SPELL:
        end = id_of(kind, "<end>")
        first, *rest = spelled(kind, "\u20ac".encode())
        assert pieces_of(kind, [first, end, 10**6, *rest]) == ["", "", "", "", "\u20ac", ""], kind


def test_a_stop_string_is_found_across_pieces_and_cut() -> None:
    matcher = StopMatcher(("###", "\n\nQ:"))
    assert matcher.feed("an answer#") == "an answer"
    assert matcher.feed("#") == ""
    assert not matcher.is_stopped
    assert matcher.feed("# more") == ""
    assert matcher.is_stopped
    assert matcher.feed("and more") + matcher.flush() == ""


def test_text_held_back_is_shown_when_it_turns_out_to_be_harmless() -> None:
    matcher = StopMatcher(("\n\nQ:",))
    assert matcher.feed("a\n\n") == "a"
    assert matcher.feed("b\n") == "\n\nb"
    assert matcher.flush() == "\n"


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text(alphabet="ab", max_size=3), max_size=12),
)
def test_however_the_text_is_cut_it_ends_before_the_first_stop_string(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(tuple(stops))
    shown = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        if matcher.is_stopped:
            break
    shown += matcher.flush()
    whole = "".join(pieces)
    if matcher.is_stopped:
        assert whole.startswith(shown)
        assert any(whole.startswith(stop, len(shown)) for stop in stops)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == whole
        assert not any(stop in whole for stop in stops)
