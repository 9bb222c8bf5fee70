import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from transformers import MixtralConfig

from pager.engine.kv import (
    BLOCK_TOKENS,
    BlockPool,
    KvCache,
    blocks_for,
    kv_bytes_per_token,
    token_slots,
)

CONFIG = MixtralConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)


class BlockPoolMachine(RuleBasedStateMachine):
    allocations = Bundle("allocations")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=8)
        self.held: set[int] = set()

    @rule(target=allocations, num_tokens=st.integers(1, 8 * BLOCK_TOKENS + 1))
    def allocate(self, num_tokens: int) -> tuple[int, ...]:
        free_before = self.pool.num_free
        blocks = self.pool.allocate(num_tokens)
        if blocks is None:
            assert blocks_for(num_tokens) > free_before
            assert self.pool.num_free == free_before
            return ()
        assert len(blocks) == blocks_for(num_tokens)
        assert self.held.isdisjoint(blocks)
        self.held.update(blocks)
        return blocks

    @rule(blocks=consumes(allocations))
    def free(self, blocks: tuple[int, ...]) -> None:
        self.pool.free(blocks)
        self.held.difference_update(blocks)

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len(self.held)


BlockPoolMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestBlockPool = BlockPoolMachine.TestCase


def test_freeing_twice_is_noticed() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.free(blocks)


def test_the_tensors_take_what_the_arithmetic_says() -> None:
    cache = KvCache(CONFIG, 5, torch.float32, torch.device("cpu"))
    assert cache.nbytes == 5 * BLOCK_TOKENS * kv_bytes_per_token(CONFIG, torch.float32)
    assert kv_bytes_per_token(CONFIG, torch.bfloat16) == 2 * 3 * 2 * 8 * 2


def test_slots_follow_the_block_table_and_padding_stays_within_it() -> None:
    slots = token_slots([(3, 1), (2,)], torch.device("cpu"))
    assert slots.shape == (2, 32)
    assert slots[0].tolist() == [*range(48, 64), *range(16, 32)]
    assert slots[1].tolist() == [*range(32, 48)] * 2
