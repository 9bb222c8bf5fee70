"""Exports a training run as a model folder in the released format: one tensor an expert, config, tokenizer, card.

python -m training.export --run DIR --to DIR --corpus DIR
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from pager.models import EmoForCausalLM
from training import evaluate
from training.card import write_card
from training.data import EOS, PAD
from training.objective import install_pool_gates
from training.recipe import Recipe
from training.run_folder import CHECKPOINT, WEIGHTS_PREFIX

console = Console()


def load_trained(run: Path) -> EmoForCausalLM:
    """Loads the run's model as of its last checkpoint, fp32. Raises FileNotFoundError where none was written."""
    model = EmoForCausalLM(Recipe.of(run).model_config())
    tensors = load_file(run / CHECKPOINT)
    weights = {
        name.removeprefix(WEIGHTS_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(WEIGHTS_PREFIX)
    }
    model.load_state_dict(weights)
    model.eval()
    return model


def export(run: Path, to: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes `to` such that AutoModelForCausalLM and AutoTokenizer load it with `pager.models` imported."""
    model = load_trained(run).to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=model.config.eos_token_id, pad_token_id=1)
    model.save_pretrained(to)
    _store_rope_the_released_way(to / "config.json")
    PreTrainedTokenizerFast(
        tokenizer_file=str(run / "tokenizer.json"),
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(to)


def validation_losses(run: Path, corpus: Path | None) -> evaluate.LossTable:
    """Returns the losses that the run stored at its end, or measures them.

    Raises SystemExit where neither is possible.
    """
    stored = run / "valid.json"
    if stored.exists():
        table: evaluate.LossTable = json.loads(stored.read_text())
        return table
    if corpus is None:
        raise SystemExit(f"{run} has no valid.json yet; give --corpus, so that the losses for the card can be measured")
    model = load_trained(run)
    install_pool_gates(model)
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    return evaluate.losses_by_domain(model, tokenizer, corpus, Recipe.of(run).train_context)


def _store_rope_the_released_way(config_path: Path) -> None:
    config = json.loads(config_path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main(
    run: Annotated[Path, typer.Option(help="Run folder of training.train.")],
    to: Annotated[Path, typer.Option(help="Model folder to write, in bf16.")],
    corpus: Annotated[
        Path | None, typer.Option(help="What the run was trained on; its README's table of sources goes into the card.")
    ] = None,
) -> None:
    """Exports the last checkpoint of a run, with a model card made from the run."""
    export(run, to)
    write_card(run, to, validation_losses(run, corpus), corpus)
    size = sum(file.stat().st_size for file in to.iterdir())
    console.print(f"{to}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
