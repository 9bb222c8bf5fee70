"""The benchmark programs do what they say on a toy checkpoint. Nothing here looks at a figure that is a time."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.peer_files import Tensors, write_compressed
from benchmarks.peers import NOT_INSTALLED, Gone, Group, Way, start, table
from benchmarks.prompts import domains_of
from benchmarks.shapes import SHAPES
from benchmarks.synthetic import write_checkpoint
from pager import load_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXPERT = "model.layers.{}.mlp.experts.{}"
GOLDEN = ROOT / "tests" / "data" / "golden" / "ckpt_emo_tiny"


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{program}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards."""
    path = tmp_path_factory.mktemp("synthetic") / "micro"
    done = run("synthetic", path, "--shape", "emo-micro", "--layers", "2", "--shard-size", "500KiB")
    assert done.returncode == 0, done.stderr
    return path


def test_a_synthetic_checkpoint_is_answered_alike_plain_and_paged(synthetic: Path, tmp_path: Path) -> None:
    """Plain transformers loads it too, so its format is the released one."""
    done = run("exactness", synthetic, "--prompts", "2", "--new-tokens", "4", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("exactness-micro_*.md")
    rows = re.findall(r"^\| (100|50|25|12\.5)% \|.*\| ok \|$", written.read_text(), re.MULTILINE)
    assert rows == ["100", "50", "25", "12.5"]


def test_the_seed_says_every_weight_however_it_is_sharded(synthetic: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    arguments = ("--shape", "emo-micro", "--layers", "2")
    assert run("synthetic", whole, *arguments).returncode == 0
    assert run("synthetic", tmp_path / "other", *arguments, "--seed", "1").returncode == 0
    shards = sorted(synthetic.glob("*.safetensors"))
    assert len(shards) > 1
    (one,), (other,) = whole.glob("*.safetensors"), (tmp_path / "other").glob("*.safetensors")
    with safe_open(one, "pt") as mine, safe_open(other, "pt") as differently_seeded:
        for shard in shards:
            with safe_open(shard, "pt") as its:
                assert all(mine.get_tensor(name).equal(its.get_tensor(name)) for name in its.keys())  # noqa: SIM118
        router = "model.layers.1.mlp.gate.weight"
        assert not mine.get_tensor(router).equal(differently_seeded.get_tensor(router))


def test_an_existing_directory_is_not_overwritten(synthetic: Path) -> None:
    before = sorted(path.stat().st_mtime_ns for path in synthetic.iterdir())
    done = run("synthetic", synthetic, "--shape", "emo-micro")
    assert done.returncode == 1
    assert "already exists" in done.stderr
    assert sorted(path.stat().st_mtime_ns for path in synthetic.iterdir()) == before


def test_exactness_fails_where_an_answer_differs(synthetic: Path, tmp_path: Path) -> None:
    """No difference is small enough for a tolerance below zero."""
    program = "import benchmarks.exactness as it, typer; it.TOLERANCE = -1.0; typer.run(it.main)"
    done = subprocess.run(
        [sys.executable, "-c", program, GOLDEN, "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    assert done.stdout.count("DIFFERS") == 5  # four rows and the verdict


def test_mixed_traffic_is_measured_in_a_quarter_of_the_memory_beside_all_of_it() -> None:
    """With the model of the repository: its codebook chooses the pools."""
    done = run("traffic", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    for row in (r"2 x 2 .* - ", r"25% +\d", r"alone +\d", r"beside a flood +\d", r"beside it, first come, .* \d"):
        assert re.search(rf"^{row}", done.stdout, re.MULTILINE), row


def test_prompts_of_a_domain_are_different_and_as_long_as_asked() -> None:
    domains = domains_of(ROOT / "models" / "emo-tiny", 16, 8, 64)
    assert {len(prompt) for domain in domains for prompt in domain} == {64}
    assert all(len({tuple(prompt) for prompt in domain}) == 8 for domain in domains)
    with pytest.raises(ValueError, match="16 domains, not of 17"):
        domains_of(ROOT / "models" / "emo-tiny", 17, 8, 64)


def test_the_service_is_measured_beside_its_engine(tmp_path: Path) -> None:
    done = run("service", GOLDEN, "--quick", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\d+) +[\d.]+ \(", done.stdout, re.MULTILINE) == ["1", "4"]
    assert not list(tmp_path.iterdir())


def test_http_is_measured_beside_grpc(tmp_path: Path) -> None:
    done = run("http_front", GOLDEN, "--quick", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\d+) +[\d.]+ \(", done.stdout, re.MULTILINE) == ["1"]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache is looked at through Linux calls")
def test_exact_bound_has_a_row_for_each_residency_and_way(tmp_path: Path) -> None:
    done = run("exact_bound", "--quick", "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "exact, " in line]
    assert len(rows) == 8
    assert "wrote" not in done.stdout


def test_residency_measures_every_table(tmp_path: Path) -> None:
    done = run("residency", tmp_path / "none", "--quick", "--work", tmp_path / "work")
    assert done.returncode == 0, done.stdout + done.stderr
    for title in ("Page-in, disk to slots", "Time to first token", "Plain transformers generate", "Decode, "):
        assert title in done.stdout
    assert "no reference model" in done.stdout


def test_peers_compares_plain_transformers_with_the_engine(tmp_path: Path) -> None:
    """Which runs wherever ours does, and has the same model; a quick run writes no table."""
    more = ("--work", tmp_path / "work", "--results", tmp_path / "results")
    done = run("peers", "--quick", "--groups", "bf16", "--ways", "transformers", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("engine", "plain transformers bf16"):
        assert re.search(rf"^{name} +(19|20) of 20 +[0-9.]+ \(", done.stdout, re.MULTILINE), done.stdout
    assert not (tmp_path / "results").exists()


def test_a_peer_that_is_missing_is_a_row_that_says_so(tmp_path: Path) -> None:
    ours, other = Way("engine", "engine", tmp_path), Way("vLLM-CPU", "vllm", tmp_path, missing=NOT_INSTALLED)
    group = Group("bf16", "", [ours, other])
    with ExitStack() as opened, pytest.raises(Gone, match="make peers"):
        start(other, group, opened, tmp_path)
    (row,) = table(group, {"vLLM-CPU": {"reason": NOT_INSTALLED}}).rows
    assert tuple(row[:2]) == ("vLLM-CPU", NOT_INSTALLED)


def test_an_engine_that_ends_says_why(tmp_path: Path) -> None:
    """Its last error, from what it wrote."""
    missing = Way("engine", "engine", tmp_path / "missing")
    with ExitStack() as opened, pytest.raises(Gone, match="missing"):
        start(missing, Group("bf16", "", [missing]), opened, tmp_path)


def test_a_gguf_file_holds_the_checkpoint(tmp_path: Path) -> None:
    """Read back by the format's own package."""
    from gguf import GGUFReader, dequantize

    from benchmarks.gguf_file import write_gguf

    checkpoint, out = tmp_path / "olmoe", tmp_path / "olmoe.gguf"
    write_checkpoint(checkpoint, SHAPES["olmoe-micro"].shortened(2))
    write_gguf(checkpoint, out, "bf16", lambda kind, _: pytest.fail(f"nothing is quantised, not to {kind}"))
    stored = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    plain = Tensors(checkpoint)
    for name, ours in (
        (
            "blk.1.ffn_down_exps.weight",
            torch.stack([plain.read(f"{EXPERT.format(1, each)}.down_proj.weight") for each in range(16)]),
        ),
        ("blk.0.attn_q.weight", plain.read("model.layers.0.self_attn.q_proj.weight")),
        ("blk.0.ffn_gate_inp.weight", plain.read("model.layers.0.mlp.gate.weight")),
        ("output_norm.weight", plain.read("model.norm.weight")),
    ):
        tensor = stored[name]
        found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        assert found.reshape(ours.shape).equal(ours.float()), name
    assert len(stored) == 3 + 2 * 12


def test_experts_in_int8_are_within_half_a_step(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "olmoe", tmp_path / "compressed"
    write_checkpoint(checkpoint, SHAPES["olmoe-micro"].shortened(2))
    write_compressed(checkpoint, out, "int8")
    name = f"{EXPERT.format(1, 7)}.up_proj.weight"
    stored, exact = Tensors(out), Tensors(checkpoint).read(name).float()
    scales = stored.read(f"{name}_scale").float()
    assert ((stored.read(name) * scales - exact).abs() <= 0.51 * scales).all()


def test_experts_in_int4_are_read_as_compressed_tensors(tmp_path: Path) -> None:
    """Our own reader of that format is tested against the format's package."""
    checkpoint, out = tmp_path / "olmoe", tmp_path / "compressed"
    write_checkpoint(checkpoint, SHAPES["olmoe-micro"].shortened(2))
    write_compressed(checkpoint, out, "int4")
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    logits = []
    for path in (checkpoint, out):
        model = load_model(path, dtype="float32")
        with torch.inference_mode():
            logits.append(model(prompt).logits.log_softmax(-1))
        model.expert_paging.close()
    error = (logits[0] - logits[1]).abs().mean() / logits[0].std()
    assert 0 < error < 0.15
