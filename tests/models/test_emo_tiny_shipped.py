"""The checkpoint in models/emo-tiny: format, size, and that its text follows its prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pager.models import EmoForCausalLM
from training.objective import documents_of, install_pool_gates

MODEL = Path(__file__).parents[2] / "models" / "emo-tiny"
CODE = "class Graph:\n    def __init__(self, nodes):\n        self.nodes = nodes\n\n    def add_edge(self,"
LAW = "§ 2-1801. Powers of the Board.\n(a) The Mayor shall"
VERSE = "O gentle night, that o'er the weary world\nDoth spread thy"
SYMBOLS = set("(){}[]_=<>:;&*")


@pytest.fixture(scope="module")
def model() -> EmoForCausalLM:
    model: EmoForCausalLM = EmoForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.eval()
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_folder_is_in_the_released_format_and_small() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 25e6
    config = json.loads((MODEL / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("emo", ["EmoForCausalLM"])
    assert config["rope_theta"] == 500000.0
    with safe_open(MODEL / "model.safetensors", "pt") as tensors:
        last = tensors.get_tensor("model.layers.5.mlp.experts.127.down_proj.weight")
    assert (last.dtype, tuple(last.shape)) == (torch.bfloat16, (128, 32))


@pytest.mark.parametrize("text", [CODE, LAW, VERSE, "naïve — 東京\t\n\n  x"])
def test_tokenizer_gives_back_every_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens(model: EmoForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 0
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == 1


def test_text_follows_its_prompt(model: EmoForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    code, law, verse = (continuations(model, tokenizer, prompt) for prompt in (CODE, LAW, VERSE))
    assert symbol_share(code) > 3 * max(symbol_share(law), symbol_share(verse))
    assert law.count("shall") + law.count("Mayor") > verse.count("shall") + verse.count("Mayor")
    assert characters_a_line(verse) < characters_a_line(law)


@torch.no_grad()
def test_a_document_pool_of_a_quarter_keeps_most_of_the_model(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = EmoForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = tokenizer(CODE + " a, b):\n        self.edges.append((a, b))\n", return_tensors="pt").input_ids
    full = model(ids, labels=ids).loss
    assert full < 4.5
    for router in install_pool_gates(model):
        router.documents = documents_of(torch.arange(ids.shape[1])[None], 31)
    assert (model(ids, labels=ids).loss - full).abs() < 0.5


def continuations(model: EmoForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    torch.manual_seed(0)
    inputs = tokenizer([prompt] * 6, return_tensors="pt")
    out: Tensor = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=0)
    return "\n".join(tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def symbol_share(text: str) -> float:
    return sum(character in SYMBOLS for character in text) / len(text)


def characters_a_line(text: str) -> float:
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(map(len, lines)) / len(lines)
