"""What people who know transformers write first: the options of load_model, and what says no to the others."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import pager
from pager.errors import BudgetError, CheckpointError, ConfigError, InvalidRequest, PagerError
from pager.types import DriftAction, DriftPolicy

Load = Callable[..., PreTrainedModel]
MakeSmall = Callable[..., Any]

ROOT = Path(__file__).parents[2]
EMO = ROOT / "models" / "emo-tiny"
EXPERT_BYTES = 3 * 64 * 32 * 4  # of the golden checkpoint, which has 4 layers with 15 routed experts each


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Returns the warnings alone: another test in the process may have set the level to INFO."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


class TestDevice:
    @pytest.mark.parametrize("device", [torch.device("cpu"), "cpu"])
    def test_by_name_or_as_a_torch_device(self, golden: Any, load: Load, device: Any) -> None:
        assert load(golden.checkpoint, device=device).device == torch.device("cpu")

    def test_auto_is_a_gpu_where_there_is_one(self, golden: Any, load: Load) -> None:
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert load(golden.checkpoint, device="auto").device.type == expected

    @pytest.mark.parametrize("device", ["tpu", "cuda:first", "cuda:", None, torch.device("meta")])
    def test_another_says_which_there_are(self, golden: Any, load: Load, device: Any) -> None:
        with pytest.raises(ConfigError, match=r"device must be 'cpu' or 'cuda', not '.*'; 'cuda:1' .* 'auto'"):
            load(golden.checkpoint, device=device)


class TestDtype:
    @pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("in_config", [True, False])
    def test_the_default_is_the_checkpoints(self, small: MakeSmall, stored: str, in_config: bool) -> None:
        made = small("olmoe")
        made.plain.to(getattr(torch, stored)).save_pretrained(made.path)
        config = json.loads((made.path / "config.json").read_text())
        assert config.pop("dtype") == stored
        if not in_config:
            (made.path / "config.json").write_text(json.dumps(config))
        for asked in ({}, {"dtype": None}, {"dtype": "auto"}):
            with pager.load_model(made.path, **asked) as model:
                assert model.dtype == model.expert_paging.pager.slots.dtype == getattr(torch, stored)

    def test_what_is_asked_for_comes_first(self, small: MakeSmall) -> None:
        with pager.load_model(small("olmoe").path, dtype=torch.bfloat16) as model:
            assert model.dtype == torch.bfloat16


class TestPools:
    def test_a_share_as_a_number_is_that_share(self, golden: Any, load: Load) -> None:
        ids = golden.tensors["doc96.input_ids"]
        pools = [load(golden.checkpoint, pool_size=size)(ids).past_key_values.documents for size in (0.25, "25%")]
        assert pools[0][0].pool.experts == pools[1][0].pool.experts

    @pytest.mark.parametrize(("total", "counts"), [(16, [4, 4, 4, 4]), (18, [5, 5, 4, 4]), (60, [15] * 4)])
    def test_bytes_are_shared_out_evenly(self, golden: Any, load: Load, total: int, counts: list[int]) -> None:
        model = load(golden.checkpoint, pool_size=f"{total * EXPERT_BYTES}B")
        (document,) = model(golden.tensors["doc96.input_ids"]).past_key_values.documents
        assert [len(layer) for layer in document.pool.experts] == counts

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            (16, "16 routed experts a layer, and no layer of this model has more than 15"),
            ("500", "500 routed experts a layer"),
            ("4,16,4,4", "4,16,4,4 routed experts, and the layers of this model have 15,15,15,15"),
            ("1GiB", f"1.0 GiB, and all routed experts of this model have {60 * EXPERT_BYTES} bytes"),
        ],
    )
    def test_a_pool_larger_than_the_model_is_refused(self, golden: Any, load: Load, size: Any, message: str) -> None:
        with pytest.raises(InvalidRequest, match=message) as caught:
            load(golden.checkpoint, pool_size=size)
        assert caught.value.field == "pool.size"
        assert "leave pool_size out" in caught.value.message

    @pytest.mark.parametrize("size", [5, "mass:0.9:5", "37.5%"])
    def test_a_pool_larger_than_the_slots_is_told(
        self, golden: Any, load: Load, size: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        load(golden.checkpoint, pool_size=size, expert_memory=20 * EXPERT_BYTES)
        assert not warnings_in(caplog)
        load(golden.checkpoint, pool_size=size, expert_memory=19 * EXPERT_BYTES)
        (record,) = warnings_in(caplog)
        assert "20 experts in all layers and expert_memory holds 19" in record.getMessage()
        assert f"expert_memory={20 * EXPERT_BYTES} or more" in record.getMessage()

    @pytest.mark.parametrize("drift", ["0.3", 0.3, "0.3:widen", DriftPolicy(0.3)])
    def test_drift_as_on_the_command_line(self, golden: Any, load: Load, drift: Any) -> None:
        model = load(golden.checkpoint, pool_size=4, drift=drift)
        (document,) = model(golden.tensors["doc96.input_ids"]).past_key_values.documents
        assert document.policy.drift == DriftPolicy(0.3, DriftAction.WIDEN)

    @pytest.mark.parametrize(
        ("drift", "field"),
        [("often", "pool.drift"), (1.5, "pool.drift.threshold"), ("0.3:widen:0", "pool.drift.window")],
    )
    def test_no_drift_at_all_says_what_is_wrong(self, golden: Any, load: Load, drift: Any, field: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            load(golden.checkpoint, pool_size=4, drift=drift)
        assert caught.value.field == field


class TestBudgets:
    @pytest.mark.parametrize("budget", [25, "25"])
    def test_a_few_bytes_may_have_been_percent(self, golden: Any, load: Load, budget: Any) -> None:
        with pytest.raises(BudgetError, match=r"holds 0 experts; .*; did you mean '25%'\?"):
            load(golden.checkpoint, expert_memory=budget)
        with pytest.raises(BudgetError, match=r"host_memory .* holds no expert of 24576 bytes.*; did you mean '25%'\?"):
            load(golden.checkpoint, host_memory=budget)

    def test_a_share_beyond_one_may_have_been_percent(self, golden: Any, load: Load) -> None:
        with pytest.raises(ConfigError, match=r"not 12\.5; did you mean '12\.5%'\?"):
            load(golden.checkpoint, expert_memory=12.5)


OF_TRANSFORMERS = {
    "device_map": ("auto", "device='auto'"),
    "torch_dtype": (torch.float16, "it is called dtype"),
    "quantization_config": ({"bits": 4}, "lower expert_memory"),
    "load_in_8bit": (True, "lower expert_memory"),
    "max_memory": ({0: "8GiB"}, "give expert_memory"),
    "trust_remote_code": (True, "code from a checkpoint is never run"),
    "attn_implementation": ("eager", r"set_attn_implementation"),
    "revision": ("main", "snapshot_download"),
}


class TestOptionsOfTransformers:
    @pytest.mark.parametrize("name", OF_TRANSFORMERS)
    def test_are_answered(self, golden: Any, load: Load, name: str) -> None:
        value, answer = OF_TRANSFORMERS[name]
        with pytest.raises(ConfigError, match=f"load_model has no option {name}: .*{answer}"):
            load(golden.checkpoint, **{name: value})

    def test_one_that_nobody_knows_is_a_type_error(self, golden: Any, load: Load) -> None:
        with pytest.raises(
            TypeError, match=r"unexpected keyword argument 'expert_memroy'; did you mean 'expert_memory'"
        ):
            load(golden.checkpoint, expert_memroy="25%")
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'$"):
            load(golden.checkpoint, zzz=1)

    def test_another_attention_is_set_as_the_message_says(self, golden: Any, load: Load) -> None:
        model = load(golden.checkpoint)
        model.set_attn_implementation("eager")
        logits = model(golden.tensors["doc96.input_ids"]).logits
        torch.testing.assert_close(logits, golden.tensors["doc96.logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("pool_size", [None, 4])
def test_a_prompt_beyond_the_context_is_told_once(
    small: MakeSmall, load: Load, pool_size: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    made = small("mixtral", max_position_embeddings=20)
    model = load(made.path, pool_size=pool_size)
    model(made.prompt(1, 20))
    assert not warnings_in(caplog)
    logits = model(made.prompt(1, 21)).logits
    model(input_ids=made.prompt(1, 30))
    if pool_size is None:  # and runs, as in transformers
        torch.testing.assert_close(logits, made.plain(made.prompt(1, 21)).logits, rtol=0, atol=1e-4)
    (record,) = warnings_in(caplog)
    assert record.getMessage().startswith("a prompt of 21 tokens is longer than this model's context of 20")


class TestErrors:
    """They are what transformers raises for the same mistake, and what callers catch."""

    def test_files_are_os_errors(self, tmp_path: Path, load: Load) -> None:
        with pytest.raises(OSError, match="is not a directory") as caught:
            load(tmp_path / "absent")
        assert isinstance(caught.value, CheckpointError)
        assert str(caught.value) == caught.value.message

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtype": "float8"}, "dtype 'float8'"),
            ({"device": "tpu"}, "not 'tpu'"),
            ({"expert_memory": "lots"}, "'lots' is not a size"),
            ({"expert_memory": "1KiB"}, "holds 0 experts"),
            ({"pool_size": "a few"}, "'a few' is not a pool size"),
            ({"pool_size": 1}, "a pool of 1 routed experts"),
            ({"drift": "0.3"}, "no pool that it could leave"),
            ({"device_map": "auto"}, "no option device_map"),
        ],
    )
    def test_values_are_value_errors(self, golden: Any, load: Load, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load(golden.checkpoint, **options)
        assert isinstance(caught.value, PagerError)

    def test_a_family_that_can_not_be_paged_is_a_value_error(self, small: MakeSmall, load: Load) -> None:
        made = small("emo")
        (made.path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(ValueError, match="model type 'llama'"):
            load(made.path)

    def test_an_expert_that_can_not_be_read_is_an_os_error(self, small: MakeSmall, load: Load) -> None:
        made = small("mixtral")
        model = load(made.path, expert_memory="25%")
        file = made.path / "model.safetensors"
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size // 2)
        with pytest.raises(OSError, match="cannot read expert"):
            model(made.prompt(4, 60))


REGISTERED = """
import sys
if sys.argv[2] == "pager first":
    import pager
    assert not {"torch", "transformers"} & set(sys.modules), "`import pager` alone should be quick"
from transformers import AutoConfig, AutoTokenizer
import pager
from transformers import pipeline

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert tokenizer.decode(tokenizer("SELECT name")["input_ids"]) == "SELECT name"
config = AutoConfig.from_pretrained(sys.argv[1])
assert (type(config).__name__, config.model_type) == ("EmoConfig", "emo")
assert "pager.engine.library" not in sys.modules
write = pipeline("text-generation", model=sys.argv[1])
ask = {"max_new_tokens": 4, "do_sample": False}
whole = write("SELECT name FROM", **ask)
with pager.load_model(sys.argv[1], expert_memory="50%") as model:
    assert type(write.model).__name__ == type(model).__name__
    assert write.model.dtype == model.dtype
    paged = pipeline("text-generation", model=model, tokenizer=tokenizer)("SELECT name FROM", **ask)
assert whole == paged, (whole, paged)
print(whole[0]["generated_text"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["pager first", "transformers first"])
def test_transformers_know_emo_from_the_import_on(order: str) -> None:
    command = [sys.executable, "-W", "error::FutureWarning", "-c", REGISTERED, str(EMO), order]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SELECT name FROM")
    assert "model of type" not in done.stderr, "transformers complains of a type that it does not know"
