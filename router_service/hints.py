"""The memory of routers: hints that improve placement, and claims of request ids.

This module has the protocols and the stores of one process; `router_service.redis` has the shared stores.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol, Self

from pager.cluster.placement import WorkerState
from pager.types import Bytes, Count, Counts, ExpertPool, Full, Mass, PoolSize, RoutingFacts, Share, WorkerResidency

SHORTEST_PREFIX = 32
TURN_STEPS = ((16, 512), (64, 2048), (256, 8192))
"""The prefixes under which turns are kept, as a step and a distance in tokens: a turn is kept under its longest prefix
of a multiple of each step, and the next turn's prompt looks that far back for it, past the answer and what was added.
"""
MAX_ENCODED_BYTES = 256 * 1024
MAX_POOLS = 16_384  # that a process remembers, by all keys; an answer has up to four


class HintStore(Protocol):
    """Pools by prompt prefix, and the experts that the workers of other routers hold."""

    async def find_pool(self, keys: Sequence[str], token_ids: Sequence[int] = ()) -> ExpertPool | None:
        """Returns the pool under the first of `keys` that has one; a turn's only where `token_ids` continue it."""

    async def remember_pool(self, keys: Sequence[str], pool: ExpertPool, turn: Turn | None = None) -> None: ...

    async def report(self, workers: Sequence[WorkerResidency]) -> None:
        """Reports this router's ready workers to the other routers, and renews what it holds in the store.

        Called about once a second.
        """

    async def residency(self) -> dict[str, WorkerResidency]:
        """Returns the ready workers of all routers, by worker id."""

    async def close(self) -> None: ...


async def all_workers(own: Sequence[WorkerResidency], hints: HintStore) -> list[WorkerResidency]:
    """Returns this router's workers, then by id those that other routers report."""
    reported = await hints.residency()
    remote = [worker for worker_id, worker in sorted(reported.items()) if worker_id not in {each.id for each in own}]
    return [*own, *remote]


# --- keys -----------------------------------------------------------------------------------------------------------


def prefix_keys(fingerprint: str, size: PoolSize, tenant: str, token_ids: Sequence[int]) -> tuple[str, ...]:
    """Returns the keys of a prompt, best first: all of it, then its longest prefix of a power of two (at least 32)
    tokens.

    The second is more than half of the prompt, so its pool is a good guess at the whole prompt's.
    """
    count = len(token_ids)
    half = 1 << (count.bit_length() - 1) if count else 0
    lengths = [count] + ([half] if SHORTEST_PREFIX <= half < count else [])
    seed = "\n".join(("prefix", fingerprint, size_name(size), tenant)).encode()
    packed = array("I", token_ids).tobytes()
    return tuple(_digest(seed + b"\n%d\n" % length + packed[: 4 * length]) for length in lengths)


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a conversation: its whole prompt, as a length and a digest, and the first token of its answer.

    Prompts of one tenant begin alike, with a system prompt. What begins with a turn's prompt and goes on as its answer
    did continues it; there may be a blank between them, which some templates add.
    """

    num_tokens: int
    digest: str
    answer_id: int

    @classmethod
    def of(cls, prompt_ids: Sequence[int], answer_id: int) -> Self:
        return cls(len(prompt_ids), _digest(array("I", prompt_ids).tobytes()), answer_id)

    def is_continued_by(self, token_ids: Sequence[int]) -> bool:
        """Tells whether a prompt begins with this turn."""
        if self.answer_id not in token_ids[self.num_tokens : self.num_tokens + 2]:
            return False
        return Turn.of(token_ids[: self.num_tokens], self.answer_id) == self


def turn_keys(
    fingerprint: str, size: PoolSize, tenant: str, token_ids: Sequence[int], *, is_asked: bool
) -> tuple[str, ...]:
    """Returns the keys under which a turn is kept or, if it `is_asked` for by the next one's prompt, looked for; the
    longest prefix first.
    """
    count = len(token_ids)
    ends: set[int] = set()
    for step, back in TURN_STEPS:
        last = count - count % step
        ends.update(range(last, max(1, count - back) - 1, -step) if is_asked else (last,))
    running = hashlib.blake2b("\n".join(("turn", fingerprint, size_name(size), tenant)).encode(), digest_size=16)
    packed, before, keys = array("I", token_ids).tobytes(), 0, []
    for end in sorted(ends - {0}):
        running.update(packed[4 * before : 4 * end])
        before = end
        keys.append(running.hexdigest())
    return tuple(keys[::-1])


def pool_key(fingerprint: str, tenant: str, digest: str) -> str:
    """Returns the key of a pool by its digest, for this tenant alone."""
    return _digest("\n".join(("pool", fingerprint, tenant, digest)).encode())


def size_name(size: PoolSize) -> str:
    match size:
        case Full():
            return "full"
        case Count(routed):
            return f"count:{routed}"
        case Share(share):
            return f"share:{share!r}"
        case Mass(mass, cap):
            return f"mass:{mass!r}:{cap}"
        case Counts(per_layer):
            return f"counts:{','.join(map(str, per_layer))}"
        case Bytes(total):
            return f"bytes:{total}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# --- stored values --------------------------------------------------------------------------------------------------


def encode_pool(pool: ExpertPool, turn: Turn | None = None) -> bytes:
    of = {} if turn is None else {"turn": [turn.num_tokens, turn.digest, turn.answer_id]}
    return json.dumps({"v": 1, "experts": pool.experts, **of}, separators=(",", ":")).encode()


def decode_turn(data: bytes | None) -> Turn | None:
    """Decodes the turn that a stored pool is of; None for a pool that is of none, and for anything else."""
    match (_json_object(data) or {}).get("turn"):
        case [int(num_tokens), str(digest), int(answer_id)] if num_tokens > 0:
            return Turn(num_tokens, digest, answer_id)
    return None


def decode_pool(data: bytes | None, facts: RoutingFacts) -> ExpertPool | None:
    """Decodes a pool; None for anything else, since other programs can write to a shared store."""
    value = _json_object(data)
    layers = value.get("experts") if value is not None and value.get("v") == 1 else None
    if not isinstance(layers, list) or len(layers) != facts.num_layers:
        return None
    for layer, routed, top_k in zip(layers, facts.routed_per_layer, facts.top_k_per_layer, strict=True):
        if not isinstance(layer, list) or not top_k <= len(layer) <= routed:
            return None
        if not all(type(expert) is int and 0 <= expert < routed for expert in layer):
            return None
        if any(left >= right for left, right in itertools.pairwise(layer)):
            return None
    return ExpertPool(tuple(tuple(layer) for layer in layers))


def encode_worker(worker: WorkerResidency) -> bytes:
    value = {
        "v": 1,
        "load": [worker.waiting, worker.running],
        "slots": [worker.num_slots, worker.expert_bytes],
        "resident": [f"{mask:x}" for mask in worker.resident],
    }
    return json.dumps(value, separators=(",", ":")).encode()


def decode_worker(worker_id: str, data: bytes | None, facts: RoutingFacts) -> WorkerResidency | None:
    """Decodes the report of another router's worker; None for anything that is not a report about this model."""
    value = _json_object(data)
    if value is None or value.get("v") != 1:
        return None
    try:
        numbers = (*value["load"], *value["slots"])
        resident = tuple(int(mask, 16) for mask in value["resident"])
    except (KeyError, TypeError, ValueError):
        return None
    if len(numbers) != 4 or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        return None
    if len(resident) != facts.num_layers:
        return None
    if any(mask < 0 or mask >> routed for mask, routed in zip(resident, facts.routed_per_layer, strict=True)):
        return None
    return WorkerResidency(worker_id, WorkerState.READY, *numbers, resident=resident, is_remote=True)


def _json_object(data: bytes | None) -> dict[str, Any] | None:
    if data is None or len(data) > MAX_ENCODED_BYTES:
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class InProcessHints:
    """The hints of one process. Owns its pools; the least recently used is dropped first."""

    def __init__(self, max_pools: int = MAX_POOLS) -> None:
        self._max_pools = max_pools
        self._pools: OrderedDict[str, tuple[ExpertPool, Turn | None]] = OrderedDict()
        self._residency: dict[str, WorkerResidency] = {}

    @property
    def num_pools(self) -> int:
        return len(self._pools)

    async def find_pool(self, keys: Sequence[str], token_ids: Sequence[int] = ()) -> ExpertPool | None:
        for key in keys:
            pool, turn = self._pools.get(key, (None, None))
            if pool is not None and (turn is None or turn.is_continued_by(token_ids)):
                self._pools.move_to_end(key)
                return pool
        return None

    async def remember_pool(self, keys: Sequence[str], pool: ExpertPool, turn: Turn | None = None) -> None:
        for key in keys:
            self._pools[key] = pool, turn
            self._pools.move_to_end(key)
        while len(self._pools) > self._max_pools:
            self._pools.popitem(last=False)

    async def report(self, workers: Sequence[WorkerResidency]) -> None:
        self._residency = {worker.id: worker for worker in workers}

    async def residency(self) -> dict[str, WorkerResidency]:
        return dict(self._residency)

    async def close(self) -> None:
        self._pools.clear()


# --- claims of request ids --------------------------------------------------------------------------------------------
#
# A claim is a lock on a request id, held while the request is in flight at whichever router. An id is unique within its
# tenant only. Through its claim, a router learns that the request was aborted at another router.


class Claims(Protocol):
    """The ids in flight at all routers that share them."""

    async def claim(self, request_id: str, tenant: str) -> bool:
        """Claims an id. Returns False when a request of this tenant with it is in flight, here or at another router."""

    async def release(self, request_id: str, tenant: str) -> None:
        """Releases a claim that is held here; any other is left alone."""

    async def mark_aborted(self, request_id: str, tenant: str) -> bool:
        """Marks a claimed request of this tenant as aborted. Returns False when there is none."""

    async def is_aborted(self, request_id: str, tenant: str) -> bool: ...

    async def close(self) -> None: ...


class LocalClaims:
    """The claims of one process. Owns the ids in flight at this router, which admission bounds."""

    def __init__(self) -> None:
        self._held: set[tuple[str, str]] = set()  # tenant and id
        self._aborted: set[tuple[str, str]] = set()

    @property
    def held(self) -> Set[tuple[str, str]]:
        """Returns the tenant and request id of everything in flight."""
        return self._held

    async def claim(self, request_id: str, tenant: str) -> bool:
        claim = (tenant, request_id)
        if claim in self._held:
            return False
        self._held.add(claim)
        return True

    async def release(self, request_id: str, tenant: str) -> None:
        self._held.discard((tenant, request_id))
        self._aborted.discard((tenant, request_id))

    async def mark_aborted(self, request_id: str, tenant: str) -> bool:
        claim = (tenant, request_id)
        if claim not in self._held:
            return False
        self._aborted.add(claim)
        return True

    async def is_aborted(self, request_id: str, tenant: str) -> bool:
        return (tenant, request_id) in self._aborted

    async def close(self) -> None:
        """Does nothing: no connection is open."""
