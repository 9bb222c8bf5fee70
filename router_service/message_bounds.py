"""Bounds on the size of a message, field by field, checked on its bytes before they are parsed.

Parsing and converting take time in proportion to bytes, on the event loop. Here only the top level of a message is
scanned, which costs as much for 8 MiB of text as for a word.
"""

from __future__ import annotations

import asyncio
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from expert_pager.inference import open_inference_pb2 as inference_pb
from expert_pager.v1 import expert_pager_pb2 as pb
from google.protobuf.message import Message

from pager.errors import InvalidRequest, PagerError, PromptTooLong
from pager.memory.units import format_bytes
from pager.pools.pick import MAX_EXAMPLES
from pager.sampling import MAX_GRAMMAR_BYTES
from pager.types import ModelInfo

MAX_MESSAGE_BYTES = 8 * 2**20
CORE_MESSAGE_BYTES = 2 * MAX_MESSAGE_BYTES  # a larger message is refused by gRPC itself, whose error has no details
MAX_UNZIPPED_BYTES = (
    2**20
)  # of a compressed message: one that unpacks to a thousand times its size costs its sender little
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


# --- bounds ---------------------------------------------------------------------------------------------------------


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
