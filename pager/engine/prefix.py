"""Which keys and values a request may take over from earlier ones that began alike, and which it leaves to later ones.

Keys and values hold only under the experts that computed them. So a prefix is shared between requests whose pool is the
same for all of it: a pool that was known before the prefill, all experts, or the pool that an earlier prefill chose
where that is asked for as a fixed one. A prefill that has yet to choose takes nothing over, because its pool depends on
the whole prompt.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence

from pager.engine.kv import BLOCK_TOKENS, BlockPool
from pager.types import ExpertPool, Full, GenerateRequest, PoolPolicy


class PrefixKeys:
    """The keys of a request's full blocks, each of which stands for all tokens up to the end of its block.

    They stand for all else that keys and values depend on, too, and for whoever may share them. They are SHA-256, so
    that nobody can find tokens whose key is that of others. Mutable: it grows with the request.
    """

    def __init__(self, pool: ExpertPool | None, tenant: str | None, *, is_long: bool = False) -> None:
        """`pool` None: all experts. `tenant` None: shared by all. `is_long`: rotated by longrope's table for long
        prompts.
        """
        experts = None if pool is None else [sorted(map(int, layer)) for layer in pool.experts]
        self._scope = hashlib.sha256(json.dumps([tenant, experts, is_long]).encode()).digest()
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        return len(self._keys)

    def between(self, start: int, end: int) -> Sequence[bytes]:
        """The keys of these blocks."""
        return self._keys[start:end]

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds the full blocks of `token_ids`, which follow the blocks that there are."""
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
        """`policy` has a predicted pool filled in. `tenant` and `is_long` as for `PrefixKeys`. `max_tokens`: so many
        tokens can run at most after those that are taken over.
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

    def find(self, blocks: BlockPool) -> tuple[int, ...]:
        """The blocks that the prompt can take over now. At least one token is left to run, whose logits are wanted; all
        are, where those of the whole prompt are wanted or where the rest would be longer than can run after others.
        """
        if self._keys is None or self._reports_prompt:
            return ()
        found = blocks.find(self._keys.between(0, (len(self._prompt) - 1) // BLOCK_TOKENS))
        return found if len(self._prompt) - len(found) * BLOCK_TOKENS <= self._max_tokens else ()

    def publish(
        self, blocks: BlockPool, held: Sequence[int], output_ids: Sequence[int], pool: ExpertPool | None
    ) -> None:
        """Makes the full ones of `held` available, once the forward that gave the last of `output_ids` has succeeded.

        `pool` is what everything so far was computed under; None: all experts.
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
        """Those between two positions of prompt and answer."""
        num_prompt = len(self._prompt)
        return [*self._prompt[start:end], *output_ids[max(0, start - num_prompt) : max(0, end - num_prompt)]]
