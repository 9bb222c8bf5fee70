"""Decode steps that are recorded and replayed, on a CPU.

Two stand-ins for a GPU. `OpGraph` is a graph of torch's operations: it holds the tensors that a step worked on and
works on them again, without any of the step's Python. The meta device has shapes and no values: what asks it for one
raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pager.engine import decoding, experts
from pager.engine.attention import layers_of
from pager.engine.decoding import device_step
from pager.engine.kv import BlockPool, KvCache
from pager.engine.paged_model import PagedModel, load_paged_model
from pager.engine.runner import STEPS_BEFORE_CAPTURE, DecodeBatch, ModelRunner, RowStart, Step
from pager.engine.sampler import Draw, Sampler
from pager.models.emo import EmoConfig, EmoForCausalLM
from pager.models.open_model import moe_blocks
from pager.pools.step import StepRouting
from pager.types import Count, DriftAction, DriftPolicy, ExpertPool, Full, PoolPolicy, SamplingParams
from tests.support.experts import load_pools

SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8, "seed": 5}


def tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class OpGraph(TorchDispatchMode):
    """The operations of a step. As with a CUDA graph, recording them leaves everything as it was."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ops: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for position, argument in enumerate(op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[position] if position < len(args) else kwargs.get(argument.name)
                for storage in (tensor.untyped_storage() for tensor in tensors(given)):
                    self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = op(*args, **kwargs)
        self._ops.append((op, args, kwargs, result))
        return result

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.inference_mode()
    def replay(self) -> None:
        for op, args, kwargs, result in self._ops:
            for then, now in zip(tensors(result), tensors(op(*args, **kwargs)), strict=True):
                if now.untyped_storage().data_ptr() != then.untyped_storage().data_ptr():
                    then.copy_(now)


class OpCapture:
    """What `capture_on` gives for a GPU."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0
        self.error: Exception | None = None

    def __call__(self, step: Step) -> Step:
        graph = OpGraph()
        with graph:
            result = step()
        graph.undo()
        self.num_captured += 1
        if self.error is not None:
            raise self.error

        def replay() -> Tensor:
            self.num_replayed += 1
            with _disable_current_modes():
                graph.replay()
            return result

        return replay


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> OpCapture:
    """Engines made from now on record their steps, with a GPU's kernel."""
    made = OpCapture()
    monkeypatch.setattr(decoding, "capture_on", lambda device: made)
    monkeypatch.setattr(experts, "run_slots", experts.grouped)
    return made


def run_story(driver: Any, random_prompt: Any, random_pool: Any) -> list[tuple[list[int], float | None]]:
    """Rows with different pools that join and leave, and contexts that grow from 50 tokens to 200."""
    ids = [
        driver.submit(random_prompt(1, 50), PoolPolicy(fixed=random_pool(1)), max_tokens=150),
        driver.submit(random_prompt(2, 7), PoolPolicy(Count(4)), max_tokens=60, **SAMPLED),
    ]
    for count in (25, 20):
        for _ in range(count):
            driver.engine.step()
        ids.append(
            driver.submit(random_prompt(count, 30), PoolPolicy(Count(3)), max_tokens=50, temperature=1.0, seed=1)
        )
    driver.finish()
    driver.assert_nothing_held()
    return [(driver.tokens(each), driver.usage(each).out_of_pool_mass) for each in ids]


@pytest.mark.slow
def test_replayed_steps_say_what_eager_ones_say(
    make_driver: Any, random_prompt: Any, random_pool: Any, request: pytest.FixtureRequest
) -> None:
    eager = run_story(make_driver(60), random_prompt, random_pool)
    capture = request.getfixturevalue("capture")
    driver = make_driver(60)
    replayed = run_story(driver, random_prompt, random_pool)
    assert [tokens for tokens, _ in replayed] == [tokens for tokens, _ in eager]
    assert [mass for _, mass in replayed] == pytest.approx([mass for _, mass in eager], rel=1e-4)
    assert all(mass for _, mass in eager)
    num_forwards = driver.engine.status().num_decode_forwards
    num_eager = num_forwards - capture.num_replayed
    assert capture.num_captured >= 8, "a graph for every group and every context it grew to"
    assert num_eager < num_forwards / 3


def test_what_others_page_in_and_out_leaves_a_graph_alone(
    make_driver: Any, random_prompt: Any, random_pool: Any, request: pytest.FixtureRequest
) -> None:
    alone = make_driver(60)
    expected = alone.submit(random_prompt(1, 4), PoolPolicy(fixed=random_pool(1)), max_tokens=59)
    alone.finish()
    capture = request.getfixturevalue("capture")
    driver = make_driver(26)
    stream = driver.submit(random_prompt(1, 4), PoolPolicy(fixed=random_pool(1)), max_tokens=59)
    while capture.num_captured == 0:
        driver.engine.step()
    num_evicted = driver.paged.pager.stats().evictions
    for number in range(2, 8):
        other = driver.submit(random_prompt(number, 20), PoolPolicy(fixed=random_pool(number)), max_tokens=1)
        while other not in driver.chunks:
            driver.engine.step()
    assert driver.paged.pager.stats().evictions > num_evicted + 20
    driver.finish()
    assert driver.tokens(stream) == alone.tokens(expected)
    assert capture.num_captured == 1
    assert capture.num_replayed == 59 - 1 - STEPS_BEFORE_CAPTURE


def test_a_replayed_step_is_its_replay_and_nothing_else(
    make_driver: Any, random_prompt: Any, random_pool: Any, capture: OpCapture
) -> None:
    """On a GPU a replay works in the graph's own memory. Of the rest nothing makes a tensor."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(op)
            return op(*args, **(kwargs or {}))

    driver = make_driver(60)
    load_pools(driver.paged.pager, *(random_pool(number) for number in (1, 2, 3)))
    for number in (1, 2):
        driver.submit(random_prompt(number, 4), PoolPolicy(fixed=random_pool(number)), max_tokens=50)
    while capture.num_captured == 0:
        driver.engine.step()
    seen: list[Any] = []
    with Seen():  # type: ignore[no-untyped-call]
        for _ in range(30):
            driver.engine.step()
        assert capture.num_replayed == 31
        fetching = {torch.ops.aten.resolve_conj.default, torch.ops.aten.resolve_neg.default}
        assert set(seen) == fetching, "views, that a list is made of"
        driver.submit(random_prompt(3, 4), PoolPolicy(fixed=random_pool(3)), max_tokens=5)
        driver.engine.step()
        driver.engine.step()
        assert len(set(seen)) > 20, "what runs eagerly is seen"


@pytest.mark.slow
def test_a_step_leaves_no_memory_behind(make_driver: Any, random_prompt: Any, random_pool: Any) -> None:
    driver = make_driver(60)
    load_pools(driver.paged.pager, *(random_pool(number) for number in (1, 2)))
    for number in (1, 2):
        driver.submit(random_prompt(number, 4), PoolPolicy(fixed=random_pool(number)), max_tokens=50, **SAMPLED)
    for _ in range(6):
        driver.engine.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(20):
            driver.engine.step()
    sizes = [event.self_cpu_memory_usage for event in profiled.events()]
    assert sum(size for size in sizes if size > 0) > 10**5, "its work is seen"
    assert sum(sizes) == 0


@pytest.mark.parametrize(
    "policy",
    [
        PoolPolicy(Full()),
        PoolPolicy(Count(4), drift=DriftPolicy(action=DriftAction.EXACT, threshold=0.9, window=16)),
    ],
    ids=["exact", "drifting"],
)
def test_steps_that_ask_the_device_are_not_recorded(
    make_driver: Any, random_prompt: Any, capture: OpCapture, policy: PoolPolicy
) -> None:
    driver = make_driver(60)
    answer = driver.submit(random_prompt(1, 4), policy, max_tokens=20)
    driver.finish()
    assert len(driver.tokens(answer)) == 20
    assert capture.num_captured == 0


def test_a_group_that_soon_changes_is_not_recorded(make_driver: Any, random_prompt: Any, capture: OpCapture) -> None:
    driver = make_driver(60)
    for number in range(4):
        driver.submit(random_prompt(number, 4), PoolPolicy(Count(3)), max_tokens=1 + STEPS_BEFORE_CAPTURE)
        driver.finish()
    assert capture.num_captured == 0


def test_what_can_not_be_recorded_runs_eagerly_and_says_so_once(
    make_driver: Any,
    random_prompt: Any,
    random_pool: Any,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    eager = run_story(make_driver(60), random_prompt, random_pool)
    capture = request.getfixturevalue("capture")
    capture.error = RuntimeError("the device has no graphs")
    with caplog.at_level(logging.WARNING):
        tried = run_story(make_driver(60), random_prompt, random_pool)
    assert [tokens for tokens, _ in tried] == [tokens for tokens, _ in eager]
    assert [mass for _, mass in tried] == pytest.approx([mass for _, mass in eager], rel=1e-4)
    assert (capture.num_captured, capture.num_replayed) == (1, 0)
    said = [record for record in caplog.records if "the device has no graphs" in record.message]
    assert [record.levelno for record in said] == [logging.WARNING]


# On the meta device.

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": torch.bfloat16,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "emo": lambda: EmoForCausalLM(EmoConfig(**SMALL, num_experts=8, num_shared_experts=1)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SMALL, num_experts=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=8)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_experts=8, moe_intermediate_size=16, head_dim=8, mlp_only_layers=[1])
    ),
}


class OneDevice(TorchDispatchMode):
    """Raises where an operation takes tensors of one device and gives, or changes, those of another."""

    num_ops = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.num_ops += 1
        devices = {tensor.device.type for tensor in tensors((args, kwargs, result))}
        assert devices <= {"meta"}, f"{op} waits for a copy between {devices}"
        return result


@pytest.fixture(params=MODELS)
def paged_on_meta(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PagedModel]:
    """Its pager fills slots of the CPU; what the model computes with lies on the meta device."""
    MODELS[request.param]().to(torch.bfloat16).save_pretrained(tmp_path)
    paged = load_paged_model(tmp_path)
    paged.device = torch.device("meta")
    paged.model.to("meta")
    for _, block in moe_blocks(paged.model):
        held = block.experts
        object.__setattr__(held, "gate_up_proj", held.gate_up_proj.to("meta"))
        object.__setattr__(held, "down_proj", held.down_proj.to("meta"))
        held.paging._slot_of_E = held.paging._slot_of_E.to("meta")
    yield paged
    paged.close()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_the_step_asks_the_device_for_nothing(
    paged_on_meta: PagedModel, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged, meta = paged_on_meta, torch.device("meta")
    blocks = BlockPool(32)
    cache = KvCache(layers_of(paged.config), 32, torch.bfloat16, meta)
    runner = ModelRunner(paged.model, cache, meta)
    documents, starts, draws = [], [], []
    for row in range(num_rows):
        routed = paged.facts.routed_per_layer
        policy = PoolPolicy(fixed=ExpertPool(tuple((row, row + 2, row + 4) if count else () for count in routed)))
        documents.append(paged.routing(policy, lease=paged.reserve(policy)))
        table = blocks.allocate(100)
        assert table is not None
        starts.append(RowStart(table, 1, 20 * row))
        draws.append(Draw(SamplingParams(**[{}, {"temperature": 1.0}, SAMPLED][row])))
    batch, sampler = DecodeBatch(starts, meta), Sampler(draws, meta)
    # Numbers of the host would be copied to a GPU; on the meta device there is nothing to copy.
    monkeypatch.setattr(torch, "tensor", None)
    step = StepRouting(documents)
    for _ in range(2):
        with paged.running(step), OneDevice() as mode:  # type: ignore[no-untyped-call]
            assert step.is_steady
            token_B = device_step(runner, batch, sampler, runner.padded_context(batch))
        with pytest.raises(RuntimeError):
            token_B.tolist()
        assert mode.num_ops > 50
        batch.count_step()
