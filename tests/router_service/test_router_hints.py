from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pager.cluster.placement import WorkerState
from pager.types import Bytes, Count, Counts, ExpertPool, Full, Mass, PoolSize, RoutingFacts, Share, WorkerResidency
from router_service.hints import (
    MAX_ENCODED_BYTES,
    InProcessHints,
    LocalClaims,
    Turn,
    decode_pool,
    decode_turn,
    decode_worker,
    encode_pool,
    encode_worker,
    pool_key,
    prefix_keys,
    turn_keys,
)

POOL = ExpertPool(((), (0, 3, 7), (1, 2)))
WORKER = WorkerResidency("w0", WorkerState.READY, 1, 2, 16, 1000, resident=(0, 0b101, 0xFF), is_remote=True)


def test_a_long_prompt_has_a_key_for_its_largest_half_too() -> None:
    tokens = list(range(100))
    keys = prefix_keys("f", Count(3), "t", tokens)
    assert len(keys) == 2
    assert keys[1] == prefix_keys("f", Count(3), "t", tokens[:64])[0]
    assert keys[1] == prefix_keys("f", Count(3), "t", [*tokens[:64], 7, 7, 7])[1]
    assert len(prefix_keys("f", Count(3), "t", tokens[:31])) == 1
    assert len(prefix_keys("f", Count(3), "t", tokens[:32])) == 1


def test_keys_differ_in_everything_a_pool_depends_on() -> None:
    sizes: list[PoolSize] = [Full(), Count(3), Count(4), Share(0.25), Mass(0.25), Mass(0.25, 3), Counts((3,)), Bytes(3)]
    asked: list[tuple[str, PoolSize, str, list[int]]] = [("f", size, "t", [1, 2]) for size in sizes]
    asked += [("g", Count(3), "t", [1, 2]), ("f", Count(3), "u", [1, 2]), ("f", Count(3), "t", [2, 1])]
    asked += [("f", Count(3), "t", [1]), ("f", Count(3), "t", [1, 2, 0])]
    keys = [prefix_keys(*each)[0] for each in asked]
    assert len(set(keys)) == len(keys)
    assert pool_key("f", "t", POOL.digest) != pool_key("f", "u", POOL.digest)


def test_pools_and_holdings_survive_the_way(facts: RoutingFacts) -> None:
    assert decode_pool(encode_pool(POOL), facts) == POOL
    assert decode_worker("w0", encode_worker(WORKER), facts) == WORKER


BROKEN_POOLS = {
    "nothing": None,
    "no JSON": b"\x80\x04pickle",
    "no object": b"[]",
    "another version": json.dumps({"v": 2, "experts": [[], [0, 1], [0, 1]]}).encode(),
    "no experts": b'{"v":1}',
    "a layer short": json.dumps({"v": 1, "experts": [[], [0, 1]]}).encode(),
    "experts in a dense layer": json.dumps({"v": 1, "experts": [[0], [0, 1], [0, 1]]}).encode(),
    "an id too high": json.dumps({"v": 1, "experts": [[], [0, 8], [0, 1]]}).encode(),
    "a shared expert": json.dumps({"v": 1, "experts": [[], [0, 1, 8], [0, 1]]}).encode(),
    "a negative id": json.dumps({"v": 1, "experts": [[], [-1, 1], [0, 1]]}).encode(),
    "fewer than top-k": json.dumps({"v": 1, "experts": [[], [0], [0, 1]]}).encode(),
    "out of order": json.dumps({"v": 1, "experts": [[], [1, 0], [0, 1]]}).encode(),
    "twice the same": json.dumps({"v": 1, "experts": [[], [1, 1], [0, 1]]}).encode(),
    "no numbers": json.dumps({"v": 1, "experts": [[], ["0", "1"], [0, 1]]}).encode(),
    "booleans": json.dumps({"v": 1, "experts": [[], [False, True], [0, 1]]}).encode(),
    "fractions": json.dumps({"v": 1, "experts": [[], [0.0, 1.0], [0, 1]]}).encode(),
    "too deep": b"[" * 100_000,
    "too long": b" " * MAX_ENCODED_BYTES + encode_pool(POOL),
}


@pytest.mark.parametrize("name", BROKEN_POOLS)
def test_a_value_that_is_no_pool_of_this_model_is_a_miss(name: str, facts: RoutingFacts) -> None:
    assert decode_pool(BROKEN_POOLS[name], facts) is None


@given(data=st.binary(max_size=200))
def test_no_bytes_break_the_decoders(facts: RoutingFacts, data: bytes) -> None:
    assert decode_pool(data, facts) is None
    assert decode_worker("w0", data, facts) is None


@pytest.mark.parametrize(
    "value",
    [
        {"v": 1, "load": [0, 0], "slots": [1, 1], "resident": ["0", "1ff", "0"]},
        {"v": 1, "load": [0, 0], "slots": [1, 1], "resident": ["0", "-1", "0"]},
        {"v": 1, "load": [0, 0], "slots": [1, 1], "resident": ["0"]},
        {"v": 1, "load": [0, -1], "slots": [1, 1], "resident": ["0", "0", "0"]},
        {"v": 1, "load": [0, 0], "slots": [1], "resident": ["0", "0", "0"]},
        {"v": 1, "load": 3, "slots": [1, 1], "resident": ["0", "0", "0"]},
        {"v": 1, "load": [0, 2**70], "slots": [1, 1], "resident": ["0", "0", "0"]},
    ],
)
def test_a_value_that_is_no_holding_is_a_miss(value: dict[str, Any], facts: RoutingFacts) -> None:
    assert decode_worker("w0", json.dumps(value).encode(), facts) is None


async def test_the_least_recently_used_pool_goes_first() -> None:
    hints = InProcessHints(max_pools=2)
    await hints.remember_pool(["a"], POOL)
    await hints.remember_pool(["b"], POOL)
    assert await hints.find_pool(["a"]) == POOL
    await hints.remember_pool(["c"], POOL)
    assert await hints.find_pool(["b"]) is None
    assert await hints.find_pool(["missing", "a"]) == POOL
    assert hints.num_pools == 2


async def test_claims_are_exclusive_and_aborts_stay_within_a_tenant() -> None:
    claims = LocalClaims()
    assert await claims.claim("r", "t")
    assert not await claims.claim("r", "t")
    assert not await claims.mark_aborted("r", "u")
    assert await claims.claim("r", "u"), "an id is its tenant's own"
    assert await claims.mark_aborted("r", "t")
    assert await claims.is_aborted("r", "t")
    assert not await claims.is_aborted("r", "u")
    await claims.release("r", "t")
    assert not await claims.mark_aborted("r", "t")
    assert not await claims.claim("r", "u"), "what another tenant gives back is not this one's"
    assert await claims.claim("r", "t")
    assert not await claims.is_aborted("r", "t")


def test_a_turn_is_found_by_the_prompt_that_continues_it() -> None:
    """Under some of its keys, however long its answer and what was asked next are, up to a bound."""
    dice = random.Random(1)
    for _ in range(300):
        length, more = dice.randint(1, 3000), int(dice.triangular(0, 9000, 0))
        prompt = [dice.randrange(1000) for _ in range(length + more)]
        kept = turn_keys("f", Count(4), "t", prompt[:length], is_asked=False)
        asked = turn_keys("f", Count(4), "t", prompt, is_asked=True)
        assert len(kept) <= 3
        assert len(asked) <= 90
        if length < 16:
            assert kept == ()
        elif more <= 448 or (more <= 1900 and length >= 64) or (more <= 7900 and length >= 256):
            assert set(kept) & set(asked), (length, more)
        assert not set(kept) & set(turn_keys("f", Count(4), "u", prompt, is_asked=True))
        turn = Turn.of(prompt[:length], 7)
        assert turn.is_continued_by([*prompt[:length], 7])
        assert turn.is_continued_by([*prompt[:length], 5, 7, *prompt])
        assert not turn.is_continued_by([*prompt[:length], 5, 6, 7])
        assert not turn.is_continued_by(prompt[:length])
        assert not turn.is_continued_by([*prompt[: length - 1], 1000, 7])


async def test_a_turns_pool_is_for_what_continues_it(facts: RoutingFacts) -> None:
    hints, turn = InProcessHints(), Turn.of([1, 2], 3)
    await hints.remember_pool(["turn"], POOL, turn)
    assert await hints.find_pool(["turn"], [1, 2, 3, 4]) == POOL
    assert await hints.find_pool(["turn"], [1, 2, 4, 4]) is None
    assert await hints.find_pool(["turn"]) is None
    encoded = encode_pool(POOL, turn)
    assert (decode_pool(encoded, facts), decode_turn(encoded)) == (POOL, turn)
    assert decode_turn(encode_pool(POOL)) is decode_turn(b'{"turn": [1, "d"]}') is decode_turn(b"[]") is None
