"""Experts in 8 and 4 bits: their bytes against torch's packer, and what torch's kernels make of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from pager.errors import ConfigError, UnsupportedModel
from pager.store.pack_format import (
    BLOCK,
    GROUP,
    KINDS,
    MOST_INT4_ROWS,
    MOST_ROWS,
    RecordFormat,
    decoded_fp8,
    decoded_int4,
    lies_in_blocks,
    product_fp8,
    quantise_fp8,
    quantise_int4,
)
from pager.types import ExpertShape

SHAPE = ExpertShape(hidden=128, intermediate=32)
HALF_A_STEP = {
    "int8": 0.51 / 127,
    "int4": 0.55 / 15,
    "fp8": 1 / 16,
}  # of the range of an output's weights, and the scale's rounding


def matrices(seed: int = 0) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws) for shape in SHAPE.shapes]


def parts_of(record: RecordFormat, made: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip((name for name, _ in record.record(SHAPE).named), record.quantised(made), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
class TestRecords:
    def test_an_expert_is_as_many_bytes_as_its_record_says(self, kind: str, dtype: torch.dtype) -> None:
        record = RecordFormat.of(kind, dtype)
        made = record.quantised(matrices())
        assert [tuple(part.shape) for part in made] == list(record.record(SHAPE).shapes)
        assert all(part.dtype == torch.uint8 for part in made)

    def test_no_weight_is_off_by_more_than_half_a_step(self, kind: str, dtype: torch.dtype) -> None:
        record, made = RecordFormat.of(kind, dtype), matrices()
        for matrix, decoded in zip(made, record.matrices(parts_of(record, made)), strict=True):
            assert decoded.dtype == dtype
            rounding = 2 * torch.finfo(dtype).eps * matrix.abs().max()
            spread = matrix.abs().amax(1, keepdim=True) * 2 if kind == "int4" else matrix.abs().amax(1, keepdim=True)
            assert ((decoded.float() - matrix).abs() <= spread * HALF_A_STEP[kind] + 2 * rounding).all()

    @pytest.mark.parametrize("num_rows", [1, 3, MOST_ROWS + 1, MOST_INT4_ROWS + 1])
    def test_a_product_is_that_with_the_decoded_matrix(self, kind: str, dtype: torch.dtype, num_rows: int) -> None:
        record, made = RecordFormat.of(kind, dtype), matrices()
        parts = parts_of(record, made)
        typed = record.views(parts)
        hidden = torch.randn(num_rows, SHAPE.hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = record.product(hidden, typed["gate_up_proj"], typed["gate_up_scales"])
        wanted = hidden.double() @ record.matrices(parts)[0].double().t()
        assert found.dtype == dtype
        tolerance = 2e-4 if dtype == torch.float32 else 0.25
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)

    def test_a_matrix_of_zeros_stays_zero(self, kind: str, dtype: torch.dtype) -> None:
        record = RecordFormat.of(kind, dtype)
        made = [torch.zeros(shape) for shape in SHAPE.shapes]
        assert not any(matrix.any() for matrix in record.matrices(parts_of(record, made)))


def test_four_bits_are_the_bytes_of_torchs_packer() -> None:
    record = RecordFormat.of("int4", torch.float32)
    steps = torch.randint(0, 16, (2 * SHAPE.intermediate, SHAPE.hidden), generator=torch.Generator().manual_seed(3))
    for group in steps.unflatten(1, (-1, GROUP)).flatten(0, 1):
        group[0], group[1] = 0, 15  # so that the least and the greatest weight of each group are steps 0 and 15
    steps = steps.int()
    packed = record.quantised([steps.float() - 8, torch.zeros(SHAPE.shapes[1])])[0]
    assert packed.equal(torch._convert_weight_to_int4pack_for_cpu(steps, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_are_decoded_to_what_torchs_kernel_computes_with(dtype: torch.dtype) -> None:
    if not lies_in_blocks():
        pytest.skip("this processor lays 4-bit matrices out in another way")
    weight_NK = torch.randn(192, 96, generator=torch.Generator().manual_seed(4))
    packed, scales = quantise_int4(weight_NK, dtype)
    by_kernel_KN = torch._weight_int4pack_mm_for_cpu(torch.eye(96, dtype=dtype), packed, GROUP, scales)
    decoded_BKO = decoded_int4(packed, scales)
    assert decoded_BKO.dtype == dtype
    decoded_KN = decoded_BKO.transpose(0, 1).flatten(1)
    torch.testing.assert_close(decoded_KN, by_kernel_KN, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize(("num_rows", "dtype"), [(MOST_INT4_ROWS + 1, torch.bfloat16), (1, torch.float32)])
def test_many_rows_in_four_bits_are_multiplied_with_the_decoded_matrix(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, dtype: torch.dtype
) -> None:
    """torch's kernel takes as long for each further row. In float32 it takes longer for one than decoding does."""
    if not lies_in_blocks():
        pytest.skip("this processor lays 4-bit matrices out in another way")
    record = RecordFormat.of("int4", dtype)
    typed = record.views(parts_of(record, matrices()))
    hidden = torch.randn(num_rows, SHAPE.hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    by_kernel = torch._weight_int4pack_mm_for_cpu(hidden, typed["gate_up_proj"], GROUP, typed["gate_up_scales"])
    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", None)
    found = record.product(hidden, typed["gate_up_proj"], typed["gate_up_scales"])
    torch.testing.assert_close(
        found.double(), by_kernel.double(), rtol=0, atol=2e-4 if dtype == torch.float32 else 0.25
    )


def test_eight_bits_are_the_rounded_weights() -> None:
    record = RecordFormat.of("int8", torch.float32)
    steps = torch.randint(-127, 128, (2 * SHAPE.intermediate, SHAPE.hidden), generator=torch.Generator().manual_seed(3))
    steps[:, 0] = 127
    stored, scales, *_ = record.quantised([steps * 0.5, torch.zeros(SHAPE.shapes[1])])
    assert stored.view(torch.int8).equal(steps.to(torch.int8))
    assert scales.view(torch.float32).equal(torch.full((2 * SHAPE.intermediate,), 0.5))


class TestFp8:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_every_number_decodes_as_torch_converts_it(self, dtype: torch.dtype) -> None:
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        finite = numbers.isfinite()
        rows = numbers.expand(3, -1).contiguous()
        scales = torch.tensor([[0.1234567, 3.9e-5]])
        wanted = (rows * scales.repeat_interleave(BLOCK, 1)).to(dtype)
        found = decoded_fp8(rows.to(torch.float8_e4m3fn).view(torch.int8), scales, dtype)
        assert found[:, finite].equal(wanted[:, finite])
        assert int(finite.sum()) == 254

    @pytest.mark.parametrize("shape", [(2 * BLOCK, BLOCK), (5 * BLOCK + 72, 2 * BLOCK + 8), (40, 24)])
    def test_blocks_have_the_scales_of_their_largest_weights(self, shape: tuple[int, int]) -> None:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        weight[:8] *= 1e-3
        weight[-BLOCK:] *= 1e-5
        stored, scales = quantise_fp8(weight, torch.float32)
        for row, column in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
            where = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
            assert scales[row, column] == weight[where].abs().max() / 448
            torch.testing.assert_close(
                stored[where].float() * scales[row, column], weight[where], rtol=1 / 16, atol=float(scales[row, column])
            )

    @pytest.mark.parametrize(  # no float16 is as small as 1e-30
        ("dtype", "size"), [(torch.bfloat16, 1e-30), *product((torch.bfloat16, torch.float16), (1.0, 1e4))]
    )
    def test_a_row_of_any_size_is_multiplied_as_precisely_as_with_the_decoded_matrix(
        self, dtype: torch.dtype, size: float
    ) -> None:
        draws = torch.Generator().manual_seed(6)
        weight = torch.randn(5 * BLOCK + 72, 3 * BLOCK + 8, generator=draws) * 0.02
        weight[BLOCK:] *= 1e-3
        stored, scales = quantise_fp8(weight, torch.float32)
        row = torch.randn(2, weight.shape[1], generator=draws)
        row[1] *= 0.1
        row = (row * size).to(dtype)
        wanted = row.double() @ decoded_fp8(stored.view(torch.int8), scales, torch.float32).double().t()
        found = product_fp8(row, stored.view(torch.int8), scales).double()
        for some, exact in zip(found.split(BLOCK, 1), wanted.split(BLOCK, 1), strict=True):
            assert ((some - exact).norm(dim=1) <= torch.finfo(dtype).eps * exact.norm(dim=1)).all()

    def test_a_row_of_zeros_gives_zeros_and_one_that_is_no_number_none(self) -> None:
        stored, scales = quantise_fp8(torch.ones(BLOCK, BLOCK), torch.float32)
        rows = torch.zeros(2, BLOCK, dtype=torch.bfloat16)
        rows[1, 3] = torch.nan
        zeros, spoilt = (product_fp8(row[None], stored.view(torch.int8), scales) for row in rows)
        assert not zeros.any()
        assert spoilt.isnan().all()

    def test_it_is_served_in_any_dtype(self) -> None:
        RecordFormat.of("fp8", torch.bfloat16).check_machine("cpu", torch.float32)


class TestRefusals:
    def test_a_kind_that_is_none(self) -> None:
        with pytest.raises(ConfigError, match="cannot be packed as 'int3'; use int8 or int4 or fp8"):
            RecordFormat.of("int3", torch.bfloat16)

    def test_another_dtype_than_that_of_the_scales(self) -> None:
        with pytest.raises(ConfigError, match="int8 for bfloat16 cannot be served as float32"):
            RecordFormat.of("int8", torch.bfloat16).check_machine("cpu", torch.float32)

    def test_a_gpu(self) -> None:
        with pytest.raises(UnsupportedModel, match="computed on a CPU only"):
            RecordFormat.of("int4", torch.bfloat16).check_machine("cuda", torch.bfloat16)

    def test_another_processors_layout(self) -> None:
        record = replace(RecordFormat.of("int4", torch.bfloat16), layout="0123456789abcdef", processor="AVX2")
        with pytest.raises(UnsupportedModel, match=r"packed as int4 for processors with AVX2.*pack the model again"):
            record.check_machine("cpu", torch.bfloat16)

    def test_experts_that_are_no_three_matrices(self) -> None:
        ungated = ExpertShape(hidden=64, intermediate=32, parameters=(("up_proj", (32, 64)), ("down_proj", (64, 32))))
        with pytest.raises(UnsupportedModel, match="experts of up_proj, down_proj cannot be packed as int8"):
            RecordFormat.of("int8", torch.bfloat16).record(ungated)

    def test_sizes_that_the_packer_does_not_take(self) -> None:
        with pytest.raises(UnsupportedModel, match=r"down_proj of 64 x 24 cannot be packed as int4.*--experts int8"):
            RecordFormat.of("int4", torch.bfloat16).record(ExpertShape(hidden=64, intermediate=24))
