"""A whole run on a corpus of a few documents: train, resume, export, load."""

from __future__ import annotations

import csv
import gzip
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import data, evaluate
from training.card import licence_table, write_card
from training.export import export, validation_losses
from training.plot import plot_losses, read_losses
from training.recipe import Recipe
from training.run_folder import CHECKPOINT, Progress
from training.train import Trainer

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(
    hidden_size=16,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_experts=16,
    top_k=4,
    vocab_size=300,
    context=64,
    train_context=32,
    rows_per_step=2,
    warmup_steps=2,
    min_pool=4,
)
STEP_TOKENS = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    vocabularies = {"letters": "abcdefgh", "digits": "12345678"}
    for domain, alphabet in vocabularies.items():
        for split, count in (("train", 30), ("valid", 6)):
            with gzip.open(folder / f"{domain}.{split}.jsonl.gz", "wt") as file:
                for i in range(count):
                    words = ["".join(rng.choice(list(alphabet), 4)) for _ in range(60)]
                    file.write(json.dumps({"id": str(i), "text": " ".join(words)}) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return data.train_tokenizer(corpus, RECIPE.vocab_size)


def test_rows_are_full_and_balanced(corpus: Path, tokenizer: Tokenizer) -> None:
    rows = data.balanced(corpus, "train", tokenizer, 32, seed=0)
    assert rows.tokens_RN.shape == rows.positions_RN.shape
    assert rows.tokens_RN.shape[1] == 32
    assert (rows.positions_RN[:, 0] == 0).all()
    restarts = rows.positions_RN[:, 1:] == 0
    assert (rows.positions_RN[:, 1:][~restarts] == rows.positions_RN[:, :-1][~restarts] + 1).all()
    text = tokenizer.decode(rows.tokens_RN.flatten().tolist())
    letters, digits = sum(map(str.isalpha, text)), sum(map(str.isdigit, text))
    assert 0.7 < letters / digits < 1.4


def test_cutting_and_packing_lose_only_row_ends(corpus: Path, tokenizer: Tokenizer) -> None:
    pieces = data.documents(corpus, "digits", "valid", tokenizer, 32, np.random.default_rng(0))
    assert max(map(len, pieces)) == 32
    assert sum(int(piece[-1]) == tokenizer.token_to_id(data.EOS) for piece in pieces) == 6
    rows = data.pack(pieces, 32)
    assert np.array_equal(rows.tokens_RN[0][: len(pieces[0])], pieces[0][:32])


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \*\.train\.jsonl\.gz"):
        data.domains_of(tmp_path, "train")


def test_a_resumed_run_ends_like_an_uninterrupted_one(corpus: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    Trainer(RECIPE, corpus, whole).run(8 * STEP_TOKENS, None, save_minutes=60)

    first = Trainer(RECIPE, corpus, halves)
    for step, (tokens_BN, positions_BN) in enumerate(first.batches()):
        if step == 3:
            break
        first.step(tokens_BN, positions_BN, done=step / 8)
    first.save()
    Trainer(RECIPE, corpus, halves).run(8 * STEP_TOKENS, None, save_minutes=60)

    a, b = load_file(whole / CHECKPOINT), load_file(halves / CHECKPOINT)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_keeps_every_step(
    number: signal.Signals, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def third_step_sends(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.progress.step == 2:
            signal.raise_signal(number)
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "step", third_step_sends)
    before = signal.getsignal(number)
    assert not Trainer(RECIPE, corpus, tmp_path).run(8 * STEP_TOKENS, None, save_minutes=60)
    assert signal.getsignal(number) is before
    assert Progress.of(tmp_path).step == 3
    assert Trainer(RECIPE, corpus, tmp_path).run(8 * STEP_TOKENS, None, save_minutes=60)
    assert Progress.of(tmp_path).step == 8
    assert [int(tokens) for tokens in read_losses(tmp_path / "loss.csv")[0]] == [STEP_TOKENS * n for n in range(1, 9)]


def test_a_run_ended_while_it_writes_a_file_begins_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(rows: data.PackedRows, path: Path) -> None:
        path.write_bytes(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(data.PackedRows, "save", write_half)
        with pytest.raises(KeyboardInterrupt):
            Trainer(RECIPE, corpus, tmp_path)
    assert Trainer(RECIPE, corpus, tmp_path).run(STEP_TOKENS, None, save_minutes=60)


@pytest.mark.slow
def test_a_corpus_without_documents_is_said_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.train", "--corpus", str(tmp_path), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no *.train.jsonl.gz in" in done.stderr
    assert "Traceback" not in done.stderr


def test_training_learns_and_the_export_loads(corpus: Path, tmp_path: Path) -> None:
    run, to = tmp_path / "run", tmp_path / "model"
    trainer = Trainer(RECIPE, corpus, run)
    trainer.run(60 * STEP_TOKENS, None, save_minutes=60)
    with (run / "loss.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    table = evaluate.losses_by_domain(trainer.model, trainer.tokenizer, corpus, 32)
    assert table.keys() == {"letters", "digits", "mean"}

    export(run, to)
    model = AutoModelForCausalLM.from_pretrained(to)
    assert model.dtype == torch.bfloat16
    tensors = load_file(to / "model.safetensors")
    assert tensors["model.layers.1.mlp.experts.15.gate_proj.weight"].shape == (8, 16)
    tokenizer = AutoTokenizer.from_pretrained(to)
    assert tokenizer.decode(tokenizer("1234  abcd\n").input_ids) == "1234  abcd\n"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)


def test_a_run_is_not_resumed_with_another_recipe(corpus: Path, tmp_path: Path) -> None:
    Trainer(RECIPE, corpus, tmp_path)
    with pytest.raises(SystemExit, match="min_pool"):
        Trainer(replace(RECIPE, min_pool=5), corpus, tmp_path)


def test_small_pools_train_as_often_as_large_ones(corpus: Path, tmp_path: Path) -> None:
    sizes = Trainer(RECIPE, corpus, tmp_path)._pool_sizes(0, 4000)
    assert set(sizes.tolist()) == set(range(4, 16))
    assert float((sizes < 8).float().mean()) == pytest.approx(0.5, abs=0.03), "4 to 7 and 8 to 15 are a doubling each"


def test_a_standard_moe_trains_without_pools(corpus: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, pool="none")
    trainer = Trainer(recipe, corpus, tmp_path)
    trainer.run(2 * STEP_TOKENS, None, save_minutes=60)
    assert all(router.documents is None for router in trainer.routers)


SOURCES = """# Corpus

| domain | source (commit elsewhere) | licence | docs |
|---|---|---|---|
| letters | a book | CC0 | 3 |
| digits | a table | MIT | 4 |

More text.
"""


def test_the_card_is_made_from_the_run(corpus: Path, tmp_path: Path) -> None:
    run, to, described = tmp_path / "run", tmp_path / "digits-tiny", tmp_path / "corpus"
    Trainer(RECIPE, corpus, run).run(3 * STEP_TOKENS, None, save_minutes=60)
    export(run, to)
    described.mkdir()
    (described / "README.md").write_text(SOURCES)
    losses = validation_losses(run, corpus)
    assert losses.keys() == {"letters", "digits", "mean"}
    write_card(run, to, losses, described)
    card = (to / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# digits-tiny" in card
    assert "3 steps of 64 tokens: 0.00 M tokens" in card
    assert f"| letters | {losses['letters']['full']:.3f} | {losses['letters']['pool31']:.3f} |" in card
    assert "| digits | a table | MIT |" in card
    assert "| experts a layer | 16: 15 routed and 1 shared (the last); top-4 = 3 routed and the shared |" in card


def test_losses_stored_by_the_run_are_not_measured_again(tmp_path: Path) -> None:
    table = {"mean": {"full": 1.0, "pool31": 2.0}}
    (tmp_path / "valid.json").write_text(json.dumps(table))
    assert validation_losses(tmp_path, None) == table
    (tmp_path / "valid.json").unlink()
    with pytest.raises(SystemExit, match="give --corpus"):
        validation_losses(tmp_path, None)


def test_sources_are_said_only_where_the_corpus_says_them(tmp_path: Path) -> None:
    assert licence_table(None) is None
    assert licence_table(tmp_path) is None
    (tmp_path / "README.md").write_text("| name | size |\n|---|---|\n| letters | 3 |\n")
    assert licence_table(tmp_path) is None
    (tmp_path / "README.md").write_text(SOURCES)
    assert licence_table(tmp_path) == (
        "| domain | source | licence |\n| --- | --- | --- |\n| letters | a book | CC0 |\n| digits | a table | MIT |"
    )


def test_a_step_that_ran_twice_counts_once(tmp_path: Path) -> None:
    (tmp_path / "loss.csv").write_text("step,tokens,loss\n1,64,5.0\n2,128,4.0\n2,128,4.5\n3,192,3.0\n")
    tokens, losses = read_losses(tmp_path / "loss.csv")
    assert tokens.tolist() == [64, 128, 192]
    assert losses.tolist() == [5.0, 4.5, 3.0]


def test_the_loss_plot_is_a_picture(tmp_path: Path) -> None:
    for name in ("emo", "std"):
        (tmp_path / name).mkdir()
        rows = "".join(f"{step},{64 * step},{5 - step / 50}\n" for step in range(1, 100))
        (tmp_path / name / "loss.csv").write_text(f"step,tokens,loss\n{rows}")
    plot_losses([tmp_path / "emo", tmp_path / "std"], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
