"""Slices: plain transformers gives the pooled model's logits with the chosen experts alone, and they merge back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pager.engine.paged_model import load_paged_model
from pager.errors import CheckpointError, ConfigError, InvalidRequest, PoolTooSmall, UnsupportedModel
from pager.models.open_model import OpenModel
from pager.pools import slices
from pager.pools.slices import SLICE_FIELD, Merged, Slice, cut, merge
from pager.store.pack import record as record_checksums
from pager.store.reads import raw_bytes
from pager.types import ExpertPool, PoolPolicy, PoolSource

pytestmark = pytest.mark.slow

MakeSmall = Callable[..., Any]

FAMILIES = ("emo", "olmoe", "mixtral", "qwen3_moe", "qwen2_moe", "flex_olmo")
UNIFORM = ExpertPool(((0, 3, 6), (1, 2, 7), (4, 5, 6)))
UNEVEN = ExpertPool(((0, 3), (1, 2, 5, 7), (4, 5, 6)))
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


def cut_to(path: Path, out: Path, pool: ExpertPool = UNIFORM, **options: Any) -> Slice:
    model = OpenModel.open(path)
    with model.checkpoint:
        return cut(model, pool, out, chosen_by="a test", **options)


def plain_model(path: Path) -> PreTrainedModel:
    """As transformers loads it, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def pooled_logits(path: Path, pool: ExpertPool, ids: Tensor) -> Tensor:
    paged = load_paged_model(path, device="cpu", dtype="float32")
    try:
        document = paged.routing(PoolPolicy(source=PoolSource.FIXED, fixed=pool))
        with torch.inference_mode(), paged.step([document], prefill=True):
            logits: Tensor = paged.model(ids, use_cache=False).logits
        return logits
    finally:
        paged.close()


def weights(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def differing(left: Path, right: Path) -> set[str]:
    """The names of the tensors that are not the same to the bit."""
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not ours[name].equal(theirs[name])}


@pytest.fixture
def mixtral(small: MakeSmall) -> Any:
    return small("mixtral")


# --- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_in_plain_transformers_gives_the_pooled_models_logits(
    small: MakeSmall, tmp_path: Path, family: str
) -> None:
    made = small(family)
    cut_to(made.path, tmp_path / "slice")
    ids = made.prompt(num_rows=1)
    expected = pooled_logits(made.path, UNIFORM, ids)
    whole = plain_model(made.path)(ids).logits
    assert not torch.allclose(whole, expected, atol=1e-2), "the pool makes no difference"
    sliced = plain_model(tmp_path / "slice")
    torch.testing.assert_close(sliced(ids).logits, expected, **TOLERANCE)
    num_kept = 3 + (family == "emo")
    assert {len(layer.mlp.gate.weight) for layer in sliced.model.layers} == {num_kept}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_is_paged_as_any_checkpoint(
    small: MakeSmall, load: Callable[..., PreTrainedModel], tmp_path: Path, family: str
) -> None:
    made = small(family)
    cut_to(made.path, tmp_path / "slice")
    ids = made.prompt(num_rows=1)
    paged = load(tmp_path / "slice", expert_memory="50%")
    torch.testing.assert_close(paged(ids).logits, pooled_logits(made.path, UNIFORM, ids), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("emo", {"num_shared_experts": 2, "num_experts": 10, "num_experts_per_tok": 4}),
        ("emo", {"num_shared_experts": 0, "num_experts": 8, "norm_topk_prob": True, "num_experts_per_tok": 2}),
        ("olmoe", {"norm_topk_prob": True}),
        ("olmoe", {"tie_word_embeddings": True}),
        ("qwen3_moe", {"norm_topk_prob": True}),
    ],
)
def test_shared_experts_and_both_rules_after_top_k(
    small: MakeSmall, tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    made = small(family, **config)
    cut_to(made.path, tmp_path / "slice")
    ids = made.prompt(num_rows=1)
    expected = pooled_logits(made.path, UNIFORM, ids)
    torch.testing.assert_close(plain_model(tmp_path / "slice")(ids).logits, expected, **TOLERANCE)


def test_emo_takes_another_number_in_every_layer(small: MakeSmall, tmp_path: Path) -> None:
    made = small("emo", num_experts_per_layer=[9, 0, 9], dense_intermediate_size=16)
    pool = ExpertPool(((0, 3), (), (1, 2, 5, 7)))
    cut_to(made.path, tmp_path / "slice", pool)
    ids = made.prompt(num_rows=1)
    expected = pooled_logits(made.path, pool, ids)
    torch.testing.assert_close(plain_model(tmp_path / "slice")(ids).logits, expected, **TOLERANCE)
    assert json.loads((tmp_path / "slice" / "config.json").read_text())["num_experts_per_layer"] == [3, 0, 5]


def test_layers_without_experts_do_not_count_as_another_number(small: MakeSmall, tmp_path: Path) -> None:
    made = small("qwen3_moe", mlp_only_layers=[1])
    pool = ExpertPool(((0, 3, 6), (), (4, 5, 6)))
    cut_to(made.path, tmp_path / "slice", pool)
    ids = made.prompt(num_rows=1)
    expected = pooled_logits(made.path, pool, ids)
    torch.testing.assert_close(plain_model(tmp_path / "slice")(ids).logits, expected, **TOLERANCE)


def test_a_sharded_checkpoint_becomes_the_same_slice(small: MakeSmall, tmp_path: Path) -> None:
    made = small("emo", save={"max_shard_size": "40KB"})
    assert len(list(made.path.glob("*.safetensors"))) > 1
    cut_to(made.path, tmp_path / "slice")
    made.plain.save_pretrained(tmp_path / "single")
    cut_to(tmp_path / "single", tmp_path / "other")
    assert not differing(tmp_path / "slice", tmp_path / "other")


@pytest.mark.parametrize("family", ["emo", "mixtral", "qwen3_moe"])
def test_experts_that_are_stored_stacked_are_cut_and_merged_too(small: MakeSmall, tmp_path: Path, family: str) -> None:
    made = small(family, save={"save_original_format": False})
    stacked = [name for name in weights(made.path) if name.endswith("experts.gate_up_proj")]
    cut_to(made.path, tmp_path / "slice")
    ids = made.prompt(num_rows=1)
    expected = pooled_logits(made.path, UNIFORM, ids)
    torch.testing.assert_close(plain_model(tmp_path / "slice")(ids).logits, expected, **TOLERANCE)
    if not stacked:  # EMO is always stored expert by expert
        return
    tensors = weights(tmp_path / "slice")
    tensors[stacked[1]][2] += 1.0
    save_file(tensors, tmp_path / "slice" / "model.safetensors", metadata={"format": "pt"})
    assert merge(tmp_path / "slice", made.path, tmp_path / "merged") == Merged(1, 0, ())
    assert differing(made.path, tmp_path / "merged") == {stacked[1]}
    before, after = weights(made.path)[stacked[1]], weights(tmp_path / "merged")[stacked[1]]
    assert [row for row in range(8) if not before[row].equal(after[row])] == [7]


def test_experts_alone_are_stored_in_another_dtype(mixtral: Any, tmp_path: Path) -> None:
    as_stored = cut_to(mixtral.path, tmp_path / "stored")
    in_half = cut_to(mixtral.path, tmp_path / "half", expert_dtype=torch.bfloat16)
    tensors = weights(tmp_path / "half")
    assert {tensor.dtype for name, tensor in tensors.items() if ".experts." in name} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in tensors.items() if ".experts." not in name} == {torch.float32}
    assert in_half.nbytes < as_stored.nbytes
    ids = mixtral.prompt(num_rows=1)
    torch.testing.assert_close(
        plain_model(tmp_path / "half")(ids).logits, plain_model(tmp_path / "stored")(ids).logits, rtol=0.0, atol=0.1
    )


def test_the_card_and_the_config_say_what_was_kept(small: MakeSmall, tmp_path: Path) -> None:
    made = small("emo")
    (made.path / "README.md").write_text("the whole model's card")
    (made.path / "tokenizer_config.json").write_text("{}")
    result = cut_to(made.path, tmp_path / "slice", ExpertPool(UNIFORM.experts, 0.875))
    card = (tmp_path / "slice" / "README.md").read_text()
    with OpenModel.open(made.path).checkpoint as whole:
        fingerprint = whole.fingerprint
    for said in (fingerprint, "a test", "87.5%", "12 of the 27 experts", "| 1 | 3 + 1 of 9 | 1 2 7 |", "import pager"):
        assert said in card
    assert (result.num_experts, result.num_left_out) == (12, 15)
    recorded = json.loads((tmp_path / "slice" / "config.json").read_text())[SLICE_FIELD]
    assert recorded["fingerprint"] == fingerprint
    assert recorded["experts"] == [[0, 3, 6, 8], [1, 2, 7, 8], [4, 5, 6, 8]]
    assert (tmp_path / "slice" / "README.whole.md").read_text() == "the whole model's card"
    assert (tmp_path / "slice" / "tokenizer_config.json").exists()


def test_what_is_held_does_not_grow_with_the_model(
    mixtral: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def measured(tensor: Tensor) -> memoryview:
        sizes.append(tensor.nbytes)
        return raw_bytes(tensor)

    monkeypatch.setattr(slices, "raw_bytes", measured)
    monkeypatch.setattr("pager.store.reads.STAGING_BYTES", 512)
    cut_to(mixtral.path, tmp_path / "slice")
    assert max(sizes) == 512
    sizes.clear()
    trained(tmp_path / "slice", tmp_path / "trained", lambda name: True)
    merge(tmp_path / "trained", mixtral.path, tmp_path / "merged")
    assert max(sizes) == 512


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_a_pool_whose_layers_differ_is_refused_where_the_config_has_one_number(
    small: MakeSmall, tmp_path: Path, family: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"2 to 4 experts a layer.*'{family}'.*one number.*pool of 3 experts"):
        cut_to(small(family).path, tmp_path / "slice", UNEVEN)
    assert not (tmp_path / "slice").exists()


def test_a_pool_that_no_gate_can_pick_from_is_refused(mixtral: Any, tmp_path: Path) -> None:
    with pytest.raises(PoolTooSmall, match="layer 0 of the pool has 1 routed experts"):
        cut_to(mixtral.path, tmp_path / "slice", ExpertPool(((0,), (1,), (2,))))
    with pytest.raises(InvalidRequest, match="distinct ascending routed experts below 8"):
        cut_to(mixtral.path, tmp_path / "slice", ExpertPool(((0, 8), (1, 2), (2, 3))))


def test_a_family_whose_gate_cannot_be_cut_is_refused_by_name(
    mixtral: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(slices._COUNT_FIELDS, "mixtral")
    with pytest.raises(
        UnsupportedModel, match="the gate of model type 'mixtral' cannot be cut; those of emo, flex_olmo, olmoe"
    ):
        cut_to(mixtral.path, tmp_path / "slice")


def test_always_active_experts_are_refused(small: MakeSmall, tmp_path: Path) -> None:
    made = small("emo", always_active_experts=[2], num_shared_experts=0, num_experts=8)
    with pytest.raises(UnsupportedModel, match="always-active"):
        cut_to(made.path, tmp_path / "slice")


def test_damage_and_a_folder_in_the_way_leave_nothing_behind(mixtral: Any, tmp_path: Path) -> None:
    record_checksums(mixtral.path)
    with OpenModel.open(mixtral.path).checkpoint as checkpoint:
        spec = checkpoint.specs["model.layers.2.block_sparse_moe.gate.weight"]
    data = bytearray((mixtral.path / spec.file).read_bytes())
    data[spec.offset] ^= 1
    (mixtral.path / spec.file).write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        cut_to(mixtral.path, tmp_path / "slice")
    assert [path.name for path in tmp_path.iterdir()] == ["mixtral"]
    (tmp_path / "slice").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        cut_to(mixtral.path, tmp_path / "slice")


# --- merging ----------------------------------------------------------------------------------------------------------


def trained(path: Path, out: Path, changes: Callable[[str], bool], dtype: torch.dtype = torch.float32) -> Path:
    """Saves the slice as transformers does after it was trained, every parameter that `changes` names moved."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if changes(name):
                parameter += 0.5
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_that_was_not_trained_merges_into_the_same_whole(small: MakeSmall, tmp_path: Path, family: str) -> None:
    made = small(family, save={"max_shard_size": "60KB"})
    cut_to(made.path, tmp_path / "slice")
    trained(tmp_path / "slice", tmp_path / "saved", lambda name: False)
    for name in ("slice", "saved"):
        assert merge(tmp_path / name, made.path, tmp_path / f"{name}-merged") == Merged(0, 0, ())
        for file in (*made.path.glob("*.safetensors"), made.path / "config.json"):
            assert (tmp_path / f"{name}-merged" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_changes_what_was_trained_and_nothing_else(small: MakeSmall, tmp_path: Path, family: str) -> None:
    made = small(family)
    cut_to(made.path, tmp_path / "slice")
    trained(tmp_path / "slice", tmp_path / "trained", lambda name: ".layers.1.mlp" in name and "shared" not in name)
    merged = merge(tmp_path / "trained", made.path, tmp_path / "merged")
    kept = (*UNIFORM.experts[1], *((8,) if family == "emo" else ()))
    assert merged == Merged(len(kept), 1, ())
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    gate = f"model.layers.1.{block}.gate.weight"
    changed = differing(made.path, tmp_path / "merged")
    experts = {f"model.layers.1.{block}.experts.{expert}." for expert in kept}
    assert {name for name in changed if not name.startswith(tuple(experts))} == {gate}
    assert len(changed) == 3 * len(kept) + 1
    before, after = weights(made.path)[gate], weights(tmp_path / "merged")[gate]
    assert {row for row in range(len(before)) if not before[row].equal(after[row])} == set(kept)

    ids = made.prompt(num_rows=1)
    expected = plain_model(tmp_path / "trained")(ids).logits
    torch.testing.assert_close(pooled_logits(tmp_path / "merged", UNIFORM, ids), expected, **TOLERANCE)


def test_rounding_to_a_slices_precision_is_no_change(mixtral: Any, tmp_path: Path) -> None:
    """A float32 whole, a slice that was loaded, trained and saved in bfloat16."""
    cut_to(mixtral.path, tmp_path / "slice")
    trained(tmp_path / "slice", tmp_path / "trained", lambda name: name == "model.norm.weight", torch.bfloat16)
    assert merge(tmp_path / "trained", mixtral.path, tmp_path / "merged") == Merged(0, 0, ("model.norm.weight",))
    assert differing(mixtral.path, tmp_path / "merged") == {"model.norm.weight"}


def test_a_slice_goes_back_only_into_its_own_model(small: MakeSmall, mixtral: Any, tmp_path: Path) -> None:
    cut_to(mixtral.path, tmp_path / "slice")
    with pytest.raises(CheckpointError, match="was cut from the model with fingerprint"):
        merge(tmp_path / "slice", small("olmoe").path, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="is not a slice"):
        merge(mixtral.path, mixtral.path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "damage",
    [
        7,
        {},
        {"fingerprint": "x", "experts": 3},
        {"fingerprint": "x", "experts": [["a"]]},
        {"fingerprint": "x", "experts": [[2, 1]]},
        {"fingerprint": "x", "experts": [[-1]]},
        {"fingerprint": "x", "experts": [[0.5]]},
        {"fingerprint": "x", "experts": [[[0]]]},
    ],
)
def test_a_damaged_record_is_one_sentence(mixtral: Any, tmp_path: Path, damage: Any) -> None:
    cut_to(mixtral.path, tmp_path / "slice")
    change_config(tmp_path / "slice", damage)
    with pytest.raises(CheckpointError, match="damaged 'expert_slice'"):
        merge(tmp_path / "slice", mixtral.path, tmp_path / "merged")


def test_a_record_of_other_experts_is_refused(mixtral: Any, tmp_path: Path) -> None:
    record = cut_to(mixtral.path, tmp_path / "slice").record.as_config
    change_config(tmp_path / "slice", {**record, "experts": [[0, 3, 6, 7], [1, 2, 7], [4, 5, 6]]})
    with pytest.raises(CheckpointError, match=r"lacks 'model.layers.0.block_sparse_moe.experts.3|has shape"):
        merge(tmp_path / "slice", mixtral.path, tmp_path / "merged")
    change_config(tmp_path / "slice", {**record, "experts": [[0, 3, 99], [1, 2, 7], [4, 5, 6]]})
    with pytest.raises(CheckpointError, match=r"not of .*first 'model.layers.0.block_sparse_moe.experts.2|layer 0"):
        merge(tmp_path / "slice", mixtral.path, tmp_path / "merged")


def change_config(path: Path, record: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, SLICE_FIELD: record}))
