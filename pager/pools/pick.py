"""Expert pools: sizes and their checks, the choice from scores, and named pools. Pure: numpy in, integers out."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pager.errors import DamagedPool, InvalidRequest, PagerError, PoolOfAnotherModel, PoolTooSmall, PromptTooLong
from pager.memory import format_bytes, parse_bytes
from pager.reading import parse_json
from pager.types import (
    Bytes,
    Count,
    Counts,
    ExpertPool,
    Full,
    Mass,
    NamedPool,
    PoolSize,
    RoutingFacts,
    RoutingScores,
    Share,
)


def share_out(scores: RoutingScores, total_experts: int, facts: RoutingFacts, power: float = 1.0) -> Counts:
    """Returns how many routed experts each layer keeps when all layers together keep `total_experts` (or all there
    are).

    Every layer gets what one token picks; beyond that, a layer's share of its experts is in proportion to the router
    mass of its quarter of most wanted ones: where mass lies on a few experts, missing one of them costs most. (Router
    mass left outside is a worse guide: early layers spread theirs evenly, and hardly notice.) Ties go to the smaller
    count, then to the lower layer. A larger total takes no expert away from any layer. `power` is that of the mass: 0
    keeps the same share of every layer. Raises PoolTooSmall below one token's picks.
    """
    gains_LR = [_claim(mean_R, power) / (np.arange(len(mean_R)) + 0.5) for mean_R in scores.mean_LR]
    return Counts(_share_out(gains_LR, total_experts, facts))


def share_out_evenly(total_experts: int, facts: RoutingFacts) -> Counts:
    """The same total with every layer alike, as far as its number of experts allows. Raises PoolTooSmall."""
    return Counts(_share_out([np.zeros(routed) for routed in facts.routed_per_layer], total_experts, facts))


def _claim(mean_R: np.ndarray, power: float) -> float:
    """Returns in experts the mass of the most wanted quarter to a power, times how many the layer has."""
    wanted = float(np.sort(mean_R)[::-1][: -(-len(mean_R) // 4)].sum()) / max(float(mean_R.sum()), 1e-300)
    return round(len(mean_R) * math.pow(wanted, power), 9)


def _share_out(gains_LR: Sequence[np.ndarray], total_experts: int, facts: RoutingFacts) -> tuple[int, ...]:
    """`gains_LR`: what a layer's n-th expert brings, descending."""
    counts_L = np.array(facts.top_k_per_layer, dtype=np.int64)
    least = int(counts_L.sum())
    if total_experts < least:
        raise PoolTooSmall(
            f"{total_experts} routed experts in all layers together are fewer than the {least} that the routers "
            f"pick for one token; ask for at least {least}",
            field="pool.size",
        )
    gains = np.concatenate([gains_R[top_k:] for gains_R, top_k in zip(gains_LR, counts_L, strict=True)])
    sizes_L = [max(len(gains_R) - top_k, 0) for gains_R, top_k in zip(gains_LR, counts_L, strict=True)]
    layer = np.repeat(np.arange(len(sizes_L)), sizes_L)
    place = np.concatenate([top_k + np.arange(size) for top_k, size in zip(counts_L, sizes_L, strict=True)])
    best = np.lexsort((layer, place, -gains))[: total_experts - least]
    counts_L += np.bincount(layer[best], minlength=len(counts_L))
    return tuple(counts_L.tolist())


def parse_pool_size(value: str | int | float | None) -> PoolSize:
    """Parses what a user wrote: None or "full", 32 (routed experts a layer), "12.5%" or 0.125 (of all experts, shared
    included), "mass:0.9" or "mass:0.9:48" (the fewest experts with that gate mass, at most 48), "16,24,32" (a count for
    every layer, 0 where it has none), "64MiB" (of routed experts, shared out over the layers). Raises InvalidRequest.
    """
    if value is None:
        return Full()
    if isinstance(value, float):
        value = f"{100 * value:.12g}%"
    text = str(value).strip().lower()
    try:
        if text in ("full", "100%"):
            return Full()
        if text.endswith("%"):
            return check_pool_size(Share(float(text[:-1]) / 100))
        if text.startswith("mass:"):
            mass, _, cap = text.removeprefix("mass:").partition(":")
            return check_pool_size(Mass(float(mass), int(cap) if cap else None))
        if text.endswith("b"):
            return check_pool_size(Bytes(parse_bytes(text)))
        if "," in text:
            return check_pool_size(Counts(tuple(int(count) for count in text.split(","))))
        return check_pool_size(Count(int(text)))
    except InvalidRequest:
        raise
    except ValueError:
        raise InvalidRequest(
            f"{value!r} is not a pool size; write a number of routed experts (32), '12.5%', 'mass:0.9', a number for "
            "each layer ('16,24,32'), bytes ('64MiB') or 'full'",
            field="pool.size",
        ) from None


def write_pool_size(size: PoolSize) -> str:
    """The text that `parse_pool_size` reads as this size."""
    match size:
        case Full():
            return "full"
        case Count(routed):
            return str(routed)
        case Share(share):
            return f"{100 * share:.12g}%"
        case Mass(mass, cap):
            return f"mass:{mass!r}" if cap is None else f"mass:{mass!r}:{cap}"
        case Counts(per_layer):
            return ",".join(map(str, per_layer))
        case Bytes(total):
            return f"{total}B"


def check_pool_size(size: PoolSize) -> PoolSize:
    """`size` itself, if its numbers make sense for any model. Raises InvalidRequest."""
    match size:
        case Count(routed) if routed < 1:
            raise InvalidRequest(f"a pool has at least one expert, not {routed}", field="pool.size.count")
        case Share(share) if not (math.isfinite(share) and 0 < share <= 1):
            raise InvalidRequest(f"a pool's share lies above 0 and at most at 1, not {share}", field="pool.size.share")
        case Mass(mass, _) if not (math.isfinite(mass) and 0 < mass <= 1):
            raise InvalidRequest(f"a pool's mass lies above 0 and at most at 1, not {mass}", field="pool.size.mass")
        case Mass(_, cap) if cap is not None and cap < 1:
            raise InvalidRequest(f"a pool's cap is at least one expert, not {cap}", field="pool.size.cap")
        case Counts(counts) if min(counts, default=-1) < 0:
            raise InvalidRequest(f"a pool has a number of experts for every layer, not {counts}", field="pool.size")
        case Bytes(total) if total < 1:
            raise InvalidRequest(f"a pool has at least one byte, not {total}", field="pool.size.bytes")
    return size


def largest_counts(size: PoolSize, facts: RoutingFacts) -> tuple[int, ...]:
    """Per layer, the most routed experts a pool of this size can hold: what has to be reserved before it is known.

    Of `Bytes`, which the scores share out, only the sum is known: it is given shared out evenly.
    Raises PoolTooSmall when a layer would get fewer experts than its gate picks for one token, InvalidRequest when
    the size is for another model.
    """
    if isinstance(size, Bytes):
        return share_out_evenly(_experts_in(size, facts), facts).per_layer
    if isinstance(size, Counts) and len(size.per_layer) != facts.num_layers:
        raise InvalidRequest(
            f"the pool's size names {len(size.per_layer)} layers and the model has {facts.num_layers}; give a number "
            "for each",
            field="pool.size",
        )
    counts = []
    layers = zip(facts.experts_per_layer, facts.shared_per_layer, facts.top_k_per_layer, strict=True)
    for layer, (num_experts, num_shared, top_k) in enumerate(layers):
        num_routed = num_experts - num_shared
        match size:
            case Full():
                count = num_routed
            case Count(routed):
                count = routed
            case Share(share):
                count = math.floor(share * num_experts + 1e-9) - num_shared
            case Mass(_, cap):
                count = cap if cap is not None else max(num_routed // 2, top_k)
            case Counts(per_layer):
                count = per_layer[layer]
        if count < top_k:
            raise PoolTooSmall(
                f"a pool of {count} routed experts in layer {layer} is smaller than the {top_k} that its gate picks "
                f"for one token; ask for at least {top_k}",
                field="pool.size",
            )
        counts.append(min(count, num_routed))
    return tuple(counts)


def pick_layer(mass_R: np.ndarray, size: PoolSize, count: int, top_k: int) -> tuple[int, ...]:
    """One layer's pool: the experts with the largest mass, ascending; equal mass goes to the lower id (EMO rule 13).

    `count` is this layer's entry of `largest_counts`. `mass_R` is float64, in any unit.
    """
    order = np.argsort(-mass_R, kind="stable")
    if isinstance(size, Mass):
        covered = np.cumsum(mass_R[order]) / max(float(mass_R.sum()), 1e-300)
        enough = int(np.searchsorted(covered, size.mass - 1e-12)) + 1
        count = min(count, max(enough, top_k))
    return tuple(sorted(order[:count].tolist()))


def pick_pool(scores: RoutingScores, size: PoolSize, facts: RoutingFacts) -> ExpertPool:
    """The pool of `size` that these scores name; each layer chooses for itself, once bytes are shared out."""
    size = resolve_size(size, scores, facts)
    counts = largest_counts(size, facts)
    layers = zip(scores.mean_LR, counts, facts.top_k_per_layer, strict=True)
    experts = tuple(pick_layer(mean_R, size, count, top_k) for mean_R, count, top_k in layers)
    return ExpertPool(experts, covered_mass(scores.mean_LR, experts))


def resolve_size(size: PoolSize, scores: RoutingScores, facts: RoutingFacts) -> PoolSize:
    """`size`, with `Bytes` turned into the `Counts` that these scores share them out to. Raises PoolTooSmall."""
    return share_out(scores, _experts_in(size, facts), facts) if isinstance(size, Bytes) else size


def _experts_in(size: Bytes, facts: RoutingFacts) -> int:
    if not facts.expert_bytes:
        raise InvalidRequest(
            "nobody said how many bytes an expert of this model has; give a count or a share", field="pool.size.bytes"
        )
    num_experts, needed = size.total // facts.expert_bytes, sum(facts.top_k_per_layer)
    if num_experts < needed:
        raise PoolTooSmall(
            f"{format_bytes(size.total)} hold {num_experts} routed experts of {format_bytes(facts.expert_bytes)} and "
            f"the routers pick {needed} for one token; give at least {needed * facts.expert_bytes} bytes",
            field="pool.size.bytes",
        )
    return num_experts


def covered_mass(mean_LR: Sequence[np.ndarray], experts: Sequence[Sequence[int]]) -> float | None:
    """Mean over the sparse layers of the share of gate mass that lies inside the pool."""
    shares = [
        float(mean_R[list(layer)].sum() / max(float(mean_R.sum()), 1e-300))
        for mean_R, layer in zip(mean_LR, experts, strict=True)
        if len(mean_R)
    ]
    return float(np.mean(shares)) if shares else None


def check_pool(pool: ExpertPool, facts: RoutingFacts) -> ExpertPool:
    """`pool` itself, if a model with these facts can run with it. Raises InvalidRequest or PoolTooSmall."""
    if len(pool.experts) != facts.num_layers:
        raise InvalidRequest(
            f"the pool has {len(pool.experts)} layers and the model {facts.num_layers}", field="pool.fixed"
        )
    layers = zip(pool.experts, facts.routed_per_layer, facts.top_k_per_layer, strict=True)
    for layer, (experts, num_routed, top_k) in enumerate(layers):
        if list(experts) != sorted(set(experts)) or any(not 0 <= expert < num_routed for expert in experts):
            raise InvalidRequest(
                f"layer {layer} of the pool must hold distinct ascending routed experts below {num_routed}",
                field="pool.fixed",
            )
        if len(experts) < top_k:
            raise PoolTooSmall(
                f"layer {layer} of the pool has {len(experts)} routed experts, its router picks {top_k} for a token",
                field="pool.fixed",
            )
    return pool


# --- named pools ------------------------------------------------------------------------------------------------------


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
    """Returns what `encode_named` made of the pool of that name. Raises DamagedPool: others can write to a store."""
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
