"""slice: which experts it keeps, by every way to say so, what it refuses, and the way back."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pager.models.open_model import OpenModel
from pager.predict.fitted import Codebook, PredictorFile
from pager.types import Share
from tests.support.checkpoints import saved
from tests.support.quantised import deepseek_v3, fp8_checkpoint, gptq_checkpoint, gptq_parts, qwen3_moe

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]
TEXTS = ["SELECT a FROM b WHERE c = 1", "SELECT d FROM e", "INSERT INTO f"]


@pytest.fixture(autouse=True)
def no_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "REDIS_URL_FILE", "EXPERT_PAGER_POOLS_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "sql.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_pool_said_in_three_ways_is_one_slice(run: Run, checkpoint: Path, examples: Path, tmp_path: Path) -> None:
    kept = ("--pools", tmp_path / "pools")
    named = run(
        "calibrate", "--name", "sql", "--examples", examples, "--model", checkpoint, *kept, "--pool", 4, "--json"
    )
    (tmp_path / "pool.json").write_text(named.stdout)
    layers = [[*layer, 8] for layer in answer(named)["pool"]["layers"]]
    (tmp_path / "list.json").write_text(json.dumps(answer(named)["pool"]["layers"]))
    ways = {
        "named": ("--pool", "sql", *kept),
        "chosen": ("--examples", examples, "--size", 4),
        "printed": ("--experts-file", tmp_path / "pool.json"),
        "listed": ("--experts-file", tmp_path / "list.json"),
    }
    weights = []
    for name, options in ways.items():
        made = answer(run("slice", checkpoint, tmp_path / name, *options, "--json"))
        assert (made["experts"], made["num_experts"]) == (layers, 15), name
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert len(set(weights)) == 1
    card = (tmp_path / "named" / "README.md").read_text()
    assert "the named pool 'sql', method mean over 3 examples" in card
    assert "method mean over 3 examples" in (tmp_path / "chosen" / "README.md").read_text()
    assert "sql.jsonl" in (tmp_path / "chosen" / "README.md").read_text()


def test_a_slice_answers_within_the_commands(run: Run, checkpoint: Path, examples: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([[0, 1, 2], [2, 3, 4], [5, 6, 7]]))
    made = run("slice", checkpoint, tmp_path / "slice", "--experts-file", tmp_path / "list.json", "--experts", "bf16")
    assert made.returncode == 0, made.stderr
    assert "12 of 27 experts" in made.stdout
    facts = answer(run("inspect", tmp_path / "slice", "--json"))
    assert (facts["experts_per_layer"], facts["stored_dtypes"]) == ([4, 4, 4], ["bfloat16", "float32"])
    answered = answer(
        run("generate", "hello", "--model", tmp_path / "slice", "--max-tokens", 3, "--ignore-eos", "--json")
    )
    assert answered["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_slice_is_the_slice_packed(run: Run, checkpoint: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "list.json").write_text(json.dumps([[0, 1, 2], [2, 3, 4], [5, 6, 7]]))
    kept = ("--experts-file", tmp_path / "list.json")
    made = answer(run("slice", checkpoint, tmp_path / "at-once", *kept, "--experts", kind, "--json"))
    assert made["num_experts"] == 12
    assert made["bytes"] == sum(path.stat().st_size for path in (tmp_path / "at-once").iterdir())
    assert run("slice", checkpoint, tmp_path / "slice", *kept).returncode == 0
    assert run("pack", tmp_path / "slice", tmp_path / "packed", "--experts", kind).returncode == 0
    for name in ("experts.pack", "trunk.safetensors", "config.json"):
        assert (tmp_path / "at-once" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    assert f"experts in {kind}, packed for expert-pager" in (tmp_path / "at-once" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at-once", "list.json", "packed", "slice"]
    assert answer(run("inspect", tmp_path / "at-once", "--dtype", "auto", "--json"))["format"].startswith(
        f"{kind}, a scale in"
    )


def test_a_slice_that_cannot_be_packed_leaves_nothing(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([[0, 1, 2], [2, 3, 4], [5, 6, 7]]))
    kept = ("--experts-file", tmp_path / "list.json")
    refused = run("slice", checkpoint, tmp_path / "slice", *kept, "--experts", "int4")
    assert refused.returncode == 1
    assert "down_proj of 32 x 16 cannot be packed as int4" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["list.json"]


def test_a_slice_of_a_quantised_model_keeps_its_format(run: Run, tmp_path: Path) -> None:
    path, _ = fp8_checkpoint(qwen3_moe(), tmp_path / "fp8")
    (tmp_path / "list.json").write_text(json.dumps([[0, 1, 2], [2, 3, 4]]))
    kept = ("--experts-file", tmp_path / "list.json")
    refused = run("slice", path, tmp_path / "slice", *kept, "--experts", "bf16")
    assert refused.returncode == 1
    assert "are quantised (fp8 in blocks of 128 x 128); leave --experts out" in refused.stderr
    assert run("slice", path, tmp_path / "slice", *kept).returncode == 0
    assert answer(run("inspect", tmp_path / "slice", "--json"))["format"].startswith("fp8, a scale in float32")
    card = (tmp_path / "slice" / "README.md").read_text()
    assert "quantised as fp8 is (fp8 in blocks of 128 x 128): loads in expert-pager" in card
    assert "--merge" not in card
    tensors = load_file(tmp_path / "slice" / "model.safetensors")
    trained = {name: each.float() for name, each in tensors.items() if not name.endswith("_scale_inv")}
    save_file(trained, tmp_path / "slice" / "model.safetensors")
    merged = run("slice", "--merge", tmp_path / "slice", "--into", path, tmp_path / "merged")
    assert f"{path} is quantised, and what was trained goes back into plain floats only" in merged.stderr
    assert not (tmp_path / "merged").exists()


def test_quantised_gates_are_not_cut(run: Run, tmp_path: Path) -> None:
    path, _ = gptq_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    for name in [each for each in tensors if each.endswith("mlp.gate.weight")]:
        parts, _ = gptq_parts(tensors.pop(name), 4, "gptq", in_order=True)
        tensors |= {name.replace("weight", end): part for end, part in parts.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert run("inspect", path).returncode == 0
    (tmp_path / "list.json").write_text(json.dumps([[0, 1, 2], [2, 3, 4]]))
    refused = run("slice", path, tmp_path / "slice", "--experts-file", tmp_path / "list.json")
    assert refused.returncode == 1
    assert f"the gates of {path} are quantised (tensor 'model.layers.0.mlp.gate." in refused.stderr
    assert not (tmp_path / "slice").exists()


def test_what_cannot_be_cut_is_said_before_experts_are_chosen(
    run: Run, checkpoint: Path, examples: Path, tmp_path: Path
) -> None:
    options = ("--examples", examples, "--size", "50%")
    path = saved(deepseek_v3(), tmp_path / "model")
    (path / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text())
    assert "the gate of model type 'deepseek_v3' cannot be cut" in run("slice", path, tmp_path / "s", *options).stderr
    assert run("pack", checkpoint, tmp_path / "packed").returncode == 0
    assert "is packed; slice the checkpoint that" in run("slice", tmp_path / "packed", tmp_path / "s", *options).stderr


def test_the_experts_of_a_codeword(run: Run, tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "models" / "emo-tiny"
    with OpenModel.open(model).checkpoint as checkpoint:
        file = PredictorFile.load(model, checkpoint.fingerprint)
    codebook = Codebook.of(file, OpenModel.open(model).facts)
    assert codebook is not None
    name = codebook.names[1]
    made = answer(run("slice", model, tmp_path / "slice", "--codeword", name, "--size", "6.25%", "--json"))
    routed = [tuple(each for each in layer if each < 127) for layer in made["experts"]]
    assert tuple(routed) == codebook.pool(name, Share(0.0625)).experts
    assert f"the codeword '{name}' of its codebook" in (tmp_path / "slice" / "README.md").read_text()
    unknown = run("slice", model, tmp_path / "other", "--codeword", "c99-0000", "--size", "6.25%")
    assert f"'c99-0000' is no codeword of {model}; it has {codebook.names[0]}, {name}" in unknown.stderr
    assert not (tmp_path / "other").exists()


def test_a_trained_slice_is_merged_back(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([[0, 1, 2], [2, 3, 4], [5, 6, 7]]))
    made = run("slice", checkpoint, tmp_path / "slice", "--experts-file", tmp_path / "list.json")
    assert made.returncode == 0, made.stderr
    path = tmp_path / "slice" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.experts.0.down_proj.weight"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    back = run("slice", "--merge", tmp_path / "slice", "--into", checkpoint, tmp_path / "merged")
    assert (back.returncode, back.stderr) == (0, "")
    assert "1 experts and 0 gates differ" in back.stdout
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert [name for name in before if not before[name].equal(after[name])] == [
        "model.layers.1.mlp.experts.2.down_proj.weight"
    ]
    tensors["model.norm.weight"] *= torch.tensor(2.0)
    save_file(tensors, path, metadata={"format": "pt"})
    again = run("slice", "--merge", tmp_path / "slice", "--into", checkpoint, tmp_path / "again")
    assert "1 tensors that every prompt uses differ too, first model.norm.weight" in again.stderr
    told = answer(run("slice", "--merge", tmp_path / "slice", "--into", checkpoint, tmp_path / "third", "--json"))
    assert told["changed"] == {"experts": 1, "gates": 0, "others": ["model.norm.weight"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("MODEL", "OUT"), "say exactly once which experts to keep"),
        (("MODEL", "OUT", "--pool", "a", "--experts-file", "f"), "say exactly once which experts to keep"),
        (("MODEL", "OUT", "--pool", "a", "--codeword", "c"), "say exactly once which experts to keep"),
        (("MODEL", "OUT", "--examples", "f"), "--examples and --codeword need --size"),
        (("MODEL", "OUT", "--codeword", "c"), "--examples and --codeword need --size"),
        (("MODEL", "OUT", "--pool", "a", "--size", "4"), "--examples and --codeword need --size"),
        (("MODEL", "OUT", "--pool", "a", "--method", "mean"), "--method would have no effect"),
        (("MODEL", "--pool", "a"), "give two folders"),
        (("MODEL", "OUT", "--experts-file", "f", "--server", "localhost:1"), "--server would have no effect"),
        (("OUT", "--merge", "MODEL"), "a merge is"),
        (("MODEL", "OUT", "--merge", "MODEL", "--into", "MODEL"), "a merge is"),
        (("OUT", "--merge", "MODEL", "--into", "MODEL", "--size", "4"), "a merge takes no other option"),
        (("OUT", "--merge", "MODEL", "--into", "MODEL", "--experts", "bf16"), "a merge takes no other option"),
    ],
)
def test_options_that_do_not_belong_together(
    run: Run, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    places = {"MODEL": checkpoint, "OUT": tmp_path / "out"}
    done = run("slice", *(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[0, 1", "cannot be read as a list of experts"),
        ('{"layers": 3}', "is not a list with the experts of each layer"),
        ("[[0.5, 1]]", "is not a list with the experts of each layer"),
        ("[[true, 1]]", "is not a list with the experts of each layer"),
        ("[[0, 1]]", "the pool has 1 layers and the model 3"),
        ("[[0, 8], [0, 1], [0, 1]]", "routed experts below 8"),
        ("[[0, 1], [1, 1], [0, 1]]", "distinct ascending"),
        ("[[0, 1], [1], [0, 1]]", "layer 1 of the pool has 1 routed experts"),
    ],
)
def test_a_list_that_is_none_is_one_line(run: Run, checkpoint: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "list.json").write_text(text)
    done = run("slice", checkpoint, tmp_path / "out", "--experts-file", tmp_path / "list.json")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_refusals_are_one_line(run: Run, checkpoint: Path, examples: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    out = tmp_path / "out"
    packed = tmp_path / "packed"
    assert run("pack", checkpoint, packed).returncode == 0
    chosen = ("--examples", examples, "--size", 4)
    for arguments, said in (
        ((checkpoint, tmp_path / "there", *chosen), "already exists"),
        ((checkpoint, out, "--pool", "law", "--pools", tmp_path / "pools"), "has no pool 'law'"),
        ((checkpoint, out, *chosen, "--experts", "int3"), "--experts is one of bf16, int8, int4, fp8"),
        ((checkpoint, out, "--examples", examples, "--size", "full"), "the model itself"),
        (
            (checkpoint, out, "--codeword", "c00", "--size", 4),
            "has no codebook; make one with `expert-pager fit-router",
        ),
        ((packed, out, *chosen), "is packed; slice the checkpoint that it was made from"),
        ((out, "--merge", packed, "--into", checkpoint), "is packed"),
        ((out, "--merge", checkpoint, "--into", checkpoint), "is not a slice"),
    ):
        done = run("slice", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert said in done.stderr
        assert not out.exists()
