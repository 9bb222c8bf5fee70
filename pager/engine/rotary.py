"""Rotary embeddings whose tables depend on a row alone.

Some rope types choose their frequencies by the longest position of a forward. In transformers that is the longest row
of the batch, so a short prompt would be computed differently while a long one decodes beside it.

Legend: B rows, S new tokens a row, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pager.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAME_FOR_EVERY_LENGTH = frozenset({"default", "linear", "llama3", "proportional", "yarn"})


class RowRotary(nn.Module):
    """Stands in for a model's rotary embedding: each row gets the tables that transformers gives it alone.

    `longrope` has two tables, for rows up to `original_max_position_embeddings` and for longer ones. `dynamic` grows
    its table past `max_position_embeddings`, which no sequence of an engine reaches, and so keeps its first.

    `prompt_tokens` is the length of the whole prompt that the next forward runs a part of, 0 for any other forward.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.prompt_tokens = 0
        self._angles: Callable[..., tuple[Tensor, Tensor]] = inspect.unwrap(type(rotary).forward)  # without the update
        config, device = rotary.config, rotary.inv_freq.device
        # New ones: earlier forwards may have left another table in `rotary`.
        self._short: Any = type(rotary)(config=config).to(device)
        self._long: Any = None
        if rotary.rope_type == "longrope":
            self._short_tokens: int = config.rope_parameters["original_max_position_embeddings"]
            self._long = type(rotary)(config=config).to(device)
            self._long.inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](config, device, seq_len=self._short_tokens + 1)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, D] at `position_ids` [B, S]."""
        short_cos_BSD, short_sin_BSD = self._angles(self._short, x, position_ids)
        if self._long is None:
            return short_cos_BSD, short_sin_BSD
        long_cos_BSD, long_sin_BSD = self._angles(self._long, x, position_ids)
        tokens_B = (position_ids.amax(1) + 1).clamp_min(self.prompt_tokens)
        is_long_B11 = (tokens_B > self._short_tokens)[:, None, None]
        return torch.where(is_long_B11, long_cos_BSD, short_cos_BSD), torch.where(
            is_long_B11, long_sin_BSD, short_sin_BSD
        )


def install(model: PreTrainedModel) -> RowRotary | None:
    """Makes the rows of `model`'s batches independent of each other; None where they are already.

    Raises UnsupportedModel for a rope type that is not known to depend on a row alone.
    """
    rotary: Any = model.model.rotary_emb
    if isinstance(rotary, RowRotary):
        return rotary
    if rotary.rope_type in SAME_FOR_EVERY_LENGTH:
        return None
    if rotary.rope_type not in ("dynamic", "longrope"):
        known = ", ".join(sorted({"dynamic", "longrope", *SAME_FOR_EVERY_LENGTH}))
        raise UnsupportedModel(
            f"rope_type {rotary.rope_type!r} is not supported where requests share a batch, since the length of one "
            f"could change the answer of another; supported are {known}. pager.load_model runs it as transformers does"
        )
    model.model.rotary_emb = RowRotary(rotary)
    return model.model.rotary_emb  # type: ignore[no-any-return]
