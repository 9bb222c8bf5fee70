"""Prompts to measure with: text in several domains where the checkpoint can read it, else seeded random token ids."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.report import ROOT

Domains = list[list[list[int]]]
"""Prompts as token ids, by domain."""

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


FILES = (
    *("pager/engine/engine.py", "protos/expert_pager/v1/expert_pager.proto", "deploy/monitoring/rules.yaml", "LICENSE"),
    *("deploy/monitoring/dashboards/serving.json", "Makefile", "docs/log.md", "CHANGELOG.md"),
)
"""Files of this repository, each a domain beside TEXTS."""


def domains_of(model: Path, num_domains: int, num_prompts: int, num_tokens: int, corpus: Path | None = None) -> Domains:
    """`num_prompts` different prompts of `num_tokens` ids from each of `num_domains` domains.

    The domains are the first ones of `corpus` (files NAME.valid.jsonl.gz with a text a line), or, without one, those
    that this repository has texts of: 16. Raises ValueError for more.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    if corpus is not None:
        texts = [_text_of(path) for path in sorted(corpus.glob("*.valid.jsonl.gz"))]
    else:
        texts = [*((text + "\n") * 20 for text in TEXTS), *((ROOT / name).read_text() for name in FILES)]
    if num_domains > len(texts):
        raise ValueError(f"there are texts of {len(texts)} domains, not of {num_domains}")
    found = []
    for text in texts[:num_domains]:
        ids = tokenizer.encode(text[: 16 * num_prompts * num_tokens]).ids
        step = (len(ids) - num_tokens) // num_prompts
        found.append([ids[number * step : number * step + num_tokens] for number in range(num_prompts)])
    return found


def _text_of(path: Path) -> str:
    with gzip.open(path, "rt") as lines:
        return "\n".join(json.loads(line)["text"] for line, _ in zip(lines, range(200), strict=False))


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
