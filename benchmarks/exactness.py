"""Does paging change the answer? Logits and greedy tokens at every residency against plain transformers, in fp32.

    python -m benchmarks.exactness [MODEL]

Exits with status 1 when any row differs.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.models import load_library, load_plain
from benchmarks.prompts import prompts_of
from benchmarks.report import RESULTS, ROOT, Report, Table, conditions, console, quieten
from pager.memory import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHIPPED = ROOT / "models" / "emo-tiny"
GOLDEN = ROOT / "tests" / "data" / "golden" / "ckpt_emo_tiny"
RESIDENCIES = ("100%", "50%", "25%", "12.5%")
TOLERANCE = 1e-4
PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to each prompt: logits [1, N, V] of its tokens, and the greedy ids that follow."""

    logits: Sequence[Tensor]
    token_ids: Sequence[list[int]]

    def difference(self, other: Answer) -> float:
        """The largest between two logits."""
        return max(float((mine - its).abs().max()) for mine, its in zip(self.logits, other.logits, strict=True))

    def same_tokens(self, other: Answer) -> int:
        """For how many prompts the greedy tokens are equal."""
        return sum(mine == its for mine, its in zip(self.token_ids, other.token_ids, strict=True))


@torch.inference_mode()
def answer(model: PreTrainedModel, prompts: Sequence[Tensor], num_new: int) -> Answer:
    logits, token_ids = [], []
    for prompt_1N in prompts:
        logits.append(model(prompt_1N, use_cache=False).logits)
        generated = model.generate(
            prompt_1N,
            attention_mask=torch.ones_like(prompt_1N),
            max_new_tokens=num_new,
            do_sample=False,
        )
        token_ids.append(generated[0, prompt_1N.shape[1] :].tolist())
    return Answer(logits, token_ids)


def plain_answer(path: Path, prompts: Sequence[Tensor], num_new: int) -> Answer:
    """With everything resident, by the family's own reference implementation of the experts."""
    return answer(load_plain(path, torch.float32, "eager"), prompts, num_new)


def compare(path: Path, residency: str, prompts: Sequence[Tensor], num_new: int, plain: Answer) -> tuple[bool, Any]:
    """Whether the paged model's answer is the plain one's, and the table's row that says so."""
    with load_library(path, dtype="float32", expert_memory=residency) as model:
        found = answer(model, prompts, num_new)
        stats, plan = model.expert_paging.pager.stats(), model.expert_paging.plan
    difference, same = found.difference(plain), found.same_tokens(plain)
    ok = difference <= TOLERANCE and same == len(prompts)
    return ok, (
        residency,
        f"{plan.num_slots} of {plan.num_routed}",
        format_bytes(plan.slot_bytes),
        f"{difference:.1e}",
        f"{same} of {len(prompts)}",
        f"{stats.paging.experts_hit}",
        f"{stats.paging.experts_missed}",
        f"{stats.hit_rate:.1%}",
        format_bytes(stats.paging.bytes_from_disk),
        "ok" if ok else "DIFFERS",
    )


COLUMNS = (
    "residency", "slots", "slot memory", "max logit difference", "same greedy tokens", "hits", "misses", "hit rate",
    "paged in", "",
)  # fmt: skip


def main(
    model: Annotated[Path | None, typer.Argument(help="A checkpoint; the shipped model by default.")] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts.")] = 6,
    new_tokens: Annotated[int, typer.Option(help="Greedy tokens after each prompt.")] = 32,
    threads: Annotated[int, typer.Option(help="Of torch.")] = torch.get_num_threads(),
    results: Annotated[Path, typer.Option(help="Directory for the table.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Two prompts, and no file is written.")] = False,
) -> None:
    """Compare paged with plain logits and greedy tokens, fp32, at 100, 50, 25 and 12.5 % of the experts."""
    quieten()
    torch.set_num_threads(threads)
    path = model or (SHIPPED if SHIPPED.exists() else GOLDEN)
    num_prompts, num_new = (2, 8) if quick else (prompts, new_tokens)
    if not path.is_dir():
        raise typer.BadParameter(f"{path} is not a directory; give the folder of a checkpoint")
    token_ids = [torch.tensor([ids]) for ids in prompts_of(path, num_prompts, PROMPT_TOKENS)]
    report = Report(
        f"exactness-{path.name}",
        f"exact mode against plain transformers, fp32, at most {TOLERANCE:.0e} apart",
        conditions(
            model=path.name,
            threads=str(threads),
            prompts=f"{num_prompts} of {PROMPT_TOKENS} tokens, {num_new} greedy tokens after each",
        ),
    )
    report.start()
    plain = plain_answer(path, token_ids, num_new)
    gc.collect()
    rows, all_ok = [], True
    for residency in RESIDENCIES:
        ok, row = compare(path, residency, token_ids, num_new, plain)
        rows.append(row)
        all_ok &= ok
    notes = (
        "Plain: AutoModelForCausalLM, experts_implementation='eager', everything resident.",
        "Hits and misses count a (layer, expert) once a forward; shared experts are always resident and not counted.",
        "Paged in: bytes read, in the dtype of the checkpoint.",
    )
    report.add(Table("Exactness", COLUMNS, rows, notes))
    if not quick:
        report.write(results)
    console.print("[green]ok[/green]: paging changes nothing" if all_ok else "[red]DIFFERS[/red]: see the table")
    raise typer.Exit(0 if all_ok else 1)


if __name__ == "__main__":
    typer.run(main)
