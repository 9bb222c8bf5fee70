from __future__ import annotations

import inspect

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from pager import errors
from pager.types import ExpertKey
from pager.wire import decode_status
from router_service.status import CODES, MAX_MESSAGE_CHARACTERS, WireError, code_of, to_wire

ALL_ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.PagerError)]


def status_of(wire: WireError) -> Status:
    return Status.FromString(dict(wire.trailing_metadata)["grpc-status-details-bin"])


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_error_has_its_own_row(kind: type[errors.PagerError]) -> None:
    assert kind in CODES


def test_only_the_base_is_internal() -> None:
    assert [kind for kind, code in CODES.items() if code is grpc.StatusCode.INTERNAL] == [errors.PagerError]


@pytest.mark.parametrize("kind", [kind for kind in ALL_ERRORS if kind.retryable])
def test_what_is_retryable_has_a_code_that_clients_retry(kind: type[errors.PagerError]) -> None:
    assert CODES[kind] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_a_class_added_later_has_its_parents_code() -> None:
    class Flooded(errors.TenantOverloaded):
        pass

    assert code_of(Flooded("too much")) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_retry_info_and_push_back_say_the_same() -> None:
    wire = to_wire(errors.Overloaded("full", retry_after_s=0.25), "r1")
    status = status_of(wire)
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain, dict(info.metadata)) == ("OVERLOADED", "expert-pager", {"request_id": "r1"})
    assert retry.retry_delay.ToMilliseconds() == 250
    assert ("grpc-retry-pushback-ms", "250") in wire.trailing_metadata
    assert (status.code, status.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "full")


def test_a_field_becomes_a_violation_and_no_retry_is_offered() -> None:
    status = status_of(to_wire(errors.PoolTooLarge(96, 64)))
    assert len(status.details) == 2
    bad = BadRequest()
    assert status.details[1].Unpack(bad)
    assert bad.field_violations[0].field == "pool"
    assert "96" in bad.field_violations[0].description


def test_a_message_fits_into_headers() -> None:
    wire = to_wire(errors.InvalidRequest("x" * 10_000))
    assert len(wire.message) == MAX_MESSAGE_CHARACTERS
    assert status_of(wire).message == wire.message


def made(kind: type[errors.PagerError]) -> errors.PagerError:
    if issubclass(kind, errors.PoolTooLarge):
        return kind(needed=96, slots=64)
    if issubclass(kind, errors.ExpertUnavailable):
        return kind("it is corrupt", ExpertKey(1, 3))
    return kind("it is so", field="pool.size", retry_after_s=0.25 if kind.retryable else None)


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_a_client_reads_every_error_as_what_it_was(kind: type[errors.PagerError]) -> None:
    error = made(kind)
    found = decode_status(status_of(to_wire(error, "r1")))
    assert type(found) is kind
    assert found.__dict__ == error.__dict__ | {"retry_after_s": found.retry_after_s}
    assert found.retry_after_s == (0.25 if kind.retryable and error.retry_after_s else 1.0 if kind.retryable else None)


def test_a_status_without_our_name_is_none_of_ours() -> None:
    assert decode_status(Status(code=13, message="a proxy failed")) is None
