"""The checks of a request, with and without a tokenizer, and its conversion into the request that a worker gets."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from expert_pager.v1 import expert_pager_pb2 as pb

from pager.errors import InvalidRequest, PromptTooLong, UnknownModel, UnknownPool
from pager.pools.drift import check_can_drift, check_drift
from pager.pools.pick import (
    check_example,
    check_name,
    check_num_examples,
    check_pool,
    check_pool_size,
    largest_counts,
    pool_for,
)
from pager.sampling import check_prompt_logprobs, check_sampling, check_vocabulary
from pager.types import (
    Count,
    Counts,
    DriftPolicy,
    ExpertPool,
    Full,
    GenerateRequest,
    ModelInfo,
    PoolAsk,
    PoolPolicy,
    PoolSize,
    PoolSource,
    SamplingParams,
)
from pager.wire import decode_ask, decode_sampling
from router_service.message_bounds import field_of
from router_service.pools import PoolStore
from router_service.prediction import Predictor

_DIGEST = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class PoolByDigest:
    """A pool named by its digest, which this tenant was given before."""

    digest: str
    drift: DriftPolicy | None = None


@dataclass(frozen=True, slots=True)
class PoolByName:
    """A pool named by the name that its tenant gave it."""

    name: str
    drift: DriftPolicy | None = None


def pool_policy(ask: PoolAsk, model: ModelInfo, default: PoolPolicy) -> PoolPolicy | PoolByDigest | PoolByName:
    """Returns the policy that a caller asks for, with the defaults of the service.

    Raises InvalidRequest or PoolTooSmall.
    """
    if ask.fixed is not None or ask.digest is not None or ask.name is not None:
        return _fixed(ask, model)
    if ask.source is PoolSource.FIXED:
        raise InvalidRequest(
            "a FIXED pool is given in `experts`, `digest` or `name`, and none is set", field="pool.fixed"
        )
    drift = None if ask.drift is None else check_drift(ask.drift)
    size = default.size if ask.size is None else check_pool_size(ask.size)
    if isinstance(size, Full) and ask.source is PoolSource.CODEBOOK:
        raise InvalidRequest(
            "a request for all experts needs no pool that others share; give a size, or leave the source out",
            field="pool.source",
        )
    inherited = default.drift if ask.size is None else None
    source = ask.source or (PoolSource.PREFILL if isinstance(size, Full) else default.source)
    return chosen_pool(size, source, drift or inherited, model)


def _fixed(ask: PoolAsk, model: ModelInfo) -> PoolPolicy | PoolByDigest | PoolByName:
    if ask.source not in (None, PoolSource.FIXED):
        raise InvalidRequest("a pool given in `experts`, `digest` or `name` has the source FIXED", field="pool.source")
    if ask.size is not None:
        raise InvalidRequest("a fixed pool brings its size; leave `size` out", field="pool.size")
    drift = None if ask.drift is None else check_drift(ask.drift)
    if ask.name is not None:
        return PoolByName(check_name(ask.name, "pool.name"), drift)
    if ask.digest is not None:
        if not _DIGEST.fullmatch(ask.digest):
            raise InvalidRequest("a pool digest has 24 hexadecimal digits, lower case", field="pool.digest")
        return PoolByDigest(ask.digest, drift)
    assert ask.fixed is not None
    return fixed_pool(check_pool(ask.fixed, model.facts), drift)


def fixed_pool(pool: ExpertPool, drift: DriftPolicy | None = None) -> PoolPolicy:
    return PoolPolicy(source=PoolSource.FIXED, fixed=pool, drift=drift)


def chosen_pool(size: PoolSize, source: PoolSource, drift: DriftPolicy | None, model: ModelInfo) -> PoolPolicy:
    """Returns a policy whose pool is chosen from the prompt. Raises InvalidRequest or PoolTooSmall."""
    if isinstance(size, Full) and source is PoolSource.PREDICTION:
        raise InvalidRequest(
            "a request for all experts has nothing to predict; give a size, or the source PREFILL", field="pool.source"
        )
    return check_can_drift(PoolPolicy(_fits(size, model), source, drift=drift))


def calibrated_size(ask: PoolAsk, model: ModelInfo, default: PoolSize) -> PoolSize:
    """Returns the size of a pool to be made from examples. Raises InvalidRequest or PoolTooSmall."""
    if ask != PoolAsk(size=ask.size):
        raise InvalidRequest("a named pool is made from a size only; leave the rest of `pool` out", field="pool")
    size = default if ask.size is None else check_pool_size(ask.size)
    if isinstance(size, Full):
        raise InvalidRequest("a pool of all experts needs no examples; give a size below `full`", field="pool.size")
    return _fits(size, model)


def _fits(size: PoolSize, model: ModelInfo) -> PoolSize:
    if not isinstance(size, Full):
        largest_counts(size, model.facts)
    most = max(model.facts.routed_per_layer, default=0)
    match size:
        case Count(routed):
            largest = routed
        case Counts(per_layer):
            largest = max(per_layer, default=0)
        case _:
            largest = 0
    if largest > most:
        raise InvalidRequest(
            f"a pool of {largest} routed experts is more than the {most} that a layer has; ask for `full`",
            field="pool.size.count",
        )
    return size


MAX_ID_BYTES = 128
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_ID_BYTES}}}")

Prompt = str | Sequence[int]  # the ids as they arrived; their number fits, and their values are unchecked


@dataclass(frozen=True, slots=True)
class Ask:
    """The checked content of a Generate call. `max_tokens` None: as many as there is room for, up to the default."""

    id: str
    prompt: Prompt
    sampling: SamplingParams
    has_max_tokens: bool
    pool: PoolPolicy | PoolByDigest | PoolByName
    is_watched: bool = False  # its chunks are to say what was read for it, and what its tokens left outside


@dataclass(frozen=True, slots=True)
class RouteAsk:
    """The checked content of a Route call."""

    prompt: Prompt
    pool: PoolPolicy | PoolByDigest | PoolByName


@dataclass(frozen=True, slots=True)
class CalibrateAsk:
    """The checked content of a Calibrate call. `method` None: the best predictor that the service has."""

    name: str
    examples: tuple[Prompt, ...]
    size: PoolSize
    method: str | None
    replaces: bool


def id_of(request: pb.GenerateRequest) -> str:
    """Returns the request's id, or a new one if it has none. Raises InvalidRequest."""
    return request_id(request.request_id) if request.request_id else new_id()


def new_id() -> str:
    """Returns an id for a request that brings none."""
    return uuid.uuid4().hex


def id_in(data: bytes, number: int) -> str:
    """Returns the id in that field of an unparsed message, which may be refused later; empty without a legal one."""
    with suppress(InvalidRequest, UnicodeDecodeError):
        return request_id(field_of(data, number, MAX_ID_BYTES).decode())
    return ""


def ask(id_: str, request: pb.GenerateRequest, model: ModelInfo, default_pool: PoolPolicy) -> Ask:
    """Reads a Generate message. Raises InvalidRequest, PromptTooLong, PoolTooSmall or UnknownModel."""
    check_model(request.model, model)
    wanted = sampling(request.sampling, model)
    return Ask(
        id=id_,
        prompt=prompt(request, model),
        sampling=wanted,
        has_max_tokens=request.sampling.HasField("max_tokens"),
        pool=pool_policy(decode_ask(request.pool), model, default_pool),
    )


def route_ask(request: pb.RouteRequest, model: ModelInfo, default_pool: PoolPolicy) -> RouteAsk:
    """Reads a Route message. Raises InvalidRequest, PromptTooLong, PoolTooSmall or UnknownModel."""
    check_model(request.model, model)
    return RouteAsk(prompt(request, model), pool_policy(decode_ask(request.pool), model, default_pool))


def calibrate_ask(request: pb.CalibrateRequest, model: ModelInfo, default_size: PoolSize) -> CalibrateAsk:
    """Reads a Calibrate message. Raises InvalidRequest, PoolTooSmall, PromptTooLong or UnknownModel."""
    check_model(request.model, model)
    name = check_name(request.name)
    check_num_examples(len(request.examples))
    return CalibrateAsk(
        name=name,
        examples=tuple(_example(each, index, model) for index, each in enumerate(request.examples)),
        size=calibrated_size(decode_ask(request.pool), model, default_size),
        method=request.method or None,
        replaces=request.replace,
    )


def request_id(value: str) -> str:
    if not _REQUEST_ID.fullmatch(value):
        raise InvalidRequest(
            f"a request id has 1 to 128 of the characters A-Z a-z 0-9 . _ : -, and this one, of {len(value)}, does not",
            field="request_id",
        )
    return value


def check_model(name: str, model: ModelInfo) -> None:
    if name and name != model.name:
        raise UnknownModel(
            f"model {name[:100]!r} is not served here; {model.name!r} is (leave the field empty for it)", field="model"
        )


def prompt(request: pb.GenerateRequest | pb.RouteRequest, model: ModelInfo) -> Prompt:
    match request.WhichOneof("input"):
        case "text":
            return text(request.text, "text", "the prompt")
        case "prompt":
            return _not_empty(request.prompt, "prompt", "the prompt")
        case "token_ids":
            check_prompt_length(len(request.token_ids.ids), model, "token_ids")
            return request.token_ids.ids
        case _:
            raise InvalidRequest("the prompt is missing; give `prompt`, `text` or `token_ids`", field="prompt")


def text(data: bytes, field: str, what: str) -> str:
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{what} is not valid UTF-8: byte {error.start} ({error.reason}); encode the text as UTF-8", field=field
        ) from None
    return _not_empty(decoded, field, what)


def _not_empty(value: str, field: str, what: str) -> str:
    if not value:
        raise InvalidRequest(f"{what} is empty; give at least one token", field=field)
    return value


def _example(request: pb.Example, index: int, model: ModelInfo) -> Prompt:
    field = f"examples[{index}]"
    match request.WhichOneof("input"):
        case "text":
            return text(request.text, field, f"example {index + 1}")
        case "prompt":
            return _not_empty(request.prompt, field, f"example {index + 1}")
        case "token_ids":
            check_example(index, len(request.token_ids.ids), model.context_length)
            return request.token_ids.ids
        case _:
            raise InvalidRequest(f"example {index + 1} is missing; give `prompt`, `text` or `token_ids`", field=field)


def check_prompt_length(num_tokens: int, model: ModelInfo, field: str) -> None:
    """Checks that a prompt has a token and leaves room for another. Raises InvalidRequest or PromptTooLong."""
    if not num_tokens:
        raise InvalidRequest("the prompt is empty; give at least one token", field=field)
    if num_tokens >= model.token_limit:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens; with at least one to generate, {model.token_limit - 1} fit "
            f"(context {model.context_length}, KV budget {model.kv_token_limit})",
            field=field,
        )


def prompt_ids(ids: Sequence[int], model: ModelInfo, field: str) -> tuple[int, ...]:
    """Returns a prompt of legal length in the form that a worker gets. Raises InvalidRequest."""
    return in_vocabulary(tuple(ids), model, field)


def in_vocabulary(ids: tuple[int, ...], model: ModelInfo, field: str) -> tuple[int, ...]:
    largest = max(ids)
    if largest >= model.vocab_size:
        raise InvalidRequest(
            f"token id {largest} at position {ids.index(largest)} is not in the vocabulary of {model.vocab_size}",
            field=field,
        )
    return ids


def sampling(wire: pb.SamplingParams, model: ModelInfo) -> SamplingParams:
    """Reads the sampling parameters. Raises InvalidRequest."""
    params = decode_sampling(wire, model.sampling)
    check_sampling(params)
    check_vocabulary(params, model.vocab_size)
    return params


def no_such_pool(name: str) -> UnknownPool:
    """Returns the error for a name under which the tenant has no pool."""
    return UnknownPool(f"this tenant has no pool {name!r}; make it with Calibrate, or see ListPools", field="pool.name")


class Intake:
    """The checks that need the tokenizer or the stores. Raises PagerErrors that name the field at fault."""

    def __init__(self, model: ModelInfo, predictor: Predictor, pools: PoolStore) -> None:
        self._model = model
        self._predictor = predictor
        self._pools = pools

    async def request(self, ask: Ask, tenant: str, deadline_s: float | None) -> GenerateRequest:
        prompt = await self.prompt(tenant, ask.prompt)
        return GenerateRequest(
            id=ask.id,
            tenant=tenant,
            prompt_token_ids=prompt,
            sampling=self._sampling(ask, len(prompt)),
            pool=await self.policy(ask.pool, tenant),
            deadline_s=deadline_s,
            is_watched=ask.is_watched,
        )

    async def prompt(self, tenant: str, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt_ids(prompt, self._model, "token_ids")
        return await self.encoded(tenant, prompt)

    async def encoded(self, tenant: str, text: str, **options: bool) -> tuple[int, ...]:
        """Returns the tokens of a prompt of legal length; `options` are the encoder's. Raises InvalidRequest,
        PromptTooLong.
        """
        encoded = await self._predictor.encode(tenant, text, self._model.token_limit, **options)
        check_prompt_length(encoded.num_tokens, self._model, "text")
        return prompt_ids(encoded.ids, self._model, "text")

    async def example(self, tenant: str, example: Prompt, index: int) -> tuple[int, ...]:
        """Returns the token ids of one example of a named pool."""
        ids: Sequence[int]
        if isinstance(example, str):
            encoded = await self._predictor.encode(tenant, example, self._model.context_length)
            check_example(index, encoded.num_tokens, self._model.context_length)
            ids = encoded.ids
        else:
            await asyncio.sleep(0)  # yields after each conversion, however many examples there are
            ids = example
        return in_vocabulary(tuple(ids), self._model, f"examples[{index}]")

    async def policy(self, pool: PoolPolicy | PoolByDigest | PoolByName, tenant: str) -> PoolPolicy:
        """Returns the policy, or that of the pool that this tenant named."""
        match pool:
            case PoolByDigest(digest, drift):
                return fixed_pool(await self._by_digest(digest, tenant), drift)
            case PoolByName(name, drift):
                return fixed_pool(await self._by_name(name, tenant), drift)
        return pool

    async def _by_digest(self, digest: str, tenant: str) -> ExpertPool:
        found = await self._predictor.find_by_digest(tenant, digest)
        if found is None:
            raise UnknownPool(
                f"pool {digest} is not remembered for this tenant; give its experts instead", field="pool.digest"
            )
        return found

    async def _by_name(self, name: str, tenant: str) -> ExpertPool:
        named = await self._pools.find(tenant, name)
        if named is None:
            raise no_such_pool(name)
        return pool_for(named, self._model.fingerprint, self._model.facts)

    def _sampling(self, ask: Ask, prompt_tokens: int) -> SamplingParams:
        limit = self._model.token_limit
        check_prompt_logprobs(ask.sampling, prompt_tokens)
        wanted = ask.sampling.max_tokens
        if prompt_tokens + wanted <= limit:
            return ask.sampling
        if ask.has_max_tokens:
            raise PromptTooLong(
                f"the prompt's {prompt_tokens} tokens and max_tokens {wanted} exceed the {limit} that fit; "
                f"ask for at most {limit - prompt_tokens}",
                field="sampling.max_tokens",
            )
        shortened = replace(ask.sampling, max_tokens=limit - prompt_tokens)
        check_sampling(shortened)
        return shortened
