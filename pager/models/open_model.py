"""A transformers model without its experts: built on the meta device, filled tensor by tensor from the disk tier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import pager.models  # noqa: F401 - registers the models this project adds
from pager.errors import CheckpointError, ConfigError, PagerError
from pager.models.config_bounds import TOKEN_IDS, check_config, check_shape, check_token_ids, without_choices
from pager.models.families import Family, family_of
from pager.reading import one_line
from pager.store.checkpoint import read_json_object
from pager.store.expert_source import ExpertSource, open_experts
from pager.store.safetensors import Checkpoint
from pager.types import RoutingFacts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A checkpoint on disk together with the facts of its family; no weights are in memory yet."""

    checkpoint: Checkpoint
    config: PretrainedConfig
    family: Family
    facts: RoutingFacts
    dtype: torch.dtype

    @classmethod
    def open(cls, path: str | Path, dtype: torch.dtype | str | None = None) -> OpenModel:
        """Opens a checkpoint.

        Raises CheckpointError for a damaged one, UnsupportedModel for a family that cannot be paged, ConfigError for
        the dtype.
        """
        checkpoint = Checkpoint.open(path)
        try:
            family = family_of(checkpoint.config.get("model_type"))
            with _config_errors(checkpoint):
                check_config(checkpoint.config)
                config = AutoConfig.for_model(**without_choices(checkpoint.config))
                facts = family.facts(config)
                check_shape(config, facts.experts_per_layer)
            chosen = _choose_dtype(dtype, checkpoint)
        except BaseException:
            checkpoint.close()
            raise
        expert_bytes = family.expert_shape(config).num_elements * chosen.itemsize
        return cls(checkpoint, config, family, replace(facts, expert_bytes=expert_bytes), chosen)

    @property
    def expert_bytes(self) -> int:
        return self.facts.expert_bytes

    @property
    def trunk_bytes(self) -> int:
        """The bytes of everything but the experts, in the serving dtype."""
        model = self.build_empty()
        num_elements: int = sum(parameter.numel() for parameter in model.parameters())
        return num_elements * self.dtype.itemsize

    def open_experts(self) -> ExpertSource:
        """Opens the disk tier. Raises CheckpointError when an expert is missing or misshapen."""
        shape = self.family.expert_shape(self.config)
        return open_experts(self.checkpoint, self.family.expert_names, self.facts.experts_per_layer, shape)

    def build_empty(self) -> PreTrainedModel:
        """Builds the model on the meta device, without its experts' parameters."""
        # transformers would make the serving dtype torch's default for a while, and that of every other thread too.
        with torch.device("meta"), _config_errors(self.checkpoint):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.get_default_dtype()).to(self.dtype)
        model.config.dtype = self.dtype
        for _, block in moe_blocks(model):
            del block.experts.gate_up_proj, block.experts.down_proj
        return model.eval()

    def check(self) -> None:
        """Reads headers only. Raises CheckpointError unless every tensor is there, in its shape and a usable dtype."""
        self._trunk_names(self.build_empty())
        self.open_experts().close()

    def load_trunk(self, device: torch.device | str = "cpu") -> PreTrainedModel:
        """Loads everything but the experts into memory, one tensor at a time. Raises CheckpointError."""
        model = self.build_empty()
        for name, stored in self._trunk_names(model).items():
            weight = self.checkpoint.read_tensor(stored, self.dtype).to(device)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
        if model.config.tie_word_embeddings:
            model.tie_weights()
        # Rotary tables are computed, not stored; on the meta device they were not.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
        left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
        if left:
            raise CheckpointError(f"nothing was loaded for {', '.join(left[:3])} ({len(left)} tensors)")
        model.generation_config = self._generation_config()
        model.get_output_embeddings().register_forward_pre_hook(_own_strides)
        return model

    def _trunk_names(self, model: PreTrainedModel) -> dict[str, str]:
        """Maps each parameter to its name in the checkpoint. Raises CheckpointError."""
        names = {}
        for name, parameter in model.named_parameters():
            if model.config.tie_word_embeddings and name == "lm_head.weight":
                continue
            names[name] = self.family.stored_name(name)
            spec = self.checkpoint.require(names[name], parameter.shape)
            if not spec.dtype.is_floating_point:
                raise CheckpointError(f"tensor {spec.name!r} is stored as {spec.dtype}; it must be in floating point")
        return names

    def _generation_config(self) -> GenerationConfig:
        path = self.checkpoint.path / "generation_config.json"
        if not path.exists():
            config = GenerationConfig.from_model_config(self.config)
        else:
            read_json_object(path)  # what is no file, or none of this kind, is refused before transformers opens it
            try:
                config = GenerationConfig.from_pretrained(self.checkpoint.path)
            except Exception as error:  # it validates its fields in its own ways
                raise CheckpointError(f"{path} is malformed: {one_line(error)}; repair it or remove it") from error
        try:
            check_token_ids({name: getattr(config, name) for name in TOKEN_IDS})
        except CheckpointError as error:
            raise CheckpointError(f"{path} is malformed: {error.message}; repair it or remove it") from None
        return config


@contextmanager
def _config_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns whatever transformers raises for a config that it cannot build into a CheckpointError."""
    path = checkpoint.path / "config.json"
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not valid: {error.message}") from None
    except PagerError:
        raise
    except Exception as error:  # each family validates its fields in its own way
        raise CheckpointError(f"{path} is not valid: {one_line(error)}") from error


def moe_blocks(model: PreTrainedModel) -> Iterator[tuple[int, Any]]:
    """Yields `(layer, block)` of sparse layers; a block has a `gate` that returns raw logits first and `experts`."""
    for layer, decoder in enumerate(model.model.layers):
        if hasattr(decoder.mlp, "experts"):
            yield layer, decoder.mlp


def _own_strides(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies the hidden states that the output head gets, often those of the last token alone.

    Such a slice has the strides of the whole, and torch then multiplies it with a transposed copy of the head's
    weights: with a vocabulary of 100352, 5.3 s a prefill instead of 0.04.
    """
    hidden, *rest = inputs
    return (hidden.clone(memory_format=torch.contiguous_format), *rest)


def _choose_dtype(asked: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype:
    """Returns the dtype asked for, else bfloat16, in which float32 checkpoints are served too.

    "auto" is what the config says, or else what the first tensor in floating point is stored as.
    """
    name = str(asked or "bfloat16").removeprefix("torch.")
    if name == "auto":
        stored = (spec.dtype for spec in checkpoint.specs.values() if spec.dtype.is_floating_point)
        said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or next(stored, torch.bfloat16)
        name = str(said).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(DTYPES)} or auto")
    return DTYPES[name]
