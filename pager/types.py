"""The values that cross package borders. Frozen, plain data; the standard library is all that they need.

Shape legend: L layers, E experts of a layer (all of them, shared last), R routed experts of a layer, T tokens.
"""

from __future__ import annotations

import hashlib
import math
import operator
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import reduce
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np


class ExpertKey(NamedTuple):
    """One expert of one layer; `expert` indexes all experts of the layer, shared ones included."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The parameters of one expert, by name and shape, in the order in which a record of it has them.

    `parameters` empty is SwiGLU's: gates and ups [2 * intermediate, hidden] and downs [hidden, intermediate].
    """

    hidden: int
    intermediate: int
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, parameters: Mapping[str, tuple[int, ...]], *, hidden: int, intermediate: int) -> ExpertShape:
        """Returns the shape of an expert with these parameters, which may be SwiGLU's."""
        swiglu = cls(hidden, intermediate)
        return swiglu if dict(swiglu.named) == parameters else cls(hidden, intermediate, tuple(parameters.items()))

    @property
    def named(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Each parameter's name and shape."""
        return self.parameters or (
            ("gate_up_proj", (2 * self.intermediate, self.hidden)),
            ("down_proj", (self.hidden, self.intermediate)),
        )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for _, shape in self.named)

    @property
    def num_elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True, slots=True)
class RoutingFacts:
    """The facts that a pool has to respect: per layer, how many experts there are, how many are shared, how many a
    token picks.

    A dense layer has 0 everywhere. `top_k` counts routed experts only. `expert_bytes` is one expert's size in the
    serving dtype; 0 where nobody said.
    """

    experts_per_layer: tuple[int, ...]
    shared_per_layer: tuple[int, ...]
    top_k_per_layer: tuple[int, ...]
    expert_bytes: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.experts_per_layer)

    @property
    def routed_per_layer(self) -> tuple[int, ...]:
        return tuple(all_ - shared for all_, shared in zip(self.experts_per_layer, self.shared_per_layer, strict=True))


# --- pools ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Full:
    """No restriction: every expert that the gate wants."""


@dataclass(frozen=True, slots=True)
class Count:
    """`routed` routed experts in every layer."""

    routed: int


@dataclass(frozen=True, slots=True)
class Share:
    """A share of *all* experts of a layer, shared included, rounded down as in the paper: 0.125 of 128 is 15 + 1."""

    share: float


@dataclass(frozen=True, slots=True)
class Mass:
    """The fewest experts whose mean gate probability over the prompt adds up to `mass`, at most `cap` a layer."""

    mass: float
    cap: int | None = None  # None: half of the layer's routed experts


@dataclass(frozen=True, slots=True)
class Counts:
    """`per_layer[i]` routed experts in layer i; 0 where dense."""

    per_layer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bytes:
    """Routed experts of all layers together in `total` bytes, shared out by what each layer's gate would lose.

    Needs scores of every layer at once: a prefill, which chooses layer by layer, runs with the `Counts` made of it.
    """

    total: int


PoolSize = Full | Count | Share | Mass | Counts | Bytes


@dataclass(frozen=True, slots=True, eq=False)
class RoutingScores:
    """Per layer, each routed expert's mean gate probability over the prompt: [R] float64, empty where dense."""

    mean_LR: tuple[np.ndarray, ...]
    source: str  # "trunk", "prefill", "hint", ...
    num_tokens: int
    of_prompt: RoutingScores | None = None  # where these look ahead to the whole document: the trunk's, of the prompt


@dataclass(frozen=True, slots=True)
class ExpertPool:
    """Per layer, the routed experts a request may use, ascending; empty where dense. Shared experts are implied."""

    experts: tuple[tuple[int, ...], ...]
    covered_mass: float | None = None  # mean over layers of the gate mass inside the pool; None where not known

    @property
    def digest(self) -> str:
        """Hex name of this choice of experts (the mass is not part of it)."""
        packed = b"".join(struct.pack(f"<H{len(layer)}H", len(layer), *layer) for layer in self.experts)
        return hashlib.blake2b(packed, digest_size=12).hexdigest()

    @property
    def num_experts(self) -> int:
        return sum(len(layer) for layer in self.experts)

    def keys(self) -> tuple[ExpertKey, ...]:
        """All experts of the pool in layer order."""
        return tuple(ExpertKey(index, expert) for index, layer in enumerate(self.experts) for expert in layer)

    def recall_of(self, actual: ExpertPool) -> float:
        """The share of `actual`'s experts that this pool (a prediction) named."""
        if actual.num_experts == 0:
            return 1.0
        found = sum(len(set(mine) & set(other)) for mine, other in zip(self.experts, actual.experts, strict=True))
        return found / actual.num_experts


class PoolSource(StrEnum):
    PREFILL = "prefill"  # the worker's prefill chooses, layer by layer (rules 13 to 15 of EMO)
    PREDICTION = "prediction"  # the router's prediction is the pool
    FIXED = "fixed"  # the request brought it
    CODEBOOK = "codebook"  # a pool that alike prompts share; a prompt that none covers gets its own


DRIFT_WINDOW = 16
"""Tokens over which drift is averaged where a policy names no other number."""


class DriftAction(StrEnum):
    WIDEN = "widen"  # add the experts that the gate wanted most outside of the pool
    EXACT = "exact"  # all experts for the rest of the answer


@dataclass(frozen=True, slots=True)
class DriftPolicy:
    """An answer has left its pool: mean gate mass outside of it over the last `window` tokens past `threshold`."""

    threshold: float
    action: DriftAction = DriftAction.WIDEN
    window: int = DRIFT_WINDOW


@dataclass(frozen=True, slots=True)
class DriftReport:
    """The report of drift in one answer. `peak_mass` is the largest windowed mass seen outside the pool.

    `exact_from` is the first answer token, counted from 0, that had all experts; None where none had.
    `experts_left_out` counts, over all widenings, the experts that were wanted and for which the worker has no slots.
    """

    peak_mass: float
    widenings: int = 0
    experts_added: int = 0
    exact_from: int | None = None
    experts_left_out: int = 0


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """The pool that a request asks for. `fixed` is given exactly when `source` is FIXED; `drift` None is no drift."""

    size: PoolSize = field(default_factory=Full)
    source: PoolSource = PoolSource.PREFILL
    fixed: ExpertPool | None = None
    drift: DriftPolicy | None = None


@dataclass(frozen=True, slots=True)
class PoolAsk:
    """The pool that a caller asks for; fields that are None are left to the service's defaults.

    At most one of `fixed`, `digest` (of a pool that this tenant was given before) and `name` (of a named pool) is set,
    and none of them beside a `size`.
    """

    size: PoolSize | None = None
    source: PoolSource | None = None
    fixed: ExpertPool | None = None
    digest: str | None = None
    name: str | None = None
    drift: DriftPolicy | None = None


@dataclass(frozen=True, slots=True)
class NamedPool:
    """A pool under a name. `method` is the selection method that made it; `fingerprint` is that of its only model."""

    name: str
    pool: ExpertPool
    method: str
    num_examples: int
    num_tokens: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class PoolListing:
    """A tenant's named pools; `damaged` has the names under which something is stored that cannot be read."""

    pools: tuple[NamedPool, ...]
    damaged: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """All names that are taken."""
        return frozenset((*(named.name for named in self.pools), *self.damaged))


# --- requests -------------------------------------------------------------------------------------------------------


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"  # any; its text is empty
    REGEX = "regex"
    EBNF = "ebnf"  # GBNF, with a rule named root


@dataclass(frozen=True, slots=True)
class Grammar:
    """The grammar that the whole text of an answer has to follow."""

    kind: GrammarKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The parameters by which the next token is drawn, and what is reported of it. `temperature == 0` is greedy.

    The defaults restrict, change and report nothing. Presence and frequency penalties count the tokens of the answer,
    the repetition penalty those of the prompt, too. `logprobs` is a number of alternatives; None reports none at all.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # by token id, each once
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    n: int = 1  # answers, from one prefill and in one pool; answer i has seed + i


DRAWN_BY = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The fields of sampling for which a model's own settings may have defaults."""
CHOSEN_BY_SERVICE = ("max_tokens", *DRAWN_BY)
"""Those that a service fills in where they are absent: by its room, and by these settings."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A validated request, as the worker receives it. Of those in flight, tenant and id together name one."""

    id: str
    tenant: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    pool: PoolPolicy
    deadline_s: float | None = None  # on this process's monotonic clock: what is left of it is what is passed on
    predicted: ExpertPool | None = None  # the router's prediction; starts the paging early
    traceparent: str | None = None  # W3C Trace Context of the router's span
    tracestate: str | None = None  # what goes with it
    priority: int = 0  # its class: those of a higher one are admitted first
    weight: float = 1.0  # of its tenant: how much of the worker it is entitled to, beside the weights of others
    is_watched: bool = False  # its chunks say which experts were read for it, and what each token left outside
    guaranteed_share: float = 0.0  # of its tenant: the share of the worker's slots of which no stranger takes one


@dataclass(frozen=True, slots=True)
class PagingCounts:
    """The cost of paging: for one request, or for one worker since it started. Two of them add up.

    A hit is an expert that was in a device slot already, or being read for another request. Bytes are charged to the
    request that caused a read, not to those that joined it. `stall_s` is the time that forwards waited for experts.
    """

    experts_hit: int = 0
    experts_missed: int = 0
    bytes_from_disk: int = 0
    bytes_from_host: int = 0
    stall_s: float = 0.0

    @property
    def num_lookups(self) -> int:
        return self.experts_hit + self.experts_missed

    @property
    def bytes_paged(self) -> int:
        """The bytes read from either tier."""
        return self.bytes_from_disk + self.bytes_from_host

    def __add__(self, other: PagingCounts) -> PagingCounts:
        return PagingCounts(*map(operator.add, _counted(self), _counted(other)))

    def __sub__(self, before: PagingCounts) -> PagingCounts:
        """Returns what was added since `before`."""
        return PagingCounts(*map(operator.sub, _counted(self), _counted(before)))

    def split(self, num_parts: int) -> list[PagingCounts]:
        """Equal parts that add up to these counts; what cannot be divided is in the first."""
        values = _counted(self)
        part = PagingCounts(*(each // num_parts if isinstance(each, int) else each / num_parts for each in values))
        others = [part] * (num_parts - 1)
        return [reduce(operator.sub, others, self), *others]


_counted = operator.attrgetter(*(each.name for each in fields(PagingCounts)))


class FinishReason(StrEnum):
    STOP = "stop"  # end-of-sequence token or a stop string
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Account:
    """The usage of a request at its worker, however it ended. Every request that a worker took has one at its end.

    Prompt tokens are those that were run or found in the prefix cache. `queue_s` is None for a request that was never
    admitted.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    paging: PagingCounts = PagingCounts()
    queue_s: float | None = None
    cached_prompt_tokens: int = 0  # of the prompt's, those whose keys and values were there

    def with_answer(self, answer: Account) -> Account:
        """Returns the account with another answer to its prompt, which was run for all of them."""
        completion_tokens = self.completion_tokens + answer.completion_tokens
        return replace(answer, completion_tokens=completion_tokens, paging=self.paging + answer.paging)


class RequestObserver(Protocol):
    """Hears of one request at its worker."""

    def sent(self) -> None:
        """Called when the request has been sent."""

    def settled(self, account: Account) -> None:
        """Called when it has ended there, with what it has used: once, and also after its answer is not read any more.

        Never for a request that the worker did not take, nor for one whose worker, or the way there, was lost.
        """


AnswerMode = Literal["exact", "pool", "degraded"]


@dataclass(frozen=True, slots=True)
class PageIn:
    """An expert that was read for a watched request, and how long after the request's arrival it was in its slot."""

    key: ExpertKey
    source: Literal["disk", "host"]
    at_s: float


@dataclass(frozen=True, slots=True)
class Usage:
    """The mode of one answer, and its cost.

    `mode`: exact (every expert that the gate wanted was available), pool (restricted to the pool asked for), degraded
    (the pool covers less than the policy asked for: a mass cap was hit).
    """

    mode: AnswerMode
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    pool: ExpertPool | None
    paging: PagingCounts
    out_of_pool_mass: float
    predicted_recall: float | None
    queue_s: float
    time_to_first_token_s: float
    model_fingerprint: str
    drift: DriftReport | None = None  # absent where the policy asked for none
    cached_prompt_tokens: int = 0  # of `prompt_tokens`, those whose keys and values were there
    codeword: str = ""  # whose pool it was; empty for a pool that is no codeword's

    @property
    def account(self) -> Account:
        return Account(self.prompt_tokens, self.completion_tokens, self.paging, self.queue_s, self.cached_prompt_tokens)

    @property
    def experts_hit(self) -> int:
        return self.paging.experts_hit

    @property
    def experts_missed(self) -> int:
        return self.paging.experts_missed

    @property
    def bytes_from_disk(self) -> int:
        return self.paging.bytes_from_disk

    @property
    def bytes_from_host(self) -> int:
        return self.paging.bytes_from_host

    @property
    def stall_s(self) -> float:
        return self.paging.stall_s


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's natural log-probability, and those of the likeliest tokens in its place, likeliest first.

    They are of the distribution that the model gives with the experts it may use, before anything is done to it.
    """

    token_id: int
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """A piece of an answer. Its last one carries `usage` (and possibly the last text). Of several answers to a prompt,
    `index` says which it is of, and `num_going_on` how many others have not ended.

    `tenant` is whose request it is, since ids are a tenant's own; empty at a client. Where they were asked for,
    `logprobs` has an entry for each of `token_ids`, and the chunks before the first token bring those of the prompt,
    from its second token on. Of a watched request, `page_ins` has the experts read for it since the chunk before, and
    `outside_mass` the share of the gates' probability that fell outside of its pool in the forward that gave the token:
    None for the first token, of which it is not measured, and for an exact answer.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    usage: Usage | None = None
    tenant: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    page_ins: tuple[PageIn, ...] = ()
    outside_mass: float | None = None
    index: int = 0
    num_going_on: int = 0

    @property
    def is_last(self) -> bool:
        """Tells whether nothing more comes of the request."""
        return self.usage is not None and not self.num_going_on


# --- the service ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The one model that a service serves. `num_slots`: of the largest ready worker; 0 where none is ready."""

    name: str
    fingerprint: str
    context_length: int
    kv_token_limit: int
    vocab_size: int
    facts: RoutingFacts
    tokenizer_class: str
    tokenizer_sha256: str
    plan: str
    num_slots: int = 0
    codewords: tuple[str, ...] = ()
    # What holds where a request says nothing, by the model's own settings; clients are not told.
    sampling: SamplingParams = field(default=SamplingParams(), kw_only=True)

    @property
    def token_limit(self) -> int:
        """The longest prompt plus answer."""
        return min(self.context_length, self.kv_token_limit)


@dataclass(frozen=True, slots=True)
class RouteAnswer:
    """The prediction of a service for a prompt, and the worker that Generate would use.

    `source` is the predictor, and `scores` has each routed expert's score, layer by layer, empty where dense; there are
    none where only the worker's prefill scores. `observed` is the pool that a prefill chose for this prompt before.
    `worker` is None where no worker is ready; otherwise that worker lacks `missing_bytes` of the pool. `codeword` is
    the one whose pool it is, empty for any other; `coverage` is known where a codebook was asked.
    """

    source: str
    num_tokens: int
    scores: tuple[tuple[float, ...], ...] = ()
    pool: ExpertPool | None = None
    observed: ExpertPool | None = None
    expected_recall: float | None = None
    worker: str | None = None
    missing_bytes: int = 0
    codeword: str = ""
    coverage: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerResidency:
    """The experts that one worker holds now. `resident` has a bit mask of its routed experts for each layer.

    A remote worker is known only through another router; its state and load may be some seconds old.
    """

    id: str
    state: str  # starting, ready, draining, hung or dead
    waiting: int = 0
    running: int = 0
    num_slots: int = 0
    expert_bytes: int = 0
    resident: tuple[int, ...] = ()
    is_remote: bool = False

    @property
    def num_resident(self) -> int:
        return sum(mask.bit_count() for mask in self.resident)

    def bitmaps(self, facts: RoutingFacts) -> list[bytes]:
        """Little-endian bytes for each layer, of which bit e is set where expert e is in a slot."""
        resident = self.resident or (0,) * facts.num_layers
        layers = zip(resident, facts.routed_per_layer, strict=True)
        return [mask.to_bytes((routed + 7) // 8, "little") for mask, routed in layers]


@dataclass(frozen=True, slots=True)
class TenantLoad:
    """A tenant's requests in flight at a router. Tokens are those of prompts and those that may be generated."""

    tenant: str
    num_requests: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """The requests that a router has in flight."""

    num_requests: int = 0
    num_tokens: int = 0
    tenants: tuple[TenantLoad, ...] = ()


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """The workers of a service, and the load of the router that was asked."""

    workers: tuple[WorkerResidency, ...]
    load: Load
