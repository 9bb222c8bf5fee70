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
    layers_by_config,
    token_slots,
)

LAYERS = layers_by_config(
    MixtralConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
)


def keys_of(tenant: str, blocks: list[int]) -> list[bytes]:
    """A key for each block that stands for those before it."""
    return [f"{tenant} {blocks[: end + 1]}".encode() for end in range(len(blocks))]


class BlockPoolMachine(RuleBasedStateMachine):
    """Requests of few different tokens, so that many begin alike. `content` is what was last written to a block."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=8)
        self.content: dict[int, bytes] = {}
        self.held: list[tuple[int, ...]] = []

    @rule(
        target=requests,
        tenant=st.sampled_from(["a", "b"]),
        blocks=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        rest=st.integers(0, BLOCK_TOKENS - 1),
    )
    def admit(self, tenant: str, blocks: list[int], rest: int) -> tuple[tuple[int, ...], list[bytes]]:
        keys = keys_of(tenant, blocks)
        num_tokens, free_before = len(blocks) * BLOCK_TOKENS + rest, self.pool.num_free
        shared = self.pool.find(keys)
        assert [self.content[block] for block in shared] == keys[: len(shared)]
        num_idle = sum(not any(block in held for held in self.held) for block in shared)
        taken = self.pool.allocate(num_tokens, shared)
        if taken is None:
            assert blocks_for(num_tokens) - len(shared) > free_before - num_idle
            assert self.pool.num_free == free_before
            assert self.pool.find(keys) == shared
            return (), []
        assert len(taken) == len(set(taken)) == blocks_for(num_tokens)
        assert taken[: len(shared)] == shared
        for block in taken[len(shared) :]:
            assert not any(block in held for held in self.held)
        self.content.update(zip(taken[len(shared) :], keys[len(shared) :], strict=False))
        self.held.append(taken)
        return taken, keys

    @rule(request=requests, num_blocks=st.integers(0, 9))
    def publish(self, request: tuple[tuple[int, ...], list[bytes]], num_blocks: int) -> None:
        taken, keys = request
        if taken in self.held:
            num_blocks = min(num_blocks, len(keys))
            self.pool.publish(taken[:num_blocks], keys[:num_blocks])
            assert len(self.pool.find(keys)) >= num_blocks

    @rule(request=consumes(requests))
    def free(self, request: tuple[tuple[int, ...], list[bytes]]) -> None:
        taken, keys = request
        if taken:
            found = self.pool.find(keys)
            self.pool.free(taken)
            self.held.remove(taken)
            assert self.pool.find(keys) == found, "what nobody holds stays until its block is needed"

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len({block for held in self.held for block in held})


BlockPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBlockPool = BlockPoolMachine.TestCase


def test_freeing_twice_is_noticed() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.free(blocks)


def published(pool: BlockPool, tenant: str, num_blocks: int) -> list[bytes]:
    """The keys of a request that has come and gone and left so many blocks."""
    keys = keys_of(tenant, [1] * num_blocks)
    blocks = pool.allocate(num_blocks * BLOCK_TOKENS)
    assert blocks is not None
    pool.publish(blocks, keys)
    pool.free(blocks)
    return keys


def test_the_least_recently_used_goes_first_and_the_end_of_a_prefix_before_its_beginning() -> None:
    pool = BlockPool(6)
    old, new = published(pool, "old", 2), published(pool, "new", 2)
    pool.free(pool.allocate(2 * BLOCK_TOKENS, pool.find(old)) or ())  # used once more
    assert (pool.num_free, pool.num_published) == (6, 4)
    left = []
    for num_blocks in (2, 3, 4, 5, 6):
        pool.free(pool.allocate(num_blocks * BLOCK_TOKENS) or ())
        left.append((len(pool.find(old)), len(pool.find(new))))
    assert left == [(2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]
    assert pool.num_published == 0


def test_two_that_ran_the_same_at_once_leave_it_once() -> None:
    pool = BlockPool(4)
    keys = keys_of("t", [1])
    first, second = pool.allocate(BLOCK_TOKENS), pool.allocate(BLOCK_TOKENS)
    assert first is not None
    assert second is not None
    pool.publish(first, keys)
    pool.publish(second, keys)
    pool.free(first)
    pool.free(second)
    pool.check_integrity()
    assert pool.find(keys) == first
    assert pool.num_published == 1


def test_the_tensors_take_what_the_arithmetic_says() -> None:
    cache = KvCache(LAYERS, 5, torch.float32, torch.device("cpu"))
    assert cache.nbytes == 5 * BLOCK_TOKENS * kv_bytes_per_token(LAYERS, torch.float32)
    assert kv_bytes_per_token(LAYERS, torch.bfloat16) == 2 * 3 * 2 * 8 * 2


def test_slots_follow_the_block_table_and_padding_stays_within_it() -> None:
    slots = token_slots([(3, 1), (2,)], torch.device("cpu"))
    assert slots.shape == (2, 32)
    assert slots[0].tolist() == [*range(48, 64), *range(16, 32)]
    assert slots[1].tolist() == [*range(32, 48)] * 2
