"""EMO's picking rule as a pure function of the router's logits.

Legend: T tokens, E experts of the layer (shared last), K experts picked for a token (top_k).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pick_experts(
    logits_TE: Tensor,
    *,
    top_k: int,
    num_shared: int = 0,
    always_active: Sequence[int] = (),
    norm_topk_prob: bool = False,
    allowed_TE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick each token's experts and weigh them: `(weights_TK fp32, index_TK)`, indices over all E experts.

    The last `num_shared` experts serve every token, weighed by a softmax of their own; the other K − num_shared
    come from a softmax over the routed columns. `always_active` experts take precedence over `num_shared`: one
    softmax over all columns, those experts first. Nothing is renormalised after top-k unless `norm_topk_prob`,
    which is legal only without shared and always-active experts (EmoConfig checks it).

    `allowed_TE` (bool, broadcastable to [T, E]) is the document's pool: a routed expert outside it takes no part in
    the softmax. Its entries for shared and always-active experts are not read. It must leave at least K − num_shared
    routed experts; otherwise experts of weight 0 from outside the pool fill the places.
    """
    scores_TE = logits_TE.float()
    if allowed_TE is not None:
        scores_TE = scores_TE.masked_fill(~_with_permanent(allowed_TE, num_shared, always_active), -torch.inf)
    if always_active:
        return _pick_beside_always_active(scores_TE, top_k, always_active)
    num_routed = logits_TE.shape[-1] - num_shared
    probs_TR = scores_TE[:, :num_routed].softmax(-1)
    weights_TK, index_TK = probs_TR.topk(min(top_k - num_shared, num_routed), dim=-1)
    if norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    if not num_shared:
        return weights_TK, index_TK
    shared_TS = scores_TE[:, num_routed:].softmax(-1)
    index_TS = torch.arange(num_routed, num_routed + num_shared, device=logits_TE.device).expand_as(shared_TS)
    return torch.cat([weights_TK, shared_TS], -1), torch.cat([index_TK, index_TS], -1)


def _pick_beside_always_active(scores_TE: Tensor, top_k: int, always_active: Sequence[int]) -> tuple[Tensor, Tensor]:
    probs_TE = scores_TE.softmax(-1)
    always_A = torch.tensor(always_active, device=scores_TE.device)
    always_TA = always_A.expand(len(scores_TE), -1)
    others_TE = probs_TE.index_fill(-1, always_A, -1.0)
    num_others = min(top_k, scores_TE.shape[-1]) - len(always_active)
    weights_TK, index_TK = others_TE.topk(num_others, dim=-1)
    return torch.cat([probs_TE.gather(-1, always_TA), weights_TK], -1), torch.cat([always_TA, index_TK], -1)


def _with_permanent(allowed_TE: Tensor, num_shared: int, always_active: Sequence[int]) -> Tensor:
    num_experts = allowed_TE.shape[-1]
    permanent = list(always_active) or range(num_experts - num_shared, num_experts)
    permanent_E = torch.zeros(num_experts, dtype=torch.bool, device=allowed_TE.device)
    permanent_E[list(permanent)] = True
    return allowed_TE | permanent_E
