from expert_pager.v1 import expert_pager_pb2 as _expert_pager_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Command(_message.Message):
    __slots__ = ("submit", "cancel", "abort")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: Cancel
    abort: Abort
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("ticket", "request_id", "tenant", "prompt", "sampling", "pool", "fixed", "remaining_s", "predicted", "traceparent", "tracestate", "priority", "weight", "watched", "guaranteed_share")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    FIXED_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    WATCHED_FIELD_NUMBER: _ClassVar[int]
    GUARANTEED_SHARE_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    request_id: str
    tenant: str
    prompt: _expert_pager_pb2.TokenIds
    sampling: _expert_pager_pb2.SamplingParams
    pool: _expert_pager_pb2.PoolPolicy
    fixed: _expert_pager_pb2.Pool
    remaining_s: float
    predicted: _expert_pager_pb2.Pool
    traceparent: str
    tracestate: str
    priority: int
    weight: float
    watched: bool
    guaranteed_share: float
    def __init__(self, ticket: _Optional[int] = ..., request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., prompt: _Optional[_Union[_expert_pager_pb2.TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[_expert_pager_pb2.SamplingParams, _Mapping]] = ..., pool: _Optional[_Union[_expert_pager_pb2.PoolPolicy, _Mapping]] = ..., fixed: _Optional[_Union[_expert_pager_pb2.Pool, _Mapping]] = ..., remaining_s: _Optional[float] = ..., predicted: _Optional[_Union[_expert_pager_pb2.Pool, _Mapping]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., priority: _Optional[int] = ..., weight: _Optional[float] = ..., watched: bool = ..., guaranteed_share: _Optional[float] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    def __init__(self, ticket: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("number", "request_id", "tenant")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    number: int
    request_id: str
    tenant: str
    def __init__(self, number: _Optional[int] = ..., request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("step", "load", "refusal", "aborted")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    step: Step
    load: Load
    refusal: str
    aborted: Aborted
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., refusal: _Optional[str] = ..., aborted: _Optional[_Union[Aborted, _Mapping]] = ...) -> None: ...

class Aborted(_message.Message):
    __slots__ = ("number", "found")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    number: int
    found: bool
    def __init__(self, number: _Optional[int] = ..., found: bool = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("chunks", "failures")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[Chunk]
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    def __init__(self, chunks: _Optional[_Iterable[_Union[Chunk, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("ticket", "token_ids", "text", "usage", "logprobs", "prompt_logprobs", "page_ins", "outside_mass", "index", "num_going_on")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PAGE_INS_FIELD_NUMBER: _ClassVar[int]
    OUTSIDE_MASS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_GOING_ON_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    usage: _expert_pager_pb2.Usage
    logprobs: _containers.RepeatedCompositeFieldContainer[_expert_pager_pb2.TokenLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_expert_pager_pb2.TokenLogprobs]
    page_ins: _containers.RepeatedCompositeFieldContainer[PageIn]
    outside_mass: float
    index: int
    num_going_on: int
    def __init__(self, ticket: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., usage: _Optional[_Union[_expert_pager_pb2.Usage, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_expert_pager_pb2.TokenLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_expert_pager_pb2.TokenLogprobs, _Mapping]]] = ..., page_ins: _Optional[_Iterable[_Union[PageIn, _Mapping]]] = ..., outside_mass: _Optional[float] = ..., index: _Optional[int] = ..., num_going_on: _Optional[int] = ...) -> None: ...

class PageIn(_message.Message):
    __slots__ = ("layer", "expert", "from_host", "at_s")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    FROM_HOST_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    from_host: bool
    at_s: float
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., from_host: bool = ..., at_s: _Optional[float] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("ticket", "error", "refused", "account")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    error: Error
    refused: bool
    account: Account
    def __init__(self, ticket: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., refused: bool = ..., account: _Optional[_Union[Account, _Mapping]] = ...) -> None: ...

class Account(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "bytes_from_disk", "bytes_from_host", "queue_s", "experts_hit", "experts_missed", "stall_seconds", "cached_prompt_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_DISK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_HOST_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_HIT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_MISSED_FIELD_NUMBER: _ClassVar[int]
    STALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    bytes_from_disk: int
    bytes_from_host: int
    queue_s: float
    experts_hit: int
    experts_missed: int
    stall_seconds: float
    cached_prompt_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., bytes_from_disk: _Optional[int] = ..., bytes_from_host: _Optional[int] = ..., queue_s: _Optional[float] = ..., experts_hit: _Optional[int] = ..., experts_missed: _Optional[int] = ..., stall_seconds: _Optional[float] = ..., cached_prompt_tokens: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("reason", "message", "field", "retry_after_s", "facts")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    field: str
    retry_after_s: float
    facts: _containers.ScalarMap[str, int]
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., facts: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("waiting", "running", "resident", "page_in_bytes_per_s", "draining", "experts_hit", "experts_missed", "bytes_from_disk", "bytes_from_host", "peak_page_in_bytes_per_s", "place_s", "stall_seconds", "kv_share")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    PAGE_IN_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_HIT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_MISSED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_DISK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_HOST_FIELD_NUMBER: _ClassVar[int]
    PEAK_PAGE_IN_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PLACE_S_FIELD_NUMBER: _ClassVar[int]
    STALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KV_SHARE_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    running: int
    resident: _containers.RepeatedScalarFieldContainer[bytes]
    page_in_bytes_per_s: float
    draining: bool
    experts_hit: int
    experts_missed: int
    bytes_from_disk: int
    bytes_from_host: int
    peak_page_in_bytes_per_s: float
    place_s: float
    stall_seconds: float
    kv_share: float
    def __init__(self, waiting: _Optional[int] = ..., running: _Optional[int] = ..., resident: _Optional[_Iterable[bytes]] = ..., page_in_bytes_per_s: _Optional[float] = ..., draining: bool = ..., experts_hit: _Optional[int] = ..., experts_missed: _Optional[int] = ..., bytes_from_disk: _Optional[int] = ..., bytes_from_host: _Optional[int] = ..., peak_page_in_bytes_per_s: _Optional[float] = ..., place_s: _Optional[float] = ..., stall_seconds: _Optional[float] = ..., kv_share: _Optional[float] = ...) -> None: ...
