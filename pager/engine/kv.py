"""Keys and values: which request owns which block (integers), the tensors behind the blocks, and shared prefixes.

Legend: N token slots (blocks times BLOCK_TOKENS), G key/value heads, D head dimension.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from pager.engine.states import StateShape, StateStore
from pager.memory import GATHER_TOKENS, KV_BLOCK_TOKENS
from pager.models.families import largest
from pager.types import ExpertPool, Full, GenerateRequest, PoolPolicy

if TYPE_CHECKING:
    from transformers import PretrainedConfig


BLOCK_TOKENS = KV_BLOCK_TOKENS


class BlockPool:
    """The KV blocks: which are held, by how many requests, and what the full ones contain. Knows no tensors.

    Blocks are handed out all at once for a request's whole life, so a running request never waits for one. A full block
    can be published under a key that stands for everything that its content depends on (`PrefixKeys`): requests that
    begin alike then hold the same block. A published block is never written to. When no request holds it, it counts as
    free, and it is evicted, least recently used first, once no blocks without content are left.

    Beside blocks every answer in flight holds a place, where layers keep its state (`StateStore`).
    """

    def __init__(self, num_blocks: int, num_places: int = 1) -> None:
        self.num_blocks = num_blocks
        self.num_places = num_places
        self._places = list(reversed(range(num_places)))
        self._blank = list(reversed(range(num_blocks)))  # not held, without content
        self._idle: dict[int, None] = {}  # published and not held, least recently used first
        self._num_holders = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_places_used(self) -> int:
        return self.num_places - len(self._places)

    @property
    def num_published(self) -> int:
        return len(self._published)

    def find(self, keys: Iterable[bytes]) -> tuple[int, ...]:
        """Returns the blocks published under `keys`, up to the first key that has none. They stay evictable."""
        found = takewhile(lambda block: block is not None, map(self._published.get, keys))
        return tuple(block for block in found if block is not None)

    def allocate(self, num_tokens: int, shared: Sequence[int] = ()) -> tuple[int, ...] | None:
        """Returns blocks for `num_tokens` tokens, the first of them `shared`, which `find` returned; None, and nothing
        taken, when there are not enough now.
        """
        count = blocks_for(num_tokens) - len(shared)
        num_idle = sum(block in self._idle for block in shared)
        if count > self.num_free - num_idle:
            return None
        for block in shared:
            self._idle.pop(block, None)
        taken = (*shared, *(self._take_free() for _ in range(count)))
        for block in taken:
            self._num_holders[block] += 1
        return taken

    def take_place(self) -> int:
        """Returns a place. There is one for each of the rows that may be in flight."""
        return self._places.pop()

    def free_place(self, place: int) -> None:
        """Gives back what `take_place` returned."""
        assert place not in self._places, f"place {place} is freed twice"
        self._places.append(place)

    def hold(self, blocks: Sequence[int]) -> None:
        """Counts one more holder of `blocks`, which are held; each holder gives them back with `free`."""
        for block in blocks:
            assert self._num_holders[block], f"block {block} is held by nobody"
            self._num_holders[block] += 1

    def publish(self, blocks: Sequence[int], keys: Sequence[bytes]) -> None:
        """Makes the content of full blocks, which are held and have these keys, available to other requests.

        A block whose content is published already, by whichever block, stays as it is.
        """
        for block, key in zip(blocks, keys, strict=True):
            assert self._num_holders[block], f"block {block} is published but not held"
            if self._key_of[block] is None and key not in self._published:
                self._key_of[block] = key
                self._published[key] = block

    def free(self, blocks: Sequence[int]) -> None:
        """Gives back what `allocate` returned. The last published blocks are evicted first: they are of no use without
        those before.
        """
        for block in reversed(blocks):
            assert self._num_holders[block], f"block {block} is freed twice"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if self._key_of[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None

    def check_integrity(self) -> None:
        """Checks that every block is held, blank or idle, and exactly one of them, and that keys and blocks match one
        to one.
        """
        blank = set(self._blank)
        assert len(blank) == len(self._blank), "a block is twice in the free list"
        for block, (num_holders, key) in enumerate(zip(self._num_holders, self._key_of, strict=True)):
            assert num_holders >= 0, f"block {block} is freed twice"
            states = (num_holders > 0, block in blank, block in self._idle)
            assert sum(states) == 1, f"block {block} is held, blank, idle: {states}"
            assert key is None or (block not in blank and self._published[key] == block), (
                f"block {block} has lost its key"
            )
            assert key is not None or block not in self._idle, f"block {block} is idle without a key"
        assert len(self._published) == sum(key is not None for key in self._key_of), "a key has no block"

    def _take_free(self) -> int:
        if self._blank:
            return self._blank.pop()
        block = next(iter(self._idle))
        del self._idle[block]
        key = self._key_of[block]
        assert key is not None, "an idle block is published"
        del self._published[key]
        self._key_of[block] = None
        return block


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The state that one layer keeps of a token, and the tokens that its queries see: all that came before, or the last
    `window` tokens.

    With `has_sinks` each query head has a logit of its own beside those of the tokens, which takes a share for nothing.
    A layer that does not attend has no heads; it may have a `state` instead.
    """

    num_query_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    has_sinks: bool = False
    state: StateShape | None = None

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.num_kv_heads * self.value_dim


class KvCache:
    """The tensors `k` [N, G, D] and `v` [N, G, D] of every layer. A token slot is `block * BLOCK_TOKENS + offset`.

    `gather_tokens` is how many of them `gather` takes at a time. `states` has places for `num_places` answers.
    """

    def __init__(
        self,
        layers: Sequence[LayerAttention],
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        gather_tokens: int = GATHER_TOKENS,
        num_places: int = 1,
    ) -> None:
        self.layers = tuple(layers)
        shapes = {layer: each.state for layer, each in enumerate(layers) if each.state is not None}
        self.states = StateStore(shapes, num_places, device)
        num_slots = num_blocks * BLOCK_TOKENS
        zeros, empty = (partial(make, dtype=dtype, device=device) for make in (torch.zeros, torch.empty))
        self.k = [zeros(num_slots, each.num_kv_heads, each.key_dim) for each in layers]
        self.v = [zeros(num_slots, each.num_kv_heads, each.value_dim) for each in layers]
        self.dtype = dtype
        self.gather_tokens = gather_tokens
        # Kept, because every layer of every step needs them: new ones would cost a page fault per 4 KiB each time.
        self._gathered_k = empty(gather_tokens * max(each.key_width for each in layers))
        self._gathered_v = empty(gather_tokens * max(each.value_width for each in layers))

    def gather(self, layer: int, slots_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values [B, G, C, D] of these token slots; valid until the next call."""
        slots_T = slots_BC.reshape(-1)

        def taken(held: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
            shape_TGD = (len(slots_T), *held.shape[1:])
            out = buffer[: math.prod(shape_TGD)].view(shape_TGD)
            return torch.index_select(held, 0, slots_T, out=out).view(*slots_BC.shape, *held.shape[1:]).transpose(1, 2)

        return taken(self.k[layer], self._gathered_k), taken(self.v[layer], self._gathered_v)

    def copy_block(self, source: int, to: int) -> None:
        """Copies the content of one block into another."""
        of, into = (slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS) for block in (source, to))
        for held in (*self.k, *self.v):
            held[into] = held[of]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.k, *self.v)) + self.states.nbytes


def state_bytes(layers: Sequence[LayerAttention]) -> int:
    """Bytes of the states that an answer in flight has in all layers, twice (`StateStore`)."""
    return 2 * sum(each.state.nbytes for each in layers if each.state is not None)


def kv_bytes_per_token(layers: Sequence[LayerAttention], dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take in all layers."""
    return sum(each.key_width + each.value_width for each in layers) * dtype.itemsize


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def token_slots(tables: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Returns [B, max blocks * BLOCK_TOKENS] int64: the token slot of each position of each block table. Positions
    beyond a table's end repeat its first block.
    """
    width = max(map(len, tables))
    padded = torch.tensor([[*table, *[table[0]] * (width - len(table))] for table in tables])
    slots = padded[:, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)
    return slots.flatten(1).to(device)


def layers_by_config(config: PretrainedConfig) -> tuple[LayerAttention, ...]:
    """Returns what the layers of a model keep as far as its config says it: all of them the same."""
    num_heads = largest(config, "num_attention_heads") or 1
    head_dim = largest(config, "head_dim") or config.hidden_size // num_heads
    num_kv_heads = largest(config, "num_key_value_heads") or num_heads
    return (LayerAttention(num_heads, num_kv_heads, head_dim, head_dim),) * int(config.num_hidden_layers)


# --- shared prefixes --------------------------------------------------------------------------------------------------
#
# Keys and values that a request takes over from earlier ones that began alike, and those that it leaves to later ones.
# They hold only under the experts that computed them. So a prefix is shared between requests whose pool is the same for
# all of it: a pool that was known before the prefill, all experts, or the pool that an earlier prefill chose, where a
# request brings it as a fixed one. A prefill that has yet to choose takes nothing over, because its pool depends on the
# whole prompt.


class PrefixKeys:
    """The keys of a request's full blocks, each of which stands for all tokens up to the end of its block.

    They also stand for everything else that keys and values depend on, and for who may share them. They are SHA-256, so
    that tokens with another request's key cannot be constructed. Mutable: it grows with the request.
    """

    def __init__(self, pool: ExpertPool | None, tenant: str | None, *, is_long: bool = False) -> None:
        """Starts without blocks. `pool` None: all experts. `tenant` None: shared by all. `is_long`: rotated by
        longrope's table for long prompts.
        """
        experts = None if pool is None else [sorted(map(int, layer)) for layer in pool.experts]
        self._scope = hashlib.sha256(json.dumps([tenant, experts, is_long]).encode()).digest()
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        return len(self._keys)

    def between(self, start: int, end: int) -> Sequence[bytes]:
        """Returns the keys of these blocks."""
        return self._keys[start:end]

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds the full blocks of `token_ids`, which follow the present blocks."""
        key = self._keys[-1] if self._keys else self._scope
        for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            content = array("q", token_ids[start : start + BLOCK_TOKENS])
            key = hashlib.sha256(key + content.tobytes()).digest()
            self._keys.append(key)


class Prefix:
    """One request's part in the sharing of prefixes. Mutable; owned by its request."""

    def __init__(
        self, request: GenerateRequest, policy: PoolPolicy, tenant: str | None, *, is_long: bool, max_tokens: int
    ) -> None:
        """Prepares the keys. `policy` has a predicted pool filled in. `tenant` and `is_long` are as for `PrefixKeys`.
        `max_tokens` is how many tokens can run at most after those that are taken over.
        """
        self._prompt = request.prompt_token_ids
        self._tenant = tenant
        self._is_long = is_long
        self._max_tokens = max_tokens
        self._reports_prompt = request.sampling.prompt_logprobs is not None
        self._keys: PrefixKeys | None = None
        self._num_published = 0
        if policy.fixed is not None or isinstance(policy.size, Full):
            self._keys = PrefixKeys(policy.fixed, tenant, is_long=is_long)
            self._keys.extend(self._prompt)

    def fork(self) -> Prefix:
        """Returns the part of another answer to the same prompt; it publishes by itself what follows the prompt."""
        forked = copy.copy(self)
        forked._keys = copy.deepcopy(self._keys)
        return forked

    def find(self, blocks: BlockPool) -> tuple[int, ...]:
        """Returns the blocks that the prompt can take over now. At least one token is left to run, since its logits are
        needed; all are left where the logits of the whole prompt are needed, or where the rest is longer than can run
        after others.
        """
        if self._keys is None or self._reports_prompt:
            return ()
        found = blocks.find(self._keys.between(0, (len(self._prompt) - 1) // BLOCK_TOKENS))
        return found if len(self._prompt) - len(found) * BLOCK_TOKENS <= self._max_tokens else ()

    def publish(
        self, blocks: BlockPool, held: Sequence[int], output_ids: Sequence[int], pool: ExpertPool | None
    ) -> None:
        """Makes the full blocks of `held` available, once the forward that produced the last of `output_ids` has
        succeeded.

        `pool` is the pool under which everything so far was computed; None: all experts.
        """
        num_full = (len(self._prompt) + len(output_ids) - 1) // BLOCK_TOKENS
        if num_full <= self._num_published:
            return
        if self._keys is None:
            self._keys = PrefixKeys(pool, self._tenant, is_long=self._is_long)
        self._keys.extend(self._tokens(output_ids, len(self._keys) * BLOCK_TOKENS, num_full * BLOCK_TOKENS))
        keys = self._keys.between(self._num_published, num_full)
        blocks.publish(held[self._num_published : num_full], keys)
        self._num_published = num_full

    def _tokens(self, output_ids: Sequence[int], start: int, end: int) -> Sequence[int]:
        """Returns the tokens between two positions of prompt and answer."""
        num_prompt = len(self._prompt)
        return [*self._prompt[start:end], *output_ids[max(0, start - num_prompt) : max(0, end - num_prompt)]]
