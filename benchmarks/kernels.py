"""Which kernel multiplies tokens with experts in slots the fastest on this CPU, by shape, dtype and number of tokens.

python -m benchmarks.kernels            about 3 minutes on one core, 3 GB
python -m benchmarks.kernels --quick    a smoke run on a toy shape

ONEDNN_MAX_CPU_ISA=AVX512_CORE (or AVX2) before it has oneDNN do without bf16 arithmetic, as on an older machine;
torch's own loops and MKL do not look at it.
"""

from __future__ import annotations

import os
import statistics
import time
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import silu

from benchmarks.measure import alternate
from benchmarks.report import RESULTS, Report, Table, conditions, console
from pager.engine.experts import COPIED_PAIRS, KERNELS, SMALL_EXPERT_BYTES, run_slots

NUM_PICKS = 8
SHAPES = {"emo-tiny": (128, 32, 128), "emo-mini": (512, 256, 64), "emo-1b14b": (2048, 1024, 48)}
"""Hidden, expert intermediate, slots."""


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of which the median is taken.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Toy shape, two repeats, no file is written.")] = False,
) -> None:
    """Time every kernel in thread CPU time, and what pager.engine.experts would choose beside them."""
    torch.set_num_threads(1)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    isa = limit or "whatever the CPU has"
    name = f"kernels-{limit.lower()}" if limit else "kernels"
    report = Report(name, "microseconds of CPU time a layer", conditions(threads="1 of torch", oneDNN=isa))
    report.start()
    shapes = {"toy": (32, 16, 32)} if quick else SHAPES
    for name, shape in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            report.add(_table(name, shape, dtype, 2 if quick else rounds))
    if not quick:
        report.write(RESULTS)


@torch.inference_mode()
def _table(name: str, shape: tuple[int, int, int], dtype: torch.dtype, num_rounds: int) -> Table:
    hidden, intermediate, num_slots = shape
    module = SimpleNamespace(
        gate_up_proj=torch.randn(num_slots, 2 * intermediate, hidden).to(dtype),
        down_proj=torch.randn(num_slots, hidden, intermediate).to(dtype),
        _apply_gate=_apply_gate,
    )
    is_small = 3 * module.down_proj[0].nbytes <= SMALL_EXPERT_BYTES
    rows = []
    for num_used in (16, num_slots):
        for num_tokens in (1, 2, 8, 32):
            with console.status(f"{name}, {dtype}, {num_tokens} tokens, {num_used} experts"):
                found = _times(module, num_tokens, num_used, is_small, num_rounds)
            cells = [f"{found[kernel]:.0f}" if kernel in found else "-" for kernel in (*KERNELS, "chosen")]
            rows.append((f"{num_tokens} of {num_used} experts", *cells))
    title = f"{name}, {str(dtype).removeprefix('torch.')}"
    note = "- was not run: copies of large experts take gigabytes."
    return Table(title, ("tokens", *KERNELS, "chosen"), rows, (note,))


def _times(module: Any, num_tokens: int, num_used: int, is_small: bool, num_rounds: int) -> dict[str, float]:
    """Median microseconds of each kernel."""
    picks = torch.stack([torch.randperm(num_used)[:NUM_PICKS] for _ in range(num_tokens)]).int()
    hidden = torch.randn(num_tokens, module.down_proj.shape[1]).to(module.down_proj.dtype)
    args = (module, hidden, picks, torch.rand(num_tokens, NUM_PICKS).to(hidden.dtype))
    fits = is_small and picks.numel() <= COPIED_PAIRS
    kernels = {name: kernel for name, kernel in KERNELS.items() if fits or "copied" not in name} | {"chosen": run_slots}
    num_calls = 10 if is_small else 1

    def run(kernel: Any) -> float:
        started_s = time.thread_time()
        for _ in range(num_calls):
            kernel(*args)
        return (time.thread_time() - started_s) / num_calls * 1e6

    for kernel in kernels.values():
        kernel(*args)
    times = alternate({name: partial(run, kernel) for name, kernel in kernels.items()}, num_rounds)
    return {name: statistics.median(values) for name, values in times.items()}


def _apply_gate(inner: torch.Tensor) -> torch.Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return silu(gate) * up


if __name__ == "__main__":
    typer.run(main)
