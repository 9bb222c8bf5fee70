"""Training-time kernels for one or two CPU cores.

They give the results of the model's own code with less memory traffic.

Legend: T tokens, S token-expert pairs sorted by expert, E experts, D hidden, F intermediate, V vocabulary.
"""

# autograd.Function is untyped in torch, and module attributes look like Tensor | Module.
# mypy: disable-error-code="no-any-return,no-untyped-call,arg-type"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

CACHE_RESIDENT = "cache_resident"
"""Name under which `install` registers the experts function; pass it to `model.set_experts_implementation`."""


class _ExpertByExpert(torch.autograd.Function):
    """Runs gate, up, activation and down one expert at a time, so that intermediates never leave the CPU's cache."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
        weights_S: Tensor,
        token_S: Tensor,
        counts: list[int],
    ) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        gate_up_SF = x_TD.new_empty(len(token_S), gate_up_EFD.shape[1])
        for expert, rows in _groups(counts):
            token = token_S[rows]
            torch.mm(x_TD[token], gate_up_EFD[expert].T, out=gate_up_SF[rows])
            gate, up = gate_up_SF[rows].chunk(2, dim=-1)
            act = functional.silu(gate).mul_(up).mul_(weights_S[rows, None])
            out_TD.index_add_(0, token, act @ down_EDF[expert].T)
        ctx.save_for_backward(x_TD, gate_up_EFD, down_EDF, weights_S, token_S, gate_up_SF)
        ctx.counts = counts
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TD,) = grads
        x_TD, gate_up_EFD, down_EDF, weights_S, token_S, gate_up_SF = ctx.saved_tensors
        grad_x, grad_weights = torch.zeros_like(x_TD), torch.empty_like(weights_S)
        grad_gate_up, grad_down = torch.zeros_like(gate_up_EFD), torch.zeros_like(down_EDF)
        for expert, rows in _groups(ctx.counts):
            token, weights = token_S[rows], weights_S[rows, None]
            grad_out, x = grad_TD[token], x_TD[token]
            gate, up = gate_up_SF[rows].chunk(2, dim=-1)
            silu = functional.silu(gate)
            act = silu * up
            grad_act = grad_out @ down_EDF[expert]
            torch.sum(grad_act * act, dim=-1, out=grad_weights[rows])
            torch.mm(grad_out.T, act.mul_(weights), out=grad_down[expert])
            grad_act.mul_(weights)
            grad_gate = torch.ops.aten.silu_backward(grad_act * up, gate)
            grad_h = torch.cat((grad_gate, grad_act.mul_(silu)), dim=-1)
            torch.mm(grad_h.T, x, out=grad_gate_up[expert])
            grad_x.index_add_(0, token, grad_h @ gate_up_EFD[expert])
        return grad_x, grad_gate_up, grad_down, grad_weights, None, None


def _groups(counts: list[int]) -> list[tuple[int, slice]]:
    groups, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            groups.append((expert, slice(start, start + count)))
            start += count
    return groups


def cache_resident_experts(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts function for transformers' registry; SwiGLU experts only."""
    order_S = top_k_index.flatten().argsort()
    counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts).tolist()
    token_S = order_S // top_k_index.shape[-1]
    weights_S = top_k_weights.flatten()[order_S]
    return _ExpertByExpert.apply(hidden_states, self.gate_up_proj, self.down_proj, weights_S, token_S, counts)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sums the cross entropies of `x @ W.T` and makes their gradients on the way: the [T, V] logits never exist."""

    CHUNK = 256

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        grad_x, grad_weight = torch.empty_like(x_TD), torch.zeros_like(weight_VD)
        total = x_TD.new_zeros(())
        for x, labels, grad in zip(
            x_TD.split(_ChunkedCrossEntropy.CHUNK),
            labels_T.split(_ChunkedCrossEntropy.CHUNK),
            grad_x.split(_ChunkedCrossEntropy.CHUNK),
            strict=True,
        ):
            logits = x @ weight_VD.T
            total -= logits.gather(-1, labels[:, None]).sum()
            peak = logits.amax(-1, keepdim=True)
            exp = logits.sub_(peak).exp_()
            norm = exp.sum(-1, keepdim=True)
            total += (norm.log() + peak).sum()
            exp.div_(norm)[torch.arange(len(labels), device=labels.device), labels] -= 1
            torch.mm(exp, weight_VD, out=grad)
            grad_weight.addmm_(exp.T, x)
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grads[0], grad_weight * grads[0], None


def cross_entropy(x_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Returns the mean next-token loss in nats over the tokens whose label is not −100."""
    kept = labels_T != -100
    total: Tensor = _ChunkedCrossEntropy.apply(x_TD[kept], head_VD, labels_T[kept])
    return total / kept.sum()


def install() -> None:
    ALL_EXPERTS_FUNCTIONS.register(CACHE_RESIDENT, cache_resident_experts)
