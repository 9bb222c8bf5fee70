from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pager.engine.detokenizer import Detokenizer, StopMatcher


def byte_tokenizer() -> Tokenizer:
    """One token a byte: every character outside ASCII is split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


TOKENIZER = byte_tokenizer()
END = TOKENIZER.token_to_id("<end>")


@given(st.text(alphabet="aé€𝄞 \n", max_size=12))
def test_pieces_add_up_to_the_text_and_no_character_is_split(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.feed(token_id) for token_id in TOKENIZER.encode(text).ids]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


@given(st.lists(st.integers(0, 255), max_size=12))
def test_pieces_and_flush_equal_the_decoded_whole_for_any_tokens(token_ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    text = "".join(detokenizer.feed(token_id) for token_id in token_ids) + detokenizer.flush()
    assert text == TOKENIZER.decode(token_ids)


def test_an_open_character_is_flushed_as_a_replacement_character_once() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    first, second, _ = TOKENIZER.encode("€").ids
    assert detokenizer.feed(first) == detokenizer.feed(second) == ""
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""


def test_special_tokens_have_no_text() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.feed(TOKENIZER.encode("a").ids[0]) == "a"
    assert detokenizer.feed(END) + detokenizer.flush() == ""


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
