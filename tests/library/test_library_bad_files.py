"""Checkpoints with damaged or hostile files: whatever they say, it ends in one error of ours, at once."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pager
from pager.cli.local import Local
from pager.errors import CheckpointError, PagerError
from pager.memory import Budgets
from pager.types import PoolAsk, SamplingParams
from tests.library.conftest import MODELS

pytestmark = pytest.mark.slow

MakeSmall = Callable[..., Any]
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**5, 10**9, 2**63, 10**30, 0.0, 0.5, -1.5, 1e300, "", "x", "4", "__class__",
    [], [1], [0], ["a"], [None], [10**9], [[1]], {}, {"a": 1}, {"rope_type": "linear", "factor": 2.0}, {"type": "yarn"},
    {"rope_type": "longrope", "factor": 1.0}, {"rope_type": "dynamic"}, {"rope_type": "x"}, {"rope_theta": 0},
    float("inf"), float("nan"),
)  # fmt: skip
MORE_FIELDS = (
    "rope_scaling", "rope_parameters", "rope_theta", "layer_types", "num_labels", "id2label", "dtype", "torch_dtype",
    "quantization_config", "auto_map", "architectures", "attn_implementation", "_experts_implementation", "head_dim",
    "sliding_window", "use_sliding_window", "is_encoder_decoder", "output_hidden_states", "return_dict", "self",
    "num_experts_per_layer", "num_shared_experts_per_layer", "always_active_experts", "always_active_experts_per_layer",
    "dense_intermediate_size", "to_dict", "attribute_map", "sub_configs",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family, make in MODELS.items():
        torch.manual_seed(0)
        found[family] = tmp_path_factory.mktemp("models") / family
        make().save_pretrained(found[family])
    return found


@pytest.fixture(scope="module")
def config_of(folders: dict[str, Path]) -> Iterator[Callable[[str], dict[str, Any]]]:
    configs = {family: (folder / "config.json").read_text() for family, folder in folders.items()}
    yield lambda family: dict(json.loads(configs[family]))
    for family, folder in folders.items():
        (folder / "config.json").write_text(configs[family])


def generate(folder: Path) -> None:
    local = Local(folder, "cpu", "float32")
    budgets = Budgets(expert_memory="50%")
    list(local.generate((1, 2, 3), SamplingParams(max_tokens=2), (), PoolAsk(), None, budgets))


def refusal_of(folder: Path) -> PagerError | None:
    try:
        generate(folder)
    except PagerError as error:
        return error
    return None


def check_refusal(error: PagerError | None) -> None:
    """A line that a user can read; None is fine too."""
    if error is not None:
        assert error.reason != "INTERNAL", error
        assert "\n" not in str(error)
        assert len(str(error)) < 1500


@pytest.mark.parametrize("family", sorted(MODELS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_config_with_odd_values_runs_or_is_refused(
    folders: dict[str, Path], config_of: Callable[[str], dict[str, Any]], family: str, data: st.DataObject
) -> None:
    config = config_of(family)
    names = st.sampled_from([*config, *MORE_FIELDS])
    config |= data.draw(st.dictionaries(names, st.sampled_from(ODD), min_size=1, max_size=2))
    (folders[family] / "config.json").write_text(json.dumps(config))
    check_refusal(refusal_of(folders[family]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_header_with_odd_values_runs_or_is_refused(folders: dict[str, Path], data: st.DataObject) -> None:
    path = folders["olmoe"] / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()) and name != "__metadata__":
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        header[name][field] = data.draw(st.sampled_from([*ODD, [2**62, 4], [1] * 100_000, "F8_E4M3", "U64"]))
    else:
        header[name] = data.draw(st.sampled_from(ODD))
    encoded = json.dumps(header).encode()
    try:
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
        check_refusal(refusal_of(folders["olmoe"]))
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 10**5, "num_hidden_layers is 100000; it must be a whole number from 1 to 1024"),
        ("num_hidden_layers", 10**8, "from 1 to 1024"),
        ("num_experts", 10**9, "from 0 to 65536"),
        ("num_labels", 10**9, "from 0 to 65536"),
        ("num_experts_per_tok", 1000, "at most 9, the experts of a layer"),
        ("num_attention_heads", 0, "num_attention_heads is 0"),
        ("num_attention_heads", "4", "num_attention_heads is '4'"),
        ("num_key_value_heads", 3, "a multiple of num_key_value_heads, 3"),
        ("hidden_act", "__import__('os')", "one of gelu, "),
        ("rms_norm_eps", 2, "from 0 to 1"),
        ("max_position_embeddings", -1, "max_position_embeddings is -1"),
        ("rope_theta", 0, "rope_theta is 0"),
        ("rope_scaling", {"type": "x", "factor": 2.0}, "rope_type is 'x'; it must be one of default, linear"),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "linear", "factor": "y"}, "factor is 'y'"),
    ],
)
def test_a_config_that_no_model_has_is_refused_at_once(
    folders: dict[str, Path], config_of: Callable[[str], dict[str, Any]], field: str, value: Any, said: str
) -> None:
    (folders["emo"] / "config.json").write_text(json.dumps(config_of("emo") | {field: value}))
    began_s = time.process_time()
    with pytest.raises(CheckpointError, match=r"config\.json is not valid") as caught:
        pager.load_model(folders["emo"])
    assert said in caught.value.message
    assert time.process_time() - began_s < 2


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(
    folders: dict[str, Path], config_of: Callable[[str], dict[str, Any]], number: str
) -> None:
    text = json.dumps(config_of("emo") | {"router_aux_loss_coef": 0.125}).replace("0.125", number)
    (folders["emo"] / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"not a number of JSON|it must be a finite number"):
        pager.load_model(folders["emo"])


def test_an_implementation_that_a_config_names_is_not_fetched(
    folders: dict[str, Path], config_of: Callable[[str], dict[str, Any]]
) -> None:
    named = {"_attn_implementation": "some-repository/some-kernel", "experts_implementation": "some-repository/another"}
    (folders["emo"] / "config.json").write_text(json.dumps(config_of("emo") | named))
    generate(folders["emo"])


def test_more_tensors_than_any_model_has_are_refused_before_they_are_parsed(small: MakeSmall) -> None:
    path = small("olmoe").path
    entry = b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    encoded = b"{" + b",".join(entry % number for number in range(400_000)) + b"}"
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    began_s = time.process_time()
    with pytest.raises(CheckpointError, match="has more than 262144 tensors"):
        pager.load_model(path)
    assert time.process_time() - began_s < 2


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "generation_config.json", "checksums.json", "model.safetensors.index.json"],
)
def test_a_named_pipe_in_the_place_of_a_file_is_refused_without_a_wait(small: MakeSmall, name: str) -> None:
    path = small("olmoe").path
    (path / name).unlink(missing_ok=True)
    if name == "model.safetensors.index.json":
        (path / "model.safetensors").unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match=f"{name}.*named pipe"):
        pager.load_model(path)
