"""What a worker says about the dtype that it is to compute in."""

from __future__ import annotations

import math

import pytest
import torch

from pager.cluster import loading

CPU = torch.device("cpu")


def test_a_processor_that_is_slow_in_half_precision_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both are really multiplied: what is called slow is moved instead."""
    monkeypatch.setattr(loading, "SLOW_PRODUCTS", 0.0)
    loading.warn_of_slow_products(torch.bfloat16, CPU)
    (said,) = caplog.messages
    assert "to multiply in bfloat16 as in float32" in said
    assert "--dtype float32" in said
    caplog.clear()
    loading.warn_of_slow_products(torch.float32, CPU)
    monkeypatch.setattr(loading, "SLOW_PRODUCTS", math.inf)
    loading.warn_of_slow_products(torch.bfloat16, CPU)
    assert caplog.messages == []
