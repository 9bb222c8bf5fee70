"""EMO's training objective (arXiv 2605.06663): a gate that keeps each document to a pool, and the gate's losses.

Legend: T tokens of the batch, M documents, E experts of a layer (shared last), R routed experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pager.models import EmoForCausalLM
from pager.models.emo import EmoConfig, EmoSparseMoeBlock, EmoTopKRouter


@dataclass(frozen=True, slots=True)
class Documents:
    """Which document each token belongs to, and how many routed experts each document may use."""

    document_T: Tensor
    pool_sizes_M: Tensor


class PoolGate(EmoTopKRouter):
    """The model's gate, restricted per document while `documents` is set. Remembers its last forward's losses.

    A document keeps the routed experts with the largest gate probability summed over all its tokens, the future
    included. The choice has no gradient; the softmax over the chosen experts does.
    """

    def __init__(self, config: EmoConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.documents: Documents | None = None
        self.balance_loss = self.z_loss = torch.zeros(())
        self.load_E = torch.zeros(self.num_experts)

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = functional.linear(hidden_TD, self.weight)
        allowed_TE = None if self.documents is None else self.pools(logits_TE.detach(), self.documents)
        weights_TK, index_TK = self.pick(logits_TE, allowed_TE)
        self._remember_losses(logits_TE, index_TK, allowed_TE)
        return logits_TE, weights_TK, index_TK

    def pools(self, logits_TE: Tensor, documents: Documents) -> Tensor:
        """Returns bool [T, E]: the pool of each token's document."""
        probs_TR = logits_TE[:, : self.num_experts - self.num_shared].softmax(-1)
        scores_MR = probs_TR.new_zeros(len(documents.pool_sizes_M), probs_TR.shape[-1])
        scores_MR.index_add_(0, documents.document_T, probs_TR)
        rank_MR = scores_MR.argsort(descending=True, stable=True).argsort()
        allowed_MR = rank_MR < documents.pool_sizes_M[:, None]
        allowed_ME = functional.pad(allowed_MR, (0, self.num_shared), value=True)
        return allowed_ME[documents.document_T]

    def _remember_losses(self, logits_TE: Tensor, index_TK: Tensor, allowed_TE: Tensor | None) -> None:
        """Keeps the losses.

        Load balancing is over the whole batch, on the pooled routing: 1 when all shares are equal.
        """
        num_routed = self.num_experts - self.num_shared
        routed_TR = logits_TE[:, :num_routed]
        self.z_loss = routed_TR.logsumexp(-1).square().mean()
        if allowed_TE is not None:
            routed_TR = routed_TR.masked_fill(~allowed_TE[:, :num_routed], -torch.inf)
        self.load_E = torch.bincount(index_TK.flatten(), minlength=self.num_experts) / len(index_TK)
        share_R = self.load_E[:num_routed] / self.load_E[:num_routed].sum()
        self.balance_loss = num_routed * (share_R * routed_TR.softmax(-1).mean(0)).sum()


def install_pool_gates(model: EmoForCausalLM) -> list[PoolGate]:
    """Replaces every layer's gate by a PoolGate with the same weights; returns them in layer order."""
    routers = []
    for layer_idx, layer in enumerate(model.model.layers):
        block = layer.mlp
        if isinstance(block, EmoSparseMoeBlock):
            router = PoolGate(model.config, layer_idx)
            router.weight = block.gate.weight
            block.gate = router
            routers.append(router)
    return routers


def documents_of(positions_BN: Tensor, pool_sizes: Tensor | int) -> Documents:
    """Finds the documents of packed rows.

    `pool_sizes` is one number for all, or at least as many as there are documents.
    """
    document_T = (positions_BN == 0).flatten().cumsum(0) - 1
    num_documents = int(document_T[-1]) + 1
    if isinstance(pool_sizes, int):
        return Documents(document_T, torch.full((num_documents,), pool_sizes, device=positions_BN.device))
    return Documents(document_T, pool_sizes[:num_documents])


def next_token_labels(tokens_BN: Tensor, positions_BN: Tensor) -> Tensor:
    """Returns labels [B, N]: the following token of the same document, −100 at a document's last token."""
    labels_BN = torch.full_like(tokens_BN, -100)
    continues = positions_BN[:, 1:] != 0
    labels_BN[:, :-1][continues] = tokens_BN[:, 1:][continues]
    return labels_BN
