from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DriftAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRIFT_ACTION_UNSPECIFIED: _ClassVar[DriftAction]
    DRIFT_ACTION_WIDEN: _ClassVar[DriftAction]
    DRIFT_ACTION_EXACT: _ClassVar[DriftAction]

class PoolSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOL_SOURCE_UNSPECIFIED: _ClassVar[PoolSource]
    POOL_SOURCE_PREFILL: _ClassVar[PoolSource]
    POOL_SOURCE_PREDICTION: _ClassVar[PoolSource]
    POOL_SOURCE_FIXED: _ClassVar[PoolSource]
    POOL_SOURCE_CODEBOOK: _ClassVar[PoolSource]

class AnswerMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ANSWER_MODE_UNSPECIFIED: _ClassVar[AnswerMode]
    ANSWER_MODE_EXACT: _ClassVar[AnswerMode]
    ANSWER_MODE_POOL: _ClassVar[AnswerMode]
    ANSWER_MODE_DEGRADED: _ClassVar[AnswerMode]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_DEADLINE: _ClassVar[FinishReason]
DRIFT_ACTION_UNSPECIFIED: DriftAction
DRIFT_ACTION_WIDEN: DriftAction
DRIFT_ACTION_EXACT: DriftAction
POOL_SOURCE_UNSPECIFIED: PoolSource
POOL_SOURCE_PREFILL: PoolSource
POOL_SOURCE_PREDICTION: PoolSource
POOL_SOURCE_FIXED: PoolSource
POOL_SOURCE_CODEBOOK: PoolSource
ANSWER_MODE_UNSPECIFIED: AnswerMode
ANSWER_MODE_EXACT: AnswerMode
ANSWER_MODE_POOL: AnswerMode
ANSWER_MODE_DEGRADED: AnswerMode
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_DEADLINE: FinishReason

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "text", "token_ids", "prompt", "sampling", "pool")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    text: bytes
    token_ids: TokenIds
    prompt: str
    sampling: SamplingParams
    pool: PoolPolicy
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., text: _Optional[bytes] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., prompt: _Optional[str] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., pool: _Optional[_Union[PoolPolicy, _Mapping]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens", "stop_token_ids", "logprobs", "prompt_logprobs", "json_schema", "json_object", "regex", "ebnf", "n")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    JSON_OBJECT_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    EBNF_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: int
    prompt_logprobs: int
    json_schema: str
    json_object: bool
    regex: str
    ebnf: str
    n: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: bool = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., json_schema: _Optional[str] = ..., json_object: bool = ..., regex: _Optional[str] = ..., ebnf: _Optional[str] = ..., n: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "text", "token_ids", "usage", "logprobs", "prompt_logprobs", "index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    usage: Usage
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    index: int
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., index: _Optional[int] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("token_id", "logprob", "top_ids", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class PoolPolicy(_message.Message):
    __slots__ = ("full", "count", "share", "mass", "bytes", "counts", "source", "experts", "digest", "name", "drift")
    FULL_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    MASS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    full: Full
    count: int
    share: float
    mass: Mass
    bytes: int
    counts: LayerCounts
    source: PoolSource
    experts: FixedPool
    digest: str
    name: str
    drift: DriftPolicy
    def __init__(self, full: _Optional[_Union[Full, _Mapping]] = ..., count: _Optional[int] = ..., share: _Optional[float] = ..., mass: _Optional[_Union[Mass, _Mapping]] = ..., bytes: _Optional[int] = ..., counts: _Optional[_Union[LayerCounts, _Mapping]] = ..., source: _Optional[_Union[PoolSource, str]] = ..., experts: _Optional[_Union[FixedPool, _Mapping]] = ..., digest: _Optional[str] = ..., name: _Optional[str] = ..., drift: _Optional[_Union[DriftPolicy, _Mapping]] = ...) -> None: ...

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
    action: DriftAction
    window: int
    def __init__(self, threshold: _Optional[float] = ..., action: _Optional[_Union[DriftAction, str]] = ..., window: _Optional[int] = ...) -> None: ...

class Full(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Mass(_message.Message):
    __slots__ = ("mass", "cap")
    MASS_FIELD_NUMBER: _ClassVar[int]
    CAP_FIELD_NUMBER: _ClassVar[int]
    mass: float
    cap: int
    def __init__(self, mass: _Optional[float] = ..., cap: _Optional[int] = ...) -> None: ...

class FixedPool(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ...) -> None: ...

class LayerExperts(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, experts: _Optional[_Iterable[int]] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("digest", "num_experts", "layers", "covered_mass")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    COVERED_MASS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    num_experts: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    covered_mass: float
    def __init__(self, digest: _Optional[str] = ..., num_experts: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., covered_mass: _Optional[float] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("mode", "finish_reason", "prompt_tokens", "completion_tokens", "pool", "bytes_from_disk", "bytes_from_host", "experts_hit", "experts_missed", "stall_seconds", "out_of_pool_mass", "predicted_recall", "queue_seconds", "time_to_first_token_seconds", "model_fingerprint", "drift", "cached_prompt_tokens", "codeword")
    MODE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_DISK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_HOST_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_HIT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_MISSED_FIELD_NUMBER: _ClassVar[int]
    STALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_POOL_MASS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_RECALL_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CODEWORD_FIELD_NUMBER: _ClassVar[int]
    mode: AnswerMode
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    pool: Pool
    bytes_from_disk: int
    bytes_from_host: int
    experts_hit: int
    experts_missed: int
    stall_seconds: float
    out_of_pool_mass: float
    predicted_recall: float
    queue_seconds: float
    time_to_first_token_seconds: float
    model_fingerprint: str
    drift: DriftReport
    cached_prompt_tokens: int
    codeword: str
    def __init__(self, mode: _Optional[_Union[AnswerMode, str]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., pool: _Optional[_Union[Pool, _Mapping]] = ..., bytes_from_disk: _Optional[int] = ..., bytes_from_host: _Optional[int] = ..., experts_hit: _Optional[int] = ..., experts_missed: _Optional[int] = ..., stall_seconds: _Optional[float] = ..., out_of_pool_mass: _Optional[float] = ..., predicted_recall: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., time_to_first_token_seconds: _Optional[float] = ..., model_fingerprint: _Optional[str] = ..., drift: _Optional[_Union[DriftReport, _Mapping]] = ..., cached_prompt_tokens: _Optional[int] = ..., codeword: _Optional[str] = ...) -> None: ...

class DriftReport(_message.Message):
    __slots__ = ("peak_mass", "widenings", "experts_added", "exact_from", "experts_left_out")
    PEAK_MASS_FIELD_NUMBER: _ClassVar[int]
    WIDENINGS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_ADDED_FIELD_NUMBER: _ClassVar[int]
    EXACT_FROM_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    peak_mass: float
    widenings: int
    experts_added: int
    exact_from: int
    experts_left_out: int
    def __init__(self, peak_mass: _Optional[float] = ..., widenings: _Optional[int] = ..., experts_added: _Optional[int] = ..., exact_from: _Optional[int] = ..., experts_left_out: _Optional[int] = ...) -> None: ...

class RouteRequest(_message.Message):
    __slots__ = ("model", "text", "token_ids", "prompt", "pool")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: bytes
    token_ids: TokenIds
    prompt: str
    pool: PoolPolicy
    def __init__(self, model: _Optional[str] = ..., text: _Optional[bytes] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., prompt: _Optional[str] = ..., pool: _Optional[_Union[PoolPolicy, _Mapping]] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("scores", "pool", "observed", "placement", "expected_recall", "codeword", "coverage")
    SCORES_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_RECALL_FIELD_NUMBER: _ClassVar[int]
    CODEWORD_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    scores: Scores
    pool: Pool
    observed: Pool
    placement: Placement
    expected_recall: float
    codeword: str
    coverage: float
    def __init__(self, scores: _Optional[_Union[Scores, _Mapping]] = ..., pool: _Optional[_Union[Pool, _Mapping]] = ..., observed: _Optional[_Union[Pool, _Mapping]] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., expected_recall: _Optional[float] = ..., codeword: _Optional[str] = ..., coverage: _Optional[float] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("source", "num_tokens", "layers")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    source: str
    num_tokens: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerScores]
    def __init__(self, source: _Optional[str] = ..., num_tokens: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerScores, _Mapping]]] = ...) -> None: ...

class LayerScores(_message.Message):
    __slots__ = ("mean",)
    MEAN_FIELD_NUMBER: _ClassVar[int]
    mean: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, mean: _Optional[_Iterable[float]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("worker", "missing_bytes")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MISSING_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker: str
    missing_bytes: int
    def __init__(self, worker: _Optional[str] = ..., missing_bytes: _Optional[int] = ...) -> None: ...

class CalibrateRequest(_message.Message):
    __slots__ = ("model", "name", "examples", "pool", "method", "replace")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    model: str
    name: str
    examples: _containers.RepeatedCompositeFieldContainer[Example]
    pool: PoolPolicy
    method: str
    replace: bool
    def __init__(self, model: _Optional[str] = ..., name: _Optional[str] = ..., examples: _Optional[_Iterable[_Union[Example, _Mapping]]] = ..., pool: _Optional[_Union[PoolPolicy, _Mapping]] = ..., method: _Optional[str] = ..., replace: bool = ...) -> None: ...

class Example(_message.Message):
    __slots__ = ("text", "token_ids", "prompt")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    text: bytes
    token_ids: TokenIds
    prompt: str
    def __init__(self, text: _Optional[bytes] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., prompt: _Optional[str] = ...) -> None: ...

class CalibrateResponse(_message.Message):
    __slots__ = ("pool",)
    POOL_FIELD_NUMBER: _ClassVar[int]
    pool: NamedPool
    def __init__(self, pool: _Optional[_Union[NamedPool, _Mapping]] = ...) -> None: ...

class NamedPool(_message.Message):
    __slots__ = ("name", "pool", "method", "num_examples", "num_tokens", "model_fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    pool: Pool
    method: str
    num_examples: int
    num_tokens: int
    model_fingerprint: str
    def __init__(self, name: _Optional[str] = ..., pool: _Optional[_Union[Pool, _Mapping]] = ..., method: _Optional[str] = ..., num_examples: _Optional[int] = ..., num_tokens: _Optional[int] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class ListPoolsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPoolsResponse(_message.Message):
    __slots__ = ("pools", "damaged")
    POOLS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[NamedPool]
    damaged: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pools: _Optional[_Iterable[_Union[NamedPool, _Mapping]]] = ..., damaged: _Optional[_Iterable[str]] = ...) -> None: ...

class DeletePoolRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeletePoolResponse(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: bool
    def __init__(self, deleted: bool = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: bool
    def __init__(self, aborted: bool = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("name", "fingerprint", "context_length", "kv_token_limit", "vocab_size", "tokenizer", "pool_sizes", "plan", "codewords")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    KV_TOKEN_LIMIT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    POOL_SIZES_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CODEWORDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    context_length: int
    kv_token_limit: int
    vocab_size: int
    tokenizer: Tokenizer
    pool_sizes: PoolSizes
    plan: str
    codewords: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., context_length: _Optional[int] = ..., kv_token_limit: _Optional[int] = ..., vocab_size: _Optional[int] = ..., tokenizer: _Optional[_Union[Tokenizer, _Mapping]] = ..., pool_sizes: _Optional[_Union[PoolSizes, _Mapping]] = ..., plan: _Optional[str] = ..., codewords: _Optional[_Iterable[str]] = ...) -> None: ...

class Tokenizer(_message.Message):
    __slots__ = ("class_name", "sha256")
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    class_name: str
    sha256: str
    def __init__(self, class_name: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class PoolSizes(_message.Message):
    __slots__ = ("min_routed", "max_routed", "slots", "layers")
    MIN_ROUTED_FIELD_NUMBER: _ClassVar[int]
    MAX_ROUTED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    min_routed: int
    max_routed: int
    slots: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerFacts]
    def __init__(self, min_routed: _Optional[int] = ..., max_routed: _Optional[int] = ..., slots: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerFacts, _Mapping]]] = ...) -> None: ...

class LayerFacts(_message.Message):
    __slots__ = ("routed", "shared", "top_k")
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    routed: int
    shared: int
    top_k: int
    def __init__(self, routed: _Optional[int] = ..., shared: _Optional[int] = ..., top_k: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker", "router")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    router: bool
    def __init__(self, worker: _Optional[str] = ..., router: bool = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetResidencyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetResidencyResponse(_message.Message):
    __slots__ = ("workers", "load")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerResidency]
    load: Load
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerResidency, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("requests", "tokens", "tenants")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    tokens: int
    tenants: _containers.RepeatedCompositeFieldContainer[TenantLoad]
    def __init__(self, requests: _Optional[int] = ..., tokens: _Optional[int] = ..., tenants: _Optional[_Iterable[_Union[TenantLoad, _Mapping]]] = ...) -> None: ...

class TenantLoad(_message.Message):
    __slots__ = ("tenant", "requests", "tokens")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    requests: int
    tokens: int
    def __init__(self, tenant: _Optional[str] = ..., requests: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class WorkerResidency(_message.Message):
    __slots__ = ("worker", "state", "waiting", "running", "slots", "expert_bytes", "resident_experts", "resident", "remote")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    state: str
    waiting: int
    running: int
    slots: int
    expert_bytes: int
    resident_experts: int
    resident: _containers.RepeatedScalarFieldContainer[bytes]
    remote: bool
    def __init__(self, worker: _Optional[str] = ..., state: _Optional[str] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., slots: _Optional[int] = ..., expert_bytes: _Optional[int] = ..., resident_experts: _Optional[int] = ..., resident: _Optional[_Iterable[bytes]] = ..., remote: bool = ...) -> None: ...
