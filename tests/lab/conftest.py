"""A small random checkpoint with a tokenizer of bytes, and documents of two domains."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pager.models import EmoConfig, EmoForCausalLM
from tests.support.checkpoints import byte_tokenizer, lively, saved

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "emo": lambda: EmoForCausalLM(EmoConfig(**COMMON, num_experts=17, num_experts_per_tok=3)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**COMMON, num_experts=16, num_experts_per_tok=2)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=8, num_experts_per_tok=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16)
    ),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint("emo")`: a random model with lively routing, fp32, saved with its tokenizer; made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            model = lively(FAMILIES[family]())
            made[family] = saved(model, tmp_path_factory.mktemp(family), byte_tokenizer())
        return made[family]

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`letters.valid.jsonl` and `digits.valid.jsonl.gz` with six documents each, and as many in `*.train.*`."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)

    def lines(alphabet: str) -> str:
        sizes = [5, 20, 28, 33, 40, 60, 90]  # characters, one token each; the first is too short
        texts = ["".join(random.choice(list(alphabet), size)) for size in sizes]
        return "".join(json.dumps({"text": text, "id": f"{alphabet[0]}{n}"}) + "\n" for n, text in enumerate(texts))

    for split in ("valid", "train"):
        (folder / f"letters.{split}.jsonl").write_text(lines("abcdefgh "))
        with gzip.open(folder / f"digits.{split}.jsonl.gz", "wt") as file:
            file.write(lines("0123456789"))
    return folder
