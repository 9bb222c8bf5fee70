"""What people do with a transformers model, and can't with a paged one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pager.errors import ConfigError

INPUTS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def model(golden: Any, load: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return load(golden.checkpoint, expert_memory="50%", dtype="float32")


def test_saving_is_refused(model: PreTrainedModel, golden: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be saved") as caught:
        model.save_pretrained(tmp_path, safe_serialization=True)
    assert str(golden.checkpoint) in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [PreTrainedModel.half, lambda model: model.to(torch.bfloat16)])
def test_a_converted_model_says_so(model: PreTrainedModel, change: Callable[[Any], Any]) -> None:
    change(model)
    with pytest.raises(ConfigError, match=r"float16 on cpu after it was loaded as float32 on cpu"):
        model(INPUTS)


def test_what_changes_nothing_is_fine(model: PreTrainedModel) -> None:
    before = model(INPUTS).logits
    torch.testing.assert_close(model.float().to("cpu").eval()(INPUTS).logits, before)


def test_other_experts_implementations_are_refused(model: PreTrainedModel) -> None:
    before = model(INPUTS).logits
    for name in ("eager", "grouped_mm", "batched_mm"):
        with pytest.raises(ConfigError, match="experts are computed where they are paged to"):
            model.set_experts_implementation(name)
    torch.testing.assert_close(model(INPUTS).logits, before)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_and_harms_nothing(model: PreTrainedModel, duplicate: Callable[[Any], Any]) -> None:
    before = model(INPUTS).logits
    with pytest.raises(TypeError, match="a paged model cannot be copied or pickled"):
        duplicate(model.expert_paging)
    for part in (model, model.model, model.model.layers[0].mlp):
        if part is model or duplicate is not copy.copy:  # of a module, it shares all that the first has
            with pytest.raises(TypeError, match="a paged model cannot be copied or pickled"):
                duplicate(part)
    torch.testing.assert_close(model(INPUTS).logits, before)  # a half-made copy would close the experts' files


@pytest.mark.parametrize("num_tokens", [1, 3, 60])
def test_what_needs_gradients_runs_and_its_backward_is_refused(model: PreTrainedModel, num_tokens: int) -> None:
    """As where an adapter is in the model. Slots have other experts by then, and gradients would be wrong."""
    inputs = torch.arange(3, 3 + num_tokens)[None]
    embedded = model.get_input_embeddings()(inputs).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    torch.testing.assert_close(logits, model(inputs).logits, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match=r"computes no gradients: .* train the whole model with transformers"):
        logits.sum().backward()


def test_the_same_with_pools(golden: Any, load: Callable[..., PreTrainedModel]) -> None:
    model = load(golden.checkpoint, expert_memory="50%", dtype="float32", pool_size="50%")
    embedded = model.get_input_embeddings()(INPUTS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    torch.testing.assert_close(logits, model(INPUTS).logits, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="computes no gradients"):
        logits.sum().backward()
