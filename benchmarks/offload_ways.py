"""One way to run a model that does not fit, in a process of its own that `offload` starts and caps.

Legend: F expert intermediate, D hidden, E experts of a layer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import disk_offload, init_empty_weights
from accelerate.utils import offload_weight, save_offload_index
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.engine_run import fixed, load_engine, random_pools
from benchmarks.models import Decoded, decode_by_generate, endless
from benchmarks.prompts import prompts_of
from benchmarks.report import quieten
from pager.memory import Budgets, format_bytes
from pager.models.open_model import moe_blocks
from pager.types import PoolPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPE = torch.bfloat16
POOL = 0.125
PROMPT_TOKENS = 16
NUM_READERS = 4
EXPERTS = "model.layers.{}.mlp.experts"


def stack_experts(checkpoint: Path, folder: Path) -> None:
    """Each layer's experts as transformers has them in memory, gate_up [E, 2F, D] and down [E, D, F]: a folder a layer
    in accelerate's format, which is raw, so that it can be mapped too. Holds one tensor at a time.
    """
    files = {name: path for path in sorted(checkpoint.glob("*.safetensors")) for name in _names(path)}
    config = json.loads((checkpoint / "config.json").read_text())

    def read(layer: int, expert: int, part: str) -> torch.Tensor:
        name = f"{EXPERTS.format(layer)}.{expert}.{part}_proj.weight"
        with safe_open(files[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    for layer in range(config["num_hidden_layers"]):
        index: dict[str, Any] = {}
        (folder / str(layer)).mkdir(parents=True)
        for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            experts = range(config["num_experts"])
            stacked = torch.stack([torch.cat([read(layer, each, part) for part in parts]) for each in experts])
            index = offload_weight(stacked, name, folder / str(layer), index)
            del stacked
        save_offload_index(index, folder / str(layer))


def accelerated(checkpoint: Path, stacked: Path) -> PreTrainedModel:
    """The trunk in memory, the experts offloaded to disk by accelerate."""
    model = _without_experts(checkpoint)
    for layer, block in moe_blocks(model):
        disk_offload(block.experts, str(stacked / str(layer)), execution_device=torch.device("cpu"))
    return model


def mapped(checkpoint: Path, stacked: Path) -> PreTrainedModel:
    """The trunk in memory, the experts mapped from their files: the operating system pages."""
    model = _without_experts(checkpoint)
    for layer, block in moe_blocks(model):
        index = json.loads((stacked / str(layer) / "index.json").read_text())
        for name, entry in index.items():
            file, size = stacked / str(layer) / f"{name}.dat", torch.Size(entry["shape"])
            memory = torch.from_file(str(file), shared=True, size=size.numel(), dtype=DTYPE)
            setattr(block.experts, name, torch.nn.Parameter(memory.view(size), requires_grad=False))
    return model


def run_transformers(model: PreTrainedModel, prompt: list[int], num_steps: int) -> tuple[float, Decoded, str]:
    # The implementation that touches only the experts that tokens picked.
    model.set_experts_implementation("eager")
    started_s = time.perf_counter()
    ended_s: list[float] = []
    decoded = decode_by_generate(endless(model), [prompt], num_steps, lambda: ended_s.append(time.perf_counter()))
    return ended_s[0] - started_s, decoded, "-"


def run_engine(checkpoint: Path, prompt: list[int], num_steps: int, *, pooled: bool) -> tuple[float, Decoded, str]:
    """With as many slots as the planner finds room for under the cap."""
    budgets = Budgets(expert_memory=None, host_memory=0, max_running=1)
    with ExitStack() as opened:
        engine = opened.enter_context(load_engine(checkpoint, DTYPE, budgets, NUM_READERS))
        policy = fixed(random_pools(engine.paged.facts, POOL, 1)[0]) if pooled else PoolPolicy()
        first_token_s, _ = engine.first_token(prompt, policy)
        plan = engine.paged.plan
        decoded = engine.decoder(policy)([prompt], num_steps)
        return first_token_s, decoded, f"{plan.num_slots / plan.num_routed:.1%}, {format_bytes(plan.slot_bytes)}"


def _without_experts(checkpoint: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(checkpoint)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    trunk: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            trunk |= {name: file.get_tensor(name).clone() for name in _names(path) if ".mlp.experts." not in name}
    model.load_state_dict(trunk, strict=False, assign=True)
    return model.eval()


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def main() -> None:
    """`WAY CHECKPOINT STACKED STEPS`: prints one line of JSON."""
    quieten()
    way, checkpoint, stacked, num_steps = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    prompt = prompts_of(checkpoint, 1, PROMPT_TOKENS)[0]
    ways: dict[str, Callable[[], tuple[float, Decoded, str]]] = {
        "pooled": lambda: run_engine(checkpoint, prompt, num_steps, pooled=True),
        "exact": lambda: run_engine(checkpoint, prompt, num_steps, pooled=False),
        "accelerate": lambda: run_transformers(accelerated(checkpoint, stacked), prompt, num_steps),
        "mapped": lambda: run_transformers(mapped(checkpoint, stacked), prompt, num_steps),
    }
    first_token_s, decoded, slots = ways[way]()
    print(json.dumps({"first_token_s": first_token_s, "rate": decoded.rate, "slots": slots}))


if __name__ == "__main__":
    main()
