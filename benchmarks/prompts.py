"""Prompts to measure with: text in several domains where the checkpoint can read it, else seeded random token ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

TEXTS = (
    "def merge_sorted(left: list[int], right: list[int]) -> list[int]:\n    result = []\n    i = j = 0\n",
    "The court finds that the defendant, having received notice of the claim, failed to answer within the time "
    "that the rules allow, and enters judgment for the plaintiff",
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\nRough winds do shake",
    "SELECT customers.name, SUM(orders.total) FROM customers JOIN orders ON orders.customer_id = customers.id",
    "It was late in the evening when the coach reached the inn, and the rain had not ceased since noon; the host",
    "The mitochondrion is bounded by two membranes, of which the inner one is folded into cristae that carry the",
    "This License does not grant permission to use the trade names, trademarks, service marks, or product names",
    "O for a Muse of fire, that would ascend\nThe brightest heaven of invention,\nA kingdom for a stage",
)  # fmt: skip


def prompts_of(model: Path, num_prompts: int, num_tokens: int, seed: int = 0) -> list[list[int]]:
    """`num_prompts` prompts of exactly `num_tokens` ids each."""
    tokenizer_path = model / "tokenizer.json"
    if not tokenizer_path.exists():
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        # The last ids are the special ones.
        random = np.random.default_rng(seed).integers(0, vocabulary - 4, (num_prompts, num_tokens))
        return [[int(token) for token in row] for row in random]
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    encoded = [tokenizer.encode(text).ids for text in TEXTS]
    texts = [encoded[number % len(encoded)] for number in range(num_prompts)]
    return [(ids * (num_tokens // len(ids) + 1))[:num_tokens] for ids in texts]
