"""Adapters (PEFT) on a paged model: they go where its attention is, as on a plain model; experts take none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from pager.errors import ConfigError

Load = Callable[..., PreTrainedModel]
MakeSmall = Callable[..., Any]

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
GATE = {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}


@pytest.fixture(params=["emo", "mixtral"])
def made(small: MakeSmall, request: pytest.FixtureRequest) -> Any:
    return small(request.param)


def trained(made: Any, path: Path, **targets: Any) -> tuple[Path, Tensor]:
    """The folder of an adapter that changes what the plain model says, and its logits."""
    torch.manual_seed(1)
    adapted = get_peft_model(made.plain, LoraConfig(r=4, init_lora_weights=False, **targets))
    adapted.save_pretrained(path)
    logits = adapted(made.prompt()).logits.detach()
    adapted.unload()
    assert not torch.allclose(made.plain(made.prompt()).logits, logits, atol=1e-2)
    return path, logits


@pytest.mark.parametrize("targets", [ATTENTION, GATE], ids=["attention", "gate"])
def test_an_adapter_answers_as_on_the_plain_model(
    made: Any, load: Load, tmp_path: Path, targets: dict[str, Any]
) -> None:
    path, expected = trained(made, tmp_path / "adapter", **targets)
    adapted = PeftModel.from_pretrained(load(made.path, expert_memory="50%"), path)
    torch.testing.assert_close(adapted(made.prompt()).logits, expected, **TOLERANCE)
    generated = adapted.generate(input_ids=made.prompt(), max_new_tokens=1, do_sample=False, eos_token_id=-1)
    assert generated[:, -1].equal(expected[:, -1].argmax(-1))


@pytest.mark.parametrize("num_tokens", [1, 3, 24])
def test_an_adapter_that_could_still_be_trained_answers_too(
    made: Any, load: Load, tmp_path: Path, num_tokens: int
) -> None:
    """Autograd records such a forward, as it does outside of `generate` and `no_grad`."""
    path, expected = trained(made, tmp_path / "adapter", **ATTENTION)
    adapted = PeftModel.from_pretrained(load(made.path, expert_memory="50%"), path, is_trainable=True)
    logits = adapted(made.prompt()[:1, :num_tokens]).logits
    torch.testing.assert_close(logits, expected[:1, :num_tokens], **TOLERANCE)


def test_by_the_models_own_method_and_merged(made: Any, load: Load, tmp_path: Path) -> None:
    path, expected = trained(made, tmp_path / "adapter", **ATTENTION)
    model = load(made.path, expert_memory="50%")
    before = model(made.prompt()).logits
    model.load_adapter(str(path))
    torch.testing.assert_close(model(made.prompt()).logits, expected, **TOLERANCE)
    model.delete_adapter("default")
    torch.testing.assert_close(model(made.prompt()).logits, before, **TOLERANCE)
    merged = PeftModel.from_pretrained(load(made.path, expert_memory="50%"), path).merge_and_unload()
    torch.testing.assert_close(merged(made.prompt()).logits, expected, **TOLERANCE)


def test_a_pool_under_an_adapter_is_the_documents_own(made: Any, load: Load, tmp_path: Path) -> None:
    path, _ = trained(made, tmp_path / "adapter", **ATTENTION)
    adapted = PeftModel.from_pretrained(load(made.path, expert_memory="100%", pool_size=4), path)
    together = adapted(made.prompt())
    for row, document in enumerate(together.past_key_values.documents):
        (alone,) = adapted(made.prompt()[row : row + 1]).past_key_values.documents
        assert alone.pool.experts == document.pool.experts


@pytest.mark.filterwarnings("ignore:target_parameters=.* were set but no parameter was matched:RuntimeWarning")
@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", "mlp.experts.down_proj"]},
    ],
)
def test_an_adapter_of_experts_is_refused_and_not_left_out(
    made: Any, load: Load, tmp_path: Path, targets: dict[str, Any]
) -> None:
    path, _ = trained(made, tmp_path / "adapter", **targets)
    with pytest.raises(ConfigError, match=r"adapter 'default' is for .*_proj, and a paged model's experts take no"):
        PeftModel.from_pretrained(load(made.path), path)
    with pytest.raises(ConfigError, match=r"experts take no adapters"):
        load(made.path).load_adapter(str(path))


@pytest.mark.parametrize("module", ["experts", "gate"])
def test_experts_and_gates_are_not_copied_to_be_trained(made: Any, load: Load, module: str) -> None:
    with pytest.raises(TypeError, match="a paged model cannot be copied"):
        get_peft_model(load(made.path), LoraConfig(**ATTENTION, modules_to_save=[module]))


def test_training_is_refused_where_gradients_would_be_wrong(made: Any, load: Load) -> None:
    model = get_peft_model(load(made.path, expert_memory="50%"), LoraConfig(**ATTENTION))
    loss = model(input_ids=made.prompt(), labels=made.prompt()).loss
    with pytest.raises(ConfigError, match=r"computes no gradients: .* train the whole model"):
        loss.backward()
