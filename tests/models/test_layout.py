"""The names of released checkpoints, as their headers have them, make every parameter of the models they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    FineGrainedFP8Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from pager.models import EmoConfig
from pager.models.families import expert_modules, expert_parameters
from pager.models.formats import _Fp8Dequantize
from pager.models.layout import ExpertParameter, locate
from pager.models.open_model import model_class_of
from pager.store.expert_source import Row

pytestmark = pytest.mark.slow

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
SWIGLU = ("gate_proj", "up_proj", "down_proj")


def names(num_layers: int, of_layer: Callable[[int], Iterator[str]]) -> Iterator[str]:
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    for layer in range(num_layers):
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        yield from (f"model.layers.{layer}.{name}" for name in (*norms, *of_layer(layer)))


def parts_of(prefix: str, parts: tuple[str, ...], *ends: str) -> Iterator[str]:
    return (f"{prefix}.{part}.{end}" for part in parts for end in ends or ("weight",))


def experts(count: int, prefix: str = "mlp.experts", parts: tuple[str, ...] = SWIGLU) -> Iterator[str]:
    return (name for expert in range(count) for name in parts_of(f"{prefix}.{expert}", parts))


def of_olmoe(count: int) -> Callable[[int], Iterator[str]]:
    return lambda _: iter(
        [*parts_of("self_attn", (*QKVO, "q_norm", "k_norm")), "mlp.gate.weight", *experts(count)],
    )


def of_emo() -> Iterator[str]:
    renamed = {"input_layernorm": "pre_attention_layernorm", "post_attention_layernorm": "pre_feedforward_layernorm"}
    for name in names(16, of_olmoe(128)):
        *_, kind, _ = f".{name}".split(".")
        if kind not in ("q_norm", "k_norm"):
            yield name.replace(kind, renamed.get(kind, kind))


def of_mixtral(_: int) -> Iterator[str]:
    yield from parts_of("self_attn", QKVO)
    yield "block_sparse_moe.gate.weight"
    yield from experts(8, "block_sparse_moe.experts", ("w1", "w2", "w3"))


def of_gpt_oss(_: int) -> Iterator[str]:
    yield "self_attn.sinks"
    yield from parts_of("self_attn", QKVO, "weight", "bias")
    yield from parts_of("mlp", ("router",), "weight", "bias")
    yield from (f"mlp.experts.{name}{end}" for name in ("gate_up_proj", "down_proj") for end in ("", "_bias"))


def of_glm(layer: int) -> Iterator[str]:
    yield from parts_of("self_attn", QKVO[:3], "weight", "bias")
    yield "self_attn.o_proj.weight"
    yield from of_deepseek_mlp(layer, num_dense=1, num_experts=128)


def of_deepseek(layer: int) -> Iterator[str]:
    projections = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    yield from parts_of("self_attn", (*projections, "q_a_layernorm", "kv_a_layernorm"))
    yield from of_deepseek_mlp(layer, num_dense=3, num_experts=256)


def of_deepseek_mlp(layer: int, *, num_dense: int, num_experts: int) -> Iterator[str]:
    if layer < num_dense:
        yield from parts_of("mlp", SWIGLU)
        return
    yield from ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
    yield from parts_of("mlp.shared_experts", SWIGLU)
    yield from experts(num_experts)


RELEASED: dict[str, tuple[PreTrainedConfig, Iterator[str]]] = {
    "Emo_1b14b_1T": (EmoConfig(), of_emo()),
    "OLMoE-1B-7B": (OlmoeConfig(), names(16, of_olmoe(64))),
    "Mixtral-8x7B": (MixtralConfig(), names(32, of_mixtral)),
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig(num_hidden_layers=48, num_experts=128, head_dim=128),
        names(48, of_olmoe(128)),
    ),
    "gpt-oss-20b": (GptOssConfig(num_hidden_layers=24, num_local_experts=32), names(24, of_gpt_oss)),
    "GLM-4.5-Air": (
        Glm4MoeConfig(num_hidden_layers=46, attention_bias=True),
        names(47, of_glm),
    ),
    "DeepSeek-V3": (DeepseekV3Config(), names(62, of_deepseek)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_names_of_a_released_checkpoint_make_every_parameter(name: str) -> None:
    config, stored_names = RELEASED[name]
    with torch.device("meta"):
        model: Any = model_class_of(config)(config)
    stored = list(stored_names)
    layout = locate(model, stored)
    assert [each for each in model.state_dict() if each not in layout.stored] == []
    extra = f"model.layers.{config.num_hidden_layers}."  # one that predicts a further token, which the model leaves out
    assert [each for each in layout.unused if not each.startswith(extra)] == []
    paged = set()
    for module, layer in expert_modules(model):
        for parameter, stacked in expert_parameters(layer).items():
            found = ExpertParameter(layout.stored[f"{module}.{parameter}"], len(stacked), parameter, model)
            for expert in (0, len(stacked) - 1):
                pieces = found.of_expert(expert)
                assert isinstance(pieces, tuple), "these lie in their places as they are stored"
                paged |= {piece.name if isinstance(piece, Row) else piece for piece in pieces}
    assert paged <= set(stored)


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
