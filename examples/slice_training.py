"""Train a slice: cut a sixteenth of a model's experts for one domain, win back what that cost, and merge it back.

Run it from the repository: `python examples/slice_training.py [FOLDER] [--steps N]`. It needs no service and
`pip install ./client '.[tuning]'`, and takes two minutes on two cores. The domain is Python: its documents are this
repository's own sources, and files that are neither shown to the choice of experts nor trained on measure the loss.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

import pager  # noqa: F401 - transformers knows EMO from here on

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "emo-tiny"
NUM_TOKENS, NUM_EXAMPLES, NUM_UNSEEN = 256, 40, 24
NUM_STEPS, NUM_ROWS, RATE = 150, 8, 5e-3


def main(out: Path, num_steps: int = NUM_STEPS) -> None:
    sources = [path for path in sorted((ROOT / "pager").rglob("*.py")) if path.stat().st_size > 2000]
    held_out = sources[::5]
    training = [path for path in sources if path not in held_out]
    rows, unseen = rows_of(training), rows_of(held_out)[:NUM_UNSEEN]

    examples = out / "python.jsonl"
    texts = [path.read_text(encoding="utf-8")[:800] for path in training[:NUM_EXAMPLES]]
    examples.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    expert_pager("slice", MODEL, out / "slice", "--examples", examples, "--size", "6.25%")
    of_whole, model = loss(load(MODEL), unseen), load(out / "slice")
    before = loss(model, unseen)

    experts = LoraConfig(r=16, lora_alpha=32, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    adapted = get_peft_model(model, experts)
    settings = TrainingArguments(
        output_dir=str(out / "steps"), max_steps=num_steps, per_device_train_batch_size=NUM_ROWS, learning_rate=RATE,
        lr_scheduler_type="linear", save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, seed=0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    documents = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=adapted, args=settings, train_dataset=documents).train()
    trained = adapted.merge_and_unload().eval()
    print(f"loss of all experts {of_whole:.3f}, of the slice {before:.3f}, of the trained slice", end=" ")
    print(f"{loss(trained, unseen):.3f}")

    trained.save_pretrained(out / "trained")
    expert_pager("slice", "--merge", out / "trained", "--into", MODEL, out / "merged")


def load(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def rows_of(paths: list[Path]) -> list[Tensor]:
    """The documents, cut into rows of NUM_TOKENS."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [path.read_text(encoding="utf-8") for path in paths]
    ids = [tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in texts]
    return [row for document in ids for row in document.split(NUM_TOKENS) if len(row) == NUM_TOKENS]


def loss(model: PreTrainedModel, rows: list[Tensor]) -> float:
    """The mean over the rows, in nats a token."""
    with torch.inference_mode():
        batches = torch.stack(rows).split(NUM_ROWS)
        total = sum(float(model(batch, labels=batch).loss) * len(batch) for batch in batches)
    return total / len(rows)


def expert_pager(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pager.cli", *map(str, arguments)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains a slice of emo-tiny.")
    parser.add_argument("folder", nargs="?", type=Path, help="where to leave what is made; default: nowhere")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        main(asked.folder or Path(scratch), asked.steps)
