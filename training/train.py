"""Train a small EMO (or standard MoE) reference model on a corpus of `<domain>.train.jsonl.gz` files.

    python -m training.train --corpus DIR --out DIR --max-minutes 60

Runs on a GPU where torch finds one. Resumes from the last checkpoint in `--out`; Ctrl-C and SIGTERM end it with a
checkpoint. Everything random follows from `--seed` and the step number, so a resumed run sees the same batches and pool
sizes as an uninterrupted one. With `--max-minutes` the learning rate follows the clock too, so that it reaches zero
when the time is up.
"""

from __future__ import annotations

import csv
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from pager.models import EmoForCausalLM
from training import data, evaluate, fast
from training.objective import PoolGate, documents_of, install_pool_gates, next_token_labels
from training.recipe import PoolMode, Recipe
from training.run_folder import CHECKPOINT, WEIGHTS_PREFIX, Progress, whole

console = Console(soft_wrap=True)


class Trainer:
    """A training run: owns the model, the optimizer and the progress of one run directory."""

    def __init__(self, recipe: Recipe, corpus: Path, out: Path, device: torch.device | str = "cpu") -> None:
        self.recipe, self.corpus, self.out = recipe, corpus, out
        self.device = torch.device(device)
        out.mkdir(parents=True, exist_ok=True)
        recipe.settle(out)
        self.tokenizer = _cached_tokenizer(recipe, corpus, out / "tokenizer.json")
        self.rows = _cached_rows(recipe, corpus, self.tokenizer, out / "rows.npz")
        torch.manual_seed(recipe.seed)
        self.model = EmoForCausalLM(recipe.model_config())
        fast.install()
        self.model.set_experts_implementation(fast.CACHE_RESIDENT)
        self.routers: list[PoolGate] = install_pool_gates(self.model)
        self.model.to(self.device)  # drawn on the CPU, so that every device starts alike
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
            fused=True,
        )
        self.progress = Progress()

    def run(self, max_tokens: int, max_minutes: float | None, save_minutes: float) -> bool:
        """Trains until `max_tokens` or `max_minutes`, whichever is first; the learning rate reaches zero there.

        A SIGINT or SIGTERM ends it after the step it is in, with a checkpoint; returns whether it came to its own end.
        """
        self.resume()
        started = last_saved = time.monotonic()
        already_s = self.progress.elapsed_s
        with _ending_on_signals() as is_told_to_end, _loss_log(self.out / "loss.csv") as log:
            for tokens_BN, positions_BN in self.batches():
                done = _fraction_done(self.progress, max_tokens, max_minutes)
                if done >= 1 or is_told_to_end():
                    break
                losses = self.step(tokens_BN, positions_BN, done)
                now = time.monotonic()
                self.progress.elapsed_s = already_s + now - started
                log.writerow([self.progress.step, self.progress.tokens, *(f"{loss:.4f}" for loss in losses)])
                if self.progress.step % 20 == 0:
                    self._report(losses, done)
                if now - last_saved > save_minutes * 60:
                    self.save()
                    last_saved = now
            self.save()
            return done >= 1

    def step(self, tokens_BN: Tensor, positions_BN: Tensor, done: float) -> tuple[float, float, float, float]:
        """Takes one optimizer step; `done` in [0, 1) sets the learning rate.

        Returns loss, balance, z and gradient norm.
        """
        recipe, step = self.recipe, self.progress.step
        tokens_BN, positions_BN = tokens_BN.to(self.device), positions_BN.to(self.device)
        if recipe.pool == "document":
            documents = documents_of(positions_BN, self._pool_sizes(step, tokens_BN.numel()))
            for router in self.routers:
                router.documents = documents
        hidden_TD = self.model.model(
            input_ids=tokens_BN, position_ids=positions_BN, use_cache=False, output_router_logits=False
        ).last_hidden_state.flatten(0, 1)
        labels_T = next_token_labels(tokens_BN, positions_BN).flatten()
        loss = fast.cross_entropy(hidden_TD, self.model.lm_head.weight, labels_T)
        balance = torch.stack([router.balance_loss for router in self.routers]).mean()
        z = torch.stack([router.z_loss for router in self.routers]).mean()
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + recipe.balance_weight * balance + recipe.z_weight * z)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * (1 - done)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.tokens += tokens_BN.numel()
        return loss.item(), balance.item(), z.item(), float(grad_norm)

    def _pool_sizes(self, step: int, most_documents: int) -> Tensor:
        """Draws sizes from `min_pool` to all, every doubling as likely as any other: small pools are those to be
        served.
        """
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        above_all = self.recipe.num_experts - self.recipe.num_shared + 1
        at = torch.rand(most_documents, generator=generator, dtype=torch.float64)
        sizes = (self.recipe.min_pool * (above_all / self.recipe.min_pool) ** at).long()
        return sizes.to(self.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches from the current step on; rows are reshuffled every epoch."""
        per_epoch = len(self.rows) // self.recipe.rows_per_step
        while True:
            epoch, index = divmod(self.progress.step, per_epoch)
            order = np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.rows))
            picked = order[index * self.recipe.rows_per_step : (index + 1) * self.recipe.rows_per_step]
            yield (
                torch.from_numpy(self.rows.tokens_RN[picked]).long(),
                torch.from_numpy(self.rows.positions_RN[picked]).long(),
            )

    def save(self) -> None:
        """Writes the checkpoint; a crash in between leaves the previous one in place."""
        tensors = {f"{WEIGHTS_PREFIX}{name}": value.detach() for name, value in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        with whole(self.out / CHECKPOINT) as partial:
            save_file(tensors, partial, metadata=self.progress.metadata())

    def resume(self) -> bool:
        """Continues from the checkpoint in the run directory, if there is one."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return False
        tensors = load_file(path, device=str(self.device))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"{WEIGHTS_PREFIX}{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.step.{name}" in tensors:
                    self.optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        self.progress = Progress.of(self.out)
        console.print(f"resumed at step {self.progress.step}, {self.progress.tokens / 1e6:.2f} M tokens")
        return True

    def _report(self, losses: tuple[float, float, float, float], done: float) -> None:
        progress = self.progress
        left_s = progress.elapsed_s * (1 - done) / max(done, 1e-9)
        busiest = max(float(router.load_E[:-1].max()) for router in self.routers)
        console.print(
            f"{self.out.name}  step {progress.step:5d}  {progress.tokens / 1e6:6.2f} M tokens  {done:4.0%}  "
            f"{progress.tokens / progress.elapsed_s:5.0f} tokens/s  ETA {left_s / 60:.0f} min  loss {losses[0]:.3f}  "
            f"balance {losses[1]:.3f}  z {losses[2]:.2f}  grad {losses[3]:.2f}  busiest expert {busiest:.2f}"
        )


@contextmanager
def _ending_on_signals() -> Iterator[Callable[[], bool]]:
    """Yields whether a SIGINT or SIGTERM has come since the block was entered; they have no other effect in it."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in numbers]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _loss_log(path: Path) -> Iterator[Any]:
    """Opens the log of losses, after what earlier resumptions wrote."""
    new = not path.exists()
    with path.open("a", newline="", buffering=1) as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", "tokens", "loss", "balance", "z", "grad_norm"])
        yield writer


def _fraction_done(progress: Progress, max_tokens: int, max_minutes: float | None) -> float:
    by_tokens = progress.tokens / max_tokens
    return max(by_tokens, progress.elapsed_s / (max_minutes * 60)) if max_minutes else by_tokens


def _cached_tokenizer(recipe: Recipe, corpus: Path, path: Path) -> Tokenizer:
    if not path.exists():
        with console.status("training the tokenizer"):
            tokenizer = data.train_tokenizer(corpus, recipe.vocab_size)
            with whole(path) as partial:
                tokenizer.save(str(partial))
    return Tokenizer.from_file(str(path))


def _cached_rows(recipe: Recipe, corpus: Path, tokenizer: Tokenizer, path: Path) -> data.PackedRows:
    if not path.exists():
        with console.status("tokenising and packing the corpus"):
            rows = data.balanced(corpus, "train", tokenizer, recipe.train_context, recipe.seed)
            with whole(path) as partial:
                rows.save(partial)
            console.print(
                f"{len(rows)} rows of {recipe.train_context}: {rows.tokens_RN.size / 1e6:.1f} M tokens an epoch"
            )
    return data.PackedRows.load(path)


def main(
    corpus: Annotated[Path, typer.Option(help="Folder with <domain>.train.jsonl.gz and <domain>.valid.jsonl.gz.")],
    out: Annotated[Path, typer.Option(help="Run folder: tokenizer, packed rows, checkpoint, loss.csv.")],
    pool: Annotated[str, typer.Option(help="document: EMO; none: a standard MoE, trained alike.")] = "document",
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 12_600_000,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after this long, resumptions added up.")] = None,
    save_minutes: Annotated[float, typer.Option(help="Write a checkpoint this often.")] = 5.0,
    learning_rate: Annotated[float, typer.Option(help="Peak; decays linearly to zero.")] = Recipe().learning_rate,
    rows_per_step: Annotated[int, typer.Option(help="Batch size in rows of 512 tokens.")] = Recipe().rows_per_step,
    seed: Annotated[int, typer.Option()] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
) -> None:
    """Trains, then prints each domain's validation loss with all experts and with document pools of 31 experts."""
    if pool not in ("document", "none"):
        raise typer.BadParameter(f"--pool is document or none, not {pool!r}")
    mode: PoolMode = "document" if pool == "document" else "none"
    recipe = Recipe(pool=mode, learning_rate=learning_rate, rows_per_step=rows_per_step, seed=seed)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        trainer = Trainer(recipe, corpus, out, device)
    except FileNotFoundError as error:
        raise typer.BadParameter(f"--corpus: {error}") from None
    if not trainer.run(max_tokens, max_minutes, save_minutes):
        console.print(f"ended at step {trainer.progress.step}; the same command goes on from there")
        raise typer.Exit(130)
    table = evaluate.losses_by_domain(trainer.model, trainer.tokenizer, corpus, recipe.train_context)
    (out / "valid.json").write_text(json.dumps(table, indent=1))
    console.print(evaluate.as_table(table))


if __name__ == "__main__":
    typer.run(main)
