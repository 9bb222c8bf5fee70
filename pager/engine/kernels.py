"""Kernels that multiply tokens with experts where they lie in slots, and which of them is the fastest for a shape.

What a kernel is worth was measured with benchmarks/kernels.py; docs/log.md has the table.

Legend: T tokens, K experts a token, P = T·K pairs, U distinct experts of them, S slots, D hidden,
F expert intermediate.
A module has `gate_up_proj` [S, 2F, D], `down_proj` [S, D, F] and `_apply_gate` [..., 2F] → [..., F], as transformers'
experts modules do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.integrations.moe import grouped_mm_experts_forward

SMALL_EXPERT_BYTES = 128 * 1024
"""Up to here a call of a kernel costs more than copying an expert, so the copies are multiplied by one call."""

COPIED_PAIRS = 256
"""The most experts that are copied together."""

COPIED_ROWS = 1024
"""The most rows that are computed when every token goes through every copied expert."""

HALF_PRECISION_ROWS = 16
"""Of a oneDNN tile. It compiles a kernel of 0.7 MB, in a millisecond, for every number of rows that it meets."""

Kernel = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""`kernel(module, hidden_TD, slot_TK, weights_TK)` → [T, D]: the weighted sum of each token's experts."""


def run_slots(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, D] from experts that are all in their slots."""
    if hidden_TD.device.type != "cpu":
        return grouped(module, hidden_TD, slot_TK, weights_TK)
    num_tokens, num_picks = slot_TK.shape
    if num_tokens == 1:
        is_small = 3 * module.down_proj[0].nbytes <= SMALL_EXPERT_BYTES
        return (copied_pairs if is_small else pairs_in_place)(module, hidden_TD, slot_TK, weights_TK)
    if num_tokens * num_picks > COPIED_PAIRS or 3 * module.down_proj[0].nbytes > SMALL_EXPERT_BYTES:
        return sorted_pairs(module, hidden_TD, slot_TK, weights_TK)
    slot_U, place_TK = slot_TK.unique(return_inverse=True)
    num_rows = num_tokens * len(slot_U)
    # In half precision a batched product of matrices is dear, one of vectors is not.
    is_shared = 2 * len(slot_U) <= slot_TK.numel() or hidden_TD.dtype == torch.float32
    if is_shared and num_rows <= COPIED_ROWS:
        return _run_copied_experts(module, hidden_TD, slot_U, place_TK, weights_TK)
    return copied_pairs(module, hidden_TD, slot_TK, weights_TK)


def grouped(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """One product for all pairs, the one for a GPU. In bf16 on compute capability 9.0 and 10 it fetches nothing.

    Elsewhere torch fetches the counts of rows, and multiplies expert by expert.
    """
    output_TD: Tensor = grouped_mm_experts_forward(module, hidden_TD, slot_TK.long(), weights_TK)
    return output_TD


def pairs_in_place(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """A product of matrix and vector a pair, with the weights where they lie."""
    gate_up, down = module.gate_up_proj, module.down_proj
    slots = slot_TK.flatten().tolist()
    inner_P2F = hidden_TD.new_empty(len(slots), gate_up.shape[1])
    hidden = [hidden_D for hidden_D in hidden_TD.unbind() for _ in range(slot_TK.shape[1])]
    for slot, hidden_D, inner in zip(slots, hidden, inner_P2F.unbind(), strict=True):
        torch.mv(gate_up[slot], hidden_D, out=inner)
    out_PD = hidden_TD.new_empty(len(slots), hidden_TD.shape[1])
    for slot, inner, out in zip(slots, module._apply_gate(inner_P2F).unbind(), out_PD.unbind(), strict=True):
        torch.mv(down[slot], inner, out=out)
    return _weighted(out_PD.view(*slot_TK.shape, -1), weights_TK)


def copied_pairs(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The weights of every pair copied together: one product for gates and ups, one for downs."""
    num_tokens, num_picks = slot_TK.shape
    slot_P = slot_TK.flatten()
    inner_T = torch.bmm(
        module.gate_up_proj.index_select(0, slot_P).view(num_tokens, -1, hidden_TD.shape[1]), hidden_TD.unsqueeze(-1)
    )
    inner_PF = module._apply_gate(inner_T.view(num_tokens * num_picks, -1))
    out_PD = torch.bmm(module.down_proj.index_select(0, slot_P), inner_PF.unsqueeze(-1))
    return _weighted(out_PD.view(num_tokens, num_picks, -1), weights_TK)


def copied_experts(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The weights of every distinct expert copied together, all tokens through each, and of that the pairs' outputs."""
    slot_U, place_TK = slot_TK.unique(return_inverse=True)
    return _run_copied_experts(module, hidden_TD, slot_U, place_TK, weights_TK)


def _run_copied_experts(module: Any, hidden_TD: Tensor, slot_U: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
    num_tokens, num_experts = len(hidden_TD), len(slot_U)
    inner_T = torch.mm(hidden_TD, module.gate_up_proj.index_select(0, slot_U).flatten(0, 1).t())
    inner_TUF = module._apply_gate(inner_T.view(num_tokens, num_experts, -1))
    out_UTD = torch.bmm(inner_TUF.transpose(0, 1), module.down_proj.index_select(0, slot_U).transpose(1, 2))
    # Picked, not multiplied by zero: what a token's other experts made of it may be infinite.
    rows_TK = place_TK * num_tokens + torch.arange(num_tokens)[:, None]
    out_PD = out_UTD.flatten(0, 1).index_select(0, rows_TK.flatten())
    return _weighted(out_PD.view(*place_TK.shape, -1), weights_TK)


def _weighted(out_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, D] in the dtype of the outputs; added up in that of the weights, as some families' are fp32."""
    return torch.bmm(weights_TK.unsqueeze(1), out_TKD.to(weights_TK.dtype)).squeeze(1).to(out_TKD.dtype)


def sorted_pairs(module: Any, hidden_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """A product for each expert with all its tokens, with the weights where they lie."""
    outputs = PairOutputs(module, hidden_TD, slot_TK, weights_TK)
    outputs.add_all()
    return outputs.total()


class PairOutputs:
    """The outputs of (token, expert) pairs, sorted by expert and computed a few experts at a time.

    They are added up in the same order however many calls of `add` it took.
    """

    def __init__(self, module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        """`index_TK` names experts by any integers: expert ids or slots."""
        self._module = module
        self._shape_TK = index_TK.shape
        ids_P, self._order_P = index_TK.flatten().sort(stable=True)
        self._is_half = hidden_TD.dtype != torch.float32
        surplus = HALF_PRECISION_ROWS - 1 if self._is_half else 0
        self._hidden_PD = hidden_TD[pad(self._order_P // index_TK.shape[1], (0, surplus))]
        self._weights_P = weights_TK.flatten()[self._order_P]
        self._out_PD = hidden_TD.new_empty(len(self._order_P), hidden_TD.shape[1])
        ids, counts = ids_P.unique_consecutive(return_counts=True)
        ranges = pairwise([0, *counts.cumsum(0).tolist()])
        self._range_of: dict[int, tuple[int, int]] = dict(zip(ids.tolist(), ranges, strict=True))

    def add(self, ids: Iterable[int], slots: Iterable[int]) -> None:
        """Computes the pairs of the experts `ids`, which are in these slots."""
        module = self._module
        for expert, slot in zip(ids, slots, strict=True):
            gate_up, down = module.gate_up_proj[slot], module.down_proj[slot]
            start, end = self._range_of[expert]
            if end == start + 1:
                inner = module._apply_gate(torch.mv(gate_up, self._hidden_PD[start])[None])[0]
                torch.mv(down, inner, out=self._out_PD[start])
                continue
            num_rows = _padded(end - start) if self._is_half else end - start  # the surplus is computed for nobody
            out_ND = torch.mm(
                module._apply_gate(torch.mm(self._hidden_PD[start : start + num_rows], gate_up.t())), down.t()
            )
            self._out_PD[start:end] = out_ND[: end - start]

    def add_all(self) -> None:
        """Computes every pair, where ids are slots."""
        self.add(self._range_of, self._range_of)

    def total(self) -> Tensor:
        """[T, D], after every pair was computed."""
        weighted_PD = torch.empty_like(
            self._out_PD, dtype=torch.promote_types(self._out_PD.dtype, self._weights_P.dtype)
        )
        weighted_PD[self._order_P] = self._out_PD * self._weights_P[:, None]
        return weighted_PD.view(*self._shape_TK, -1).sum(1).to(self._out_PD.dtype)


def _padded(num_rows: int) -> int:
    """The number of rows to compute in half precision: few different ones, and not many more than asked for."""
    for few in (4, 8):
        if num_rows <= few:
            return few
    return -(-num_rows // HALF_PRECISION_ROWS) * HALF_PRECISION_ROWS


KERNELS: dict[str, Kernel] = {
    "pairs, in place": pairs_in_place,
    "pairs, copied": copied_pairs,
    "experts, copied": copied_experts,
    "experts, in place": sorted_pairs,
}
