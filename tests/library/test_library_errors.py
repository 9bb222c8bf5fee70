"""What can be wrong with a checkpoint or a budget: the class of the error, and that it names the value."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import import_utils

from pager.cache import host_index, tiers
from pager.errors import (
    BudgetError,
    CheckpointError,
    ChecksumMismatch,
    ConfigError,
    ExpertReadError,
    PagerError,
    UnsupportedModel,
)
from pager.models.open_model import OpenModel
from pager.predict.trunk import TrunkPredictor
from pager.store.pack import pack
from tests.support.checkpoints import add_to_config

Load = Callable[..., PreTrainedModel]
Remains = Callable[[Path], tuple[list[str], list[str], list[str]]]
MakeSmall = Callable[..., Any]


class TestBudgets:
    @pytest.mark.parametrize("budget", ["1KiB", 12_287, "1%", 0.01])
    def test_too_small_for_one_token(self, golden: Any, load: Load, budget: Any) -> None:
        with pytest.raises(
            BudgetError, match="one token needs 3 of a layer at once: give at least 73728 bytes"
        ) as caught:
            load(golden.checkpoint, expert_memory=budget)
        assert repr(budget) in caught.value.message

    def test_the_smallest_that_is_named_is_enough(self, golden: Any, load: Load) -> None:
        assert load(golden.checkpoint, expert_memory=73728).expert_paging.pager.num_slots == 3
        with pytest.raises(BudgetError, match="73727"):
            load(golden.checkpoint, expert_memory=73727)

    def test_larger_than_the_machine(self, golden: Any, load: Load) -> None:
        with pytest.raises(BudgetError, match=r"expert_memory '900TiB' is .*, more than the .* found in main memory"):
            load(golden.checkpoint, expert_memory="900TiB")

    @pytest.mark.parametrize("budget", ["64 parsecs", "lots", "", "-5MiB", 0, -1, "0%", "101%", 1.5, 0.0, True])
    def test_no_size_at_all(self, golden: Any, load: Load, budget: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            load(golden.checkpoint, expert_memory=budget)
        assert str(budget) in caught.value.message

    def test_more_than_all_experts_is_all_experts(self, golden: Any, load: Load) -> None:
        assert load(golden.checkpoint, expert_memory="1GiB").expert_paging.pager.num_slots == 60


class TestOptions:
    @pytest.mark.parametrize("dtype", ["float8", "int8", "bf16", torch.int8, torch.bool])
    def test_an_unknown_dtype(self, golden: Any, load: Load, dtype: Any) -> None:
        with pytest.raises(ConfigError, match="float32, bfloat16, float16 or auto") as caught:
            load(golden.checkpoint, dtype=dtype)
        assert repr(str(dtype).removeprefix("torch.")) in caught.value.message

    def test_an_unknown_device(self, golden: Any, load: Load) -> None:
        with pytest.raises(ConfigError, match="'tpu'"):
            load(golden.checkpoint, device="tpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, golden: Any, load: Load) -> None:
        with pytest.raises(ConfigError, match="no GPU here"):
            load(golden.checkpoint, device="cuda")

    def test_an_unknown_policy(self, golden: Any, load: Load) -> None:
        with pytest.raises(ConfigError, match="'newest'"):
            load(golden.checkpoint, policy="newest")

    @pytest.mark.parametrize("num_readers", [0, -2])
    def test_no_readers(self, golden: Any, load: Load, num_readers: int) -> None:
        with pytest.raises(ConfigError, match=str(num_readers)):
            load(golden.checkpoint, num_readers=num_readers)


class TestCheckpoints:
    def test_no_directory(self, tmp_path: Path, load: Load) -> None:
        with pytest.raises(CheckpointError, match="is not a directory"):
            load(tmp_path / "absent")

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("{", "config.json"),
            ("[]", "config.json"),
            (
                '{"model_type": "emo", "num_hidden_layers": "many"}',
                "num_hidden_layers is 'many'; it must be a whole",
            ),
            ('{"model_type": "emo", "num_experts": 4, "num_experts_per_tok": 1, "num_shared_experts": 2}', "2 shared"),
        ],
    )
    def test_a_bad_config(self, small: MakeSmall, load: Load, config: str, message: str) -> None:
        made = small("emo")
        (made.path / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=message):
            load(made.path)

    @pytest.mark.parametrize(
        ("ending", "config", "message"),
        [
            ("qweight", {"quant_method": "gptq", "bits": 3}, "quantised by 'gptq' to 3 bits"),
            ("qweight", {"quant_method": "awq", "bits": 4, "version": "gemv"}, "by 'awq' \\('gemv'\\) to 4 bits"),
            ("absmax", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by 'bitsandbytes' to 4 bits"),
            (
                "W_q",
                {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
                "quantised by 'hqq' to 4 bits",
            ),
            ("trellis", {"quant_method": "exl3", "bits": 3.5}, r"quantised by 'exl3' to 3.5 bits"),
            ("weight_scale", {"quant_method": "fbgemm_fp8"}, "quantised by 'fbgemm_fp8' "),
            (
                "weight_scale",
                {"quant_method": "compressed-tensors", "format": "mxfp8-quantized"},
                "quantised by 'compressed-tensors' \\('mxfp8-quantized'\\) ",
            ),
            ("weight_packed", {}, "quantised by a method that its config does not name "),
        ],
    )
    def test_quantised_weights_are_refused_by_method_and_bits(
        self, small: MakeSmall, load: Load, ending: str, config: dict[str, Any], message: str
    ) -> None:
        made = small("olmoe")
        weights = load_file(made.path / "model.safetensors")
        name = "model.layers.0.mlp.experts.3.up_proj.weight"
        weights.pop(name)
        dtype = {"W_q": torch.uint8, "trellis": torch.int16}.get(ending, torch.float32)
        save_file(
            weights | {name.replace("weight", ending): torch.ones(4, dtype=dtype)}, made.path / "model.safetensors"
        )
        add_to_config(made.path, quantization_config=config)
        with pytest.raises(UnsupportedModel, match=f"{message}.*dequantize"):
            load(made.path)

    def test_a_format_whose_package_is_not_installed(
        self, small: MakeSmall, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = small("olmoe")
        rewrite(made.path, lambda tensors: tensors.update({"model.layers.0.x.weight_packed": torch.ones(1)}))
        groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}}
        method = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
        add_to_config(made.path, quantization_config=method)
        monkeypatch.setitem(sys.modules, "compressed_tensors", None)
        monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
        is_there = import_utils.is_compressed_tensors_available  # it remembers its answer
        is_there.cache_clear()
        with pytest.raises(UnsupportedModel, match=r"'compressed-tensors'.*install expert-pager\[formats\]"):
            load(made.path)
        is_there.cache_clear()

    def test_a_quantised_expert_without_scales(self, small: MakeSmall, load: Load) -> None:
        made = small("olmoe")
        name = "model.layers.0.mlp.experts.3.up_proj.weight"
        rewrite(made.path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
        add_to_config(made.path, quantization_config={"quant_method": "fp8"})
        with pytest.raises(CheckpointError, match=f"{name}.*float8_e4m3fn"):
            load(made.path)

    def test_a_quantised_model_of_another_family_is_refused_for_its_family(self, load: Load, tmp_path: Path) -> None:
        config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        config.save_pretrained(tmp_path)
        add_to_config(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
        save_file({"model.layers.0.mlp.up_proj.qweight": torch.ones(4)}, tmp_path / "model.safetensors")
        with pytest.raises(UnsupportedModel, match="no layer of it has experts"):
            load(tmp_path)

    def test_a_quantisation_config_that_is_none(self, small: MakeSmall, load: Load) -> None:
        made = small("olmoe")
        rewrite(made.path, lambda tensors: tensors.update({"model.layers.0.x.weight_scale_inv": torch.ones(1)}))
        add_to_config(made.path, quantization_config={"quant_method": "fp8", "weight_block_size": [0, "many"]})
        with pytest.raises(CheckpointError, match=r"config\.json is not valid: its quantization_config"):
            load(made.path)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("model-Q8_0.gguf", "holds no safetensors; of a GGUF file give its own path"),
            ("pytorch_model.bin", "pickled weights.*safetensors"),
        ],
    )
    def test_weights_in_another_container(self, small: MakeSmall, load: Load, name: str, message: str) -> None:
        made = small("olmoe")
        (made.path / "model.safetensors").rename(made.path / name)
        with pytest.raises(CheckpointError, match=message) as failed:
            load(made.path)
        assert name in str(failed.value)

    def test_an_adapter_beside_a_model(self, small: MakeSmall, load: Load) -> None:
        made = small("olmoe")
        (made.path / "adapter_config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="holds an adapter beside a model"):
            load(made.path)

    def test_weights_that_are_not_quantised_load_whatever_the_config_says(self, small: MakeSmall, load: Load) -> None:
        made = small("olmoe")
        add_to_config(made.path, quantization_config={"quant_method": "fp8"})
        weights = load_file(made.path / "model.safetensors")
        unneeded = {"model.layers.0.mlp.scale": torch.zeros(8).to(torch.float8_e4m3fn)}
        save_file(weights | unneeded, made.path / "model.safetensors")
        torch.testing.assert_close(load(made.path)(made.prompt()).logits, made.plain(made.prompt()).logits)

    def test_a_predictor_needs_routers_that_it_can_read(self, tmp_path: Path) -> None:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
        config = GptOssConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
        GptOssForCausalLM(config).save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModel, match=r"has gates that pick in ways of their own"):
            TrunkPredictor.load(tmp_path)

    def test_an_adapter_is_told_from_a_model(self, load: Load, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="holds an adapter and no model; give the folder of its base model"):
            load(tmp_path)

    @pytest.mark.parametrize("config", [LlamaConfig(), {"model_type": "deepseek_v99"}, {"hidden_size": 64}])
    def test_another_family_is_refused_by_name(self, small: MakeSmall, load: Load, config: Any) -> None:
        made = small("emo")
        config = config if isinstance(config, dict) else config.to_dict()
        (made.path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModel, match=r"cannot be paged: ") as caught:
            load(made.path)
        assert repr(config.get("model_type")) in caught.value.message

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not JSON"),
            ("[]", "is not a JSON object"),
            ('{"eos_token_id": "x"}', "is malformed: its eos_token_id is 'x'"),
            ('{"eos_token_id": [2, [3]]}', r"is malformed: its eos_token_id is \[2, \[3\]\]"),
        ],
    )
    def test_a_bad_generation_config(self, small: MakeSmall, load: Load, text: str, message: str) -> None:
        made = small("emo")
        (made.path / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"generation_config\.json {message}"):
            load(made.path)

    @pytest.mark.parametrize("cut", [1, 5000, "header"])
    def test_truncated(self, small: MakeSmall, load: Load, cut: int | str) -> None:
        made = small("olmoe")
        file = made.path / "model.safetensors"
        os.truncate(file, 100 if cut == "header" else file.stat().st_size - int(cut))
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(made.path)

    def test_a_missing_shard(self, small: MakeSmall, load: Load) -> None:
        made = small("olmoe", save={"max_shard_size": "40KB"})
        shard = sorted(made.path.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(CheckpointError, match=shard.name):
            load(made.path)

    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight",
            "model.layers.1.mlp.gate.weight",
            "model.layers.2.self_attn.q_proj.weight",
            "lm_head.weight",
            "model.layers.1.mlp.experts.3.up_proj.weight",
            "model.layers.0.mlp.experts.8.down_proj.weight",  # a shared one
        ],
    )
    @pytest.mark.parametrize("damage", ["missing", "wrong shape"])
    def test_a_tensor(self, small: MakeSmall, load: Load, name: str, damage: str) -> None:
        made = small("emo")

        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensor = tensors.pop(name)
            if damage == "wrong shape":
                tensors[name] = tensor[:-1].clone()

        rewrite(made.path, change)
        with pytest.raises(CheckpointError) as caught:
            load(made.path)
        assert name in caught.value.message

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
    @pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
    def test_a_stored_dtype_that_can_not_be_served(
        self, small: MakeSmall, load: Load, name: str, dtype: torch.dtype
    ) -> None:
        made = small("emo")
        rewrite(made.path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
        with pytest.raises(CheckpointError) as caught:
            load(made.path)
        assert name in caught.value.message

    def test_a_failed_load_leaves_nothing_behind(self, small: MakeSmall, load: Load, remains: Remains) -> None:
        made = small("emo")
        rewrite(made.path, lambda tensors: tensors.pop("lm_head.weight"))
        for options in ({}, {"host_memory": "50%"}, {"expert_memory": "1%"}, {"pool_size": 1}):
            with pytest.raises(PagerError):
                load(made.path, **options)
        assert remains(made.path) == ([], [], [])

    def test_closing_leaves_nothing_behind(self, golden: Any, load: Load, remains: Remains, tmp_path: Path) -> None:
        checkpoint = shutil.copytree(golden.checkpoint, tmp_path / "own")  # others may have left that one open
        model = load(checkpoint, expert_memory="25%", host_memory="50%")
        model(golden.tensors["doc96.input_ids"])
        assert all(remains(checkpoint)), "files, threads and shared memory are seen"
        for _ in range(2):
            model.expert_paging.close()
        assert remains(checkpoint) == ([], [], [])


class TestReads:
    """An expert that can't be read fails the forward that wants it; the model lives on."""

    def test_a_file_cut_short_after_loading(self, small: MakeSmall, load: Load) -> None:
        made = small("mixtral")
        model = load(made.path, expert_memory="25%")
        expected = model(made.prompt()).logits
        file = made.path / "model.safetensors"
        whole = file.read_bytes()
        os.truncate(file, len(whole) // 2)
        with pytest.raises(ExpertReadError, match=r"cannot read expert \d+ of layer \d+: .*model\.safetensors"):
            model(made.prompt(seed=2))
        model.expert_paging.pager.check_integrity()
        file.write_bytes(whole)
        fresh = load(made.path, expert_memory="25%")
        torch.testing.assert_close(fresh(made.prompt()).logits, expected)

    def test_a_flipped_byte_in_a_pack(self, small: MakeSmall, load: Load, tmp_path: Path) -> None:
        made = small("mixtral")
        packed = tmp_path / "packed"
        pack_model(made.path, packed)
        model = load(packed, expert_memory="100%")
        torch.testing.assert_close(model(made.prompt()).logits, made.plain(made.prompt()).logits, rtol=0, atol=1e-4)
        (file,) = (path for path in packed.iterdir() if path.stat().st_size > 100_000)
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size - 5000)
            (byte,) = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte ^ 1]))
        damaged = load(packed, expert_memory="100%")
        with pytest.raises(ChecksumMismatch, match="does not match its checksum") as caught:
            damaged(made.prompt(8, 60))
        assert caught.value.key.layer == 2
        damaged.expert_paging.pager.check_integrity()


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def pack_model(source: Path, out: Path) -> None:
    opened = OpenModel.open(source)
    shape = opened.family.shape
    pack(
        source,
        out,
        pieces=opened.pieces,
        experts_per_layer=opened.facts.experts_per_layer,
        shape=shape,
    )


@pytest.fixture
def remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remains:
    """`remains(checkpoint)`: its open files, the readers begun since, and the host tiers made since.

    Of this test alone: others' files, threads and segments come and go when they like.
    """
    segments = tmp_path / "segments"
    segments.mkdir()
    for module in (tiers, host_index):
        monkeypatch.setattr(module, "SHM", segments)
    before = set(threading.enumerate())

    def remains(checkpoint: Path) -> tuple[list[str], list[str], list[str]]:
        files = []
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                files.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        readers = [thread.name for thread in set(threading.enumerate()) - before if "expert-reader" in thread.name]
        return [file for file in files if file.startswith(str(checkpoint))], readers, os.listdir(segments)

    return remains
