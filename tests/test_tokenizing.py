"""A checkpoint's tokenizer: read from a file that may be anything, and failing on a text in an orderly way."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from pager.errors import CheckpointError, InvalidRequest
from pager.tokenizing import (
    TokenizerPanic,
    encode,
    encode_all,
    longest_token_bytes,
    panics_as_errors,
    read_tokenizer,
)

MODEL = Path(__file__).parents[1] / "models" / "emo-tiny"


@pytest.fixture(scope="module")
def giving_up(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its normalizer has a regular expression that takes exponentially long, and then gives up."""
    described = json.loads((MODEL / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def test_a_regular_expression_that_gives_up_is_the_texts_fault(giving_up: Tokenizer) -> None:
    assert encode(giving_up, "abc").ids
    with pytest.raises(InvalidRequest, match="fails on this text") as caught:
        encode(giving_up, "a" * 40 + "!")
    assert "41 characters" in str(caught.value)
    assert "aaa" not in str(caught.value)
    with pytest.raises(InvalidRequest):
        encode_all(giving_up, ["abc", "a" * 40 + "!"])
    assert encode(giving_up, "abc").ids


def copied(folder: Path, **settings: Any) -> Path:
    shutil.copy(MODEL / "tokenizer.json", folder)
    for name, value in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("is_described", [False, True])
def test_tokens_that_other_files_add_count(tmp_path: Path, is_described: bool) -> None:
    before = read_tokenizer(MODEL)
    assert before is not None
    size = before.get_vocab_size()
    files: dict[str, Any] = {
        "added_tokens": {"<|end|>": size, "<|call|>": size + 1},
        "tokenizer_config": {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"},
    }
    if is_described:
        kinds = {"<|end|>": True, "<|call|>": False}
        described = {str(size + n): {"content": text, "special": kinds[text]} for n, text in enumerate(kinds)}
        files["tokenizer_config"]["added_tokens_decoder"] = described
        files["added_tokens"] = {"<|other|>": size}
    tokenizer = read_tokenizer(copied(tmp_path, **files))
    assert tokenizer is not None
    text = "a<|end|>b<|call|>"
    assert encode(tokenizer, text).ids == [*encode(before, "a").ids, size, *encode(before, "b").ids, size + 1]
    assert tokenizer.decode([size, size + 1], skip_special_tokens=True) == "<|call|>"
    if is_described:
        assert encode(tokenizer, text).ids == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids


@pytest.mark.parametrize("added", [{"<|x|>": 3}, {"<|x|>": 10**9}])
def test_added_tokens_of_another_tokenizer_are_refused(tmp_path: Path, added: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match=r"adds the token '<\|x\|>' as \d+, .* not of the same tokenizer"):
        read_tokenizer(copied(tmp_path, added_tokens=added))


@pytest.mark.parametrize("added", [{"<|x|>": "x"}, {"<|x|>": None}, [1]])
def test_added_tokens_that_are_none_are_refused(tmp_path: Path, added: Any) -> None:
    with pytest.raises(CheckpointError, match="fetch"):
        read_tokenizer(copied(tmp_path, added_tokens=added))


@pytest.mark.parametrize("name", ["absent", "model.safetensors"])
def test_a_model_that_is_no_folder(tmp_path: Path, name: str) -> None:
    """It is not one without a tokenizer."""
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=f"{name} is not a directory; give the folder"):
        read_tokenizer(tmp_path / name)


def test_without_its_file_a_tokenizer_is_what_transformers_makes_of_others(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}))
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json, and transformers makes none of vocab\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(alphabet)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert encode(tokenizer, "ab").ids == [alphabet.index("a"), alphabet.index("b")]
    assert tokenizer.decode(encode(tokenizer, "ab c").ids) == "ab c"


def test_only_panics_are_translated(giving_up: Tokenizer) -> None:
    with pytest.raises(TokenizerPanic), panics_as_errors():
        giving_up.encode("a" * 40 + "!")
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt


def test_half_of_a_pair_is_no_text() -> None:
    tokenizer = read_tokenizer(MODEL)
    assert tokenizer is not None
    with pytest.raises(InvalidRequest, match="half of a pair"):
        encode(tokenizer, "a\ud800")
    for text in ("abc", "", "ä€"):
        assert encode(tokenizer, text).ids == tokenizer.encode(text).ids
        assert encode(tokenizer, text).offsets == tokenizer.encode(text).offsets
        (found,) = encode_all(tokenizer, [text], add_special_tokens=False)
        assert found.ids == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    assert read_tokenizer(tmp_path) is None
    for content in (b"", b"[]", b"\xff", b'{"a":' * 50_000, (MODEL / "tokenizer.json").read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
            read_tokenizer(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="named pipe"):
        read_tokenizer(tmp_path)


def test_the_longest_token_bounds_every_text() -> None:
    tokenizer = read_tokenizer(MODEL)
    assert tokenizer is not None
    most = longest_token_bytes(tokenizer)
    assert most == 33  # a newline and the most spaces that were merged
    for text in ("\n" + " " * 32, " " * 10_000, "é" * 5_000, "\U0001d400" * 3_000, "def f(x):\n    return x\n" * 400):
        assert len(text.encode()) <= most * len(encode(tokenizer, text).ids)


def test_a_token_of_another_kind_counts_by_its_own_bytes() -> None:
    tokenizer = Tokenizer(models.BPE({"<0x0A>": 0, "▁é": 1}, [], byte_fallback=True))
    assert longest_token_bytes(tokenizer) == 6
    tokenizer.add_special_tokens(["<|€|>"])
    assert longest_token_bytes(tokenizer) == 7
    tokenizer.normalizer = normalizers.NFKC()
    assert longest_token_bytes(tokenizer) == 4 * 7


def test_other_threads_go_on_while_a_text_is_tokenized() -> None:
    tokenizer = read_tokenizer(MODEL)
    assert tokenizer is not None
    text = "SELECT name FROM users WHERE id = 1; " * (1 << 15)  # half a second of one core
    ended, turns = threading.Event(), 0

    def work() -> None:
        encode_all(tokenizer, [text])
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not ended.wait(0.005):
        turns += 1
    thread.join()
    assert turns >= 5


def test_prompts_are_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(pad_id=1, length=32)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = read_tokenizer(tmp_path)
    assert found is not None
    assert encode(found, "a " * 21).ids == [0] * 21
