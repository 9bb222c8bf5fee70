"""Calls of the service as a client on grpc.aio sees them: what is left of a stream, and how a call fails."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status


async def rest(call: Any) -> list[pb.GenerateResponse]:
    """The messages that are left of a stream that was begun with `read`."""
    messages: list[pb.GenerateResponse] = []
    while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        messages.append(message)
    return messages


async def failure(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    """The error that a call ends with; a call that succeeds is a failed test."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def trailer(error: grpc.aio.AioRpcError, name: str) -> str | bytes | None:
    """A header that came after the answer; None where it did not."""
    metadata: Any = error.trailing_metadata()  # the stubs do not know that it is pairs
    found: str | bytes | None = dict(metadata).get(name)
    return found


def details(error: grpc.aio.AioRpcError) -> dict[type, Any]:
    """What the error carries beside its code and message, by kind: ErrorInfo, RetryInfo, BadRequest, QuotaFailure."""
    packed = trailer(error, "grpc-status-details-bin")
    assert isinstance(packed, bytes), f"{error.code()} without details: {error.details()}"
    found: dict[type, Any] = {}
    for detail in Status.FromString(packed).details:
        for kind in (ErrorInfo, RetryInfo, BadRequest, QuotaFailure):
            if detail.Is(kind.DESCRIPTOR):
                found[kind] = kind()
                detail.Unpack(found[kind])
    return found


def reason(error: grpc.aio.AioRpcError) -> str:
    """ErrorInfo's reason."""
    return str(details(error)[ErrorInfo].reason)
