"""The native EMO against outputs of Ai2's reference code (see tests/data/golden/README.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pager.models import EmoForCausalLM
from training.objective import Documents, install_pool_gates

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CHECKPOINT = GOLDEN / "ckpt_emo_tiny"
TOLERANCE = 1e-4
LAYERS = range(4)


@pytest.fixture
def model() -> EmoForCausalLM:
    model: EmoForCausalLM = EmoForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    model.eval()
    return model


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "emo_tiny.safetensors")


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_auto_class_loads_native_model(model: EmoForCausalLM) -> None:
    assert type(model) is EmoForCausalLM
    assert model.config.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_document(model: EmoForCausalLM, golden: dict[str, Tensor], experts: str, attention: str) -> None:
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    out = model(golden["doc96.input_ids"], output_router_logits=True, output_hidden_states=True)
    assert_near(out.logits, golden["doc96.logits"])
    for layer in LAYERS:
        logits_TE = out.router_logits[layer].reshape(96, 16)
        assert_near(logits_TE, golden[f"doc96.router_logits.{layer}"])
        assert_near(out.hidden_states[layer], golden[f"doc96.hidden.{layer}"])


def mlp_of(model: EmoForCausalLM, layer: int) -> Any:
    return model.model.layers[layer].mlp


@torch.no_grad()
def test_picks_and_moe_outputs(model: EmoForCausalLM, golden: dict[str, Tensor]) -> None:
    for layer in LAYERS:
        mlp_in_TD = golden[f"doc96.mlp_in.{layer}"]
        block = mlp_of(model, layer)
        _, weights_TK, index_TK = block.gate(mlp_in_TD)
        assert torch.equal(index_TK, golden[f"doc96.topk_idx.{layer}"])
        assert_near(weights_TK, golden[f"doc96.topk_w.{layer}"])
        assert_near(block(mlp_in_TD[None])[0], golden[f"doc96.mlp_out.{layer}"])


def test_the_shared_expert_weighs_exactly_one(model: EmoForCausalLM, golden: dict[str, Tensor]) -> None:
    _, weights_TK, index_TK = mlp_of(model, 0).gate(golden["doc96.mlp_in.0"])
    assert (index_TK == 15).sum(-1).eq(1).all()
    assert weights_TK[index_TK == 15].eq(1.0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batch(model: EmoForCausalLM, golden: dict[str, Tensor], side: str) -> None:
    mask = golden[f"batch_{side}.attention_mask"]
    out = model(golden[f"batch_{side}.input_ids"], attention_mask=mask, output_router_logits=True)
    real = mask.bool()
    assert_near(out.logits[real], golden[f"batch_{side}.logits"][real])
    for layer in LAYERS:
        logits = out.router_logits[layer].reshape(*mask.shape, -1)
        assert_near(logits[real], golden[f"batch_{side}.router_logits.{layer}"][real])


@pytest.mark.parametrize("name", ["doc96", "prompt0", "prompt1", "prompt2"])
def test_greedy_tokens(model: EmoForCausalLM, golden: dict[str, Tensor], name: str) -> None:
    ids = golden[f"{name}.input_ids"]
    assert torch.equal(greedy(model, ids, torch.ones_like(ids)), golden[f"{name}.gen32"])


def test_greedy_tokens_of_a_left_padded_batch(model: EmoForCausalLM, golden: dict[str, Tensor]) -> None:
    generated = greedy(model, golden["batch_left.input_ids"], golden["batch_left.attention_mask"])
    assert torch.equal(generated, golden["batch_left.gen32"])


def greedy(model: EmoForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    model.generation_config.eos_token_id = None
    out: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=255)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("selection", ["greedy4", "greedy8", "easy_ep4", "easy_ep8", "random_s0_4", "random_s0_8"])
@torch.no_grad()
def test_masking_to_a_kept_set_equals_pruning(model: EmoForCausalLM, selection: str) -> None:
    pruned = load_file(GOLDEN / "prune_emo_tiny.safetensors")
    kept = json.loads((GOLDEN / "prune_emo_tiny.json").read_text())[f"{selection}.experts_kept_per_layer"]
    for layer in LAYERS:
        restrict(mlp_of(model, layer).gate, kept[layer])
    out = model(pruned["doc96.input_ids"], output_router_logits=True)
    assert_near(out.logits, pruned[f"{selection}.logits"])
    for layer in LAYERS:
        kept_logits = out.router_logits[layer].reshape(96, 16)[:, kept[layer]]
        assert_near(kept_logits, pruned[f"{selection}.router_logits.{layer}"])


def restrict(gate: torch.nn.Module, kept: Sequence[int]) -> None:
    allowed_E = torch.zeros(16, dtype=torch.bool)
    allowed_E[list(kept)] = True

    def repick(gate: Any, args: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        return output[0], *gate.pick(output[0], allowed_E)

    gate.register_forward_hook(repick)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize(("name", "boundary"), [("", 0), ("_docs40_96", 40)])
@torch.no_grad()
def test_document_pools_of_the_training_router(model: EmoForCausalLM, size: int, name: str, boundary: int) -> None:
    pooled = load_file(GOLDEN / "pool_emo_tiny.safetensors")
    routers = install_pool_gates(model)
    document_T = (torch.arange(96) >= boundary).long() if boundary else torch.zeros(96, dtype=torch.long)
    documents = Documents(document_T, torch.full((int(document_T[-1]) + 1,), size))
    picks = []
    for router in routers:
        router.documents = documents
        router.register_forward_hook(lambda gate, args, output: picks.append(output[1:]))
    out = model(pooled["input_ids"], output_router_logits=True)
    assert_near(out.logits, pooled[f"pool{size}{name}.logits"])
    for layer, (weights_TK, index_TK) in enumerate(picks):
        assert torch.equal(index_TK, pooled[f"pool{size}{name}.topk_idx.{layer}"])
        assert_near(weights_TK, pooled[f"pool{size}{name}.topk_w.{layer}"])


def test_saving_writes_the_released_tensors(model: EmoForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    released = {name: tensor for shard in CHECKPOINT.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(released)
        assert all(torch.equal(saved.get_tensor(name), released[name]) for name in released)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.rope_parameters == model.config.rope_parameters
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@torch.no_grad()
def test_bf16_stays_near_fp32(model: EmoForCausalLM, golden: dict[str, Tensor]) -> None:
    half = EmoForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    block, x = half.model.layers[0].mlp, golden["doc96.mlp_in.0"].bfloat16()
    _, weights_TK, index_TK = block.gate(x)
    assert weights_TK.dtype == torch.bfloat16
    same_picks = (index_TK == golden["doc96.topk_idx.0"]).all(-1)
    assert same_picks.float().mean() > 0.9
    torch.testing.assert_close(
        block(x[None])[0][same_picks].float(), golden["doc96.mlp_out.0"][same_picks], atol=0.1, rtol=0.05
    )
