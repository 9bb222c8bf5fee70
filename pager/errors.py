"""Every error a user or an operator can cause, one class each.

`reason` is the machine-readable name that crosses the wire (google.rpc.ErrorInfo.reason); `retryable` says whether the
same call can succeed later without a change; `field` names the request field at fault, where there is one. The mapping
to gRPC status codes is a table in `router_service.status`.

What transformers raises for the same mistake is a base, too: `except ValueError` catches a value that cannot be used,
`except OSError` files that are missing or damaged. Within this project either of them, around code that raises a
PagerError, needs `except PagerError: raise` before it.
"""

from __future__ import annotations

from typing import ClassVar

from pager.types import ExpertKey


class PagerError(Exception):
    """Base of all errors shown to a user. The message says what was wrong, with which value, and what to do."""

    reason: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    is_refusal: bool = False  # the call was turned away before anything was done for it
    status: str = ""  # at a client, the name of the gRPC status code that the error came with

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries; keyword-only arguments would otherwise be lost on the way.
        return (_rebuild, (type(self), self.__dict__))


ENDS_THE_PROCESS = (KeyboardInterrupt, SystemExit)
"""What may be raised anywhere and is no failure of what was being done.

Whatever else is raised is one: also a panic in a library written in Rust, which is no Exception.
"""


def _rebuild(kind: type[PagerError], state: dict[str, object]) -> PagerError:
    error = kind.__new__(kind)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


# --- requests -------------------------------------------------------------------------------------------------------


class InvalidRequest(PagerError, ValueError):
    """A field of the request is out of its legal range."""

    reason = "INVALID_ARGUMENT"


class PromptTooLong(PagerError, ValueError):
    """The prompt (or prompt plus max_tokens) exceeds the context or the KV budget."""

    reason = "PROMPT_TOO_LONG"


class UnknownModel(PagerError):
    reason = "UNKNOWN_MODEL"


class Unauthenticated(PagerError):
    """The service requires a key and got none that it knows. It does not say what was wrong with it."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(PagerError):
    """The caller is known and may not do this."""

    reason = "PERMISSION_DENIED"


class UnknownMethod(PagerError):
    """The service has no method of that name; a client of another version may call it."""

    reason = "UNKNOWN_METHOD"


class UnknownWorker(PagerError):
    reason = "UNKNOWN_WORKER"


class UnknownPool(PagerError):
    reason = "UNKNOWN_POOL"


class PoolNameInUse(PagerError):
    reason = "POOL_NAME_IN_USE"


class PoolOfAnotherModel(PagerError):
    """A named pool was made for another model than the one it is asked for."""

    reason = "POOL_OF_ANOTHER_MODEL"


class TooManyPools(PagerError):
    """A bound on named pools is reached; deleting some helps, waiting does not."""

    reason = "TOO_MANY_POOLS"


class DamagedPool(PagerError):
    """The value stored under the name is not a pool."""

    reason = "DAMAGED_POOL"


class PoolStoreUnavailable(PagerError):
    """The store of named pools cannot be reached."""

    reason = "POOL_STORE_UNAVAILABLE"
    retryable = True


class PoolTooSmall(PagerError, ValueError):
    """The pool has fewer routed experts than the gate picks for one token."""

    reason = "POOL_TOO_SMALL"


class PoolTooLarge(PagerError, ValueError):
    """The pool can never fit into the slots."""

    reason = "POOL_TOO_LARGE"

    def __init__(self, needed: int, slots: int, *, num_guaranteed: int = 0, field: str | None = "pool") -> None:
        """`slots` are those that the tenant can have, beside `num_guaranteed` that are other tenants'."""
        beside = f" beside {num_guaranteed} that other tenants are guaranteed" if num_guaranteed else ""
        super().__init__(
            f"the pool needs {needed} expert slots and this worker has {slots}{beside}; ask for a smaller pool or "
            "raise expert_memory",
            field=field,
        )
        self.needed = needed
        self.slots = slots


class DuplicateRequest(PagerError):
    reason = "REQUEST_ID_IN_USE"


class DeadlineExceeded(PagerError):
    """The deadline has passed, or cannot be met."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(PagerError):
    reason = "CANCELLED"


class SlowReader(PagerError):
    """The client did not read its stream; the bounded buffer ran full."""

    reason = "SLOW_READER"


class Overloaded(PagerError):
    """A bound on requests, tokens or a tenant's share is reached."""

    reason = "OVERLOADED"
    retryable = True


class TenantOverloaded(Overloaded):
    reason = "TENANT_OVERLOADED"


class QuotaExceeded(Overloaded):
    """A caller has used up its requests or tokens of a minute or a day."""

    reason = "QUOTA_EXCEEDED"


class SlotsExhausted(Overloaded):
    """Every expert slot is pinned or reserved, so that not one expert can be paged in."""

    reason = "SLOTS_EXHAUSTED"


class WorkerLost(PagerError):
    """The worker that ran the request died or hung."""

    reason = "WORKER_LOST"
    retryable = True


class NotReady(PagerError):
    """No worker is ready, or the service is draining."""

    reason = "NOT_READY"
    retryable = True


class ServiceUnreachable(PagerError):
    """Nothing answers at the service's address, or the connection to it broke."""

    reason = "SERVICE_UNREACHABLE"
    retryable = True


# --- weights --------------------------------------------------------------------------------------------------------


class CheckpointError(PagerError, OSError):
    """The checkpoint is incomplete, truncated or not what its config says."""

    reason = "BAD_CHECKPOINT"


class UnsupportedModel(PagerError, ValueError):
    reason = "UNSUPPORTED_MODEL"


class ExpertUnavailable(PagerError, OSError):
    """No tier can deliver an expert's weights; the one request that needs it fails."""

    reason = "EXPERT_UNAVAILABLE"

    where: str = ""  # file and byte, for whoever runs the service; not in the message, which reaches clients

    def __init__(self, message: str, key: ExpertKey, where: str = "") -> None:
        super().__init__(message)
        self.key = key
        if where:
            self.where = where

    def __str__(self) -> str:
        return f"{self.message} ({self.where})" if self.where else self.message


class ExpertReadError(ExpertUnavailable):
    reason = "EXPERT_READ_ERROR"


class ChecksumMismatch(ExpertUnavailable):
    reason = "CHECKSUM_MISMATCH"


# --- operation ------------------------------------------------------------------------------------------------------


class ConfigError(PagerError, ValueError):
    reason = "BAD_CONFIG"


class BudgetError(PagerError, ValueError):
    """A memory budget is too small to run one token, or larger than the machine."""

    reason = "BAD_BUDGET"


class InsufficientDisk(PagerError):
    reason = "INSUFFICIENT_DISK"


class PortInUse(PagerError):
    reason = "PORT_IN_USE"
