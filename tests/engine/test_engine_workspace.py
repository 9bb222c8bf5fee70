"""What the plan sets aside to work with, against what torch allocates while the engine works as hard as it may."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.profiler import ProfilerActivity, profile
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from pager.engine import attention
from pager.engine.attention import KvStep, RowContexts
from pager.engine.engine import Engine
from pager.engine.interface import EngineLimits, Failure, StreamEvent
from pager.engine.kv import KvCache, kv_bytes_per_token, layers_by_config
from pager.engine.paged_model import PagedModel, load_paged_model, needs_of
from pager.engine.sampler import DRAWN_ROWS
from pager.engine.workspace import sorting_bytes
from pager.memory import Budgets
from pager.models.emo import EmoConfig, EmoForCausalLM
from pager.models.open_model import OpenModel
from pager.types import Count, ExpertPool, GenerateRequest, PoolPolicy, SamplingParams

pytestmark = pytest.mark.slow


MIB = 2**20
CONTEXT, ROWS = 768, 6
SIZES: dict[str, Any] = {
    "vocab_size": 3000,
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "emo": lambda: EmoForCausalLM(
        EmoConfig(**SIZES, intermediate_size=128, num_experts=17, num_shared_experts=1, num_experts_per_tok=6)
    ),
    "emo-small-experts": lambda: EmoForCausalLM(
        EmoConfig(**SIZES, intermediate_size=32, num_experts=65, num_shared_experts=1, num_experts_per_tok=3)
    ),
    "olmoe": lambda: OlmoeForCausalLM(
        OlmoeConfig(**SIZES, intermediate_size=128, num_experts=16, num_experts_per_tok=6)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, intermediate_size=512, num_local_experts=8, num_experts_per_tok=2)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, intermediate_size=128, num_local_experts=8, num_experts_per_tok=2, head_dim=64)
    ),
    "deepseek-v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": SIZES["num_attention_heads"]}, moe_intermediate_size=64,
            n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
            q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        )
    ),
    "qwen3-next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
            head_dim=32, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64,
            linear_value_head_dim=64, layer_types=["linear_attention", "full_attention"],
        )
    ),
    "granite-hybrid": lambda: GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **SIZES, intermediate_size=64, shared_intermediate_size=64, num_local_experts=8, num_experts_per_tok=2,
            mamba_n_heads=12, mamba_d_state=64, layer_types=["linear_attention", "full_attention"],
        )
    ),
    "qwen3-dense-layer": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, intermediate_size=1500, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4,
            head_dim=64, mlp_only_layers=[0],
        )
    ),
}  # fmt: skip
"""Different things are the widest in each: pairs, gathered weights, pairs, an expert's inside, keys with sinks, latent
keys, states, a dense layer."""

# Tokens of the prompt, and after it. An exact prompt and one with a given pool run in chunks where all experts fit.
WORK = {"exact": (CONTEXT - 1, 1), "whole-pool": (CONTEXT - 1, 1), "chunks": (CONTEXT - 1, 1), "decode": (400, 3)}


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made: Path = tmp_path_factory.mktemp("workspace") / request.param
    MODELS[request.param]().save_pretrained(made)
    return made


@pytest.fixture(params=["float32", "bfloat16"])
def paged(path: Path, request: pytest.FixtureRequest) -> Iterator[PagedModel]:
    """KV for ROWS whole contexts, and a slot for every expert."""
    opened = OpenModel.open(path, request.param)
    with opened.checkpoint:
        kv_memory = ROWS * CONTEXT * kv_bytes_per_token(attention.check_served(opened), opened.dtype)
    budgets = Budgets(expert_memory="100%", host_memory=0, kv_memory=kv_memory, max_running=ROWS)
    loaded = load_paged_model(path, dtype=request.param, budgets=budgets)
    yield loaded
    loaded.close()


def policy_of(work: str, paged: PagedModel) -> PoolPolicy:
    facts = paged.facts
    if work == "exact":
        return PoolPolicy()
    size = max(facts.top_k_per_layer) + 1
    if work == "whole-pool":
        return PoolPolicy(size=Count(size))
    fixed = ExpertPool(tuple(tuple(range(size)) if routed else () for routed in facts.routed_per_layer))
    return PoolPolicy(size=Count(size), fixed=fixed)


def run(paged: PagedModel, engine: Engine, work: str, events: list[StreamEvent]) -> None:
    num_tokens, num_new = WORK[work]
    sampling = SamplingParams(max_tokens=num_new, temperature=1.0, top_p=0.9, seed=1, ignore_eos=True)
    policy = policy_of(work, paged)
    for number in range(ROWS if work == "decode" else 1):
        prompt = tuple(torch.randint(2, 3000, (num_tokens,), generator=torch.Generator().manual_seed(number)).tolist())
        engine.submit(GenerateRequest(f"{work}-{number}", "t", prompt, sampling, policy))
    while engine.status().running + engine.status().waiting:
        engine.step()
    assert not [event for event in events if isinstance(event, Failure)]


def peak_bytes(what: Callable[[], None]) -> int:
    """The most that torch's allocator held at a time for it, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        what()
    result: Any = profiled.profiler
    events = [event for event in result.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_no_work_takes_more_than_the_plan_has_for_it(paged: PagedModel, path: Path) -> None:
    events: list[StreamEvent] = []
    engine = Engine(paged, Tokenizer(BPE()), EngineLimits(), sink=events.extend)
    opened = OpenModel.open(path, paged.dtype)
    with opened.checkpoint:
        needs = needs_of(opened, "cpu")
    # Made before, or once: the buffers to gather in, and the allocator's. Copies of small experts are made each time.
    copied = 256 * needs.expert_bytes * 2 // 3 if needs.expert_bytes <= 128 * 1024 else MIB
    copied += DRAWN_ROWS * sorting_bytes(SIZES["vocab_size"])
    counted = replace(needs.workspace, fixed_bytes=copied, gather_bytes=0).forward_bytes(ROWS, CONTEXT)
    assert counted <= paged.plan.workspace_bytes
    peaks = {}
    for work in WORK:
        run(paged, engine, work, events)  # what is made once is there
        peaks[work] = peak_bytes(partial(run, paged, engine, work, events))
    print(
        f"\n{path.name} {paged.dtype}: {counted / MIB:.2f} MiB",
        {work: round(peak / MIB, 2) for work, peak in peaks.items()},
    )
    assert max(peaks.values()) <= counted
    assert max(peaks.values()) > counted / 4, "the count is far from what is used"


def attend_five(gather_tokens: int) -> torch.Tensor:
    """The attention of five rows over 80 tokens each."""
    generator = torch.Generator().manual_seed(0)
    layers = layers_by_config(MixtralConfig(**SIZES))
    cache = KvCache(layers, 64, torch.float32, torch.device("cpu"), gather_tokens=gather_tokens)
    for held in (*cache.k, *cache.v):
        held.normal_(generator=generator)
    layer = torch.nn.Module()
    object.__setattr__(layer, "layer_idx", 1)  # as a module's plain attribute
    rows, context = 5, 80
    query = torch.randn(rows, 6, 1, 32, generator=generator)
    key, value = torch.randn(2, rows, 2, 1, 32, generator=generator)
    read_BC = torch.stack([torch.randperm(64 * 16, generator=generator)[:context] for _ in range(rows)])
    positions_B1 = torch.randint(0, context, (rows, 1), generator=generator)
    seen = RowContexts(read_BC, positions_B1, torch.float32, is_full=False)
    output, _ = attention.attend(layer, query, key, value, None, kv_step=KvStep(cache, read_BC[:, -1], seen))
    return output


@pytest.mark.parametrize("most", [80, 170, 399])
def test_a_context_gathered_in_parts_is_the_same(most: int) -> None:
    torch.testing.assert_close(attend_five(most), attend_five(400), rtol=0, atol=0)


def test_an_engine_runs_no_more_at_a_time_than_the_plan_has_memory_for(path: Path) -> None:
    budgets = Budgets(expert_memory="100%", host_memory=0, max_running=2)
    paged = load_paged_model(path, dtype="float32", budgets=budgets)
    engine = Engine(paged, Tokenizer(BPE()), EngineLimits(max_running=5), sink=lambda _: None)
    for number in range(4):
        sampling = SamplingParams(max_tokens=4, ignore_eos=True)
        engine.submit(GenerateRequest(str(number), "t", (5, 6, 7), sampling, PoolPolicy()))
    seen = set()
    while engine.status().running + engine.status().waiting:
        engine.step()
        seen.add(engine.status().running)
    assert max(seen) == 2
    paged.close()


STEPS_OF_BUFFERS = """
import ctypes, resource
from pager.engine.workspace import return_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
MIB = 2**20

def run(num_buffers):
    buffers = [libc.malloc(MIB) for _ in range(num_buffers)]
    for buffer in buffers:
        ctypes.memset(buffer, 1, MIB)
    for buffer in buffers:
        libc.free(buffer)

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // MIB

return_freed_memory()
before_mib = resident_mib()
run(14)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    run(14)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
run(100)
print(resident_mib() - before_mib)
"""


def test_what_steps_take_anew_stays_with_the_process_up_to_what_the_plan_has_for_it() -> None:
    command = [sys.executable, "-c", STEPS_OF_BUFFERS]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    num_faults, kept_mib = map(int, ran.stdout.split())
    assert num_faults < 14 * MIB // resource.getpagesize()  # in ten steps, as many as one takes pages
    assert kept_mib < 32


STEPS_BESIDE_WHAT_LASTS = (
    STEPS_OF_BUFFERS.split("return_freed_memory()\n")[0]
    + """
import threading

def steps():
    return_freed_memory()
    lasting = []
    for _ in range(64):  # at some of these sizes, a step's buffers go beyond a heap of a thread's own arena
        lasting.append(libc.malloc(MIB))
        run(14)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run(14)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)

found = []
thread = threading.Thread(target=steps)
thread.start()
thread.join()
print(max(found))
"""
)


def test_what_steps_take_anew_stays_however_much_lasts_beside_it() -> None:
    """In a thread beside others, and in a process that is started as workers are: with what `pager.cluster` sets."""
    start = "import os, sys, pager.cluster; os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", start, STEPS_BESIDE_WHAT_LASTS]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
    assert int(ran.stdout) < MIB // resource.getpagesize()


PRODUCTS = """
import sys
import pager.engine
import torch
from pathlib import Path
from pager.engine.workspace import limit_kernels
from pager.memory import Budgets, Machine, Needs, Workspace, plan
from pager.types import RoutingFacts

def own_bytes():  # not those of libraries, which are mapped from their files
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

MIB, num_mib, num_rows = 2**20, int(sys.argv[1]), int(sys.argv[2])
needs = Needs(MIB, MIB, RoutingFacts((4,), (0,), (1,)), 1024, 64, 0, Workspace(kernel_bytes=num_mib * MIB))
limit_kernels(plan(needs, Budgets(), Machine.detect("cpu")))
torch.set_num_threads(1)
weights_ND, rows_TD = (torch.randn(size, 128, dtype=torch.bfloat16) for size in (512, 1024))
torch.nn.functional.linear(rows_TD[:2], weights_ND)  # with it comes what oneDNN takes by itself
for _ in range(2):
    before = own_bytes()
    print("pass", file=sys.stderr, flush=True)
    for rows in range(3, 3 + num_rows):
        torch.nn.functional.linear(rows_TD[:rows], weights_ND)
    print((own_bytes() - before) // MIB, file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(("num_mib", "num_rows", "are_kept"), [(512, 600, True), (32, 200, False)])
def test_kernels_of_half_precision_are_kept_within_their_part_of_the_plan(
    num_mib: int, num_rows: int, are_kept: bool
) -> None:
    """oneDNN itself says, for each product of each pass, whether it had the kernel."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    ran = subprocess.run(
        [sys.executable, "-c", PRODUCTS, str(num_mib), str(num_rows)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env=environment | {"ONEDNN_VERBOSE": "profile_create"},
    )
    grown_mib = [int(line) for line in ran.stderr.split("\n") if line.isdigit()]
    made = ran.stdout.count("create:cache_miss")
    if not made:
        pytest.skip("this processor multiplies in bfloat16 without oneDNN's kernels")
    assert made <= 1 + num_rows if are_kept else made > 3 * num_rows // 2
    assert sum(grown_mib) <= num_mib * 5 // 4
