"""How FP8 blocks are decoded where a weight ends within one, or lies within one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import FineGrainedFP8Config

from pager.models.layout import _Fp8Dequantize


@pytest.mark.parametrize(
    ("shape", "block"), [((256, 128), 128), ((192, 128), 128), ((576, 200), 128), ((64, 96), 128), ((64, 96), 2**40)]
)
def test_each_block_keeps_its_own_scale(shape: tuple[int, int], block: int) -> None:
    """Among them 192 rows, which transformers would take for two blocks of 96; and blocks as large as no memory."""
    config = FineGrainedFP8Config(weight_block_size=(block, block), dequantize=True)
    draws = torch.Generator().manual_seed(0)
    stored = torch.randn(shape, generator=draws).to(torch.float8_e4m3fn)
    scales = torch.rand(*(-(-size // block) for size in shape), generator=draws)
    rows, columns = (torch.arange(size) // block for size in shape)
    decoded = _Fp8Dequantize(SimpleNamespace(quantization_config=config))._dequantize_one(stored, scales, torch.float32)
    assert decoded.equal(stored.float() * scales[rows][:, columns])
