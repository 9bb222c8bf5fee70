"""The models this project adds to transformers; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from pager.models.emo import EmoConfig, EmoForCausalLM

__all__ = ["EmoConfig", "EmoForCausalLM"]


def _register_emo() -> None:
    AutoConfig.register(EmoConfig.model_type, EmoConfig, exist_ok=True)
    AutoModelForCausalLM.register(EmoConfig, EmoForCausalLM, exist_ok=True)
    # A checkpoint has one tensor an expert and projection, as Qwen2-MoE's do; the model holds stacked ones.
    per_expert = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(EmoConfig.model_type, per_expert, overwrite=True)


_register_emo()
