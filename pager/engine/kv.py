"""Keys and values of the requests in flight: who owns which block (integers), and the tensors behind the blocks.

Legend: L layers, N token slots (blocks times BLOCK_TOKENS), G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pager.memory.needs import GATHER_TOKENS, KV_BLOCK_TOKENS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOCK_TOKENS = KV_BLOCK_TOKENS


class BlockPool:
    """Keeps which KV blocks are free. Knows no tensors and no requests.

    Blocks are handed out all at once for a request's whole life, so a running request never waits for one.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._is_used = [False] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self, num_tokens: int) -> tuple[int, ...] | None:
        """Takes blocks for `num_tokens` tokens; None, and nothing taken, when there are not enough now."""
        count = blocks_for(num_tokens)
        if count > len(self._free):
            return None
        taken = tuple(self._free.pop() for _ in range(count))
        for block in taken:
            self._is_used[block] = True
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Gives back what `allocate` gave."""
        for block in blocks:
            assert self._is_used[block], f"block {block} is freed twice"
            self._is_used[block] = False
        self._free.extend(blocks)

    def check_integrity(self) -> None:
        """Asserts that every block is either used or in the free list, once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        for block, is_used in enumerate(self._is_used):
            assert is_used != (block in free), f"block {block} is both used and free, or neither"


class KvCache:
    """The tensors `k[L, N, G, D]` and `v[L, N, G, D]`. A token slot is `block * BLOCK_TOKENS + offset`.

    `gather_tokens` is how many of them `gather` takes at a time.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        gather_tokens: int = GATHER_TOKENS,
    ) -> None:
        num_kv_heads, head_dim = heads_of(config)
        shape = (config.num_hidden_layers, num_blocks * BLOCK_TOKENS, num_kv_heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.gather_tokens = gather_tokens
        # Kept, because every layer of every step needs them: new ones would cost a page fault per 4 KiB each time.
        self._gathered = torch.empty(2, gather_tokens, num_kv_heads, head_dim, dtype=dtype, device=device)

    def gather(self, layer: int, slots_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, G, C, D] of these token slots; valid until the next call."""
        slots_T = slots_BC.reshape(-1)
        shape = (*slots_BC.shape, *self.k.shape[2:])
        k, v = (
            torch.index_select(held[layer], 0, slots_T, out=gathered[: len(slots_T)]).view(shape).transpose(1, 2)
            for held, gathered in zip((self.k, self.v), self._gathered, strict=True)
        )
        return k, v

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take in all layers."""
    num_kv_heads, head_dim = heads_of(config)
    return 2 * int(config.num_hidden_layers) * num_kv_heads * head_dim * dtype.itemsize


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def token_slots(tables: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """[B, max blocks * BLOCK_TOKENS] int64: the token slot of each position of each block table. What lies beyond a
    table's end repeats its first block.
    """
    width = max(map(len, tables))
    padded = torch.tensor([[*table, *[table[0]] * (width - len(table))] for table in tables])
    slots = padded[:, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)
    return slots.flatten(1).to(device)


def heads_of(config: PretrainedConfig) -> tuple[int, int]:
    """How many key/value heads there are, and their dimension."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(num_kv_heads), int(head_dim)
