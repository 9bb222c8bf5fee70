"""Published models through the whole service: a GGUF file, compressed-tensors' FP8 with an output's scales, and linear
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import pager
from tests.support import gguf_files
from tests.support.families import saved_family
from tests.support.quantised import number_checkpoint

NUM_TOKENS = 12


def gguf_model(folder: Path) -> tuple[Path, Tokenizer]:
    return gguf_files.gguf_file(gguf_files.qwen3_moe(), folder / "model.gguf"), gguf_files.tokenizer()


def fp8_model(folder: Path) -> tuple[Path, Tokenizer]:
    path, _ = number_checkpoint(folder, "float", "channel")
    return path, numbers(path)


def linear_attention_model(folder: Path) -> tuple[Path, Tokenizer]:
    path = folder / "model"
    saved_family("qwen3_next", path)
    return path, numbers(path)


def numbers(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint whose tokens are numbers, which is saved beside it."""
    tokenizer = Tokenizer(models.WordLevel({f"{number}": number for number in range(90)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("make", [gguf_model, fp8_model, linear_attention_model])
def test_a_service_answers_as_the_library_does(
    tmp_path: Path, serve: Callable[..., Any], make: Callable[[Path], tuple[Path, Tokenizer]]
) -> None:
    path, tokenizer = make(tmp_path)
    text = "3 14 15 9 26 53 58"
    prompt = tokenizer.encode(text).ids
    with pager.load_model(path, dtype="float32", expert_memory="50%") as model:
        model.generation_config.eos_token_id = None
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)[0].tolist()
    with serve(tmp_path / "service", path, "--dtype", "float32", "--expert-memory", "50%") as running:
        assert running.generate(text, max_tokens=NUM_TOKENS).tokens == expected[len(prompt) :]
