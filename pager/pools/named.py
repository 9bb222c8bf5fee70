"""Named pools: made from examples once, kept until they are deleted, good for one model. Pure."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pager.errors import DamagedPool, InvalidRequest, PagerError, PoolOfAnotherModel, PromptTooLong
from pager.pools.pick import check_pool
from pager.reading import parse_json
from pager.types import ExpertPool, NamedPool, RoutingFacts, RoutingScores

MAX_EXAMPLES = 100
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_ENCODED_BYTES = 2**20


def pool_for(named: NamedPool, fingerprint: str, facts: RoutingFacts) -> ExpertPool:
    """The pool, for a request to the model with this fingerprint. Raises PoolOfAnotherModel, DamagedPool."""
    if fingerprint != named.fingerprint:
        raise PoolOfAnotherModel(
            f"pool {named.name!r} was made for the model with fingerprint {named.fingerprint}, and this one has "
            f"{fingerprint}; calibrate it again with this model, under another name or with `replace`",
            field="pool.name",
        )
    try:
        return check_pool(named.pool, facts)
    except PagerError as error:
        raise damaged(named.name, error.message) from None


def check_name(name: str, field: str = "name") -> str:
    """`name` itself. Raises InvalidRequest."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"a pool's name has 1 to 64 of the characters A-Z a-z 0-9 . _ -, and this one, of {len(name)}, does not",
            field=field,
        )
    return name


def check_num_examples(count: int) -> None:
    """Raises InvalidRequest."""
    if not 1 <= count <= MAX_EXAMPLES:
        raise InvalidRequest(
            f"a named pool is made from 1 to {MAX_EXAMPLES} examples, not from {count}", field="examples"
        )


def check_example(index: int, num_tokens: int, context_length: int) -> None:
    """`index` counts from 0. Raises InvalidRequest or PromptTooLong."""
    field = f"examples[{index}]"
    if not num_tokens:
        raise InvalidRequest(f"example {index + 1} is empty; leave it out", field=field)
    if num_tokens > context_length:
        raise PromptTooLong(
            f"example {index + 1} has {num_tokens} tokens and the model's context {context_length}; cut it", field=field
        )


def mean_scores(scores: Sequence[RoutingScores]) -> RoutingScores:
    """The mean over all tokens of all examples. The scores must be of one source."""
    num_tokens = sum(each.num_tokens for each in scores)
    weights = np.array([each.num_tokens for each in scores], dtype=np.float64) / num_tokens
    layers = zip(*(each.mean_LR for each in scores), strict=True)
    mean_LR = tuple(np.tensordot(weights, np.stack(layer), axes=1) for layer in layers)
    return RoutingScores(mean_LR, scores[0].source, num_tokens)


# --- as stored ------------------------------------------------------------------------------------------------------


def encode_named(named: NamedPool) -> bytes:
    value = {
        "v": 1,
        "name": named.name,
        "model": named.fingerprint,
        "method": named.method,
        "examples": named.num_examples,
        "tokens": named.num_tokens,
        "covered_mass": named.pool.covered_mass,
        "experts": named.pool.experts,
    }
    return json.dumps(value, separators=(",", ":")).encode()


def decode_named(data: bytes, name: str) -> NamedPool:
    """What `encode_named` made of the pool of that name. Raises DamagedPool: others can write to a store."""
    try:
        value = parse_json(data[: MAX_ENCODED_BYTES + 1])
    except ValueError:
        raise damaged(name, "it is not JSON") from None
    if not isinstance(value, dict) or value.get("v") != 1:
        raise damaged(name, "it is of an unknown version")
    if value.get("name") != name:
        raise damaged(name, "it says that it is another pool")
    texts, numbers = (value.get("model"), value.get("method")), (value.get("examples"), value.get("tokens"))
    if not all(isinstance(text, str) and len(text) <= 200 for text in texts):
        raise damaged(name, "its model or method is missing")
    if not all(type(number) is int and 0 < number < 2**63 for number in numbers):
        raise damaged(name, "its number of examples or tokens is missing")
    mass = value.get("covered_mass")
    if not (mass is None or (type(mass) is float and 0 <= mass <= 1.001)):
        raise damaged(name, "its mass is not between 0 and 1")
    pool = ExpertPool(_layers(value.get("experts"), name), mass)
    return NamedPool(name, pool, value["method"], value["examples"], value["tokens"], value["model"])


def damaged(name: str, why: str) -> DamagedPool:
    return DamagedPool(
        f"what is stored as pool {name!r} cannot be used: {why}; calibrate it again with `replace`, or delete it",
        field="pool.name",
    )


def _layers(value: Any, name: str) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not all(isinstance(layer, list) for layer in value):
        raise damaged(name, "its layers are missing")
    for layer in value:
        if not all(type(expert) is int and 0 <= expert < 2**16 for expert in layer):
            raise damaged(name, "its experts are no numbers")
        if any(left >= right for left, right in itertools.pairwise(layer)):
            raise damaged(name, "its experts are not in order")
    return tuple(tuple(layer) for layer in value)
