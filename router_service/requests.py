"""The checks of a request, on its bytes and on its values, and the request that a worker gets."""

from __future__ import annotations

import asyncio
import itertools
import re
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from expert_pager.inference import open_inference_pb2 as inference_pb
from expert_pager.v1 import expert_pager_pb2 as pb
from google.protobuf.message import Message

from pager.errors import InvalidRequest, PagerError, PromptTooLong, UnknownModel, UnknownPool
from pager.memory import format_bytes
from pager.pools.drift import check_can_drift, check_drift
from pager.pools.pick import (
    MAX_EXAMPLES,
    check_example,
    check_name,
    check_num_examples,
    check_pool,
    check_pool_size,
    largest_counts,
    pool_for,
)
from pager.sampling import MAX_GRAMMAR_BYTES, check_prompt_logprobs, check_sampling, check_vocabulary
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
from router_service.pools import PoolStore
from router_service.prediction import Predictor

# --- bounds on a message ----------------------------------------------------------------------------------------------
#
# Bounds on the size of a message, field by field, checked on its bytes before they are parsed.
#
# Parsing and converting take time in proportion to bytes, on the event loop. Here only the top level of a message is
# scanned, which costs as much for 8 MiB of text as for a word.


MAX_MESSAGE_BYTES = 8 * 2**20
CORE_MESSAGE_BYTES = 2 * MAX_MESSAGE_BYTES  # a larger message is refused by gRPC itself, whose error has no details
# Of a compressed message: one that unpacks to a thousand times its size costs its sender little.
MAX_UNZIPPED_BYTES = 2**20
CORE_METADATA_BYTES = 64 * 2**10
MAX_METADATA_BYTES = 16 * 2**10
MAX_FIELDS = 256  # at the top level; Calibrate's examples are the most that is ever needed
MAX_OTHER_BYTES = 64 * 2**10  # all fields without a bound of their own: ids, names, fields of newer clients
_MAX_SAMPLING_BYTES = 64 * 2**10 + MAX_GRAMMAR_BYTES
MAX_JSON_CONTAINERS = 8 * 2**10  # objects and arrays of a body: each takes microseconds to build and to check
MAX_JSON_KEYS = 2**15
MAX_JSON_VALUES = 2**18  # the values between commas
_SCANNED_BYTES = 256 * 2**10
_POOL_HEADER_BYTES = 4 * 2**10
_TENSOR_HEADER_BYTES = 4 * 2**10  # a tensor's name, type, shape and lengths
_NUMBER_BYTES = 11  # one number of a list, in the longest legal encoding
_LAYER_BYTES = 24

Refusal = Callable[[int], PagerError]


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound on all bytes of one field together, and the error for exceeding it."""

    num_bytes: int
    refusal: Refusal


class MessageBounds:
    """The bounds of one service, computed once: what fits a model depends on its tokens, layers and experts."""

    def __init__(self, model: ModelInfo, longest_token_bytes: int, max_tokens: int) -> None:
        """Computes the bounds.

        `max_tokens` is admission's bound for one tenant, which bounds the examples of a pool.
        """
        text = _text_bound(model, longest_token_bytes)
        ids = _ids_bound(model)
        sampling, pool = _bound("sampling", _MAX_SAMPLING_BYTES), _bound("pool", _pool_bytes(model))
        self._most_example_bytes = model.context_length * max(longest_token_bytes, _NUMBER_BYTES) + _LAYER_BYTES
        examples = _examples_bound(max_tokens, max(longest_token_bytes, _NUMBER_BYTES))
        prompt = {"text": text, "prompt": text, "token_ids": ids}
        generate = _numbered(pb.GenerateRequest, {**prompt, "sampling": sampling, "pool": pool})
        tensor = replace(text, num_bytes=text.num_bytes + _TENSOR_HEADER_BYTES)
        infer = _numbered(
            inference_pb.ModelInferRequest,
            {"inputs": tensor, "raw_input_contents": tensor, "parameters": _bound("parameters", _MAX_SAMPLING_BYTES)},
        )
        self._bounds: dict[str, Mapping[int, Bound]] = {
            "Generate": generate,
            "Complete": generate,
            "ModelInfer": infer,
            "ModelStreamInfer": infer,
            "Route": _numbered(pb.RouteRequest, {**prompt, "pool": pool}),
            "Calibrate": _numbered(pb.CalibrateRequest, {"examples": examples, "pool": pool}),
        }
        self._examples = pb.CalibrateRequest.DESCRIPTOR.fields_by_name["examples"].number

    def check(self, method: str, data: bytes) -> None:
        """Checks a message.

        Raises InvalidRequest or PromptTooLong for the first field larger than in any legal request.
        """
        if len(data) > MAX_MESSAGE_BYTES:
            raise InvalidRequest(
                f"the message has {len(data)} bytes and the service accepts {MAX_MESSAGE_BYTES}; send less"
            )
        bounds = self._bounds.get(method, {})
        weights: Counter[int] = Counter()
        for count, (number, start, end) in enumerate(_fields(data), 1):
            num_bytes = end - start
            field = number if number in bounds else 0
            weights[field] += num_bytes
            if field and weights[field] > bounds[field].num_bytes:
                raise bounds[field].refusal(weights[field])
            if method == "Calibrate" and field == self._examples:
                self._check_example(count, num_bytes)
            if count > MAX_FIELDS:
                raise InvalidRequest(
                    f"the message has more than {MAX_FIELDS} fields, repeated ones counted one by one (a pool is made "
                    f"from at most {MAX_EXAMPLES} examples); leave some out"
                )
            if weights[0] > MAX_OTHER_BYTES:
                raise InvalidRequest(
                    f"ids, names and unknown fields of the message have more than {MAX_OTHER_BYTES} bytes; send less"
                )

    def _check_example(self, count: int, num_bytes: int) -> None:
        if num_bytes > self._most_example_bytes:
            raise PromptTooLong(
                f"an example (field {count} of the message) has {num_bytes} bytes, and one that fits the model's "
                f"context has at most {self._most_example_bytes}; cut it",
                field="examples",
            )


def unzipped(data: bytes) -> bytes:
    """Returns the message that `data` holds in gzip or deflate, or `data` itself where it is not compressed.

    gRPC leaves the bytes as they came (`grpc.per_message_decompression` is off), because it would decompress every
    message, up to the largest size that it receives, before anything could be checked. No legal message begins as a
    compressed one does: gzip's first byte has a wire type that does not exist, and deflate's would be an unknown field
    15. Raises InvalidRequest for a message of more than `MAX_UNZIPPED_BYTES`, and for a damaged one.
    """
    if data[:2] != b"\x1f\x8b" and (data[:1] != b"\x78" or int.from_bytes(data[:2], "big") % 31):
        return data
    unzip = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)
    try:
        message = unzip.decompress(data, MAX_UNZIPPED_BYTES + 1)
    except zlib.error:
        raise malformed() from None
    if len(message) > MAX_UNZIPPED_BYTES:
        raise InvalidRequest(
            f"the compressed message has more than {MAX_UNZIPPED_BYTES} bytes when decompressed; send it uncompressed"
        )
    if not unzip.eof:
        raise malformed()
    return message


_MOST_OF: Mapping[bytes, int] = {
    b"[": MAX_JSON_CONTAINERS,
    b"{": MAX_JSON_CONTAINERS,
    b":": MAX_JSON_KEYS,
    b",": MAX_JSON_VALUES,
}


async def check_json(data: bytes) -> None:
    """Checks how many objects, lists, keys and values a JSON text has, before it is parsed. Raises InvalidRequest.

    Only what is outside of strings counts. A text that is within the bounds even with its strings is not scanned.
    """
    if not _has_too_many(Counter({mark: data.count(mark) for mark in _MOST_OF})):
        return
    found: Counter[bytes] = Counter()
    is_in_string, rest = False, b""
    for start in range(0, len(data), _SCANNED_BYTES):
        piece = rest + data[start : start + _SCANNED_BYTES]
        rest = piece[len(piece.rstrip(b"\\")) :]  # the escaped character may be in the next piece
        piece = piece[: len(piece) - len(rest)].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        outside = b"".join(parts[int(is_in_string) :: 2])
        is_in_string ^= len(parts) % 2 == 0
        found.update({mark: outside.count(mark) for mark in _MOST_OF})
        if _has_too_many(found):
            raise InvalidRequest(
                f"the body has more than {MAX_JSON_CONTAINERS} objects or lists, {MAX_JSON_KEYS} keys or "
                f"{MAX_JSON_VALUES} values; send less, or use gRPC"
            )
        await asyncio.sleep(0)


def _has_too_many(found: Mapping[bytes, int]) -> bool:
    return any(found[mark] > most for mark, most in _MOST_OF.items())


def check_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Checks the size of metadata. Raises InvalidRequest for more than `MAX_METADATA_BYTES`."""
    num_bytes = sum(len(key) + len(value) for key, value in metadata or ())
    if num_bytes > MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"the call's metadata has {num_bytes} bytes and the service accepts {MAX_METADATA_BYTES}; send less",
            field="metadata",
        )


def malformed() -> InvalidRequest:
    return InvalidRequest("the message cannot be parsed; does the client have another version, or is a text not UTF-8?")


# --- the bound of each field ------------------------------------------------------------------------------------------


def _text_bound(model: ModelInfo, longest_token_bytes: int) -> Bound:
    most = model.token_limit * longest_token_bytes

    def refusal(num_bytes: int) -> PagerError:
        return PromptTooLong(
            f"the prompt has {num_bytes} bytes; {model.token_limit} tokens fit, of at most {longest_token_bytes} bytes "
            f"each, so no text of more than {most} bytes ({format_bytes(most)}) does; cut it",
            field="text",
        )

    return Bound(most, refusal)


def _ids_bound(model: ModelInfo) -> Bound:
    def refusal(num_bytes: int) -> PagerError:
        return PromptTooLong(
            f"the prompt's token ids have {num_bytes} bytes, more than the {model.token_limit} tokens that fit can "
            "have; cut it",
            field="token_ids",
        )

    return Bound(model.token_limit * _NUMBER_BYTES + _LAYER_BYTES, refusal)


def _examples_bound(max_tokens: int, largest_token_bytes: int) -> Bound:
    most = max_tokens * largest_token_bytes + MAX_EXAMPLES * _LAYER_BYTES

    def refusal(num_bytes: int) -> PagerError:
        return PromptTooLong(
            f"the examples have more than {num_bytes} bytes together; the service admits {max_tokens} tokens at once, "
            f"which have at most {most}; give fewer or shorter ones",
            field="examples",
        )

    return Bound(most, refusal)


def _pool_bytes(model: ModelInfo) -> int:
    numbers = sum(model.facts.routed_per_layer) + model.facts.num_layers
    return _POOL_HEADER_BYTES + _NUMBER_BYTES * numbers + _LAYER_BYTES * model.facts.num_layers


def _bound(field: str, most: int) -> Bound:
    def refusal(num_bytes: int) -> PagerError:
        return InvalidRequest(
            f"`{field}` has {num_bytes} bytes and no legal one has more than {most}; send less", field=field
        )

    return Bound(most, refusal)


def _numbered(kind: type[Message], bounds: Mapping[str, Bound]) -> Mapping[int, Bound]:
    return {kind.DESCRIPTOR.fields_by_name[name].number: bound for name, bound in bounds.items()}


# --- the wire format ------------------------------------------------------------------------------------------------


def field_of(data: bytes, number: int, most_bytes: int) -> bytes:
    """Returns the first field of that number in an unparsed message; empty without one of at most `most` bytes.

    Raises InvalidRequest.
    """
    fields = itertools.islice(_fields(data), MAX_FIELDS)
    start, end = next(((start, end) for each, start, end in fields if each == number), (0, 0))
    return data[start:end] if end - start <= most_bytes else b""


def _fields(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields number, start and end of every field at the top level. Raises InvalidRequest."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        start = at
        match tag & 7:
            case 0:
                _, at = _varint(data, at)
            case 1:
                at += 8
            case 2:
                length, start = _varint(data, at)
                at = start + length
            case 5:
                at += 4
            case _:
                raise malformed()
        if at > len(data):
            raise malformed()
        yield tag >> 3, start, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Decodes a number; returns it and the position after it."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[at : at + 10], strict=False):
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + shift // 7 + 1
    raise malformed()


# --- the checks -------------------------------------------------------------------------------------------------------


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
    return UnknownPool(f"this tenant has no pool {name!r}; `expert-pager calibrate` makes it", field="pool.name")


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
            check_prompt_length(len(prompt), self._model, "token_ids")
            return prompt_ids(prompt, self._model, "token_ids")
        return await self.encoded(tenant, prompt)

    async def encoded(self, tenant: str, text: str, **options: bool) -> tuple[int, ...]:
        """Returns a prompt's tokens; `options` are the encoder's. Raises InvalidRequest or PromptTooLong."""
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
