"""Every kernel against the sum written out, on shapes that choose each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from pager.engine.experts import (
    COPIED_PAIRS,
    KERNELS,
    SMALL_EXPERT_BYTES,
    TURNED_ROWS,
    QuantisedSlabs,
    run_slots,
    sorted_pairs,
)
from pager.engine.paged_model import PagedModel, _without_onednn, is_faster_without_onednn, load_paged_model
from pager.models.emo import EmoConfig, EmoExperts
from pager.store.pack_format import KINDS, RecordFormat
from pager.types import ExpertShape, PoolPolicy
from tests.engine.conftest import CHECKPOINT

NUM_SLOTS, NUM_PICKS = 40, 4


def apply_gate(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return silu(gate) * up


def slab(hidden: int, intermediate: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return SimpleNamespace(
        gate_up_proj=(torch.randn(NUM_SLOTS, 2 * intermediate, hidden) * hidden**-0.5).to(dtype),
        down_proj=(torch.randn(NUM_SLOTS, hidden, intermediate) * intermediate**-0.5).to(dtype),
        _apply_gate=apply_gate,
    )


def inputs(num_tokens: int, hidden: int, dtype: torch.dtype, num_used: int = NUM_SLOTS) -> tuple[Tensor, ...]:
    torch.manual_seed(num_tokens)
    picks = [torch.randperm(num_used)[:NUM_PICKS] for _ in range(num_tokens)]
    return torch.randn(num_tokens, hidden).to(dtype), torch.stack(picks).int(), torch.rand(num_tokens, NUM_PICKS)


def written_out(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    gate_up, down = module.gate_up_proj.double(), module.down_proj.double()
    inner_TKF = apply_gate(torch.einsum("td,tkfd->tkf", hidden_TD.double(), gate_up[slot_TK]))
    return torch.einsum("tkf,tkdf,tk->td", inner_TKF, down[slot_TK], weights_TK.double())


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 33])
@pytest.mark.parametrize("name", KERNELS)
def test_each_kernel_is_the_weighted_sum(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    module, args = slab(48, 24, dtype), inputs(num_tokens, 48, dtype)
    out_TD = KERNELS[name](module, *args)
    assert out_TD.dtype == dtype
    torch.testing.assert_close(out_TD.double(), written_out(module, *args), rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_tokens", "num_used"), [(1, 40), (3, 40), (20, 6), (COPIED_PAIRS, 40), (1500, 40)])
@pytest.mark.parametrize(("hidden", "intermediate"), [(48, 24), (256, 192)], ids=["small", "large"])
def test_whatever_is_chosen_is_the_weighted_sum(
    hidden: int, intermediate: int, num_tokens: int, num_used: int, dtype: torch.dtype
) -> None:
    module, args = slab(hidden, intermediate, dtype), inputs(num_tokens, hidden, dtype, num_used)
    assert (3 * module.down_proj[0].nbytes > SMALL_EXPERT_BYTES) == (hidden == 256)
    out_TD = run_slots(module, *args)
    torch.testing.assert_close(out_TD.double(), written_out(module, *args), rtol=0, atol=TOLERANCES[dtype])


def sorted_inputs(num_tokens: int, hidden: int) -> tuple[Tensor, ...]:
    hidden_TD, slot_TK, weights_TK = inputs(num_tokens, hidden, torch.bfloat16)
    return hidden_TD, slot_TK, weights_TK.bfloat16()


def test_experts_with_few_tokens_are_gated_together() -> None:
    module, args = slab(256, 192, torch.bfloat16), sorted_inputs(8, 256)
    gated: list[int] = []

    def count_rows(inner: Tensor) -> Tensor:
        gated.append(len(inner))
        return apply_gate(inner)

    module._apply_gate = count_rows
    run_slots(module, *args)
    num_experts = len(args[1].unique())
    assert num_experts > 16
    assert len(gated) == 1
    assert num_experts <= gated[0] <= 2 * args[1].numel()  # padded to a few numbers of rows


@pytest.mark.parametrize("num_tokens", sorted(TURNED_ROWS))
def test_rows_behind_large_matrices_give_the_same(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    module, (hidden_TD, _, weights_TK) = slab(256, 192, torch.bfloat16), sorted_inputs(num_tokens, 256)
    slot_TK = torch.arange(NUM_PICKS, dtype=torch.int32).expand(num_tokens, -1)
    monkeypatch.setattr("pager.engine.experts.LEAST_TURNED_BYTES", 2 * module.down_proj[0].nbytes)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        turned_TD = sorted_pairs(module, hidden_TD, slot_TK, weights_TK)
    shapes = [event.input_shapes for event in profiled.events() if event.name == "aten::mm"]
    assert shapes == NUM_PICKS * [[[384, 256], [256, num_tokens]], [[256, 192], [192, num_tokens]]]
    expected_TD = written_out(module, hidden_TD, slot_TK, weights_TK)
    torch.testing.assert_close(turned_TD.double(), expected_TD, rtol=0, atol=TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("num_tokens", [8, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_are_rounded_as_transformers_round_them(num_tokens: int, dtype: torch.dtype) -> None:
    """Each weighted output and the sum, to the bit. All picks of a token are the same expert."""
    module, (hidden_TD, slot_TK, weights_TK) = slab(256, 192, dtype), inputs(num_tokens, 256, dtype)
    slot_TK, weights_TK = slot_TK[:, :1].expand(-1, NUM_PICKS), weights_TK.to(dtype)
    output_TD = sorted_pairs(module, hidden_TD, slot_TK, torch.tensor([1, 0, 0, 0]).expand_as(slot_TK).to(dtype))
    expected_TD = (output_TD[:, None] * weights_TK[..., None]).sum(1)
    assert sorted_pairs(module, hidden_TD, slot_TK, weights_TK).equal(expected_TD)


@pytest.mark.parametrize("name", KERNELS)
def test_an_expert_that_gives_no_number_spoils_its_own_tokens_only(name: str) -> None:
    module, (hidden_TD, slot_TK, weights_TK) = slab(48, 24, torch.float32), inputs(9, 48, torch.float32, 12)
    clean_TD = KERNELS[name](module, hidden_TD, slot_TK, weights_TK)
    module.down_proj[3] = torch.nan
    spoilt_TD = KERNELS[name](module, hidden_TD, slot_TK, weights_TK)
    uses_it_T = (slot_TK == 3).any(-1)
    assert 0 < uses_it_T.sum() < len(uses_it_T)
    assert spoilt_TD[uses_it_T].isnan().all()
    assert torch.equal(spoilt_TD[~uses_it_T], clean_TD[~uses_it_T])


def test_off_the_cpu_nothing_is_fetched_from_the_device() -> None:
    """The meta device holds no values: whatever asks for one raises."""
    config = EmoConfig(hidden_size=64, intermediate_size=32, num_experts=NUM_SLOTS)
    with torch.device("meta"):
        module = EmoExperts(config, NUM_SLOTS).to(torch.bfloat16)
    args = [arg.to("meta") for arg in inputs(8, 64, torch.bfloat16)]
    assert run_slots(module, *args).shape == (8, 64)
    with pytest.raises(RuntimeError):
        args[1].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_quantised_experts_are_the_weighted_sum_of_what_they_stand_for(kind: str, num_tokens: int) -> None:
    dtype, plain = torch.bfloat16, slab(64, 32, torch.float32)
    record = RecordFormat.of(kind, dtype)
    shape = record.record(ExpertShape(hidden=64, intermediate=32))
    parts = [record.quantised([plain.gate_up_proj[slot], plain.down_proj[slot]]) for slot in range(NUM_SLOTS)]
    slabs = {name: torch.stack(part) for (name, _), part in zip(shape.named, zip(*parts, strict=True), strict=True)}
    stood_for = [record.matrices({name: slabs[name][slot] for name in slabs}) for slot in range(NUM_SLOTS)]
    plain.gate_up_proj, plain.down_proj = (torch.stack(each) for each in zip(*stood_for, strict=True))
    module = SimpleNamespace(_apply_gate=apply_gate, quantised=QuantisedSlabs(record, slabs))
    args = inputs(num_tokens, 64, dtype)
    out_TD = run_slots(module, *args)
    assert out_TD.dtype == dtype
    torch.testing.assert_close(out_TD.double(), written_out(plain, *args), rtol=0, atol=TOLERANCES[dtype])


class TestForwardsOfOneToken:
    @pytest.fixture
    def paged(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[PagedModel]:
        monkeypatch.setattr("pager.engine.paged_model.is_faster_without_onednn", lambda matrix: True)
        with closing(load_paged_model(CHECKPOINT, dtype=torch.bfloat16)) as paged:
            yield paged

    @torch.no_grad()
    @pytest.mark.parametrize("num_tokens", [1, 2])
    def test_they_alone_run_without_onednn(self, paged: PagedModel, num_tokens: int) -> None:
        seen: list[object] = []
        paged.model.lm_head.register_forward_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
        with paged.step([paged.routing(PoolPolicy())]):
            paged.model(torch.ones(1, num_tokens, dtype=torch.long))
        assert seen == [num_tokens > 1]
        assert torch.backends.mkldnn.enabled

    @torch.no_grad()
    def test_in_company_an_expert_with_one_token_does_too(self, paged: PagedModel) -> None:
        """Two tokens that share some of their experts."""
        seen: list[tuple[str, object]] = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append((func.__name__.split(".")[0], torch.backends.mkldnn.enabled))
                return func(*args, **(kwargs or {}))

        experts: Any = paged.model.get_submodule(paged.family.layers[0].experts)
        hidden_TD = torch.randn(2, paged.model.config.hidden_size, dtype=torch.bfloat16)
        module = SimpleNamespace(
            gate_up_proj=experts.gate_up_proj.zero_(),
            down_proj=experts.down_proj.zero_(),
            one_row=experts.one_row,
            _apply_gate=apply_gate,
        )
        watch: Any = Watch()  # type: ignore[no-untyped-call]
        with watch:
            sorted_pairs(module, hidden_TD, torch.tensor([[0, 1], [0, 2]], dtype=torch.int32), torch.rand(2, 2))
        assert {enabled for name, enabled in seen if name.startswith("addmv") or name == "mv"} == {False}
        assert {enabled for name, enabled in seen if name == "mm"} == {True}
        assert torch.backends.mkldnn.enabled

    @torch.no_grad()
    def test_one_that_fails_leaves_it_on(self, paged: PagedModel) -> None:
        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        paged.model.lm_head.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError), paged.step([paged.routing(PoolPolicy())]):
            paged.model(torch.ones(1, 1, dtype=torch.long))
        assert torch.backends.mkldnn.enabled

    def test_it_is_off_until_the_last_thread_is_done(self) -> None:
        with _without_onednn:
            with _without_onednn:
                assert not torch.backends.mkldnn.enabled
            assert not torch.backends.mkldnn.enabled
        assert torch.backends.mkldnn.enabled

    def test_it_is_tried_with_large_matrices_in_half_precision_alone(self) -> None:
        large = torch.ones(8192, 1024, dtype=torch.bfloat16)
        assert not is_faster_without_onednn(large.float())
        assert not is_faster_without_onednn(large[:4096])  # a processor's caches hold it
        assert is_faster_without_onednn(large) in (True, False)
        assert torch.backends.mkldnn.enabled
