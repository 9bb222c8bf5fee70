from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Command(_message.Message):
    __slots__ = ("submit", "cancel")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: Cancel
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("ticket", "request_id", "tenant", "prompt_token_ids", "sampling", "pool", "deadline_unix_s", "predicted", "traceparent", "tracestate")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    request_id: str
    tenant: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    pool: PoolPolicy
    deadline_unix_s: float
    predicted: ExpertPool
    traceparent: str
    tracestate: str
    def __init__(self, ticket: _Optional[int] = ..., request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., pool: _Optional[_Union[PoolPolicy, _Mapping]] = ..., deadline_unix_s: _Optional[float] = ..., predicted: _Optional[_Union[ExpertPool, _Mapping]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    def __init__(self, ticket: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ...) -> None: ...

class PoolPolicy(_message.Message):
    __slots__ = ("routed", "share", "mass", "counts", "source", "fixed", "drift")
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    MASS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FIXED_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    routed: int
    share: float
    mass: Mass
    counts: LayerCounts
    source: str
    fixed: ExpertPool
    drift: DriftPolicy
    def __init__(self, routed: _Optional[int] = ..., share: _Optional[float] = ..., mass: _Optional[_Union[Mass, _Mapping]] = ..., counts: _Optional[_Union[LayerCounts, _Mapping]] = ..., source: _Optional[str] = ..., fixed: _Optional[_Union[ExpertPool, _Mapping]] = ..., drift: _Optional[_Union[DriftPolicy, _Mapping]] = ...) -> None: ...

class LayerCounts(_message.Message):
    __slots__ = ("routed",)
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    routed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, routed: _Optional[_Iterable[int]] = ...) -> None: ...

class DriftPolicy(_message.Message):
    __slots__ = ("threshold", "action", "window")
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    threshold: float
    action: str
    window: int
    def __init__(self, threshold: _Optional[float] = ..., action: _Optional[str] = ..., window: _Optional[int] = ...) -> None: ...

class Mass(_message.Message):
    __slots__ = ("mass", "cap")
    MASS_FIELD_NUMBER: _ClassVar[int]
    CAP_FIELD_NUMBER: _ClassVar[int]
    mass: float
    cap: int
    def __init__(self, mass: _Optional[float] = ..., cap: _Optional[int] = ...) -> None: ...

class ExpertPool(_message.Message):
    __slots__ = ("layers", "covered_mass")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    COVERED_MASS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    covered_mass: float
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., covered_mass: _Optional[float] = ...) -> None: ...

class LayerExperts(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, experts: _Optional[_Iterable[int]] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("step", "load")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    step: Step
    load: Load
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("chunks", "failures")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[Chunk]
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    def __init__(self, chunks: _Optional[_Iterable[_Union[Chunk, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("ticket", "token_ids", "text", "usage")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    usage: Usage
    def __init__(self, ticket: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("ticket", "error")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    error: Error
    def __init__(self, ticket: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

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

class Usage(_message.Message):
    __slots__ = ("mode", "finish_reason", "prompt_tokens", "completion_tokens", "pool", "bytes_from_disk", "bytes_from_host", "experts_hit", "experts_missed", "stall_s", "out_of_pool_mass", "predicted_recall", "queue_s", "time_to_first_token_s", "model_fingerprint", "drift")
    MODE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_DISK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_HOST_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_HIT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_MISSED_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_POOL_MASS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_RECALL_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    mode: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    pool: ExpertPool
    bytes_from_disk: int
    bytes_from_host: int
    experts_hit: int
    experts_missed: int
    stall_s: float
    out_of_pool_mass: float
    predicted_recall: float
    queue_s: float
    time_to_first_token_s: float
    model_fingerprint: str
    drift: DriftReport
    def __init__(self, mode: _Optional[str] = ..., finish_reason: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., pool: _Optional[_Union[ExpertPool, _Mapping]] = ..., bytes_from_disk: _Optional[int] = ..., bytes_from_host: _Optional[int] = ..., experts_hit: _Optional[int] = ..., experts_missed: _Optional[int] = ..., stall_s: _Optional[float] = ..., out_of_pool_mass: _Optional[float] = ..., predicted_recall: _Optional[float] = ..., queue_s: _Optional[float] = ..., time_to_first_token_s: _Optional[float] = ..., model_fingerprint: _Optional[str] = ..., drift: _Optional[_Union[DriftReport, _Mapping]] = ...) -> None: ...

class DriftReport(_message.Message):
    __slots__ = ("peak_mass", "widenings", "experts_added", "exact_from")
    PEAK_MASS_FIELD_NUMBER: _ClassVar[int]
    WIDENINGS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_ADDED_FIELD_NUMBER: _ClassVar[int]
    EXACT_FROM_FIELD_NUMBER: _ClassVar[int]
    peak_mass: float
    widenings: int
    experts_added: int
    exact_from: int
    def __init__(self, peak_mass: _Optional[float] = ..., widenings: _Optional[int] = ..., experts_added: _Optional[int] = ..., exact_from: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("waiting", "running", "resident", "page_in_bytes_per_s", "draining", "experts_hit", "experts_missed", "bytes_from_disk", "bytes_from_host")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    PAGE_IN_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_HIT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_MISSED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_DISK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_HOST_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    running: int
    resident: _containers.RepeatedScalarFieldContainer[bytes]
    page_in_bytes_per_s: float
    draining: bool
    experts_hit: int
    experts_missed: int
    bytes_from_disk: int
    bytes_from_host: int
    def __init__(self, waiting: _Optional[int] = ..., running: _Optional[int] = ..., resident: _Optional[_Iterable[bytes]] = ..., page_in_bytes_per_s: _Optional[float] = ..., draining: _Optional[bool] = ..., experts_hit: _Optional[int] = ..., experts_missed: _Optional[int] = ..., bytes_from_disk: _Optional[int] = ..., bytes_from_host: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...
