"""Native EMO for transformers 5: configuration, model and the picking rule."""

from pager.models.emo.configuration import EmoConfig
from pager.models.emo.modeling import EmoForCausalLM, EmoModel, EmoSparseMoeBlock, EmoTopKRouter
from pager.models.emo.routing import pick_experts

__all__ = ["EmoConfig", "EmoForCausalLM", "EmoModel", "EmoSparseMoeBlock", "EmoTopKRouter", "pick_experts"]
