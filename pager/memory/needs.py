"""What a model needs to run, in bytes: the planner's input. Knows no tensors and no machine."""

from __future__ import annotations

from dataclasses import dataclass

from pager.types import RoutingFacts

KV_BLOCK_TOKENS = 16
SMALLEST_KV_TOKENS = 256
PREFILL_CHUNK_TOKENS = 512
"""The most tokens of a prompt in one forward where earlier ones are read from the KV cache."""
GATHER_TOKENS = 16_384
"""How many tokens of context a decode step gathers at a time, or those of one row where that is more."""

_INDEX_BYTES = 32  # a token of context in a row's table: its slot, read where it is seen, and the mask
_MASK_BYTES = 5  # a pair of query and key: a bool, and the float that torch makes of it


def gathered_tokens(num_rows: int, num_tokens: int) -> int:
    """Returns how much context is gathered at a time for so many rows, the longest of which has `num_tokens`."""
    return max(num_tokens, min(num_rows * num_tokens, GATHER_TOKENS))


@dataclass(frozen=True, slots=True)
class Workspace:
    """The memory that a forward takes beside weights and KV: upper bounds from the model's shapes.

    `token_bytes` is for a token on its way through the layers, `draw_bytes` for a row whose next token is drawn.
    `gather_bytes` is a token of context in the buffers that keys and values are gathered in, which are kept;
    `context_bytes` what a part of a prompt makes of it. `fixed_bytes` comes once; `kernel_bytes` is what the backend
    compiles for the shapes it meets, and keeps. With `keeps_step` a decode step has memory of its own, as a CUDA graph
    does.
    """

    token_bytes: int = 0
    gather_bytes: int = 0
    context_bytes: int = 0
    draw_bytes: int = 0
    fixed_bytes: int = 0
    kernel_bytes: int = 0
    keeps_step: bool = False

    def forward_bytes(self, num_rows: int, num_tokens: int) -> int:
        """Returns the most that forwards take at a time: a prompt of `num_tokens`, a step of so many rows as long."""
        chunk = min(num_tokens, PREFILL_CHUNK_TOKENS)
        whole_prompt = num_tokens * self.token_bytes
        later_chunk = chunk * self.token_bytes + num_tokens * (self.context_bytes + chunk * _MASK_BYTES)
        decode = num_rows * (max(self.token_bytes, self.draw_bytes) + num_tokens * _INDEX_BYTES)
        gathered = gathered_tokens(num_rows, num_tokens) * self.gather_bytes
        prompt = max(whole_prompt, later_chunk)
        return self.fixed_bytes + gathered + (prompt + decode if self.keeps_step else max(prompt, decode))


@dataclass(frozen=True, slots=True)
class Needs:
    """The bytes that a model needs in its serving dtype. `expert_bytes` is one expert; the trunk has no shared experts.

    `staging_bytes` is what experts pass through on their way into slots, all readers together.
    """

    trunk_bytes: int
    expert_bytes: int
    facts: RoutingFacts
    kv_bytes_per_token: int
    context_tokens: int
    staging_bytes: int
    workspace: Workspace

    @property
    def num_routed(self) -> int:
        return sum(self.facts.routed_per_layer)

    @property
    def routed_bytes(self) -> int:
        return self.num_routed * self.expert_bytes

    @property
    def resident_bytes(self) -> int:
        return sum(self.facts.shared_per_layer) * self.expert_bytes

    @property
    def smallest_num_slots(self) -> int:
        """Returns the routed experts that one token needs in the layer that needs most."""
        return max(self.facts.top_k_per_layer, default=0)

    @property
    def kv_block_bytes(self) -> int:
        return self.kv_bytes_per_token * KV_BLOCK_TOKENS

    @property
    def smallest_kv_blocks(self) -> int:
        return -(-min(SMALLEST_KV_TOKENS, self.context_tokens) // KV_BLOCK_TOKENS)

    def longest_tokens(self, num_kv_blocks: int) -> int:
        """Returns the length of the longest request in an engine with so much KV."""
        return min(self.context_tokens, num_kv_blocks * KV_BLOCK_TOKENS)

    def gather_tokens(self, num_kv_blocks: int, max_running: int) -> int:
        """Returns the context that such an engine gathers at a time. Each request has a block of its own."""
        return gathered_tokens(min(max_running, num_kv_blocks), self.longest_tokens(num_kv_blocks))

    def workspace_bytes(self, num_kv_blocks: int, max_running: int) -> int:
        """Returns the most that its forwards take, the buffers to gather in included."""
        return self.workspace.forward_bytes(min(max_running, num_kv_blocks), self.longest_tokens(num_kv_blocks))

    def kv_cost_bytes(self, num_kv_blocks: int, max_running: int) -> int:
        """Returns the cost of so much KV, with the working memory for requests as long as it allows."""
        return num_kv_blocks * self.kv_block_bytes + self.workspace_bytes(num_kv_blocks, max_running)
