"""From a method's name and a size to one pool a document. What is known of each document is its prompt, unless said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pager.errors import InvalidRequest
from pager.lab.selection import RENAMED, random_layers, select
from pager.lab.subject import Subject, pools_of_examples
from pager.pools.named import mean_scores
from pager.pools.pick import largest_counts, pick_pool, share_out
from pager.types import ExpertPool, PoolPolicy, PoolSize, PoolSource, RoutingScores, Share

FULL = "full"
BY_LAYER = "+layers"
"""Behind a method's name: the same bytes in all, shared out over the layers."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy a document; pools that are still open are chosen by the first `voters` tokens (None: the prompt)."""

    policies: Sequence[PoolPolicy]
    voters: int | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """`says` completes "chosen by ..." in a report."""

    choose: Callable[[Subject, PoolSize], Choice]
    says: str
    needs: Literal["router", "others"] | None = None  # maps fitted to the checkpoint, other documents of the domain


def methods_for(subject: Subject, names: Sequence[str] | None) -> list[str]:
    """`names`, checked; None: all that this checkpoint and these documents allow. Raises InvalidRequest."""
    if names is None:
        return [name for name in METHODS if _obstacle(subject, name) is None]
    names = [_renamed(name) for name in names]
    for name in names:
        base = name.removesuffix(BY_LAYER)
        if base not in METHODS:
            raise InvalidRequest(
                f"{name!r} is not a method; known are {', '.join(METHODS)}, and with {BY_LAYER} behind it any "
                "that has scores"
            )
        if name.endswith(BY_LAYER) and base not in SCORES and base != "prefill":
            raise InvalidRequest(f"{base!r} has no scores of its own to share experts out over layers by")
        if (obstacle := _obstacle(subject, base)) is not None:
            raise InvalidRequest(f"method {name!r} {obstacle}")
    return names


def _renamed(name: str) -> str:
    base = name.removesuffix(BY_LAYER)
    return RENAMED.get(base, base) + name[len(base) :]


def choose(subject: Subject, name: str, size: PoolSize) -> Choice:
    """Raises PoolTooSmall for a size below what a gate picks for one token."""
    largest_counts(size, subject.facts)
    base = name.removesuffix(BY_LAYER)
    if base == name:
        return METHODS[name].choose(subject, size)
    total = sum(largest_counts(size, subject.facts))
    by_document = SCORES["trunk" if base == "prefill" else base](subject)
    sizes = [share_out(scores, total, subject.facts) for scores in by_document]
    if base == "prefill":
        return Choice([PoolPolicy(size) for size in sizes])
    pairs = zip(by_document, sizes, strict=True)
    return Choice([_fixed(pick_pool(scores, size, subject.facts)) for scores, size in pairs])


def size_of(percent: float) -> PoolSize:
    """A share of all experts of a layer, shared ones included."""
    return Share(percent / 100)


def _obstacle(subject: Subject, name: str) -> str | None:
    method = METHODS[name]
    if method.needs == "router" and subject.predictor_file is None:
        return f"needs a router fitted to {subject.path}; run expert-pager fit-router"
    if method.needs == "others" and not subject.is_calibrated:
        return "chooses from other documents of each domain; give --calibration"
    return None


def _fixed(pool: ExpertPool) -> PoolPolicy:
    return PoolPolicy(source=PoolSource.FIXED, fixed=pool)


def _from_prompt(subject: Subject, size: PoolSize) -> Choice:
    return Choice([PoolPolicy(size)] * len(subject.texts))


def _from_whole(subject: Subject, size: PoolSize) -> Choice:
    return Choice([PoolPolicy(size)] * len(subject.texts), subject.cut.context_tokens)


def _one_example(subject: Subject, size: PoolSize) -> Choice:
    pools = pools_of_examples(subject, subject.one_example_each(), size)
    return Choice([_fixed(pool) for pool in pools])


def _named(subject: Subject, size: PoolSize) -> Choice:
    """What `expert-pager calibrate` makes of one example, where it is not told how."""
    examples, score = subject.one_example_each(), subject.router("fitted")
    pools = {ids: pick_pool(score(ids), size, subject.facts) for ids in dict.fromkeys(examples)}
    return Choice([_fixed(pools[ids]) for ids in examples])


def _mean_of_prompt(subject: Subject) -> list[RoutingScores]:
    return [RoutingScores(mean.prompt_LR, "mean", subject.cut.prompt_tokens) for mean in subject.full[1]]


def _mean_of_domain(subject: Subject) -> list[RoutingScores]:
    of_domain = {domain: mean_scores(subject.calibration_means[domain]) for domain in subject.domains}
    return [of_domain[text.domain] for text in subject.texts]


def _random(subject: Subject) -> list[RoutingScores]:
    seeds = range(subject.seed, subject.seed + len(subject.texts))
    return [RoutingScores(random_layers(subject.facts, seed), "random", 1) for seed in seeds]


def _predicted(source: str) -> Callable[[Subject], list[RoutingScores]]:
    return lambda subject: list(subject.predicted(source))


def _by_scores(name: str) -> Callable[[Subject, PoolSize], Choice]:
    def choose(subject: Subject, size: PoolSize) -> Choice:
        return Choice([_fixed(pick_pool(scores, size, subject.facts)) for scores in SCORES[name](subject)])

    return choose


def _easy_ep_of_domain(subject: Subject) -> list[RoutingScores]:
    return [subject.easy_ep[text.domain] for text in subject.texts]


def _greedy(subject: Subject, size: PoolSize) -> Choice:
    pools = {domain: select("greedy", subject.probe, subject.few(domain), size) for domain in subject.domains}
    return Choice([_fixed(pools[text.domain]) for text in subject.texts])


def _frequency(subject: Subject, size: PoolSize) -> Choice:
    pool = select("frequency", subject.probe, subject.prompts[:1], size)
    return Choice([_fixed(pool)] * len(subject.texts))


SCORES: dict[str, Callable[[Subject], list[RoutingScores]]] = {
    "trunk": _predicted("trunk"),
    "lexical": _predicted("lexical"),
    "fitted": _predicted("fitted"),
    "mean": _mean_of_prompt,
    "easy-ep": _easy_ep_of_domain,
    "calibrated": _mean_of_domain,
    "random": _random,
}

METHODS: dict[str, Method] = {
    "prefill": Method(_from_prompt, "the prompt's prefill, layer by layer, as the worker does it"),
    "trunk": Method(_by_scores("trunk"), "the routing-only pass over the prompt"),
    "lexical": Method(_by_scores("lexical"), "the prompt's token counts alone", needs="router"),
    "fitted": Method(_by_scores("fitted"), "the routing-only pass and the token counts, fitted", needs="router"),
    "mean": Method(_by_scores("mean"), "the mean gate probability over the prompt, with all experts"),
    "one-example": Method(_one_example, "one other document of the domain, layer by layer"),
    "named": Method(_named, "one other document of the domain, fitted, as a named pool is", needs="router"),
    "greedy": Method(_greedy, "five other documents of the domain, layer by layer", needs="others"),
    "easy-ep": Method(_by_scores("easy-ep"), "five other documents of the domain, EASY-EP", needs="others"),
    "calibrated": Method(
        _by_scores("calibrated"), "the mean gate probability over many other documents of the domain", needs="others"
    ),
    "frequency": Method(_frequency, "how often experts are picked in all domains' documents", needs="others"),
    "random": Method(_by_scores("random"), "a draw for every document"),
    "future": Method(_from_whole, "the whole document, what is to be predicted included"),
}
