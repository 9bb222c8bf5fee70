"""Experts in 8 and 4 bits: their bytes against torch's packer, and what torch's kernels make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pager.errors import ConfigError, UnsupportedModel
from pager.store.pack_format import GROUP, KINDS, MOST_ROWS, RecordFormat
from pager.types import ExpertShape

SHAPE = ExpertShape(hidden=128, intermediate=32)
HALF_A_STEP = {"int8": 0.51 / 127, "int4": 0.55 / 15}  # of the range of an output's weights, and the scale's rounding


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

    @pytest.mark.parametrize("num_rows", [1, 3, MOST_ROWS + 1])
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


def test_eight_bits_are_the_rounded_weights() -> None:
    record = RecordFormat.of("int8", torch.float32)
    steps = torch.randint(-127, 128, (2 * SHAPE.intermediate, SHAPE.hidden), generator=torch.Generator().manual_seed(3))
    steps[:, 0] = 127
    stored, scales, *_ = record.quantised([steps * 0.5, torch.zeros(SHAPE.shapes[1])])
    assert stored.view(torch.int8).equal(steps.to(torch.int8))
    assert scales.view(torch.float32).equal(torch.full((2 * SHAPE.intermediate,), 0.5))


class TestRefusals:
    def test_a_kind_that_is_none(self) -> None:
        with pytest.raises(ConfigError, match="cannot be packed as 'int3'; use int8 or int4"):
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
