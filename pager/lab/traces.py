"""What a model's gates report of every token of a document: one exact forward a document, paged where it has to be.

Legend: T tokens, L layers, R routed experts of a layer, C columns: the routed experts of all layers side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from pager.engine.paged_model import PagedModel
from pager.errors import InvalidRequest
from pager.lab.corpus import Document
from pager.models.families import routed_probabilities
from pager.models.open_model import moe_blocks
from pager.tokenizing import encode
from pager.types import PoolPolicy

# Half precision on a CPU compiles and keeps kernels for every length it meets.
LENGTH_STEP = 64


@dataclass(frozen=True, slots=True)
class TracedDocument:
    """A document's first tokens. `pieces` joined are its text to there; `probs_TC` is float32, each layer sums to 1."""

    domain: str
    name: str
    pieces: tuple[str, ...]
    probs_TC: np.ndarray


class GateTracer:
    """Runs documents through a model with all its experts and keeps the gates' probabilities. One at a time."""

    def __init__(self, paged: PagedModel, tokenizer: Tokenizer) -> None:
        self._paged = paged
        self._tokenizer = tokenizer
        self.routed_per_layer: tuple[int, ...] = paged.facts.routed_per_layer
        self.max_tokens = int(paged.config.max_position_embeddings)
        self._probs_LTR: dict[int, np.ndarray] = {}

    def trace(self, document: Document, max_tokens: int) -> TracedDocument:
        """Its first tokens, as many as the model's context holds. Raises InvalidRequest, ExpertUnavailable."""
        encoding = encode(self._tokenizer, document.text, add_special_tokens=False)
        ids = tuple(encoding.ids[: min(max_tokens, self.max_tokens)])
        if not ids:
            raise InvalidRequest(f"document {document.name!r} of {document.domain} has no tokens; leave it out")
        pieces = tuple(text_pieces(document.text, encoding.offsets[: len(ids)]))
        return TracedDocument(document.domain, document.name, pieces, self.probabilities(ids))

    @torch.inference_mode()
    def probabilities(self, token_ids: Sequence[int]) -> np.ndarray:
        """[T, C] float32: fp32 softmax over the routed experts of each layer, the layers side by side."""
        paged = self._paged
        padding = [0] * (-len(token_ids) % LENGTH_STEP)  # behind the text, where no token of it looks
        padding = padding[: self.max_tokens - len(token_ids)]
        inputs = torch.tensor([[*token_ids, *padding]], device=paged.device)
        with self._recording(len(token_ids)), paged.step([paged.document(PoolPolicy())], prefill=True):
            paged.model.model(input_ids=inputs, use_cache=False)
        return np.concatenate([self._probs_LTR[layer] for layer in sorted(self._probs_LTR)], axis=1)

    @contextmanager
    def _recording(self, num_tokens: int) -> Iterator[None]:
        self._probs_LTR.clear()
        shared = self._paged.facts.shared_per_layer
        blocks = moe_blocks(self._paged.model)
        hooks = [block.gate.register_forward_hook(self._keep(n, shared[n], num_tokens)) for n, block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, layer: int, num_shared: int, num_tokens: int) -> Any:
        def keep(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            self._probs_LTR[layer] = routed_probabilities(output[0][:num_tokens], num_shared).cpu().numpy()

        return keep


def text_pieces(text: str, offsets: Sequence[tuple[int, int]]) -> Iterator[str]:
    """The text between the ends of neighbouring tokens: joined, it is the text again.

    A token may be a part of a character; the character is then its first token's, and the others are empty.
    """
    starts = accumulate((end for _, end in offsets), max, initial=0)
    for start, (_, end) in zip(starts, offsets, strict=False):
        yield text[start : max(start, end)]
