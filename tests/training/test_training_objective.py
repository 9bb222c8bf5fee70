"""The pool router, its losses and the training kernels against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pager.models import EmoConfig, EmoForCausalLM
from training import fast
from training.objective import PoolGate, documents_of, install_pool_gates, next_token_labels

TOKENS_BN = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
POSITIONS_BN = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4]])


@pytest.fixture
def model() -> EmoForCausalLM:
    torch.manual_seed(0)
    config = EmoConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=9,
        num_experts_per_tok=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=1,
        eos_token_id=0,
    )
    return EmoForCausalLM(config)


def hidden(model: EmoForCausalLM) -> Tensor:
    out = model.model(input_ids=TOKENS_BN, position_ids=POSITIONS_BN, use_cache=False, output_router_logits=False)
    states: Tensor = out.last_hidden_state
    return states


def test_a_document_starts_where_positions_restart() -> None:
    documents = documents_of(POSITIONS_BN, 4)
    assert documents.document_T.tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3]
    assert documents.pool_sizes_M.tolist() == [4, 4, 4, 4]


def test_labels_stop_at_a_documents_end() -> None:
    assert next_token_labels(TOKENS_BN, POSITIONS_BN).tolist() == [
        [6, 7, 8, -100, 10, -100],
        [-100, 13, 14, 15, 16, -100],
    ]


def test_no_document_leaves_its_pool(model: EmoForCausalLM) -> None:
    picks: list[Tensor] = []
    sizes = torch.tensor([3, 5, 8, 4])
    for router in install_pool_gates(model):
        router.documents = documents_of(POSITIONS_BN, sizes)
        router.register_forward_hook(lambda gate, args, output: picks.append(output[2]))
    hidden(model)
    assert len(picks) == 2
    for index_TK in picks:
        for document, size in enumerate(sizes):
            of_document = index_TK[documents_of(POSITIONS_BN, 4).document_T == document]
            assert (of_document[:, -1] == 8).all()
            assert len(of_document[:, :3].unique()) <= size


def test_packed_documents_do_not_see_each_other(model: EmoForCausalLM) -> None:
    packed = hidden(model)[0, 4:]
    alone = model.model(input_ids=TOKENS_BN[:1, 4:], use_cache=False, output_router_logits=False).last_hidden_state[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_balance_loss_is_one_at_balance_and_the_number_of_experts_at_collapse() -> None:
    config = EmoConfig(hidden_size=8, num_attention_heads=1, num_experts=9, num_experts_per_tok=2, num_hidden_layers=1)
    router = PoolGate(config, 0)
    with torch.no_grad():
        router.weight[:8] = 50 * torch.eye(8)
    router(torch.eye(8))
    assert router.balance_loss.item() == pytest.approx(1.0, abs=1e-4)
    router(torch.eye(8)[[3] * 8])
    assert router.balance_loss.item() == pytest.approx(8.0, abs=1e-4)


def test_the_pool_choice_passes_gradients_through_the_masked_softmax_only() -> None:
    config = EmoConfig(hidden_size=8, num_attention_heads=1, num_experts=9, num_experts_per_tok=2, num_hidden_layers=1)
    torch.manual_seed(0)
    router = PoolGate(config, 0)
    with torch.no_grad():
        router.weight.normal_()
    router.documents = documents_of(torch.arange(6)[None], 3)
    hidden_TD = torch.randn(6, 8)
    _, weights_TK, _ = router(hidden_TD)
    pool = router.pools(functional.linear(hidden_TD, router.weight).detach(), router.documents)[0, :8]
    assert pool.sum() == 3
    weights_TK.sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad[:8][~pool].eq(0).all()
    assert router.weight.grad[:8][pool].ne(0).any(-1).all()


def test_training_kernels_give_the_gradients_of_plain_torch(model: EmoForCausalLM) -> None:
    fast.install()
    labels_T = next_token_labels(TOKENS_BN, POSITIONS_BN).flatten()

    def gradients(experts: str, *, plain_loss: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model.set_experts_implementation(experts)
        model.zero_grad()
        hidden_TD = hidden(model).flatten(0, 1)
        if plain_loss:
            loss = functional.cross_entropy(model.lm_head(hidden_TD), labels_T)
        else:
            loss = fast.cross_entropy(hidden_TD, model.lm_head.weight, labels_T)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain_loss, plain = gradients("eager", plain_loss=True)
    fast_loss, quick = gradients(fast.CACHE_RESIDENT, plain_loss=False)
    torch.testing.assert_close(fast_loss, plain_loss)
    assert quick.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(quick[name], plain[name], atol=1e-5, rtol=1e-4, msg=name)
