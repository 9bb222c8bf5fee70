"""EMO's picking rule as a pure function of the gate's logits.

Legend: T tokens, E experts of the layer (shared last), K experts picked for a token (top_k).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def pick_experts(
    logits_TE: Tensor,
    *,
    top_k: int,
    num_shared: int = 0,
    always_active: Sequence[int] = (),
    norm_topk_prob: bool = False,
    allowed_TE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Picks each token's experts and weighs them: `(weights_TK fp32, index_TK)`, indices over all E experts.

    The last `num_shared` experts serve every token, weighed by a softmax of their own; the other K − num_shared
    come from a softmax over the routed columns. `always_active` experts take precedence over `num_shared`: one
    softmax over all columns, those experts first. Nothing is renormalised after top-k unless `norm_topk_prob`,
    which is legal only without shared and always-active experts (EmoConfig checks it).

    `allowed_TE` (bool, broadcastable to [T, E]) is the document's pool: a routed expert outside it takes no part in
    the softmax. Its entries for shared and always-active experts are not read. It must leave at least K − num_shared
    routed experts; otherwise experts of weight 0 from outside the pool fill the places.
    """
    if always_active:
        return _pick_beside_always_active(_scores(logits_TE, allowed_TE, always_active), top_k, always_active)
    num_routed = logits_TE.shape[-1] - num_shared
    allowed_TR = None if allowed_TE is None else allowed_TE[..., :num_routed]
    probs_TR = _scores(logits_TE[:, :num_routed], allowed_TR).softmax(-1)
    weights_TK, index_TK = probs_TR.topk(min(top_k - num_shared, num_routed), dim=-1)
    if norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    if num_shared == 1:  # a softmax over one column is 1
        return pad(weights_TK, (0, 1), value=1.0), pad(index_TK, (0, 1), value=num_routed)
    if not num_shared:
        return weights_TK, index_TK
    shared_TS = logits_TE[:, num_routed:].float().softmax(-1)
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


def _scores(logits_TE: Tensor, allowed_TE: Tensor | None, always_active: Sequence[int] = ()) -> Tensor:
    """Returns fp32 scores, minus infinity where an expert is not allowed."""
    if allowed_TE is None:
        return logits_TE.float()
    if always_active:
        allowed_TE = allowed_TE.index_fill(-1, torch.tensor(always_active, device=allowed_TE.device), True)
    return torch.where(allowed_TE, logits_TE.float(), -torch.inf)
