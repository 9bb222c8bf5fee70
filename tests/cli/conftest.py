"""A small random EMO checkpoint in the released format, and the command line as a process."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pager.cli import main
from tests.support.checkpoints import byte_tokenizer
from tests.support.processes import command, environment

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, VOCAB = 3, 9, 32, 16, 260

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def process(new_process: None) -> Run:
    """Runs `expert-pager ARGUMENTS` as a process, to its end."""

    def process(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            env=environment({"OMP_NUM_THREADS": "1", "COLUMNS": "120"}),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return process


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The same in this process, which has its imports behind it."""
    monkeypatch.setenv("COLUMNS", "120")
    handlers, level = logging.root.handlers[:], logging.root.level

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["expert-pager", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(exit_.value.code or 0), captured.out, captured.err)

    yield run
    logging.root.handlers[:] = handlers  # `serve` sets up logging for its process
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers of 9 experts, the last shared; a token picks 2 routed ones. Bytes are its tokens."""
    folder = tmp_path_factory.mktemp("checkpoints") / "random-emo"
    folder.mkdir()
    config = {
        "architectures": ["EmoForCausalLM"],
        "model_type": "emo",
        "dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 256,
        "pad_token_id": 257,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer(["<eos>", "<pad>"]).save(str(folder / "tokenizer.json"))
    return folder


def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "pre_attention_layernorm.weight"] = (HIDDEN,)
        shapes[prefix + "pre_feedforward_layernorm.weight"] = (HIDDEN,)
        shapes[prefix + "mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for name, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2), ("o", HIDDEN)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        for expert in range(EXPERTS):
            shapes[f"{prefix}mlp.experts.{expert}.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
            shapes[f"{prefix}mlp.experts.{expert}.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
            shapes[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return {name: torch.ones(shape) if "norm" in name else torch.randn(shape) * 0.3 for name, shape in shapes.items()}
