"""Small random checkpoints: models with lively routing, and tokenizers whose tokens can be foretold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel


def lively(model: PreTrainedModel, std: float = 0.2) -> PreTrainedModel:
    """Draws all weights anew, so large that a token's gate is far from indifferent; norms stay near one."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=std)
    model.eval()
    return model


def saved(model: PreTrainedModel, path: Path, tokenizer: Tokenizer | None = None, **options: Any) -> Path:
    """Writes a checkpoint as transformers does, with its tokenizer; `options` are those of save_pretrained."""
    model.save_pretrained(path, **options)
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"))
    return path


def add_to_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def byte_tokenizer(special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Each byte is a token, in the order of GPT-2's letters for bytes: 256 of them, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if special_tokens:
        tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


def letters_tokenizer() -> Tokenizer:
    """Token i is the i-th pair of letters from a to p, so that stop strings can lie across tokens."""
    pairs = ["".join(pair) for pair in itertools.product("abcdefghijklmnop", repeat=2)]
    tokenizer = Tokenizer(models.WordLevel({pair: i for i, pair in enumerate(pairs)}, unk_token="aa"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
