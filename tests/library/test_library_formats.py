"""load_model on quantised checkpoints against transformers' own dequantised load, on small models made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)

from pager.errors import CheckpointError, ConfigError, ExpertReadError, UnsupportedModel
from pager.models.open_model import OpenModel
from pager.store.expert_source import Destination
from pager.store.pack import pack
from pager.types import ExpertKey
from tests.support.checkpoints import add_to_config, lively, saved
from tests.support.quantised import (
    GROUP,
    awq_checkpoint,
    compressed_checkpoint,
    deepseek_v3,
    emo,
    fp8_checkpoint,
    gptq_checkpoint,
    modelopt_checkpoint,
    modelopt_fp8_checkpoint,
    mxfp4_checkpoint,
    number_checkpoint,
    nvfp4_checkpoint,
    quantised_pack,
    qwen3_moe,
)

Load = Callable[..., PreTrainedModel]

PROMPT = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}


@torch.no_grad()
def check(paged: PreTrainedModel, plain: PreTrainedModel) -> None:
    """The same logits and the same greedy tokens."""
    torch.testing.assert_close(paged(PROMPT).logits, plain(PROMPT).logits, **TOLERANCE)
    assert paged.generate(PROMPT, **GREEDY).equal(plain.generate(PROMPT, **GREEDY))


def bytes_of_an_expert(path: Path, device: str = "cpu") -> tuple[int, int]:
    """The bytes that reading one expert reads from the files, and those that it takes in a slot of `device`."""
    opened = OpenModel.open(path, "bfloat16", device=device)
    with opened.checkpoint:
        source = opened.open_experts()
        try:
            layer = opened.family.layers[0].layer
            tensors = [torch.empty(shape, dtype=opened.slot_dtype) for shape in source.shape.shapes]
            read = source.read(ExpertKey(layer, 3), *tensors)
            assert (source.bytes_read, source.stored_bytes) == (read, read)
            held = sum(tensor.nbytes for tensor in tensors)
            assert opened.expert_bytes == held
            return read, held
        finally:
            source.close()


@pytest.mark.parametrize("share", [1.0, "30%"])
class TestDecodedExperts:
    def test_fp8_in_blocks(self, tmp_path: Path, load: Load, share: float | str) -> None:
        path, _ = fp8_checkpoint(qwen3_moe(), tmp_path / "fp8")
        plain = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
        )
        check(load(path, expert_memory=share), plain.float().eval())

    def test_fp8_whose_last_blocks_are_cut_off(self, tmp_path: Path, load: Load, share: float | str) -> None:
        path, decoded = fp8_checkpoint(deepseek_v3(), tmp_path / "fp8")
        plain = deepseek_v3()
        saved(lively(plain, std=0.08), tmp_path / "plain")
        save_file(
            {
                name: decoded.get(name, tensor)
                for name, tensor in load_file(path / "model.safetensors").items()
                if not name.endswith("_scale_inv")
            },
            tmp_path / "plain" / "model.safetensors",
        )
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
        check(load(path, expert_memory=share), plain.float().eval())

    def test_mxfp4(self, tmp_path: Path, load: Load, share: float | str) -> None:
        path = mxfp4_checkpoint(tmp_path / "mxfp4")
        plain = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
        )
        check(load(path, expert_memory=share), plain.float().eval())

    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    @pytest.mark.parametrize("num_bits", [4, 8])
    def test_compressed_tensors(self, tmp_path: Path, load: Load, share: float | str, num_bits: int) -> None:
        path = compressed_checkpoint(tmp_path / "packed", num_bits)
        plain = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
        check(load(path, expert_memory=share), plain.float().eval())

    @pytest.mark.parametrize(
        ("num_bits", "kind", "in_order"), [(4, "gptq", False), (8, "gptq", True), (2, "gptq_v2", True)]
    )
    def test_gptq(
        self, tmp_path: Path, load: Load, share: float | str, num_bits: int, kind: str, in_order: bool
    ) -> None:
        path, plain = gptq_checkpoint(tmp_path, num_bits, kind, in_order=in_order)
        check(load(path, expert_memory=share), AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))

    def test_awq(self, tmp_path: Path, load: Load, share: float | str) -> None:
        path, plain = awq_checkpoint(tmp_path)
        check(load(path, expert_memory=share), AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))

    @pytest.mark.parametrize("make", [nvfp4_checkpoint, modelopt_checkpoint])
    def test_nvfp4(
        self, tmp_path: Path, load: Load, share: float | str, make: Callable[[Path], tuple[Path, Path]]
    ) -> None:
        pytest.importorskip("compressed_tensors")
        path, plain = make(tmp_path)
        check(load(path, expert_memory=share), AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))

    @pytest.mark.parametrize(
        ("kind", "strategy"), [("int", "channel"), ("int", "group"), ("float", "channel"), ("float", "block")]
    )
    def test_compressed_tensors_in_numbers(
        self, tmp_path: Path, load: Load, share: float | str, kind: str, strategy: str
    ) -> None:
        pytest.importorskip("compressed_tensors")
        path, plain = number_checkpoint(tmp_path, kind, strategy)
        check(load(path, expert_memory=share), AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))

    def test_modelopt_in_fp8(self, tmp_path: Path, load: Load, share: float | str) -> None:
        pytest.importorskip("compressed_tensors")
        path, plain = modelopt_fp8_checkpoint(tmp_path)
        check(load(path, expert_memory=share), AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))


class TestBytes:
    @pytest.mark.parametrize(("kind", "bytes_of_zeros"), [("float", 0), ("int", 1)])
    def test_an_expert_in_numbers_is_read_as_it_is_stored(self, tmp_path: Path, kind: str, bytes_of_zeros: int) -> None:
        pytest.importorskip("compressed_tensors")
        weights, outputs = 3 * 128 * 256, 2 * 128 + 256
        path, _ = number_checkpoint(tmp_path, kind, "channel")
        assert bytes_of_an_expert(path) == (weights + (2 + bytes_of_zeros) * outputs, 2 * weights)

    @pytest.mark.parametrize("make", [nvfp4_checkpoint, modelopt_checkpoint])
    def test_an_expert_in_nvfp4_is_read_as_it_is_stored(
        self, tmp_path: Path, make: Callable[[Path], tuple[Path, Path]]
    ) -> None:
        pytest.importorskip("compressed_tensors")
        weights = 3 * 128 * 256
        path, _ = make(tmp_path)
        assert bytes_of_an_expert(path) == (weights // 2 + weights // 16 + 3 * 4, 2 * weights)

    def test_an_expert_of_gptq_is_read_as_it_is_stored(self, tmp_path: Path) -> None:
        weights, of_groups = 3 * 128 * 256, 2 * 128 * 256 // GROUP + 256 * 128 // GROUP
        inputs = 2 * 256 + 128
        path, _ = gptq_checkpoint(tmp_path)
        assert bytes_of_an_expert(path) == (weights // 2 + of_groups // 2 + 2 * of_groups + 4 * inputs, 2 * weights)

    def test_an_expert_of_awq_is_read_as_it_is_stored(self, tmp_path: Path) -> None:
        weights, of_groups = 3 * 128 * 256, 2 * 128 * 256 // GROUP + 256 * 128 // GROUP
        path, _ = awq_checkpoint(tmp_path)
        assert bytes_of_an_expert(path) == (weights // 2 + of_groups // 2 + 2 * of_groups, 2 * weights)

    @pytest.mark.parametrize("num_bits", [4, 8])
    def test_an_expert_of_compressed_tensors_is_read_as_it_is_stored(self, tmp_path: Path, num_bits: int) -> None:
        weights, outputs = 3 * 128 * 256, 2 * 128 + 256
        scales = 2 * (weights // 32 if num_bits == 4 else outputs)
        read, held = bytes_of_an_expert(compressed_checkpoint(tmp_path / "packed", num_bits))
        assert (read, held) == (weights * num_bits // 8 + scales, 2 * weights)

    def test_an_expert_in_fp8_is_read_and_held_as_it_is_stored(self, tmp_path: Path) -> None:
        path, _ = fp8_checkpoint(qwen3_moe(), tmp_path / "fp8")
        weights, scales = 3 * 128 * 256, 3 * 2 * 4
        assert bytes_of_an_expert(path) == (weights + scales, weights + scales)

    def test_an_expert_in_fp8_is_decoded_where_nothing_computes_with_its_bytes(self, tmp_path: Path) -> None:
        """For a GPU, and where gate and up do not end with whole blocks."""
        path, _ = fp8_checkpoint(qwen3_moe(), tmp_path / "fp8")
        weights, scales = 3 * 128 * 256, 3 * 2 * 4
        assert bytes_of_an_expert(path, "cuda") == (weights + scales, 2 * weights)
        path, _ = fp8_checkpoint(qwen3_moe(moe_intermediate_size=96), tmp_path / "cut")
        weights = 3 * 96 * 256
        assert bytes_of_an_expert(path) == (weights + scales, 2 * weights)

    def test_an_expert_in_mxfp4_is_read_as_it_is_stored(self, tmp_path: Path) -> None:
        weights, biases = 3 * 128 * 256, 2 * 128 + 256
        quantised = weights // 2 + weights // 32
        assert bytes_of_an_expert(mxfp4_checkpoint(tmp_path / "mxfp4")) == (
            quantised + 4 * biases,
            2 * (weights + biases),
        )


def test_one_expert_that_cannot_be_decoded_fails_alone(tmp_path: Path) -> None:
    path, _ = gptq_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.down_proj.g_idx"] += 1000
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    opened = OpenModel.open(path, "bfloat16")
    with opened.checkpoint, closing(opened.open_experts()) as source:
        made = [tuple(torch.empty(shape, dtype=torch.bfloat16) for shape in source.shape.shapes) for _ in range(2)]
        wanted = [Destination(ExpertKey(1, expert), made[expert - 2]) for expert in (2, 3)]
        whole, failed = source.read_all(wanted)
    assert whole == source.stored_bytes
    assert isinstance(failed, ExpertReadError)
    assert "expert 3 of layer 1 cannot be made of what is stored: g_idx names groups that are not among" in str(failed)


def test_weights_that_want_their_inputs_turned_are_refused(tmp_path: Path, load: Load) -> None:
    """What is folded into the weights alone changes nothing about how they are used."""
    pytest.importorskip("compressed_tensors")
    path, _ = number_checkpoint(tmp_path, "int", "channel")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    for location, is_refused in (("weight_input", False), ("input", True)):
        scheme = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": location}]}
        add_to_config(path, quantization_config={**config, "transform_config": {"config_groups": {"v": scheme}}})
        with pytest.raises(UnsupportedModel, match="turns activations") if is_refused else nullcontext():
            load(path, expert_memory=1.0)


def test_a_trunk_that_cannot_be_decoded(tmp_path: Path, load: Load) -> None:
    path, _ = awq_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    del tensors[f"{name}.qzeros"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}.*makes no '{name}.weight': there is no qzeros beside"):
        load(path)


def test_a_pack_holds_decoded_experts_and_the_trunk_as_stored(tmp_path: Path, load: Load) -> None:
    path, _ = fp8_checkpoint(qwen3_moe(), tmp_path / "fp8")
    opened = OpenModel.open(path)
    with opened.checkpoint:
        pack(
            path, tmp_path / "packed", pieces=opened.pieces, experts_per_layer=opened.facts.experts_per_layer,
            shape=opened.family.shape, dtype=torch.float32, quantised=opened.quantised_names,
        )  # fmt: skip
    stored = load_file(tmp_path / "packed" / "trunk.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    check(load(tmp_path / "packed", expert_memory="30%"), load(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_experts_held_in_fp8_are_those_that_decoding_gives(tmp_path: Path, load: Load, dtype: torch.dtype) -> None:
    """To the bit, by transformers' own operations; and each prompt's logits are those of the decoded pack."""
    path, _ = fp8_checkpoint(qwen3_moe(), tmp_path / "fp8")
    held, decoded = (OpenModel.open(path, dtype, device=device) for device in ("cpu", "cuda"))
    with (
        held.checkpoint,
        decoded.checkpoint,
        closing(held.open_experts()) as ours,
        closing(decoded.open_experts()) as theirs,
    ):
        for key in (ExpertKey(0, 0), ExpertKey(1, 7)):
            for mine, other in zip(held.read_expert(ours, key), decoded.read_expert(theirs, key), strict=True):
                assert mine.dtype == other.dtype == dtype
                assert mine.equal(other)
    pack(
        path, tmp_path / "packed", pieces=held.pieces, experts_per_layer=held.facts.experts_per_layer,
        shape=held.family.shape, dtype=dtype, quantised=held.quantised_names,
    )  # fmt: skip
    found, wanted = (
        load(each, dtype=dtype, expert_memory="30%")(PROMPT).logits for each in (path, tmp_path / "packed")
    )
    if dtype == torch.float32:
        torch.testing.assert_close(found, wanted, **TOLERANCE)
    else:
        assert (found - wanted).norm() <= 0.05 * wanted.norm()


@torch.no_grad()
def test_a_budget_holds_twice_the_experts_in_fp8(tmp_path: Path, load: Load) -> None:
    path, _ = fp8_checkpoint(qwen3_moe(), tmp_path / "fp8")
    paging = load(path, dtype="bfloat16", expert_memory=6 * 3 * 128 * 256 * 2).expert_paging
    assert paging.pager.num_slots == 11
    paging.model(PROMPT)
    assert paging.pager.stats().paging.bytes_from_disk % paging.plan.expert_bytes == 0


class TestQuantisedPacks:
    @pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_a_model_with_its_decoded_experts_says_the_same(
        self, tmp_path: Path, load: Load, kind: str, dtype: torch.dtype
    ) -> None:
        """Against plain transformers with the experts that the pack stands for, at two budgets."""
        plain = lively(emo(), std=0.15).to(dtype)
        packed = quantised_pack(saved(plain, tmp_path / "plain"), tmp_path / "packed", kind, dtype)
        opened = OpenModel.open(packed, dtype)
        with opened.checkpoint, closing(opened.open_experts()) as source:
            for layer, block in enumerate(plain.model.layers):
                for expert in range(9):
                    experts, key = block.mlp.experts, ExpertKey(layer, expert)
                    experts.gate_up_proj.data[expert], experts.down_proj.data[expert] = opened.read_expert(source, key)
        wanted = plain(PROMPT).logits
        for share, host in (("100%", 0), ("40%", 0), ("40%", "50%")):
            paged = load(packed, dtype=dtype, expert_memory=share, host_memory=host)
            found = paged(PROMPT).logits
            if dtype == torch.bfloat16:
                assert (found - wanted).norm() <= 0.05 * wanted.norm()
            else:
                torch.testing.assert_close(found, wanted, **TOLERANCE)
                assert paged.generate(PROMPT, **GREEDY).equal(plain.generate(PROMPT, **GREEDY))

    @torch.no_grad()
    def test_a_quantised_checkpoint_is_packed_anew(self, tmp_path: Path, load: Load) -> None:
        path, _ = fp8_checkpoint(qwen3_moe(), tmp_path / "fp8")
        packed = load(quantised_pack(path, tmp_path / "packed", "int8", torch.float32), expert_memory="40%")
        found, wanted = packed(PROMPT).logits, load(path)(PROMPT).logits
        assert 0 < (found - wanted).norm() <= 0.03 * wanted.norm()

    def test_a_budget_holds_more_experts(self, tmp_path: Path, load: Load) -> None:
        path = saved(lively(emo()).to(torch.bfloat16), tmp_path / "plain")
        budget = 12 * 3 * 64 * 32 * 2
        held = {}
        for kind in ("int8", "int4"):
            packed = quantised_pack(path, tmp_path / kind, kind, torch.bfloat16)
            paging = load(packed, dtype="bfloat16", expert_memory=budget).expert_paging
            held[kind] = paging.pager.num_slots
            assert paging.pager.slots.nbytes <= budget + 3 * paging.plan.expert_bytes
        assert load(path, dtype="bfloat16", expert_memory=budget).expert_paging.pager.num_slots == 12
        assert held == {"int8": 23, "int4": 24}  # of 24 in all

    def test_what_was_packed_for_another_dtype_is_refused(self, tmp_path: Path, load: Load) -> None:
        path = saved(lively(emo()).to(torch.bfloat16), tmp_path / "plain")
        packed = quantised_pack(path, tmp_path / "packed", "int8", torch.bfloat16)
        with pytest.raises(ConfigError, match="pack the model again with --dtype float32"):
            load(packed, dtype="float32")
        assert load(packed, dtype="auto").dtype == torch.bfloat16
