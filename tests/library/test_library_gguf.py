"""load_model on GGUF files against transformers' own dequantised load, on small models made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.gguf import GGUF_ARCHS
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pager.cluster.loading import load_engine
from pager.cluster.worker import WorkerObserver
from pager.config import load_config
from pager.errors import CheckpointError, ConfigError, UnsupportedModel
from pager.models.open_model import OpenModel
from pager.pools.slices import cut
from pager.store.pack import pack, record, verify
from pager.tokenizing import read_tokenizer
from pager.types import ExpertKey, ExpertPool
from router_service.chat import ChatTemplate
from tests.support.gguf_files import (
    decoded_state,
    gguf_file,
    gpt_oss,
    minimax_m2,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_moe,
    tokenizer,
)

pytestmark = pytest.mark.slow

Load = Callable[..., PreTrainedModel]
Make = Callable[[], PreTrainedModel]

PROMPT = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
WEIGHTS = 3 * 256 * 256


def by_transformers(path: Path, made: PreTrainedModel) -> PreTrainedModel:
    """Its config is given, because transformers takes some sizes for those of one released model."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=made.config, dtype=torch.float32
    ).eval()


@torch.no_grad()
def check(paged: PreTrainedModel, plain: PreTrainedModel) -> None:
    """The same logits and the same greedy tokens."""
    torch.testing.assert_close(paged(PROMPT).logits, plain(PROMPT).logits, rtol=0, atol=1e-4)
    assert paged.generate(PROMPT, **GREEDY).equal(plain.generate(PROMPT, **GREEDY))


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (qwen3_moe, {"experts": "Q8_0", "trunk": "Q8_0"}),
        (qwen3_moe, {"experts": "Q4_K", "down": "Q6_K", "trunk": "Q6_K"}),
        (qwen3_moe, {"experts": "MXFP4", "trunk": "F16"}),
        (qwen3_moe, {"experts": "F16", "trunk": "F16"}),
        (qwen3_moe, {"experts": "BF16", "down": "Q4_0", "trunk": "BF16"}),
        (qwen2_moe, {"experts": "Q8_0", "down": "F32", "trunk": "Q4_K"}),
        (minimax_m2, {"experts": "Q6_K", "trunk": "Q8_0"}),
    ],
)
def test_a_file_says_what_transformers_makes_of_it(
    tmp_path: Path, load: Load, make: Make, kinds: dict[str, Any]
) -> None:
    made = make()
    path = gguf_file(made, tmp_path / "model.gguf", **kinds)
    plain = by_transformers(path, made)
    for share in (1.0, "30%"):
        check(load(path, expert_memory=share, dtype="float32"), plain)


@pytest.mark.skipif("qwen35moe" not in GGUF_ARCHS, reason="transformers 5.17 reads no such files")
@pytest.mark.filterwarnings("ignore")  # transformers looks for kernels, which there are none of
@pytest.mark.parametrize("kinds", [{"experts": "Q8_0", "trunk": "Q8_0"}, {"experts": "BF16", "trunk": "F16"}])
def test_a_file_that_transformers_reads_by_conversions(tmp_path: Path, load: Load, kinds: dict[str, str]) -> None:
    """Qwen3.5-MoE, whose norms and heads llama.cpp changes."""
    path = gguf_file(qwen3_5_moe(), tmp_path / "model.gguf", experts=kinds["experts"], trunk=kinds["trunk"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    for share in (1.0, "30%"):
        check(load(path, expert_memory=share, dtype="float32"), plain)


@torch.no_grad()
def test_a_file_says_what_the_gguf_package_decodes(tmp_path: Path, load: Load) -> None:
    made = qwen3_moe()
    path = gguf_file(made, tmp_path / "model.gguf", experts="Q4_K", down="MXFP4", trunk="Q8_0")
    made.load_state_dict(decoded_state(path, made))
    check(load(path, expert_memory="30%", dtype="float32"), made.eval())


@pytest.mark.parametrize("kind", ["MXFP4", "Q8_0", "F16"])
@torch.no_grad()
def test_gpt_oss(tmp_path: Path, load: Load, kind: str) -> None:
    """Against plain transformers with the experts that the blocks stand for, gates and ups in their places."""
    made = gpt_oss()
    path = gguf_file(made, tmp_path / "model.gguf", experts=kind)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for layer, block in enumerate(made.model.layers):
        gate, up, down = (
            torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy()).transpose(1, 2)
            for each in (found[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        )
        experts = block.mlp.experts
        experts.gate_up_proj[..., ::2], experts.gate_up_proj[..., 1::2] = gate, up
        experts.down_proj.copy_(down)
    for share in (1.0, "30%"):
        check(load(path, expert_memory=share, dtype="float32"), made.eval())


def test_a_model_in_several_files(tmp_path: Path, load: Load) -> None:
    """From whichever of them it is opened; none of its trunk may be taken for missing because another file has it."""
    made = qwen3_moe()
    path = gguf_file(made, tmp_path / "model.gguf", tensors_a_file=7)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 2
    opened = OpenModel.open(files[-1])
    with opened.checkpoint:
        assert opened.checkpoint.path == path
        assert not opened.config.tie_word_embeddings
    (tmp_path / "whole").mkdir()
    whole = gguf_file(made, tmp_path / "whole" / "model.gguf")
    check(load(path, expert_memory="30%", dtype="float32"), by_transformers(whole, made))
    files[1].unlink()
    with pytest.raises(CheckpointError, match=rf"cannot open .*{files[1].name}.*fetch the file again"):
        load(path)


@pytest.mark.parametrize(
    ("kinds", "stored_bytes"),
    [
        ({"experts": "Q8_0"}, WEIGHTS // 32 * 34),
        ({"experts": "Q4_K", "down": "Q6_K"}, WEIGHTS // 256 * (2 * 144 + 210) // 3),
        ({"experts": "MXFP4"}, WEIGHTS // 32 * 17),
        ({"experts": "BF16"}, 2 * WEIGHTS),
    ],
)
def test_an_expert_is_read_as_it_is_stored(tmp_path: Path, kinds: dict[str, Any], stored_bytes: int) -> None:
    opened = OpenModel.open(gguf_file(qwen3_moe(), tmp_path / "model.gguf", **kinds))
    assert opened.dtype == torch.bfloat16
    with opened.checkpoint:
        source = opened.open_experts()
        tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in source.shape.shapes]
        read = source.read(ExpertKey(1, 3), *tensors)
        source.close()
    assert read == source.bytes_read == source.stored_bytes == stored_bytes


@pytest.mark.parametrize("make", [qwen3_moe, qwen2_moe, minimax_m2])
def test_the_configuration_is_what_transformers_reads_and_what_it_leaves_out(tmp_path: Path, make: Make) -> None:
    made = make()
    path = gguf_file(made, tmp_path / "model.gguf")
    opened = OpenModel.open(path)
    opened.checkpoint.close()
    found, theirs = opened.checkpoint.config, load_gguf_checkpoint(path)["config"]
    theirs.pop("_model_name_or_path", None)
    own = {"dtype", "moe_intermediate_size", "shared_expert_intermediate_size"}
    assert {name: value for name, value in found.items() if name not in own} == {
        name: value for name, value in theirs.items() if name not in own
    }
    wanted = made.config.to_dict()
    named = {name: value for name, value in found.items() if name in wanted and name not in ("dtype", "rms_norm_eps")}
    assert named == {name: wanted[name] for name in named}
    assert found["rms_norm_eps"] == pytest.approx(1e-6)
    assert opened.config.rope_parameters["rope_theta"] == made.config.rope_parameters["rope_theta"]
    assert (opened.config.pad_token_id, opened.config.eos_token_id) == (260, 259)


@pytest.mark.parametrize("make", [qwen3_moe, minimax_m2, gpt_oss])
def test_the_tokenizer_and_the_template_are_in_the_file(tmp_path: Path, make: Make) -> None:
    path = gguf_file(make(), tmp_path / "model.gguf")
    if make is gpt_oss and "qwen35moe" not in GGUF_ARCHS:
        with pytest.raises(CheckpointError, match="install a later transformers"):
            read_tokenizer(path)
        return
    found = read_tokenizer(path)
    assert found is not None
    text = "the SELECT name, 12.5% von Käse FROM users<|end|>"
    assert found.encode(text).ids == tokenizer().encode(text).ids
    template = ChatTemplate.read(path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hello"}], None) == "<|begin|>hello"


def test_a_worker_serves_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = gguf_file(qwen3_moe(), tmp_path / "small.gguf")
    settings = {"model.path": str(path), "workers.device": "cpu", "workers.expert_memory": "50%"}
    loaded = load_engine(load_config(env={}, overrides=settings), lambda events: None, WorkerObserver(), None)
    try:
        assert (loaded.model.name, loaded.model.dtype) == ("small", "bfloat16")
    finally:
        loaded.close()


def test_what_is_not_done_to_a_file(tmp_path: Path) -> None:
    path, out = gguf_file(qwen3_moe(), tmp_path / "model.gguf"), tmp_path / "out"
    opened = OpenModel.open(path)
    asked: list[Callable[[], Any]] = [
        lambda: pack(path, out, pieces=opened.pieces, experts_per_layer=(8, 8), shape=opened.family.shape),
        lambda: cut(opened, ExpertPool(((0, 1), (0, 1))), out, chosen_by="nobody"),
        lambda: record(path),
        lambda: verify(path),
    ]
    with opened.checkpoint:
        for ask in asked:
            with pytest.raises(CheckpointError, match=r"model\.gguf is a GGUF file, which is served as it is"):
                ask()
    assert not out.exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"general.architecture": "llama"},
            "architecture 'llama'; of those with experts, only gpt-oss, minimax-m2, .*qwen3moe",
        ),
        ({"qwen3moe.rope.scaling.type": "yarn"}, r"wants its positions scaled \('yarn'\), which is not read"),
    ],
)
def test_what_is_not_read_from_a_file(tmp_path: Path, load: Load, metadata: dict[str, str], message: str) -> None:
    path = gguf_file(qwen3_moe(), tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(UnsupportedModel, match=message):
        load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"qwen3moe.expert_count": 1 << 30}, r"model\.gguf is not valid: its num_experts is 1073741824"),
        # Every layer's gate is wrong, and transformers may read the layers side by side: any of them may be named.
        ({"qwen3moe.expert_count": 9}, r"'blk\.[01]\.ffn_gate_inp\.weight' makes no .*: its shape is \(8, 256\)"),
        ({"qwen3moe.embedding_length": 512}, "its config calls for"),
        ({"qwen3moe.block_count": 3}, "lacks the expert tensors of layer 2"),
    ],
)
def test_metadata_that_is_not_that_of_the_tensors(
    tmp_path: Path, load: Load, metadata: dict[str, int], message: str
) -> None:
    path = gguf_file(qwen3_moe(), tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load(path)


def test_a_folder_with_nothing_but_a_file(tmp_path: Path, load: Load) -> None:
    path = gguf_file(qwen3_moe(), tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=rf"of a GGUF file give its own path: {path}"):
        load(tmp_path)
