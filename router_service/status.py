"""The one table from errors to gRPC status codes, with google.rpc details."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from pager import errors
from pager.wire import DOMAIN, error_facts

DEFAULT_RETRY_S = 1.0
MAX_MESSAGE_CHARACTERS = 1000  # status messages travel in headers, which peers limit to 8 KiB

_Code = grpc.StatusCode
CODES: Mapping[type[errors.PagerError], grpc.StatusCode] = MappingProxyType(
    {
        errors.PagerError: _Code.INTERNAL,
        errors.InvalidRequest: _Code.INVALID_ARGUMENT,
        errors.PromptTooLong: _Code.INVALID_ARGUMENT,
        errors.Unauthenticated: _Code.UNAUTHENTICATED,
        errors.PermissionDenied: _Code.PERMISSION_DENIED,
        errors.UnknownModel: _Code.NOT_FOUND,
        errors.UnknownMethod: _Code.UNIMPLEMENTED,
        errors.UnknownPool: _Code.NOT_FOUND,
        errors.UnknownWorker: _Code.NOT_FOUND,
        errors.PoolNameInUse: _Code.ALREADY_EXISTS,
        errors.PoolOfAnotherModel: _Code.FAILED_PRECONDITION,
        errors.TooManyPools: _Code.RESOURCE_EXHAUSTED,
        errors.DamagedPool: _Code.DATA_LOSS,
        errors.PoolStoreUnavailable: _Code.UNAVAILABLE,
        errors.PoolTooSmall: _Code.INVALID_ARGUMENT,
        errors.PoolTooLarge: _Code.INVALID_ARGUMENT,
        errors.DuplicateRequest: _Code.ALREADY_EXISTS,
        errors.DeadlineExceeded: _Code.DEADLINE_EXCEEDED,
        errors.Cancelled: _Code.CANCELLED,
        # The stream's buffer is full. No RetryInfo: a client that does not read will not read next time.
        errors.SlowReader: _Code.RESOURCE_EXHAUSTED,
        errors.Overloaded: _Code.RESOURCE_EXHAUSTED,
        errors.TenantOverloaded: _Code.RESOURCE_EXHAUSTED,
        errors.QuotaExceeded: _Code.RESOURCE_EXHAUSTED,
        errors.SlotsExhausted: _Code.RESOURCE_EXHAUSTED,
        errors.WorkerLost: _Code.UNAVAILABLE,
        errors.NotReady: _Code.UNAVAILABLE,
        errors.ServiceUnreachable: _Code.UNAVAILABLE,
        errors.ExpertUnavailable: _Code.DATA_LOSS,
        errors.ExpertReadError: _Code.DATA_LOSS,
        errors.ChecksumMismatch: _Code.DATA_LOSS,
        # Faults that an operator has to repair.
        errors.CheckpointError: _Code.FAILED_PRECONDITION,
        errors.UnsupportedModel: _Code.FAILED_PRECONDITION,
        errors.ConfigError: _Code.FAILED_PRECONDITION,
        errors.BudgetError: _Code.FAILED_PRECONDITION,
        errors.InsufficientDisk: _Code.FAILED_PRECONDITION,
        errors.PortInUse: _Code.FAILED_PRECONDITION,
    }
)
# Bounds of admission and quotas; a worker's slots or a slow reader's buffer are neither.
QUOTAS: Mapping[type[errors.PagerError], str] = MappingProxyType(
    {errors.Overloaded: "service", errors.TenantOverloaded: "tenant", errors.QuotaExceeded: "key"}
)


@dataclass(frozen=True, slots=True)
class WireError:
    """The arguments of `context.abort`."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def code_of(error: errors.PagerError) -> grpc.StatusCode:
    """Returns the code of the nearest class in the table."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def to_wire(error: errors.PagerError, request_id: str | None = None) -> WireError:
    """Returns the status with its details: ErrorInfo always; RetryInfo and push-back header where retrying helps,
    BadRequest where a field is at fault, QuotaFailure where a bound of admission is reached.
    """
    code = code_of(error)
    message = error.message[:MAX_MESSAGE_CHARACTERS]
    about = {name: str(value) for name, value in error_facts(error).items()}
    if request_id:
        about["request_id"] = request_id
    details: list[Message] = [ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=about)]
    pushback: tuple[tuple[str, str | bytes], ...] = ()
    if error.retryable:
        delay_ms = max(1, round(1000 * (error.retry_after_s or DEFAULT_RETRY_S)))
        delay = Duration()
        delay.FromMilliseconds(delay_ms)
        details.append(RetryInfo(retry_delay=delay))
        pushback = (("grpc-retry-pushback-ms", str(delay_ms)),)
    if error.field:
        violation = BadRequest.FieldViolation(field=error.field, description=message)
        details.append(BadRequest(field_violations=[violation]))
    if (subject := QUOTAS.get(type(error))) is not None:
        details.append(QuotaFailure(violations=[QuotaFailure.Violation(subject=subject, description=message)]))
    status = Status(code=code.value[0], message=message, details=[_packed(detail) for detail in details])
    rich = rpc_status.to_status(status)
    return WireError(code, message, (*rich.trailing_metadata, *pushback))


def _packed(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed
