"""Weights in parts: what they decode to, against the formats' own packages and definitions, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from pager.models.formats import _VARIANTS, Parts
from tests.support.quantised import (
    awq_parts,
    gptq_parts,
    modelopt_parts,
    number_config,
    number_parts,
    nvfp4_decoded,
    nvfp4_parts,
)

WEIGHT_OI = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4}


NVFP4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
    }}},
}  # fmt: skip
MODELOPT: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def parts_of(config: Mapping[str, Any]) -> Parts:
    found = _VARIANTS[config["quant_method"]](config)
    assert found is not None
    return found


def stored(config: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    if config["quant_method"] == "awq":
        return awq_parts(WEIGHT_OI)
    return gptq_parts(WEIGHT_OI, config["bits"], config.get("checkpoint_format", "gptq"), in_order=False)


@pytest.mark.parametrize("config", [AWQ, *({**GPTQ, "bits": bits} for bits in (2, 4, 8))])
def test_what_is_decoded_is_what_was_stored(config: dict[str, Any]) -> None:
    tensors, expected = stored(config)
    decode = parts_of(config).decode
    assert decode(tensors).equal(expected)
    on_meta = decode({name: tensor.to("meta") for name, tensor in tensors.items()})
    assert on_meta.shape == expected.shape


def test_gptq_without_g_idx_has_groups_in_order() -> None:
    tensors, expected = gptq_parts(WEIGHT_OI, 4, "gptq_v2", in_order=True)
    del tensors["g_idx"]
    assert parts_of({**GPTQ, "checkpoint_format": "gptq_v2"}).decode(tensors).equal(expected)


def test_awq_as_compressed_tensors_converts_it() -> None:
    """Against the one package that reads AWQ without a GPU."""
    convert = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    converter = convert.AutoAWQConverter(group_size=32)
    tensors, _ = awq_parts(WEIGHT_OI)
    scheme = next(iter(converter.update_config(None).config_groups.values()))
    converted = converter.process({f"layer.{name}": tensor for name, tensor in tensors.items()})
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    named = {name.removeprefix("layer."): tensor for name, tensor in converted.items()}
    named["weight_scale"] = named["weight_scale"].float()
    assert parts_of(AWQ).decode(tensors).equal(compressor.decompress(named, scheme)["weight"])


@pytest.mark.parametrize("config", [NVFP4, MODELOPT])
def test_nvfp4_is_what_its_own_package_makes_of_it(config: dict[str, Any]) -> None:
    """Bit for bit, and so is what its definition says."""
    pytest.importorskip("compressed_tensors")
    tensors, expected = (nvfp4_parts if config is NVFP4 else modelopt_parts)(WEIGHT_OI)
    decode = parts_of(config).decode
    assert decode(tensors).equal(expected)
    assert decode({name: tensor.to("meta") for name, tensor in tensors.items()}).shape == WEIGHT_OI.shape
    if config is NVFP4:
        assert nvfp4_decoded(tensors).equal(expected)


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
def test_numbers_are_what_was_stored(kind: str, strategy: str) -> None:
    """Whatever other scheme the config names before, whose scales have another shape."""
    pytest.importorskip("compressed_tensors")
    other = number_config(kind, "group" if strategy == "channel" else "channel")["config_groups"]["group_0"]
    config = number_config(kind, strategy)
    config["config_groups"] = {"other": other, **config["config_groups"]}
    tensors, expected = number_parts(WEIGHT_OI, kind, strategy)
    decode = parts_of(config).decode
    assert decode(tensors).equal(expected)
    assert decode({name: tensor.to("meta") for name, tensor in tensors.items()}).shape == WEIGHT_OI.shape
    if strategy == "channel":
        flat = {name: part if name == "weight" else part.flatten() for name, part in tensors.items()}
        assert decode(flat).equal(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, "there is no weight_scale beside weight"),
        ({"weight_scale": torch.ones(47, 1)}, r"int8 \(48, 64\) and scales of shape \(47, 1\) are not .* \(channel\)"),
        ({"weight": torch.ones(48, 64)}, r"weights torch.float32 \(48, 64\) and scales"),
        ({"weight": torch.ones(48, dtype=torch.int8)}, r"weights torch.int8 \(48,\) and scales"),
        ({"weight_zero_point": None}, "there is no weight_zero_point beside weight"),
        ({"weight_zero_point": torch.ones(47, dtype=torch.int8)}, "47 zeros and 48 scales do not belong together"),
    ],
)
def test_numbers_that_do_not_fit_together(change: dict[str, Tensor | None], message: str) -> None:
    pytest.importorskip("compressed_tensors")
    tensors, _ = number_parts(WEIGHT_OI, "int", "channel")
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        parts_of(number_config("int", "channel")).decode(changed)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (NVFP4, {"weight_global_scale": None}, "there is no weight_global_scale beside weight_packed"),
        (NVFP4, {"weight_scale": torch.ones(48, 3)}, "not those of nvfp4"),
        (MODELOPT, {"weight_scale": None}, "there is no weight_scale beside weight"),
        (MODELOPT, {"weight": torch.zeros(48, 32)}, "weights torch.float32"),
    ],
)
def test_parts_that_are_not_those_of_nvfp4(
    config: dict[str, Any], change: dict[str, Tensor | None], message: str
) -> None:
    pytest.importorskip("compressed_tensors")
    tensors, _ = (nvfp4_parts if config is NVFP4 else modelopt_parts)(WEIGHT_OI)
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        parts_of(config).decode(changed)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (GPTQ, {"scales": None}, "there is no scales beside qweight"),
        (AWQ, {"qzeros": None}, "there is no qzeros beside qweight"),
        (GPTQ, {"g_idx": torch.full((64,), 2).int()}, "g_idx names groups that are not among its 2"),
        (GPTQ, {"g_idx": torch.full((64,), -1).int()}, "g_idx names groups that are not among its 2"),
        (GPTQ, {"g_idx": torch.zeros(63).int()}, "its 63 inputs"),
        (GPTQ, {"qweight": torch.zeros(8, 48)}, "matrices in int32, not torch.float32"),
        (GPTQ, {"qweight": torch.zeros(8).int()}, "matrices in int32, not torch.int32 of shape"),
        (GPTQ, {"scales": torch.ones(2, 40)}, "do not belong together"),
        (AWQ, {"scales": torch.ones(3, 48)}, "do not belong together"),
        (AWQ, {"scales": torch.ones(0, 48), "qzeros": torch.ones(0, 6).int()}, "not in 0 groups of equal size"),
    ],
)
def test_parts_that_do_not_fit_together(config: dict[str, Any], change: dict[str, Tensor | None], message: str) -> None:
    tensors, _ = stored(config)
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        parts_of(config).decode(changed)


@pytest.mark.parametrize(
    "config",
    [
        {**GPTQ, "bits": 3},
        {**GPTQ, "bits": None},
        {**GPTQ, "checkpoint_format": "marlin"},
        {**AWQ, "bits": 8},
        {**AWQ, "version": "gemv"},
        {**AWQ, "zero_point": False},
        {**NVFP4, "config_groups": {"a": {"format": "nvfp4-pack-quantized"}, "b": {"format": "pack-quantized"}}},
        {**MODELOPT, "quant_algo": "W4A8_AWQ"},
        {**NVFP4, "format": "int-quantized"},
        {**NVFP4, "format": "mxfp8-quantized"},
    ],
)
def test_kinds_that_are_not_decoded(config: dict[str, Any]) -> None:
    pytest.importorskip("compressed_tensors")
    assert _VARIANTS[config["quant_method"]](config) is None
