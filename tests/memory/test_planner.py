from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pager.errors import BudgetError, ConfigError
from pager.memory import KV_BLOCK_TOKENS, Budgets, Machine, Needs, Workspace, describe, plan
from pager.types import RoutingFacts

MIB = 2**20


def needs(*, layers: int = 4, experts: int = 32, shared: int = 1, top_k: int = 7, context: int = 1024) -> Needs:
    facts = RoutingFacts((experts,) * layers, (shared,) * layers, (top_k,) * layers)
    return Needs(
        trunk_bytes=8 * MIB,
        expert_bytes=MIB,
        facts=facts,
        kv_bytes_per_token=4096,
        context_tokens=context,
        staging_bytes=4 * MIB if experts else 0,
        workspace=Workspace(
            token_bytes=8192, gather_bytes=1024, draw_bytes=65536, fixed_bytes=MIB, kernel_bytes=2 * MIB
        ),
    )


def machine(memory: int = 4096 * MIB, device: str = "cpu", host: int = 1024 * MIB) -> Machine:
    return Machine(memory, device, host)


def test_a_large_machine_holds_every_expert_and_eight_contexts() -> None:
    made = plan(needs(), Budgets(), machine())
    assert made.num_slots == made.num_routed == 4 * 31
    assert made.fully_resident
    assert made.resident_bytes == 4 * MIB
    assert made.kv_tokens == 8 * 1024
    assert made.host_records == 0


def test_kv_serves_no_more_sequences_than_may_run() -> None:
    assert plan(needs(), Budgets(max_running=2), machine()).kv_tokens == 2 * 1024


def test_share_is_of_the_routed_experts() -> None:
    assert plan(needs(), Budgets(expert_memory="25%"), machine()).num_slots == 31
    assert plan(needs(), Budgets(expert_memory=0.25), machine()).num_slots == 31


def test_bytes_round_down_to_whole_slots() -> None:
    made = plan(needs(), Budgets(expert_memory=10 * MIB + 12345), machine())
    assert (made.num_slots, made.slot_bytes) == (10, 10 * MIB)


def test_surplus_is_clipped_to_all_experts() -> None:
    assert plan(needs(), Budgets(expert_memory="1GiB"), machine()).num_slots == 124


def test_smallest_budget_is_one_tokens_experts_of_one_layer() -> None:
    assert plan(needs(), Budgets(expert_memory=7 * MIB), machine()).num_slots == 7
    with pytest.raises(BudgetError, match=rf"needs 7 of a layer at once: give at least {7 * MIB} bytes \(7.0 MiB\)"):
        plan(needs(), Budgets(expert_memory=7 * MIB - 1), machine())


@pytest.mark.parametrize("name", ["expert_memory", "kv_memory", "host_memory"])
def test_budget_beyond_the_machine_says_what_was_found(name: str) -> None:
    asked: dict[str, Any] = {name: "1TiB"}
    with pytest.raises(BudgetError, match=rf"{name} '1TiB' is 1024.0 GiB, more than the .* found in"):
        plan(needs(), Budgets(**asked), machine())


def test_budgets_that_fit_alone_but_not_together_are_refused() -> None:
    with pytest.raises(BudgetError, match="found in main memory"):
        plan(needs(), Budgets(expert_memory="100MiB", kv_memory="100MiB"), machine(128 * MIB))


def test_machine_too_small_for_the_model_is_refused() -> None:
    with pytest.raises(BudgetError, match="the model needs"):
        plan(needs(), Budgets(), machine(20 * MIB))


def test_kv_memory_below_one_short_sequence_is_refused() -> None:
    assert plan(needs(), Budgets(kv_memory=256 * 4096), machine()).kv_tokens == 256
    with pytest.raises(BudgetError, match="one sequence of 256"):
        plan(needs(), Budgets(kv_memory=255 * 4096), machine())


def test_short_context_needs_no_256_tokens() -> None:
    assert plan(needs(context=64), Budgets(kv_memory=64 * 4096), machine()).kv_tokens == 64


def test_host_tier_is_off_on_a_cpu_and_found_beside_a_gpu() -> None:
    assert plan(needs(), Budgets(), machine()).host_records == 0
    assert plan(needs(), Budgets(host_memory="50%"), machine()).host_records == 62
    assert plan(needs(), Budgets(), machine(device="cuda", host=64 * MIB)).host_records == 32
    assert plan(needs(), Budgets(host_memory=0), machine(device="cuda")).host_records == 0


def test_dense_model_has_no_slots() -> None:
    made = plan(needs(experts=0, shared=0, top_k=0), Budgets(expert_memory="1MiB"), machine())
    assert (made.num_slots, made.slot_bytes, made.staging_bytes) == (0, 0, 0)
    assert plan(needs(experts=0, shared=0, top_k=0), Budgets(), machine()).fully_resident


def test_what_is_no_size_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'lots' is not a size"):
        plan(needs(), Budgets(expert_memory="lots"), machine())


def test_workers_share_main_memory_but_not_gpus() -> None:
    assert machine(1000).shared_by(2).memory_bytes == 500
    assert machine(1000, "cuda").shared_by(2).memory_bytes == 1000


def test_working_memory_is_for_the_longest_prompt_and_the_fullest_step() -> None:
    assert Workspace(token_bytes=10**6, fixed_bytes=7).forward_bytes(1, 4096) == 7 + 4096 * 10**6  # all in one
    parts = Workspace(token_bytes=100, context_bytes=10)
    assert parts.forward_bytes(1, 2000) == 512 * 100 + 2000 * 10 + 512 * 2000 * 5  # the last part of a prompt
    assert Workspace(draw_bytes=30000).forward_bytes(64, 100) == 64 * (30000 + 100 * 32)  # every row draws
    beside = Workspace(token_bytes=10**6, keeps_step=True)
    assert beside.forward_bytes(4, 500) == 500 * 10**6 + 500 * 500 * 5 + 4 * (10**6 + 500 * 32)  # with a graph's step
    gathered = Workspace(gather_bytes=10**6)  # contexts of 16384 tokens at a time, or a longer one padded
    for rows, tokens, at_a_time in ((2, 100, 200), (64, 1024, 16384), (8, 20000, 20032)):
        bare = Workspace().forward_bytes(rows, tokens)
        assert gathered.forward_bytes(rows, tokens) == bare + at_a_time * 10**6


def test_prompts_run_beside_rows_as_far_as_the_memory_for_either_goes() -> None:
    wide = Workspace(
        token_bytes=10**6, mask_bytes=0
    )  # the longest prompt runs whole, in more than rows and a chunk take
    assert wide.beside_tokens(64, 4096) == 512
    narrow = Workspace(token_bytes=10**6, context_bytes=10**5, mask_bytes=0)
    have, rows = 1000 * 10**6, 100 * (10**6 + 1000 * 32)
    assert narrow.beside_tokens(1000, 1000) == 0, "the rows and the contexts take all of it"
    assert wide.beside_tokens(600, 1000) == (have - 600 * (10**6 + 1000 * 32)) // 10**6
    assert narrow.beside_tokens(100, 1000) == min(512, (have - 1000 * 10**5 - rows) // 10**6)
    drawing = Workspace(token_bytes=10**4, draw_bytes=10**6, mask_bytes=0)  # a draw comes when the layers have run
    assert drawing.beside_tokens(64, 100) == 512
    planned = plan(needs(), Budgets(kv_memory="4MiB"), machine(128 * MIB))
    assert planned.beside_tokens == needs().beside_tokens(planned.num_kv_blocks, planned.max_running)


def test_a_lone_prompt_runs_in_chunks_as_large_as_the_memory_for_prompts_allows() -> None:
    workspace = Workspace(token_bytes=10**6, context_bytes=10)
    assert workspace.chunk_tokens(16384) == 2048
    tight = Workspace(token_bytes=10**4, context_bytes=2000)  # what 2,000 tokens take leaves room for 1,088 of 10 kB
    assert tight.chunk_tokens(2000) == 1024
    assert Workspace(token_bytes=10, context_bytes=10**4).chunk_tokens(2000) == 512  # as much as there always is for
    maskless = Workspace(token_bytes=100, context_bytes=10, mask_bytes=0)
    assert maskless.forward_bytes(1, 2000) == 2000 * 100, "a chunk needs less than a whole prompt"
    planned = plan(needs(), Budgets(kv_memory="4MiB"), machine(128 * MIB))
    assert planned.chunk_tokens == needs().chunk_tokens(planned.num_kv_blocks)


def test_working_memory_is_in_the_plan_and_comes_out_of_the_slots() -> None:
    small = plan(needs(), Budgets(kv_memory="4MiB"), machine(128 * MIB))
    parts = (small.trunk_bytes, small.resident_bytes, small.slot_bytes, small.kv_bytes, small.staging_bytes)
    within = replace(needs(), workspace=needs().workspace.within(128 * MIB))
    assert small.workspace_bytes == within.workspace_bytes(small.num_kv_blocks, 32) > 8 * MIB
    assert small.device_bytes == small.total_bytes == sum(parts) + small.workspace_bytes + 2 * MIB
    assert 128 * MIB * 7 // 8 - small.total_bytes < MIB, "what is left holds no expert"
    fewer = plan(needs(), Budgets(kv_memory="4MiB", max_running=1), machine(128 * MIB))
    assert fewer.num_slots > small.num_slots


def test_working_memory_that_does_not_fit_is_named() -> None:
    budgets = Budgets(expert_memory="28MiB", kv_memory="1MiB", max_running=2000)
    with pytest.raises(BudgetError, match=r"256 tokens of KV, 6\.1 MiB to work with for 2000 requests.*or max_running"):
        plan(needs(), budgets, machine(50 * MIB))


def test_staging_and_host_tier_are_in_main_memory_beside_a_gpu() -> None:
    made = plan(needs(), Budgets(), machine(device="cuda", host=64 * MIB))
    assert made.total_bytes == made.device_bytes + 4 * MIB + 32 * MIB


def test_describe_and_dict_name_every_budget() -> None:
    made = plan(needs(), Budgets(expert_memory="25%"), machine())
    lines = describe(made)
    assert any("for the longest prompt, or a step of 32 requests" in line for line in lines)
    assert any("2.0 MiB that torch may compile" in line for line in lines)
    named = made.to_dict()
    assert (named["workspace_bytes"], named["kernel_bytes"]) == (made.workspace_bytes, 2 * MIB)
    assert "31 of 124 routed experts (25.0%), 31.0 MiB in slots of 1.0 MiB" in lines[2]
    assert made.to_dict()["total_bytes"] == made.total_bytes


sizes = st.none() | st.integers(1, 600 * MIB)


def test_workers_that_share_a_machine_plan_with_their_part_of_it() -> None:
    shared = plan(needs(), Budgets(num_sharing=2), machine(256 * MIB))
    assert shared == plan(needs(), Budgets(), machine(128 * MIB))


@given(
    layers=st.integers(1, 8),
    experts=st.integers(8, 64),
    shared=st.integers(0, 2),
    top_k=st.integers(1, 6),
    memory=st.integers(16 * MIB, 2048 * MIB),
    expert_memory=sizes | st.floats(0.001, 1),
    kv_memory=sizes,
    host_memory=sizes,
    max_running=st.integers(1, 64),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_a_plan_fits_the_machine_and_can_run_a_token(
    layers: int, experts: int, shared: int, top_k: int, memory: int, expert_memory: int | float | None,
    kv_memory: int | None, host_memory: int | None, max_running: int, device: str,
) -> None:  # fmt: skip
    wanted = needs(layers=layers, experts=experts, shared=shared, top_k=top_k)
    found = machine(memory, device, 256 * MIB)
    try:
        made = plan(wanted, Budgets(expert_memory, host_memory, kv_memory, max_running), found)
    except BudgetError:
        return
    assert top_k <= made.num_slots <= made.num_routed
    assert made.num_kv_blocks * KV_BLOCK_TOKENS >= 256
    assert made.device_bytes <= memory
    assert made.host_bytes <= 256 * MIB
    assert made.total_bytes <= memory or device == "cuda"
    if kv_memory is not None:
        assert made.kv_bytes <= kv_memory
    if isinstance(expert_memory, int):
        assert made.slot_bytes <= expert_memory


def test_a_small_machine_spends_its_memory_on_experts() -> None:
    """On OLMoE's shape with 4 layers, in trunk + a quarter of the experts + 0.5 GiB, less an interpreter's 292 MiB."""
    facts = RoutingFacts((64,) * 4, (0,) * 4, (8,) * 4)
    workspace = Workspace(
        token_bytes=94 * 1024, gather_bytes=8192, context_bytes=16384, draw_bytes=4569 * 1024, fixed_bytes=42 * MIB,
        kernel_bytes=192 * MIB,
    )  # fmt: skip
    olmoe = Needs(522 * MIB, 12 * MIB, facts, 32768, 4096, 0, workspace)
    small = plan(olmoe, Budgets(), machine(1510 * MIB))
    assert small.num_slots >= 40, "a pool of 12.5 % takes 32"
    assert small.gather_tokens < 16384
    assert small.kernel_bytes == 32 * MIB
    capped = plan(olmoe, Budgets(), replace(machine(1510 * MIB), is_capped=True))
    assert capped.num_slots >= small.num_slots + 5, "no stranger takes memory in a control group"
    large = plan(olmoe, Budgets(), machine(16 * 1024 * MIB))
    assert (large.kernel_bytes, large.gather_tokens) == (192 * MIB, 16384)
    on_gpu = plan(olmoe, Budgets(), machine(1510 * MIB, "cuda"))
    assert on_gpu.kernel_bytes == 192 * MIB
