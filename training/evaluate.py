"""Validation loss by domain, with all experts and with a document pool."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from tokenizers import Tokenizer

from pager.models import EmoForCausalLM
from training import data, fast
from training.objective import PoolGate, documents_of, next_token_labels

EVALUATION_POOL = 31
"""Routed experts a document keeps in the pooled column: 32 of 128 with the shared one."""

LossTable = dict[str, dict[str, float]]


@torch.no_grad()
def losses_by_domain(
    model: EmoForCausalLM, tokenizer: Tokenizer, corpus: Path, context: int, max_rows: int = 32
) -> LossTable:
    """Returns losses in nats a token: `{"python": {"full": ..., "pool31": ...}, ..., "mean": ...}`.

    The model's gates must be PoolGates. The pool is chosen over the whole document, as in training.
    """
    table: LossTable = {}
    for domain in data.domains_of(corpus, "valid"):
        pieces = data.documents(corpus, domain, "valid", tokenizer, context, np.random.default_rng(0))
        rows = data.pack(pieces, context)
        tokens_BN = torch.from_numpy(rows.tokens_RN[:max_rows]).long()
        positions_BN = torch.from_numpy(rows.positions_RN[:max_rows]).long()
        table[domain] = {
            "full": _loss(model, tokens_BN, positions_BN, None),
            f"pool{EVALUATION_POOL}": _loss(model, tokens_BN, positions_BN, EVALUATION_POOL),
        }
    table["mean"] = {key: float(np.mean([row[key] for row in table.values()])) for key in next(iter(table.values()))}
    return table


def _loss(model: EmoForCausalLM, tokens_BN: torch.Tensor, positions_BN: torch.Tensor, pool: int | None) -> float:
    device = model.lm_head.weight.device
    tokens_BN, positions_BN = tokens_BN.to(device), positions_BN.to(device)
    documents = None if pool is None else documents_of(positions_BN, pool)
    for module in model.modules():
        if isinstance(module, PoolGate):
            module.documents = documents
    hidden_TD = model.model(
        input_ids=tokens_BN, position_ids=positions_BN, use_cache=False, output_router_logits=False
    ).last_hidden_state.flatten(0, 1)
    labels_T = next_token_labels(tokens_BN, positions_BN).flatten()
    return fast.cross_entropy(hidden_TD, model.lm_head.weight, labels_T).item()


def as_table(losses: LossTable) -> Table:
    columns = list(losses["mean"])
    table = Table("domain", *columns, title="validation loss, nats a token")
    for domain, row in losses.items():
        table.add_row(domain, *(f"{row[column]:.3f}" for column in columns))
    return table
