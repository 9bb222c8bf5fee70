"""Learning a codebook from traffic: codewords for prompts that none of the fitted ones suits. Pure, in numpy alone.

Legend: C learned codewords, N observations, M of them that no codeword suits, O routed experts of all layers side by
side.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pager.predict.fitted import COVERAGE_SHARE, Codeword, inside_share

MAX_CODEWORDS = 64
MAX_STRANGERS = 128  # observations that no codeword suits, the latest
MAX_MEMBERS = 128  # observations of learned codewords, the latest
MIN_ALIKE = 12  # observations that make a codeword: none is made of a single caller's few prompts
MAX_WEIGHT = 256  # observations that a mean remembers
FORGET_AFTER = 8192  # observations of others, until a codeword that nobody uses dies
JUDGED_SHARE = 1 / 8  # of the experts, in the pools by which codewords are split and merged
MIN_SPLIT_GAIN = 0.06  # of the members' mass inside their pool
MAX_MERGE_LOSS = 0.02  # likewise; below the gain of a split, so that neither undoes the other
ROUNDS = 4
MAX_SEEDS = 8
MAX_ENCODED_BYTES = 16 << 20
NAME = re.compile(r"t[0-9]{2,16}-[0-9a-f]{4}")


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """The experts that one prompt wanted: [O], each layer's mass adds up to 1 or is 0. No text, no caller.

    `codeword` is the learned one that served it, empty where none suited it. `threshold` is the coverage from which a
    codeword suits a prompt of its length.
    """

    seen_O: np.ndarray
    threshold: float
    codeword: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class LearnedCodeword:
    """A codeword that traffic made. Its name stays while its mean moves."""

    name: str
    mean_O: np.ndarray
    weight: int  # observations in the mean, at most MAX_WEIGHT
    used: int  # `Learned.num_seen` when it was last used


@dataclass(frozen=True, slots=True)
class Changes:
    """The changes that a revision made to the codewords."""

    born: int = 0
    split: int = 0
    merged: int = 0
    died: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """All that traffic has taught the codebook of one model: a value, of bounded size, with a version."""

    version: int = 0
    num_seen: int = 0
    num_named: int = 0
    codewords: tuple[LearnedCodeword, ...] = ()
    recent: tuple[Observation, ...] = ()  # the oldest first
    changes: Changes = field(default_factory=Changes)  # of the last revision

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(codeword.name for codeword in self.codewords)

    @property
    def means(self) -> tuple[np.ndarray, ...]:
        return tuple(codeword.mean_O for codeword in self.codewords)


def observed(codeword: Codeword, *, is_misfit: bool = False) -> Observation | None:
    """Returns what a prompt that got this codeword says of the codebook; None where a fitted one suits it, or no trunk
    looked.

    `is_misfit`: the answer wanted clearly more outside of the codeword's pool than the prompt let expect.
    """
    if codeword.seen_O is None or (codeword.is_covered and not is_misfit and not codeword.is_learned):
        return None
    serves = codeword.is_covered and not is_misfit
    return Observation(codeword.seen_O, codeword.threshold, codeword.name if serves else "")


def revise(
    learned: Learned, observations: Sequence[Observation], routed_per_layer: Sequence[int], num_others: int = 0
) -> Learned:
    """The next version: the observations folded in, codewords born, split, merged and forgotten.

    `num_others` requests were seen meanwhile that a fitted codeword suits. The same arguments give the same value.
    """
    return _Revision(learned, routed_per_layer).run(observations, num_others)


class _Revision:
    def __init__(self, learned: Learned, routed_per_layer: Sequence[int]) -> None:
        self._before = learned
        self._routed = tuple(routed_per_layer)
        self._codewords = {codeword.name: codeword for codeword in learned.codewords}
        self._recent = list(learned.recent)
        self._num_named, self._num_seen = learned.num_named, learned.num_seen
        self._counts = dict.fromkeys(("born", "split", "merged", "died"), 0)

    def run(self, observations: Sequence[Observation], num_others: int) -> Learned:
        for observation in observations:
            self._fold(observation)
        self._num_seen += num_others
        while self._give_birth():
            self._counts["born"] += 1
        for name in list(self._codewords):
            self._split(name)
        while self._merge():
            self._counts["merged"] += 1
        self._forget()
        return Learned(
            self._before.version + 1,
            self._num_seen,
            self._num_named,
            tuple(self._codewords.values()),
            tuple(self._kept()),
            Changes(**self._counts),
        )

    def _fold(self, observation: Observation) -> None:
        self._num_seen += 1
        found = self._codewords.get(observation.codeword)
        if found is None:
            observation = replace(observation, codeword="")  # its codeword is gone, or there was none
        else:
            weight = min(found.weight + 1, MAX_WEIGHT)
            mean_O = found.mean_O + (observation.seen_O - found.mean_O) / weight
            self._codewords[found.name] = LearnedCodeword(found.name, mean_O, weight, self._num_seen)
        self._recent.append(observation)

    def _give_birth(self) -> bool:
        """Makes a codeword of observations that none suits, where enough of them are alike."""
        strangers = [each for each in self._recent if not each.codeword]
        if len(strangers) < MIN_ALIKE or len(self._codewords) >= MAX_CODEWORDS:
            return False
        seen_MO = np.stack([each.seen_O for each in strangers])
        needed_M = np.array([each.threshold for each in strangers])
        coverage_MM = self._coverage(seen_MO, seen_MO)  # of the second by the first
        nearest_MK = np.argsort(-coverage_MM, 1, kind="stable")[:, :MIN_ALIKE]
        density_M = np.take_along_axis(coverage_MM, nearest_MK, 1).mean(1)
        for seed in np.argsort(-density_M, kind="stable")[:MAX_SEEDS]:
            members = nearest_MK[seed]
            for _ in range(ROUNDS):
                mean_O = seen_MO[members].mean(0)
                members = np.flatnonzero(self._coverage(mean_O[None], seen_MO)[0] >= needed_M)
                if len(members) < MIN_ALIKE:
                    break
            else:
                self._add(seen_MO[members].mean(0), [strangers[member] for member in members])
                return True
        return False

    def _split(self, name: str) -> None:
        """Makes two of a codeword whose members would keep clearly more of their mass in two pools."""
        members = [each for each in self._recent if each.codeword == name]
        if len(members) < 2 * MIN_ALIKE or len(self._codewords) >= MAX_CODEWORDS:
            return
        seen_NO = np.stack([each.seen_O for each in members])
        coverage_NN = self._coverage(seen_NO, seen_NO)
        first, second = np.unravel_index(int(np.argmin(coverage_NN + coverage_NN.T)), coverage_NN.shape)
        means_2O = seen_NO[[first, second]]
        for _ in range(ROUNDS):
            half_N = (seen_NO @ self._inside(means_2O).T).argmax(1)
            if min(np.bincount(half_N, minlength=2)) < MIN_ALIKE:
                return
            means_2O = np.stack([seen_NO[half_N == half].mean(0) for half in (0, 1)])
        apart_N = (seen_NO @ self._inside(means_2O).T).max(1)
        together_N = seen_NO @ self._inside(seen_NO.mean(0)[None])[0]
        if apart_N.sum() < together_N.sum() * (1 + MIN_SPLIT_GAIN):
            return
        del self._codewords[name]
        for half in (0, 1):
            self._add(means_2O[half], [each for each, of in zip(members, half_N, strict=True) if of == half])
        self._counts["split"] += 1

    def _merge(self) -> bool:
        """Makes one of the two codewords that lose least by it, if that is little."""
        found = list(self._codewords.values())
        if len(found) < 2:
            return False
        means_CO = np.stack([codeword.mean_O for codeword in found])
        weight_C = np.array([codeword.weight for codeword in found], float)
        own_C = (means_CO * self._inside(means_CO)).sum(1)
        losses = []
        for one in range(len(found)):
            joint_CO = means_CO[one] * weight_C[one] + means_CO[one + 1 :] * weight_C[one + 1 :, None]
            inside_CO = self._inside(joint_CO)
            lost_C = own_C[one] - inside_CO @ means_CO[one]
            lost_C = weight_C[one] * lost_C + weight_C[one + 1 :] * (
                own_C[one + 1 :] - (means_CO[one + 1 :] * inside_CO).sum(1)
            )
            held_C = weight_C[one] * own_C[one] + weight_C[one + 1 :] * own_C[one + 1 :]
            losses += [(float(loss), one, one + 1 + at) for at, loss in enumerate(lost_C / held_C)]
        loss, one, other = min(losses)
        if loss > MAX_MERGE_LOSS:
            return False
        kept, gone = sorted((found[one], found[other]), key=lambda codeword: -codeword.weight)
        total = kept.weight + gone.weight
        mean_O = (kept.mean_O * kept.weight + gone.mean_O * gone.weight) / total
        del self._codewords[gone.name]
        used = max(kept.used, gone.used)
        self._codewords[kept.name] = LearnedCodeword(kept.name, mean_O, min(total, MAX_WEIGHT), used)
        self._recent = [
            replace(each, codeword=kept.name) if each.codeword == gone.name else each for each in self._recent
        ]
        return True

    def _forget(self) -> None:
        for codeword in list(self._codewords.values()):
            if self._num_seen - codeword.used > FORGET_AFTER:
                del self._codewords[codeword.name]
                self._recent = [each for each in self._recent if each.codeword != codeword.name]
                self._counts["died"] += 1

    def _add(self, mean_O: np.ndarray, members: Sequence[Observation]) -> None:
        digest = hashlib.blake2b(np.ascontiguousarray(mean_O, dtype="<f2").tobytes(), digest_size=2).hexdigest()
        name = f"t{self._num_named:02d}-{digest}"
        self._num_named += 1
        weight = min(len(members), MAX_WEIGHT)
        self._codewords[name] = LearnedCodeword(name, mean_O, weight, self._num_seen)
        chosen = set(map(id, members))
        self._recent = [replace(each, codeword=name) if id(each) in chosen else each for each in self._recent]

    def _kept(self) -> Iterable[Observation]:
        """The latest observations, bounded for those that no codeword suits and for all others."""
        room = {True: MAX_STRANGERS, False: MAX_MEMBERS}
        kept = []
        for each in reversed(self._recent):
            is_stranger = not each.codeword
            room[is_stranger] -= 1
            if room[is_stranger] >= 0:
                kept.append(each)
        return reversed(kept)

    def _coverage(self, means_CO: np.ndarray, seen_NO: np.ndarray) -> np.ndarray:
        """[C, N]: the mass of each observation in a small pool of each mean, over that in such a pool of its own."""
        own_N = (seen_NO * inside_share(seen_NO, COVERAGE_SHARE, self._routed)).sum(1)
        held_CN = inside_share(means_CO, COVERAGE_SHARE, self._routed) @ seen_NO.T
        return np.asarray(held_CN / np.maximum(own_N, 1e-9))

    def _inside(self, rows_XO: np.ndarray) -> np.ndarray:
        return inside_share(rows_XO, JUDGED_SHARE, self._routed)


# --- as bytes ---------------------------------------------------------------------------------------------------------


def encode_learned(learned: Learned) -> bytes:
    """All but the changes, in half precision."""
    codewords, recent = learned.codewords, learned.recent
    facts = {
        "v": 1,
        "version": learned.version,
        "seen": learned.num_seen,
        "named": learned.num_named,
        "codewords": [[each.name, each.weight, each.used] for each in codewords],
        "recent": [[each.threshold, each.codeword] for each in recent],
    }
    rows = [each.mean_O for each in codewords] + [each.seen_O for each in recent]
    header = np.frombuffer(json.dumps(facts, separators=(",", ":")).encode(), np.uint8)
    return bytes(save({"facts": header, "rows": np.stack(rows).astype(np.float16)} if rows else {"facts": header}))


def decode_learned(data: bytes | None, num_outputs: int) -> Learned | None:
    """Returns the value; None for data that is invalid or of another model, since others can write to the store."""
    if data is None or len(data) > MAX_ENCODED_BYTES:
        return None
    try:
        tensors = load(data)
        facts = json.loads(tensors["facts"].tobytes())
        if facts["v"] != 1:
            return None
        num_codewords, num_recent = len(facts["codewords"]), len(facts["recent"])
        if num_codewords > MAX_CODEWORDS or num_recent > MAX_STRANGERS + MAX_MEMBERS:
            return None
        rows_XO = _rows(tensors.get("rows"), num_codewords + num_recent, num_outputs)
        codewords = tuple(
            LearnedCodeword(_name(name), row_O, _count(weight, least=1), _count(used))
            for (name, weight, used), row_O in zip(facts["codewords"], rows_XO, strict=False)
        )
        recent = tuple(
            Observation(row_O, _threshold(threshold), str(name))
            for (threshold, name), row_O in zip(facts["recent"], rows_XO[num_codewords:], strict=True)
        )
        version, num_seen, num_named = (_count(facts[key]) for key in ("version", "seen", "named"))
        return Learned(version, num_seen, num_named, codewords, recent)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _rows(stored: np.ndarray | None, count: int, num_outputs: int) -> np.ndarray:
    rows_XO = np.zeros((0, num_outputs), np.float32) if stored is None else stored.astype(np.float32)
    if rows_XO.shape != (count, num_outputs) or not np.isfinite(rows_XO).all() or (rows_XO < 0).any():
        raise ValueError(rows_XO.shape)
    return rows_XO


def _name(value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(value)
    return value


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 1 << 53:
        raise ValueError(value)
    return value


def _threshold(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(value)
    return float(value)
