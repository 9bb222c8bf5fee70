"""From protobuf to the project's values. Everything that can be checked without a tokenizer is checked here."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from expert_pager.v1 import expert_pager_pb2 as pb

from pager.errors import InvalidRequest, PromptTooLong, UnknownModel
from pager.routing.named import check_example, check_name, check_num_examples
from pager.sampling_rules import check_sampling
from pager.types import PoolPolicy, PoolSize, SamplingParams
from router_service.decode_pools import PoolByDigest, PoolByName, calibrated_size, pool_policy
from router_service.message_bounds import field_of
from router_service.ports import ModelInfo
from router_service.tenants import DEFAULT_TENANT, TENANT_KEY, bad_tenant, check_tenant

MAX_ID_BYTES = 128
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_ID_BYTES}}}")

Prompt = str | Sequence[int]  # ids as they came, of a number that fits, and not looked at yet


@dataclass(frozen=True, slots=True)
class Ask:
    """What a Generate call asks. `max_tokens` None: as many as there is room for, up to the default."""

    id: str
    prompt: Prompt
    sampling: SamplingParams
    has_max_tokens: bool
    pool: PoolPolicy | PoolByDigest | PoolByName


@dataclass(frozen=True, slots=True)
class CalibrateAsk:
    """What a Calibrate call asks. `method` None: the best pass that the service has."""

    name: str
    examples: tuple[Prompt, ...]
    size: PoolSize
    method: str | None
    replaces: bool


def id_of(request: pb.GenerateRequest) -> str:
    """The request's id, or a new one where it has none. Raises InvalidRequest."""
    return request_id(request.request_id) if request.request_id else uuid.uuid4().hex


def id_in(data: bytes) -> str:
    """The id in a GenerateRequest that may be refused before it is parsed; empty without a legal one."""
    with suppress(InvalidRequest, UnicodeDecodeError):
        return request_id(field_of(data, pb.GenerateRequest.REQUEST_ID_FIELD_NUMBER, MAX_ID_BYTES).decode())
    return ""


def ask(id_: str, request: pb.GenerateRequest, model: ModelInfo, default_pool: PoolPolicy) -> Ask:
    """Raises InvalidRequest, PromptTooLong, PoolTooSmall or UnknownModel."""
    check_model(request.model, model)
    wanted = sampling(request.sampling)
    return Ask(
        id=id_,
        prompt=prompt(request, model),
        sampling=wanted,
        has_max_tokens=request.sampling.HasField("max_tokens"),
        pool=pool_policy(request.pool, model, default_pool),
    )


def calibrate_ask(request: pb.CalibrateRequest, model: ModelInfo, default_size: PoolSize) -> CalibrateAsk:
    """Raises InvalidRequest, PoolTooSmall, PromptTooLong or UnknownModel."""
    check_model(request.model, model)
    name = check_name(request.name)
    check_num_examples(len(request.examples))
    return CalibrateAsk(
        name=name,
        examples=tuple(_example(each, index, model) for index, each in enumerate(request.examples)),
        size=calibrated_size(request.pool, model, default_size),
        method=request.method or None,
        replaces=request.replace,
    )


def tenant(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The one `x-tenant-id`, or "default"."""
    values = [value for key, value in metadata or () if key == TENANT_KEY]
    if not values:
        return DEFAULT_TENANT
    value = values[0]
    if len(values) > 1 or not isinstance(value, str):
        raise bad_tenant()
    return check_tenant(value)


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
    match request.WhichOneof("prompt"):
        case "text":
            return text(request.text, "text", "the prompt")
        case "token_ids":
            check_prompt_length(len(request.token_ids.ids), model, "token_ids")
            return request.token_ids.ids
        case _:
            raise InvalidRequest("the prompt is missing; give `text` or `token_ids`", field="prompt")


def text(data: bytes, field: str, what: str) -> str:
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{what} is not valid UTF-8: byte {error.start} ({error.reason}); encode the text as UTF-8", field=field
        ) from None
    if not decoded:
        raise InvalidRequest(f"{what} is empty; give at least one token", field=field)
    return decoded


def _example(request: pb.Example, index: int, model: ModelInfo) -> Prompt:
    field = f"examples[{index}]"
    match request.WhichOneof("prompt"):
        case "text":
            return text(request.text, field, f"example {index + 1}")
        case "token_ids":
            check_example(index, len(request.token_ids.ids), model.context_length)
            return request.token_ids.ids
        case _:
            raise InvalidRequest(f"example {index + 1} is missing; give `text` or `token_ids`", field=field)


def check_prompt_length(num_tokens: int, model: ModelInfo, field: str) -> None:
    """At least one token, and one fewer than fit. Raises InvalidRequest or PromptTooLong."""
    if not num_tokens:
        raise InvalidRequest("the prompt is empty; give at least one token", field=field)
    if num_tokens >= model.token_limit:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens; with at least one to generate, {model.token_limit - 1} fit "
            f"(context {model.context_length}, KV budget {model.kv_token_limit})",
            field=field,
        )


def prompt_ids(ids: Sequence[int], model: ModelInfo, field: str) -> tuple[int, ...]:
    """A prompt of legal length as it goes to a worker. Raises InvalidRequest."""
    return in_vocabulary(tuple(ids), model, field)


def in_vocabulary(ids: tuple[int, ...], model: ModelInfo, field: str) -> tuple[int, ...]:
    largest = max(ids)
    if largest >= model.vocab_size:
        raise InvalidRequest(
            f"token id {largest} at position {ids.index(largest)} is not in the vocabulary of {model.vocab_size}",
            field=field,
        )
    return ids


def sampling(wire: pb.SamplingParams) -> SamplingParams:
    given = {
        name: getattr(wire, name)
        for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")
        if wire.HasField(name)
    }
    params = SamplingParams(**given, stop=tuple(wire.stop), ignore_eos=wire.ignore_eos)
    check_sampling(params)
    return params
