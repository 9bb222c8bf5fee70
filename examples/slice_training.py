"""Train a slice: cut a sixteenth of a model's experts for one domain, win back what that cost, and merge it back.

Run it from the repository: `python examples/slice_training.py [FOLDER]`. It needs `pip install . peft` and no service.
The domain is Python: its documents are this repository's own sources, and files that are neither shown to the choice of
experts nor trained on measure the loss.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pager  # noqa: F401 - transformers knows EMO from here on

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "emo-tiny"
NUM_TOKENS, NUM_EXAMPLES, NUM_UNSEEN = 256, 40, 24
NUM_STEPS, NUM_ROWS, RATE = 30, 4, 5e-3


def main(folder: str | Path) -> None:
    out, sources = Path(folder), [path for path in sorted((ROOT / "pager").rglob("*.py")) if path.stat().st_size > 2000]
    held_out = sources[::5]
    training = [path for path in sources if path not in held_out]
    rows, unseen = rows_of(training), rows_of(held_out)[:NUM_UNSEEN]

    examples = out / "python.jsonl"
    examples.write_text(
        "".join(json.dumps({"text": path.read_text()[:800]}) + "\n" for path in training[:NUM_EXAMPLES])
    )
    expert_pager("slice", MODEL, out / "slice", "--examples", examples, "--size", "6.25%")
    whole, model = load(MODEL), load(out / "slice")
    before, of_whole = loss(model, unseen), loss(whole, unseen)

    torch.manual_seed(0)
    experts = LoraConfig(r=16, lora_alpha=32, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    adapted = get_peft_model(model, experts)
    train(adapted, rows)
    trained = adapted.merge_and_unload()
    after = loss(trained, unseen)
    print(f"loss of all experts {of_whole:.3f}, of the slice {before:.3f}, of the trained slice {after:.3f}")

    trained.save_pretrained(out / "trained")
    expert_pager("slice", "--merge", out / "trained", "--into", MODEL, out / "merged")


def load(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def rows_of(paths: list[Path]) -> list[Tensor]:
    """The documents, cut into rows of NUM_TOKENS."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [tokenizer(path.read_text(), return_tensors="pt", verbose=False).input_ids[0] for path in paths]
    return [row for ids in texts for row in ids.split(NUM_TOKENS) if len(row) == NUM_TOKENS]


def loss(model: PreTrainedModel, rows: list[Tensor]) -> float:
    """The mean over the rows, in nats a token."""
    with torch.inference_mode():
        batches = torch.stack(rows).split(NUM_ROWS)
        total = sum(float(model(batch, labels=batch).loss) * len(batch) for batch in batches)
    return total / len(rows)


def train(model: PeftModel, rows: list[Tensor]) -> None:
    """A plain loop, for which transformers' Trainer can stand in."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=RATE)
    order = torch.randperm(len(rows))
    for step in range(NUM_STEPS):
        batch = torch.stack([rows[order[(step * NUM_ROWS + row) % len(rows)]] for row in range(NUM_ROWS)])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - (step + 1) / NUM_STEPS)


def expert_pager(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pager.cli", *map(str, arguments)], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(scratch)
