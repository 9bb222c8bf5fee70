"""inspect, pack and verify."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from pager.cli.checkpoint import ONLY_EXACT, TESTED
from tests.support.checkpoints import add_to_config, lively, saved
from tests.support.families import FAMILIES, NOT_POOLED, saved_family
from tests.support.gguf_files import gguf_file
from tests.support.gguf_files import qwen3_moe as gguf_model
from tests.support.quantised import (
    compressed_checkpoint,
    emo,
    fp8_checkpoint,
    gptq_checkpoint,
    modelopt_checkpoint,
    mxfp4_checkpoint,
    number_checkpoint,
    qwen3_moe,
)

Run = Callable[..., subprocess.CompletedProcess[str]]

EXPERT_BYTES = 3 * 32 * 16 * 4


def test_help_teaches_with_examples(process: Run, run: Run) -> None:
    top = process("--help")
    assert top.returncode == 0
    for name in ("serve", "generate", "route", "inspect", "pack", "verify"):
        assert name in top.stdout
    for name in ("serve", "generate", "route", "inspect", "pack", "verify"):
        assert f"expert-pager {name}" in run(name, "--help").stdout.replace("Usage: expert-pager", "")


def test_inspect_says_what_a_checkpoint_holds(run: Run, checkpoint: Path) -> None:
    done = run("inspect", checkpoint, "--dtype", "auto", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["family"] == "emo"
    assert found["layout"] == "one tensor an expert"
    assert found["runs"] == {"exact": "yes", "pools": "yes", "service": "yes"}
    assert found["experts_per_layer"] == [9, 9, 9]
    assert found["shared_per_layer"] == [1, 1, 1]
    assert found["top_k_per_layer"] == [2, 2, 2]
    assert found["expert_bytes"] == EXPERT_BYTES
    assert found["routed_experts"] == 24
    assert found["smallest_expert_memory"] == 2 * EXPERT_BYTES
    assert found["plan"] is None


def test_inspect_says_what_states_an_answer_has(run: Run, tmp_path: Path) -> None:
    """Two of four layers of this model attend linearly: 4 heads of 8 x 8 and 64 channels of 4 each, kept twice."""
    saved_family("qwen3_next", tmp_path)
    done = run("inspect", tmp_path, "--dtype", "float32", "--expert-memory", "50%", "--device", "cpu", "--json")
    found = json.loads(done.stdout)
    assert found["runs"]["service"].startswith("yes")
    assert found["state_bytes_per_answer"] == 2 * 2 * (4 * 8 * 8 + 64 * 4) * 4
    assert found["plan"]["state_bytes"] == 32 * found["state_bytes_per_answer"]
    words = run("inspect", tmp_path, "--dtype", "float32", "--device", "cpu").stdout
    assert "8.0 KiB of states for each answer in flight" in " ".join(words.split())


def test_inspect_says_what_a_budget_buys(run: Run, checkpoint: Path) -> None:
    done = run("inspect", checkpoint, "--dtype", "auto", "--expert-memory", "50%", "--device", "cpu", "--json")
    found = json.loads(done.stdout)
    assert found["plan"]["num_slots"] == 12
    fit = {pool["size"]: pool["fit_at_once"] for pool in found["pools"]}
    assert fit == {"50%": 1, "full": 0}
    words = run("inspect", checkpoint, "--expert-memory", "50%", "--device", "cpu").stdout
    assert "12 of 24 routed experts (50.0%)" in words


@pytest.mark.parametrize(
    ("budget", "message"),
    [("1KiB", "one token needs 2 of a layer at once"), ("900TiB", "more than the"), ("much", "is not a size")],
)
def test_a_budget_that_can_not_be_is_one_line(run: Run, checkpoint: Path, budget: str, message: str) -> None:
    done = run("inspect", checkpoint, "--expert-memory", budget)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_folder_without_a_model_is_one_line(run: Run, tmp_path: Path) -> None:
    done = run("inspect", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "config.json" in done.stderr


def test_inspect_says_how_a_model_of_another_family_runs(run: Run, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=4)).save_pretrained(tmp_path)
    found = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert (found["family"], found["layout"]) == ("gpt_oss", "stacked")
    assert found["runs"]["exact"] == "yes"
    assert found["runs"]["pools"] == "yes, by a mask on its gates, which is tried when it is loaded"
    assert found["tested"].startswith("small random models of this family against plain transformers")
    assert found["runs"]["service"] == "yes, without predictions: its gates pick in an unknown way"
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in run("inspect", tmp_path).stderr


def test_inspect_says_what_is_read_and_what_is_held(run: Run, tmp_path: Path) -> None:
    path, _ = fp8_checkpoint(qwen3_moe(), tmp_path / "fp8")
    done = run("inspect", path)
    assert done.returncode == 0, done.stderr
    assert "fp8, a scale in float32 for each block of 128 x 128; held as stored" in " ".join(done.stdout.split())
    decoded = run("inspect", mxfp4_checkpoint(tmp_path / "mxfp4"))
    words = " ".join(decoded.stdout.split())
    assert "mxfp4 in blocks of 32; an expert is read as 53.0 KiB, decoded when it enters a slot" in words
    assert "µs here) and held as bfloat16" in words
    assert json.loads(run("inspect", tmp_path / "mxfp4", "--json").stdout)["decoding_us_per_expert"] > 0
    refused = run("pack", path, tmp_path / "packed")
    assert refused.returncode == 1
    assert "give the dtype to decode them to (--dtype bfloat16)" in refused.stderr


def _cut(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:128].clone()


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (lambda path: fp8_checkpoint(qwen3_moe(), path)[0], _cut, "q_proj.weight'.*its shape is \\(128, 256\\)"),
        (lambda path: gptq_checkpoint(path)[0], dict.pop, "k_proj.*there is no qzeros beside"),
        (
            lambda path: number_checkpoint(path, "int", "channel")[0],
            _cut,
            "q_proj.weight'.*not those of a scheme of its config",
        ),
    ],
)
def test_inspect_tries_the_trunks_quantised_tensors(
    run: Run, tmp_path: Path, make: Callable[[Path], Path], change: Callable[[Any, str], Any], message: str
) -> None:
    path = make(tmp_path)
    assert run("inspect", path).returncode == 0
    tensors = load_file(path / "model.safetensors")
    change(tensors, "model.layers.1.self_attn." + ("k_proj.qzeros" if change is dict.pop else "q_proj.weight"))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    done = run("inspect", path)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr


def test_inspect_tries_the_trunk_of_a_gguf_file(run: Run, tmp_path: Path) -> None:
    path = gguf_file(gguf_model(), tmp_path / "model.gguf", metadata={"qwen3moe.attention.head_count": 2})
    done = run("inspect", path)
    assert done.returncode == 1
    assert "'blk.0.attn_q.weight' makes no 'model.layers.0.self_attn.q_proj.weight': its shape is" in done.stderr


def test_a_checkpoint_of_modelopt_whose_config_does_not_say_so(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    path, _ = modelopt_checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    asked = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    assert 'put {"quant_method": "modelopt", "quant_algo": ...} with the quant_algo' in run("inspect", path).stderr
    add_to_config(path, quantization_config=asked)
    assert "modelopt, nvfp4 in groups of 16" in run("inspect", path).stdout


def test_packages_that_decode_are_silent(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    done = run("inspect", compressed_checkpoint(tmp_path / "packed", 8))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("kind", "expert_bytes"), [("int8", 3 * 64 * 32 + 2 * (64 + 64)), ("int4", 3 * 64 * 32 * 5 // 8)]
)
def test_a_pack_of_quantised_experts(run: Run, tmp_path: Path, kind: str, expert_bytes: int) -> None:
    path = saved(lively(emo()).bfloat16(), tmp_path / "plain")
    assert run("pack", path, tmp_path / "packed", "--experts", kind).returncode == 0
    assert run("verify", tmp_path / "packed").returncode == 0
    facts = json.loads(run("inspect", tmp_path / "packed", "--json").stdout)
    assert facts["expert_bytes"] == expert_bytes
    assert facts["format"].startswith(f"{kind}, a scale in bfloat16 for each")
    wrong = run("inspect", tmp_path / "packed", "--dtype", "float32", "--plan")
    assert wrong.returncode == 1
    assert "pack the model again with --dtype float32" in wrong.stderr


def test_inspect_says_that_weights_are_not_what_the_config_calls_them(run: Run, tmp_path: Path) -> None:
    path = saved(lively(emo()), tmp_path / "plain")
    add_to_config(path, quantization_config={"quant_method": "fp8"})
    words = json.loads(run("inspect", path, "--json").stdout)["format"]
    assert words.startswith("float32, converted to bfloat16 on its way into a slot; its config calls it")
    assert words.endswith("quantised by 'fp8', which its weights are not")


def test_a_kind_of_experts_that_there_is_not(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    done = run("pack", checkpoint, tmp_path / "packed", "--experts", "int3")
    assert done.returncode == 1
    assert "experts cannot be packed as 'int3'; use int8 or int4 or fp8" in done.stderr


def test_the_families_that_inspect_calls_tested_are() -> None:
    assert FAMILIES.keys() <= TESTED, "an older transformers has fewer"
    assert NOT_POOLED.keys() == ONLY_EXACT


def test_settings_that_loading_would_refuse_are_refused(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": "end"}')
    done = run("inspect", model)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "generation_config.json is malformed" in done.stderr


def test_an_unsupported_family_is_refused_by_name(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    done = run("inspect", other)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "model type 'gpt2' cannot be paged: no layer of it has experts" in done.stderr


def test_wrong_usage_is_status_2(run: Run, checkpoint: Path) -> None:
    assert run("inspect", checkpoint, "--expert-mem", "1").returncode == 2
    assert run("generate", "hello").returncode == 2
    assert run("route", "hello", "--token-ids", "1", "--model", checkpoint).returncode == 2
    assert run("no-such-command").returncode == 2


def test_pack_then_verify_then_a_flipped_byte(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    done = run("pack", checkpoint, packed, "--dtype", "bfloat16", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_experts"] == 27
    assert json.loads(run("inspect", packed, "--json").stdout)["packed"] is True
    assert json.loads(run("verify", packed, "--json").stdout)["ok"] is True

    file = packed / "experts.pack"
    data = bytearray(file.read_bytes())
    data[-4096] ^= 1  # the first byte of the last extent
    file.write_bytes(data)
    damaged = run("verify", packed)
    assert damaged.returncode == 1
    assert "bad: layer 2 expert 8" in damaged.stderr
    assert "Traceback" not in damaged.stderr


def test_pack_never_overwrites(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    done = run("pack", checkpoint, tmp_path)
    assert done.returncode == 1
    assert "already exists" in done.stderr


def test_verify_needs_a_record_and_then_finds_damage(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(checkpoint, tmp_path / "plain")
    assert "verify --record" in run("verify", plain).stderr
    assert run("verify", "--record", plain).returncode == 0
    assert run("verify", plain).returncode == 0
    file = plain / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run("verify", plain).returncode == 1


def test_a_gguf_file_in_the_place_of_a_folder(run: Run, tmp_path: Path) -> None:
    path = gguf_file(gguf_model(), tmp_path / "small.gguf", experts="Q4_K", down="Q6_K")
    done = run("inspect", path)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "gguf, experts in Q4_K and Q6_K; an expert is read as 124.5 KiB, decoded when it enters a slot" in words
    assert "(qwen3_moe, as downloaded)" in words
    answer = run("generate", "SELECT", "--model", path, "--max-tokens", "3", "--expert-memory", "50%", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["usage"]["completion_tokens"] == 3
    assert run("config", path, "--check").returncode == 0
    refused = run("pack", path, tmp_path / "packed")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "is a GGUF file, which is served as it is; to pack it, fetch the checkpoint" in refused.stderr
    path.write_bytes(path.read_bytes()[:5000])
    cut = run("inspect", path)
    assert (cut.returncode, cut.stderr.count("\n")) == (1, 1)
