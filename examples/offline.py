"""Generate with a model whose experts do not all fit into memory, in this process: exact, then within a pool.

Run it from the repository: `python examples/offline.py [MODEL]`. It needs `pip install .` and no service.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import pager
from pager.memory import format_bytes

MODEL = Path(__file__).parents[1] / "models" / "emo-tiny"
PROMPT = "-- Which team has more than 20 points?\nSELECT TEAM FROM table WHERE"


def main(model: str | Path = MODEL) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    for title, pool_size in (("exact: every expert that the gates want", None), ("a pool of 12.5 %", "12.5%")):
        with pager.load_model(model, expert_memory="25%", pool_size=pool_size) as paged, torch.inference_mode():
            output = paged.generate(**prompt, max_new_tokens=32, do_sample=False)
            stats = paged.expert_paging.pager.stats()
        print(f"{title}\n{tokenizer.decode(output[0])}")
        print(
            f"paged {format_bytes(stats.paging.bytes_from_disk)} into {format_bytes(stats.capacity_bytes)} of slots: "
            f"{stats.paging.experts_hit} hits, {stats.paging.experts_missed} misses\n"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
