"""What a codebook learns from a stream of prompts: codewords are born, split, merged and forgotten, within bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pager.predict import learning
from pager.predict.learning import (
    FORGET_AFTER,
    MAX_CODEWORDS,
    MAX_MEMBERS,
    MAX_STRANGERS,
    MAX_WEIGHT,
    MIN_ALIKE,
    Learned,
    LearnedCodeword,
    Observation,
    decode_learned,
    encode_learned,
    revise,
)

ROUTED = (32, 0, 48)
THRESHOLD = 0.8


class Topic:
    """Prompts that want alike experts: a distribution of each layer, seen with noise."""

    def __init__(self, seed: int, near: Topic | None = None, share: float = 0.0) -> None:
        """`share`: how much of it is `near`'s."""
        random = np.random.default_rng(seed)
        layers = [random.dirichlet(np.full(count, 0.1)) for count in ROUTED if count]
        wanted_O = np.concatenate(layers)
        self.wanted_O: np.ndarray = wanted_O if near is None else (1 - share) * wanted_O + share * near.wanted_O
        self._random = random

    def prompt(self, codeword: str = "") -> Observation:
        noisy_O = self.wanted_O * self._random.gamma(4, 1 / 4, len(self.wanted_O))
        ends = np.cumsum(ROUTED)[:-1]
        layers = [layer_R / max(layer_R.sum(), 1e-9) for layer_R in np.split(noisy_O, ends)]
        return Observation(np.concatenate(layers), THRESHOLD, codeword)


def taught(learned: Learned, *batches: Sequence[Observation], num_others: int = 0) -> Learned:
    for batch in batches:
        learned = revise(learned, batch, ROUTED, num_others)
    return learned


def test_a_codeword_is_born_of_enough_prompts_that_are_alike() -> None:
    topic = Topic(1)
    few = taught(Learned(), [topic.prompt() for _ in range(MIN_ALIKE - 1)])
    assert few.codewords == ()
    born = taught(few, [topic.prompt() for _ in range(MIN_ALIKE)])
    assert (len(born.codewords), born.changes.born, born.version) == (1, 1, 2)
    assert {each.codeword for each in born.recent} == set(born.names)
    wanted = np.argsort(-topic.wanted_O[:32])[:4]
    assert set(np.argsort(-born.means[0][:32])[:4]) == set(wanted)


def test_prompts_of_many_kinds_make_no_codeword() -> None:
    strangers = [Topic(seed).prompt() for seed in range(100)]
    assert taught(Learned(), strangers[:50], strangers[50:]).codewords == ()


def test_two_kinds_of_prompts_make_two_codewords_in_any_order() -> None:
    one, other = Topic(1), Topic(2)
    mixed = [topic.prompt() for _ in range(2 * MIN_ALIKE) for topic in (one, other)]
    learned = taught(Learned(), mixed)
    assert len(learned.codewords) == 2
    best = [int(np.argmax([mean_O @ topic.wanted_O for mean_O in learned.means])) for topic in (one, other)]
    assert sorted(best) == [0, 1]


def test_a_mean_follows_what_its_codeword_serves_and_keeps_its_name() -> None:
    before = Topic(1)
    after = Topic(2, before, 0.7)
    learned = taught(Learned(), [before.prompt() for _ in range(MIN_ALIKE)])
    (name,) = learned.names
    for _ in range(16):
        learned = taught(learned, [after.prompt(name) for _ in range(8)])
    assert learned.names == (name,)
    apart = [np.abs(learned.means[0] - topic.wanted_O).sum() for topic in (before, after)]
    assert apart[1] < apart[0] / 2


def test_a_codeword_splits_when_its_prompts_are_of_two_kinds() -> None:
    one, other = Topic(1), Topic(2)
    learned = taught(Learned(), [one.prompt() for _ in range(MIN_ALIKE)])
    (name,) = learned.names
    served = [topic.prompt(name) for _ in range(2 * MIN_ALIKE) for topic in (one, other)]
    split = taught(learned, served)
    assert (split.changes.split, len(split.codewords)) == (1, 2)
    assert name not in split.names
    assert {each.codeword for each in split.recent} == set(split.names)


def test_two_codewords_of_one_kind_become_one() -> None:
    topic = Topic(1)
    learned = taught(Learned(), [topic.prompt() for _ in range(MIN_ALIKE)])
    twin = replace(learned.codewords[0], name="t99-0000", weight=3)
    merged = taught(replace(learned, codewords=(*learned.codewords, twin)), [topic.prompt("t99-0000")])
    assert merged.names == learned.names
    assert merged.changes.merged == 1
    assert merged.codewords[0].weight == learned.codewords[0].weight + 4


def test_what_nobody_uses_is_forgotten() -> None:
    topic = Topic(1)
    learned = taught(Learned(), [topic.prompt() for _ in range(MIN_ALIKE)])
    assert len(taught(learned, (), num_others=FORGET_AFTER).codewords) == 1
    forgotten = taught(learned, (), num_others=FORGET_AFTER + 1)
    assert (forgotten.codewords, forgotten.recent, forgotten.changes.died) == ((), (), 1)


def test_an_observation_whose_codeword_is_gone_counts_as_one_that_none_suits() -> None:
    topic = Topic(1)
    learned = taught(Learned(), [topic.prompt("t07-dead") for _ in range(MIN_ALIKE)])
    assert learned.changes.born == 1


@st.composite
def streams(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Batches of prompts, each by its topic and which codeword had served it, counted from the last born."""
    prompt = st.tuples(st.integers(0, 5), st.integers(0, 3))
    return draw(st.lists(st.lists(prompt, min_size=1, max_size=40), min_size=1, max_size=8))


@settings(max_examples=25, deadline=None)
@given(streams())
def test_whatever_is_served_the_value_stays_sound_and_within_its_bounds(stream: list[list[tuple[int, int]]]) -> None:
    near = Topic(0)
    topics = [near, *(Topic(seed, near, 0.2 * seed) for seed in range(1, 6))]
    learned = Learned()
    for batch in stream:
        names = learned.names
        seen = [topics[topic].prompt(names[-back] if 0 < back <= len(names) else "") for topic, back in batch]
        before, learned = learned, revise(learned, seen, ROUTED, 1)
        assert learned.version == before.version + 1
        assert learned.num_seen == before.num_seen + len(batch) + 1
        assert len(learned.codewords) <= MAX_CODEWORDS
        assert len(set(learned.names)) == len(learned.names)
        strangers = [each for each in learned.recent if not each.codeword]
        assert len(strangers) <= MAX_STRANGERS
        assert len(learned.recent) - len(strangers) <= MAX_MEMBERS
        assert {each.codeword for each in learned.recent} <= {"", *learned.names}
        for codeword in learned.codewords:
            assert 0 < codeword.weight <= MAX_WEIGHT
            assert codeword.used <= learned.num_seen
            sums = [layer_R.sum() for layer_R in np.split(codeword.mean_O, np.cumsum(ROUTED)[:-1])]
            assert sums == pytest.approx([1, 0, 1], abs=0.01)
        again = decode_learned(encode_learned(learned), sum(ROUTED))
        assert again is not None
        assert encode_learned(again) == encode_learned(learned)
        # Two routers that read the same value make the same of it.
        assert encode_learned(revise(again, seen, ROUTED)) == encode_learned(revise(again, seen, ROUTED))


def test_codewords_and_observations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "MAX_CODEWORDS", 3)
    learned = Learned()
    for seed in range(6):
        topic = Topic(seed)
        learned = taught(learned, [topic.prompt() for _ in range(2 * MIN_ALIKE)])
    assert len(learned.codewords) == 3
    assert len(encode_learned(learned)) < 2 * (3 + MAX_STRANGERS + MAX_MEMBERS) * (sum(ROUTED) + 40)


def test_what_is_no_such_value_is_refused() -> None:
    topic = Topic(1)
    data = encode_learned(taught(Learned(), [topic.prompt() for _ in range(MIN_ALIKE)]))
    assert decode_learned(data, sum(ROUTED)) is not None
    for bad in (None, b"", b"{}", data[:-1], data[:200], bytes(len(data)), data.replace(b"t00-", b"t0/-")):
        assert decode_learned(bad, sum(ROUTED)) is None
    assert decode_learned(data, sum(ROUTED) + 1) is None
    row_O = Topic(2).prompt().seen_O
    codeword = LearnedCodeword("t00-00ff", row_O, 1, 0)
    for good in (Learned(1, codewords=(codeword,)), Learned(1, recent=(Observation(row_O, 0.5),))):
        assert decode_learned(encode_learned(good), sum(ROUTED)) is not None
    for threshold in (math.nan, math.inf, -0.1, 1.1):
        assert decode_learned(encode_learned(Learned(1, recent=(Observation(row_O, threshold),))), sum(ROUTED)) is None
    for weight, used in ((0, 0), (-1, 0), (1, -1)):
        bad_codeword = Learned(1, codewords=(replace(codeword, weight=weight, used=used),))
        assert decode_learned(encode_learned(bad_codeword), sum(ROUTED)) is None
    assert decode_learned(encode_learned(Learned(7)), sum(ROUTED)) is not None
