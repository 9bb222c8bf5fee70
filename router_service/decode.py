"""From protobuf to the project's values. Everything that can be checked without a tokenizer is checked here."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from expert_pager.v1 import expert_pager_pb2 as pb

from pager.errors import InvalidRequest, PromptTooLong, UnknownModel
from pager.routing.pool import check_pool, check_pool_size, largest_counts
from pager.sampling_rules import check_sampling
from pager.types import Count, ExpertPool, Full, Mass, PoolPolicy, PoolSize, PoolSource, SamplingParams, Share
from router_service.ports import ModelInfo

DEFAULT_TENANT = "default"
TENANT_KEY = "x-tenant-id"
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{24}")

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PoolOf:
    """A pool by the digest it was given out under."""

    digest: str


@dataclass(frozen=True, slots=True)
class Ask:
    """What a Generate call asks. `max_tokens` None: as many as there is room for, up to the default."""

    id: str
    prompt: Prompt
    sampling: SamplingParams
    has_max_tokens: bool
    pool: PoolPolicy | PoolOf


def ask(request: pb.GenerateRequest, model: ModelInfo, default_pool: PoolPolicy) -> Ask:
    """Raises InvalidRequest, PromptTooLong, PoolTooSmall or UnknownModel."""
    check_model(request.model, model)
    wanted = sampling(request.sampling)
    return Ask(
        id=request_id(request.request_id) if request.request_id else uuid.uuid4().hex,
        prompt=prompt(request, model),
        sampling=wanted,
        has_max_tokens=request.sampling.HasField("max_tokens"),
        pool=pool_policy(request.pool, model, default_pool),
    )


def tenant(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The one `x-tenant-id`, or "default"."""
    values = [value for key, value in metadata or () if key == TENANT_KEY]
    if not values:
        return DEFAULT_TENANT
    value = values[0]
    if len(values) > 1 or not isinstance(value, str) or not _TENANT.fullmatch(value):
        raise InvalidRequest(
            f"metadata {TENANT_KEY} must be given once, as 1 to 64 of the characters A-Z a-z 0-9 . _ -",
            field=TENANT_KEY,
        )
    return value


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
            return _text(request.text)
        case "token_ids":
            return token_ids(request.token_ids.ids, model, "token_ids")
        case _:
            raise InvalidRequest("the prompt is missing; give `text` or `token_ids`", field="prompt")


def _text(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the prompt is not valid UTF-8: byte {error.start} ({error.reason}); encode the text as UTF-8",
            field="text",
        ) from None
    if not text:
        raise InvalidRequest("the prompt is empty; give at least one token", field="text")
    return text


def token_ids(ids: Iterable[int], model: ModelInfo, field: str) -> tuple[int, ...]:
    """A prompt's ids, at least one and one fewer than fit. Raises InvalidRequest or PromptTooLong."""
    prompt_ids = tuple(ids)
    if not prompt_ids:
        raise InvalidRequest("the prompt is empty; give at least one token", field=field)
    if len(prompt_ids) >= model.token_limit:
        raise PromptTooLong(
            f"the prompt has {len(prompt_ids)} tokens; with at least one to generate, {model.token_limit - 1} fit "
            f"(context {model.context_length}, KV budget {model.kv_token_limit})",
            field=field,
        )
    largest = max(prompt_ids)
    if largest >= model.vocab_size:
        raise InvalidRequest(
            f"token id {largest} at position {prompt_ids.index(largest)} is not in the vocabulary "
            f"of {model.vocab_size}",
            field=field,
        )
    return prompt_ids


def sampling(wire: pb.SamplingParams) -> SamplingParams:
    given = {
        name: getattr(wire, name)
        for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")
        if wire.HasField(name)
    }
    params = SamplingParams(**given, stop=tuple(wire.stop), ignore_eos=wire.ignore_eos)
    check_sampling(params)
    return params


# --- pools ----------------------------------------------------------------------------------------------------------

_SOURCES = {
    pb.POOL_SOURCE_PREFILL: PoolSource.PREFILL,
    pb.POOL_SOURCE_PREDICTION: PoolSource.PREDICTION,
    pb.POOL_SOURCE_FIXED: PoolSource.FIXED,
}


def pool_policy(wire: pb.PoolPolicy, model: ModelInfo, default: PoolPolicy) -> PoolPolicy | PoolOf:
    """Raises InvalidRequest or PoolTooSmall."""
    fixed, has_size = wire.WhichOneof("fixed"), wire.WhichOneof("size") is not None
    if wire.source not in (pb.POOL_SOURCE_UNSPECIFIED, *_SOURCES):
        raise InvalidRequest(
            f"pool.source {wire.source} is unknown; use PREFILL, PREDICTION or FIXED", field="pool.source"
        )
    if fixed is None and wire.source == pb.POOL_SOURCE_FIXED:
        raise InvalidRequest("a FIXED pool is given in `experts` or `digest`, and neither is set", field="pool.fixed")
    if fixed is None:
        source = _SOURCES.get(wire.source, PoolSource.PREFILL if has_size else default.source)
        return chosen_pool(pool_size(wire) if has_size else default.size, source, model)
    if wire.source not in (pb.POOL_SOURCE_UNSPECIFIED, pb.POOL_SOURCE_FIXED):
        raise InvalidRequest("a pool given in `experts` or `digest` has the source FIXED", field="pool.source")
    if has_size:
        raise InvalidRequest("a fixed pool has the size it has; leave `size` out", field="pool.size")
    if fixed == "experts":
        pool = ExpertPool(tuple(tuple(sorted(layer.experts)) for layer in wire.experts.layers))
        return fixed_pool(check_pool(pool, model.facts))
    if not _DIGEST.fullmatch(wire.digest):
        raise InvalidRequest("a pool digest has 24 hexadecimal digits, lower case", field="pool.digest")
    return PoolOf(wire.digest)


def fixed_pool(pool: ExpertPool) -> PoolPolicy:
    return PoolPolicy(source=PoolSource.FIXED, fixed=pool)


def chosen_pool(size: PoolSize, source: PoolSource, model: ModelInfo) -> PoolPolicy:
    if isinstance(size, Full) and source is PoolSource.PREDICTION:
        raise InvalidRequest(
            "a request for all experts has nothing to predict; give a size, or the source PREFILL", field="pool.source"
        )
    if not isinstance(size, Full):
        largest_counts(size, model.facts)
    most = max(model.facts.routed_per_layer, default=0)
    if isinstance(size, Count) and size.routed > most:
        raise InvalidRequest(
            f"a pool of {size.routed} routed experts is more than the {most} that a layer has; ask for `full`",
            field="pool.size.count",
        )
    return PoolPolicy(size, source)


def pool_size(wire: pb.PoolPolicy) -> PoolSize:
    size: PoolSize
    match wire.WhichOneof("size"):
        case "count":
            size = Count(wire.count)
        case "share":
            size = Share(wire.share)
        case "mass":
            size = Mass(wire.mass.mass, wire.mass.cap if wire.mass.HasField("cap") else None)
        case _:
            size = Full()
    return check_pool_size(size)
