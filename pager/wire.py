"""The translation between the project's values and protobuf, both ways; no other module does it.

`encode_*` makes a message of a value, `decode_*` a value of a message. Decoding checks what the value's type cannot
hold (unknown enum numbers, a missing oneof); whether a value makes sense for a model is checked by whoever uses it.
Router, worker and client use the same functions: `worker.proto` carries the public messages.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

from expert_pager.v1 import expert_pager_pb2 as pb
from expert_pager.v1 import worker_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from pager.errors import InvalidRequest, PagerError
from pager.types import (
    CHOSEN_BY_SERVICE,
    DRIFT_WINDOW,
    Account,
    AnswerMode,
    Bytes,
    Count,
    Counts,
    DriftAction,
    DriftPolicy,
    DriftReport,
    ExpertKey,
    ExpertPool,
    FinishReason,
    Full,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Load,
    Mass,
    ModelInfo,
    NamedPool,
    PageIn,
    PagingCounts,
    PoolAsk,
    PoolListing,
    PoolPolicy,
    PoolSize,
    PoolSource,
    RouteAnswer,
    RoutingFacts,
    SamplingParams,
    ServiceStatus,
    Share,
    TenantLoad,
    TokenChunk,
    TokenLogprobs,
    Usage,
    WorkerResidency,
)

_MODES: dict[AnswerMode, pb.AnswerMode] = {
    "exact": pb.ANSWER_MODE_EXACT,
    "pool": pb.ANSWER_MODE_POOL,
    "degraded": pb.ANSWER_MODE_DEGRADED,
}
_FINISH_REASONS = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}
_SOURCES = {
    PoolSource.PREFILL: pb.POOL_SOURCE_PREFILL,
    PoolSource.PREDICTION: pb.POOL_SOURCE_PREDICTION,
    PoolSource.FIXED: pb.POOL_SOURCE_FIXED,
    PoolSource.CODEBOOK: pb.POOL_SOURCE_CODEBOOK,
}
_ACTIONS = {DriftAction.WIDEN: pb.DRIFT_ACTION_WIDEN, DriftAction.EXACT: pb.DRIFT_ACTION_EXACT}

Key = TypeVar("Key")

# Attributes of `PagingCounts`, and the fields of every message that carries them. A new one is a line here.
_PAGING = {
    "experts_hit": "experts_hit",
    "experts_missed": "experts_missed",
    "bytes_from_disk": "bytes_from_disk",
    "bytes_from_host": "bytes_from_host",
    "stall_s": "stall_seconds",
}

# Attributes of `Usage` and the fields of its message that hold the same plain value. A new one is a line here.
_USAGE = {
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "completion_tokens",
    "cached_prompt_tokens": "cached_prompt_tokens",
    "out_of_pool_mass": "out_of_pool_mass",
    "predicted_recall": "predicted_recall",
    "queue_s": "queue_seconds",
    "time_to_first_token_s": "time_to_first_token_seconds",
    "model_fingerprint": "model_fingerprint",
    "codeword": "codeword",
}

# The fields of sampling parameters that are named alike and hold the same plain value, or a sequence of them.
_REPEATED = ("stop", "stop_token_ids")
_SAMPLING = tuple(field.name for field in fields(SamplingParams) if field.name not in ("logit_bias", "grammar"))
_DEFAULT_SAMPLING = SamplingParams()


# --- pools ----------------------------------------------------------------------------------------------------------


def encode_pool(pool: ExpertPool) -> pb.Pool:
    return pb.Pool(
        digest=pool.digest,
        num_experts=pool.num_experts,
        layers=encode_layers(pool),
        covered_mass=pool.covered_mass,
    )


def decode_pool(message: pb.Pool) -> ExpertPool:
    return ExpertPool(decode_layers(message.layers), optional(message, "covered_mass"))


def encode_layers(pool: ExpertPool) -> list[pb.LayerExperts]:
    return [pb.LayerExperts(experts=layer) for layer in pool.experts]


def decode_layers(layers: Iterable[pb.LayerExperts]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(layer.experts) for layer in layers)


def set_size(message: pb.PoolPolicy, size: PoolSize) -> None:
    """Sets the `size` of a policy."""
    match size:
        case Full():
            message.full.SetInParent()
        case Count(routed):
            message.count = routed
        case Share(share):
            message.share = share
        case Mass(mass, cap):
            message.mass.CopyFrom(pb.Mass(mass=mass, cap=cap))
        case Counts(per_layer):
            message.counts.CopyFrom(pb.LayerCounts(routed=per_layer))
        case Bytes(total):
            message.bytes = total


def decode_size(message: pb.PoolPolicy) -> PoolSize:
    """The policy's size; `Full` where none is set."""
    match message.WhichOneof("size"):
        case "count":
            return Count(message.count)
        case "share":
            return Share(message.share)
        case "mass":
            return Mass(message.mass.mass, optional(message.mass, "cap"))
        case "counts":
            return Counts(tuple(message.counts.routed))
        case "bytes":
            return Bytes(message.bytes)
    return Full()


def encode_source(source: PoolSource) -> pb.PoolSource:
    return _SOURCES[source]


def decode_source(message: pb.PoolPolicy) -> PoolSource | None:
    """The policy's source; None where it leaves it open. Raises InvalidRequest for one that is unknown."""
    if message.source == pb.POOL_SOURCE_UNSPECIFIED:
        return None
    for source, number in _SOURCES.items():
        if number == message.source:
            return source
    raise InvalidRequest(
        f"pool.source {message.source} is unknown; use CODEBOOK, PREFILL, PREDICTION or FIXED", field="pool.source"
    )


def encode_drift(drift: DriftPolicy) -> pb.DriftPolicy:
    return pb.DriftPolicy(threshold=drift.threshold, action=_ACTIONS[drift.action], window=drift.window)


def decode_drift(message: pb.PoolPolicy) -> DriftPolicy | None:
    """The policy's drift policy; None without one. Raises InvalidRequest for an unknown action."""
    if not message.HasField("drift"):
        return None
    drift = message.drift
    window = drift.window if drift.HasField("window") else DRIFT_WINDOW
    number = drift.action or pb.DRIFT_ACTION_WIDEN
    for action, known in _ACTIONS.items():
        if known == number:
            return DriftPolicy(drift.threshold, action, window)
    raise InvalidRequest(f"pool.drift.action {drift.action} is unknown; use WIDEN or EXACT", field="pool.drift.action")


def encode_ask(ask: PoolAsk) -> pb.PoolPolicy | None:
    """The policy; None where nothing is asked, so that the service's defaults count."""
    if ask == PoolAsk():
        return None
    message = pb.PoolPolicy(digest=ask.digest, name=ask.name)
    if ask.fixed is not None:
        message.experts.CopyFrom(pb.FixedPool(layers=encode_layers(ask.fixed)))
    if ask.source is not None:
        message.source = encode_source(ask.source)
    if ask.drift is not None:
        message.drift.CopyFrom(encode_drift(ask.drift))
    if ask.size is not None:
        set_size(message, ask.size)
    return message


def decode_ask(message: pb.PoolPolicy) -> PoolAsk:
    """Returns what a caller asks of its pool. Raises InvalidRequest for an unknown source or drift action."""
    fixed = message.WhichOneof("fixed")
    layers = tuple(tuple(sorted(layer.experts)) for layer in message.experts.layers)
    return PoolAsk(
        size=decode_size(message) if message.WhichOneof("size") else None,
        source=decode_source(message),
        fixed=ExpertPool(layers) if fixed == "experts" else None,
        digest=message.digest if fixed == "digest" else None,
        name=message.name if fixed == "name" else None,
        drift=decode_drift(message),
    )


def encode_named_pool(named: NamedPool) -> pb.NamedPool:
    return pb.NamedPool(
        name=named.name,
        pool=encode_pool(named.pool),
        method=named.method,
        num_examples=named.num_examples,
        num_tokens=named.num_tokens,
        model_fingerprint=named.fingerprint,
    )


def decode_named_pool(message: pb.NamedPool) -> NamedPool:
    return NamedPool(
        message.name,
        decode_pool(message.pool),
        message.method,
        message.num_examples,
        message.num_tokens,
        message.model_fingerprint,
    )


def decode_listing(message: pb.ListPoolsResponse) -> PoolListing:
    return PoolListing(tuple(map(decode_named_pool, message.pools)), tuple(message.damaged))


# --- requests, from a client to a router ----------------------------------------------------------------------------

Prompt = str | Sequence[int]
"""Text, or token ids."""


def encode_generate(
    prompt: Prompt, sampling: SamplingParams, pool: PoolAsk, *, request_id: str = "", unset: Collection[str] = ()
) -> pb.GenerateRequest:
    """Leaves the fields `unset` of sampling to the service. Raises InvalidRequest."""
    if unknown := sorted(set(unset) - set(CHOSEN_BY_SERVICE)):
        fields = ", ".join(CHOSEN_BY_SERVICE)
        raise InvalidRequest(f"{unknown[0]!r} cannot be left to the service; these fields can: {fields}", field="unset")
    with _refusing():
        message = pb.GenerateRequest(request_id=request_id, sampling=encode_sampling(sampling), pool=encode_ask(pool))
        for name in CHOSEN_BY_SERVICE:
            if name in unset:
                message.sampling.ClearField(name)
            else:
                setattr(message.sampling, name, getattr(sampling, name))
        return _with_prompt(message, prompt)


def encode_route(prompt: Prompt, pool: PoolAsk) -> pb.RouteRequest:
    """Raises InvalidRequest."""
    with _refusing():
        return _with_prompt(pb.RouteRequest(pool=encode_ask(pool)), prompt)


def encode_calibrate(
    name: str, examples: Iterable[Prompt], pool: PoolAsk, method: str | None, *, replaces: bool
) -> pb.CalibrateRequest:
    """Raises InvalidRequest."""
    with _refusing():
        return pb.CalibrateRequest(
            name=name,
            examples=[_with_prompt(pb.Example(), example) for example in examples],
            pool=encode_ask(pool),
            method=method or "",
            replace=replaces,
        )


Prompted = TypeVar("Prompted", pb.GenerateRequest, pb.RouteRequest, pb.Example)


def _with_prompt(message: Prompted, prompt: Prompt) -> Prompted:
    if isinstance(prompt, str):
        message.text = prompt.encode()
    else:
        message.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    return message


@contextmanager
def _refusing() -> Iterator[None]:
    """Raises InvalidRequest for values that no message can hold: a negative count, text that is not Unicode."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request has a value that its field cannot hold: {error}") from None


# --- requests, from a router to a worker ----------------------------------------------------------------------------


def encode_sampling(sampling: SamplingParams) -> pb.SamplingParams:
    """Sampling parameters, without those that have their default, but for `max_tokens`, which a service may choose."""
    given = {name: getattr(sampling, name) for name in _SAMPLING}
    changed = {name: value for name, value in given.items() if value != getattr(_DEFAULT_SAMPLING, name)}
    message = pb.SamplingParams(**changed, logit_bias=dict(sampling.logit_bias))
    message.max_tokens = sampling.max_tokens
    if sampling.grammar is not None:
        kind, text = sampling.grammar.kind, sampling.grammar.text
        setattr(message, kind.value, True if kind is GrammarKind.JSON_OBJECT else text)
    return message


def decode_sampling(message: pb.SamplingParams, defaults: SamplingParams = _DEFAULT_SAMPLING) -> SamplingParams:
    """Sampling parameters, with `defaults` for absent fields."""
    given: dict[str, Any] = {
        name: tuple(value) if name in _REPEATED else value
        for name in _SAMPLING
        if (value := optional(message, name)) is not None
    }
    bias = tuple(sorted(message.logit_bias.items()))
    return replace(defaults, **given, logit_bias=bias, grammar=_decode_grammar(message))


def _decode_grammar(message: pb.SamplingParams) -> Grammar | None:
    name = message.WhichOneof("grammar")
    if name is None:
        return None
    kind = GrammarKind(name)
    if kind is not GrammarKind.JSON_OBJECT:
        return Grammar(kind, getattr(message, name))
    if not message.json_object:
        raise InvalidRequest(
            "sampling.json_object = false: leave it out for an answer without a grammar", field="sampling.json_object"
        )
    return Grammar(kind)


def encode_request(request: GenerateRequest, ticket: int) -> worker_pb2.Submit:
    policy = pb.PoolPolicy(source=encode_source(request.pool.source))
    set_size(policy, request.pool.size)
    if request.pool.drift is not None:
        policy.drift.CopyFrom(encode_drift(request.pool.drift))
    return worker_pb2.Submit(
        ticket=ticket,
        request_id=request.id,
        tenant=request.tenant,
        prompt=pb.TokenIds(ids=request.prompt_token_ids),
        sampling=encode_sampling(request.sampling),
        pool=policy,
        fixed=None if request.pool.fixed is None else encode_pool(request.pool.fixed),
        remaining_s=None if request.deadline_s is None else request.deadline_s - time.monotonic(),
        predicted=None if request.predicted is None else encode_pool(request.predicted),
        traceparent=request.traceparent,
        tracestate=request.tracestate,
        priority=request.priority,
        weight=request.weight,
        watched=request.is_watched,
        guaranteed_share=request.guaranteed_share,
    )


def decode_request(message: worker_pb2.Submit) -> GenerateRequest:
    remaining_s = optional(message, "remaining_s")
    return GenerateRequest(
        id=message.request_id,
        tenant=message.tenant,
        prompt_token_ids=tuple(message.prompt.ids),
        sampling=decode_sampling(message.sampling),
        pool=PoolPolicy(
            size=decode_size(message.pool),
            source=decode_source(message.pool) or PoolSource.PREFILL,
            fixed=decode_pool(message.fixed) if message.HasField("fixed") else None,
            drift=decode_drift(message.pool),
        ),
        deadline_s=None if remaining_s is None else time.monotonic() + remaining_s,
        predicted=decode_pool(message.predicted) if message.HasField("predicted") else None,
        traceparent=message.traceparent or None,
        tracestate=message.tracestate or None,
        priority=message.priority,
        weight=message.weight or 1.0,
        is_watched=message.watched,
        guaranteed_share=message.guaranteed_share,
    )


# --- answers --------------------------------------------------------------------------------------------------------


def encode_response(chunk: TokenChunk) -> pb.GenerateResponse:
    usage = None if chunk.usage is None else encode_usage(chunk.usage)
    message = pb.GenerateResponse(
        request_id=chunk.request_id, text=chunk.text, token_ids=chunk.token_ids, usage=usage, index=chunk.index
    )
    _set_logprobs(message, chunk)
    return message


def decode_response(message: pb.GenerateResponse) -> TokenChunk:
    usage = decode_usage(message.usage) if message.HasField("usage") else None
    return TokenChunk(
        message.request_id, tuple(message.token_ids), message.text, usage, index=message.index, **_logprobs(message)
    )


def add_chunk(step: worker_pb2.Step, chunk: TokenChunk, ticket: int) -> None:
    """Adds a chunk on its way from a worker to a router, where the ticket stands for the request's id. A chunk that
    cannot be encoded raises, and is not added.

    Most chunks are a token and its text, and the engine waits while they are encoded: a message that is appended would
    be copied, and fields that are not set cost nothing.
    """
    message = step.chunks.add()
    try:
        message.ticket, message.text = ticket, chunk.text
        message.token_ids.extend(chunk.token_ids)
        if chunk.index:
            message.index = chunk.index
        if chunk.num_going_on:
            message.num_going_on = chunk.num_going_on
        if chunk.usage is not None:
            message.usage.CopyFrom(encode_usage(chunk.usage))
        if chunk.outside_mass is not None:
            message.outside_mass = chunk.outside_mass
        if chunk.logprobs or chunk.prompt_logprobs:
            _set_logprobs(message, chunk)
        for each in chunk.page_ins:
            from_host = each.source == "host"
            message.page_ins.add(layer=each.key.layer, expert=each.key.expert, from_host=from_host, at_s=each.at_s)
    except Exception:
        del step.chunks[-1]
        raise


def decode_chunk(message: worker_pb2.Chunk, request: GenerateRequest) -> TokenChunk:
    usage = decode_usage(message.usage) if message.HasField("usage") else None
    chunk = TokenChunk(
        request.id,
        tuple(message.token_ids),
        message.text,
        usage,
        request.tenant,
        index=message.index,
        num_going_on=message.num_going_on,
        **_logprobs(message),
    )
    if not message.page_ins and not message.HasField("outside_mass"):
        return chunk
    page_ins = (
        PageIn(ExpertKey(each.layer, each.expert), "host" if each.from_host else "disk", each.at_s)
        for each in message.page_ins
    )
    return replace(chunk, page_ins=tuple(page_ins), outside_mass=optional(message, "outside_mass"))


def _set_logprobs(message: pb.GenerateResponse | worker_pb2.Chunk, chunk: TokenChunk) -> None:
    """Costs next to nothing for a chunk without any."""
    for tokens, to in ((chunk.logprobs, message.logprobs), (chunk.prompt_logprobs, message.prompt_logprobs)):
        for token in tokens:
            to.add(
                token_id=token.token_id,
                logprob=token.logprob,
                top_ids=token.top_ids,
                top_logprobs=token.top_logprobs,
            )


def _logprobs(message: pb.GenerateResponse | worker_pb2.Chunk) -> dict[str, Any]:
    """The fields of a chunk that hold log-probabilities, where the message has any."""
    return {
        name: tuple(
            TokenLogprobs(token.token_id, token.logprob, tuple(token.top_ids), tuple(token.top_logprobs))
            for token in tokens
        )
        for name, tokens in (("logprobs", message.logprobs), ("prompt_logprobs", message.prompt_logprobs))
        if tokens
    }


def encode_account(account: Account) -> worker_pb2.Account:
    return worker_pb2.Account(
        prompt_tokens=account.prompt_tokens,
        completion_tokens=account.completion_tokens,
        queue_s=account.queue_s,
        cached_prompt_tokens=account.cached_prompt_tokens,
        **encode_paging(account.paging),
    )


def decode_account(message: worker_pb2.Account) -> Account:
    return Account(
        message.prompt_tokens,
        message.completion_tokens,
        decode_paging(message),
        optional(message, "queue_s"),
        message.cached_prompt_tokens,
    )


def encode_paging(counts: PagingCounts) -> dict[str, Any]:
    """The fields that carry paging counts: those of `Usage`, `Account` and `Load` have the same names."""
    return {field: getattr(counts, name) for name, field in _PAGING.items()}


def decode_paging(message: pb.Usage | worker_pb2.Account | worker_pb2.Load) -> PagingCounts:
    return PagingCounts(**{name: getattr(message, field) for name, field in _PAGING.items()})


def encode_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        mode=_MODES[usage.mode],
        finish_reason=_FINISH_REASONS[usage.finish_reason],
        pool=None if usage.pool is None else encode_pool(usage.pool),
        drift=None if usage.drift is None else _encode_report(usage.drift),
        **encode_paging(usage.paging),
        **{field: getattr(usage, name) for name, field in _USAGE.items()},
    )


def decode_usage(message: pb.Usage) -> Usage:
    """The usage of an answer. Raises InvalidRequest for a mode or finish reason that this version does not know."""
    return Usage(
        mode=_key(_MODES, message.mode, "usage.mode"),
        finish_reason=_key(_FINISH_REASONS, message.finish_reason, "usage.finish_reason"),
        pool=decode_pool(message.pool) if message.HasField("pool") else None,
        drift=_decode_report(message.drift) if message.HasField("drift") else None,
        paging=decode_paging(message),
        **{name: optional(message, field) for name, field in _USAGE.items()},
    )


def _encode_report(report: DriftReport) -> pb.DriftReport:
    return pb.DriftReport(
        peak_mass=report.peak_mass,
        widenings=report.widenings,
        experts_added=report.experts_added,
        exact_from=report.exact_from,
        experts_left_out=report.experts_left_out,
    )


def _decode_report(message: pb.DriftReport) -> DriftReport:
    return DriftReport(
        message.peak_mass,
        message.widenings,
        message.experts_added,
        optional(message, "exact_from"),
        message.experts_left_out,
    )


def encode_route_answer(answer: RouteAnswer) -> pb.RouteResponse:
    layers = [pb.LayerScores(mean=mean) for mean in answer.scores]
    placement = None
    if answer.worker is not None:
        placement = pb.Placement(worker=answer.worker, missing_bytes=answer.missing_bytes)
    return pb.RouteResponse(
        scores=pb.Scores(source=answer.source, num_tokens=answer.num_tokens, layers=layers),
        pool=None if answer.pool is None else encode_pool(answer.pool),
        observed=None if answer.observed is None else encode_pool(answer.observed),
        placement=placement,
        expected_recall=answer.expected_recall,
        codeword=answer.codeword,
        coverage=answer.coverage,
    )


def decode_route_answer(message: pb.RouteResponse) -> RouteAnswer:
    return RouteAnswer(
        source=message.scores.source,
        num_tokens=message.scores.num_tokens,
        scores=tuple(tuple(layer.mean) for layer in message.scores.layers),
        pool=decode_pool(message.pool) if message.HasField("pool") else None,
        observed=decode_pool(message.observed) if message.HasField("observed") else None,
        expected_recall=optional(message, "expected_recall"),
        worker=message.placement.worker if message.HasField("placement") else None,
        missing_bytes=message.placement.missing_bytes,
        codeword=message.codeword,
        coverage=optional(message, "coverage"),
    )


# --- the model and its workers --------------------------------------------------------------------------------------


def encode_model(model: ModelInfo) -> pb.GetModelResponse:
    facts = model.facts
    per_layer = zip(facts.routed_per_layer, facts.shared_per_layer, facts.top_k_per_layer, strict=True)
    return pb.GetModelResponse(
        name=model.name,
        fingerprint=model.fingerprint,
        context_length=model.context_length,
        kv_token_limit=model.kv_token_limit,
        vocab_size=model.vocab_size,
        tokenizer=pb.Tokenizer(class_name=model.tokenizer_class, sha256=model.tokenizer_sha256),
        pool_sizes=pb.PoolSizes(
            min_routed=max(facts.top_k_per_layer, default=0),
            max_routed=max(facts.routed_per_layer, default=0),
            slots=model.num_slots,
            layers=[pb.LayerFacts(routed=routed, shared=shared, top_k=top_k) for routed, shared, top_k in per_layer],
        ),
        plan=model.plan,
        codewords=model.codewords,
    )


def decode_model(message: pb.GetModelResponse) -> ModelInfo:
    """The model, but for the size of its experts, which the message does not have."""
    layers = message.pool_sizes.layers
    return ModelInfo(
        name=message.name,
        fingerprint=message.fingerprint,
        context_length=message.context_length,
        kv_token_limit=message.kv_token_limit,
        vocab_size=message.vocab_size,
        facts=RoutingFacts(
            experts_per_layer=tuple(layer.routed + layer.shared for layer in layers),
            shared_per_layer=tuple(layer.shared for layer in layers),
            top_k_per_layer=tuple(layer.top_k for layer in layers),
        ),
        tokenizer_class=message.tokenizer.class_name,
        tokenizer_sha256=message.tokenizer.sha256,
        plan=message.plan,
        num_slots=message.pool_sizes.slots,
        codewords=tuple(message.codewords),
    )


def encode_worker(worker: WorkerResidency, facts: RoutingFacts) -> pb.WorkerResidency:
    """A worker that has not loaded reports nothing of its layers; the message has an empty bitmap for each then."""
    return pb.WorkerResidency(
        worker=worker.id,
        state=worker.state,
        waiting=worker.waiting,
        running=worker.running,
        slots=worker.num_slots,
        expert_bytes=worker.expert_bytes,
        resident_experts=worker.num_resident,
        resident=worker.bitmaps(facts),
        remote=worker.is_remote,
    )


def decode_worker(message: pb.WorkerResidency) -> WorkerResidency:
    return WorkerResidency(
        id=message.worker,
        state=message.state,
        waiting=message.waiting,
        running=message.running,
        num_slots=message.slots,
        expert_bytes=message.expert_bytes,
        resident=tuple(map(decode_bitmap, message.resident)),
        is_remote=message.remote,
    )


def encode_load(load: Load) -> pb.Load:
    tenants = [
        pb.TenantLoad(tenant=each.tenant, requests=each.num_requests, tokens=each.num_tokens) for each in load.tenants
    ]
    return pb.Load(requests=load.num_requests, tokens=load.num_tokens, tenants=tenants)


def decode_service_status(message: pb.GetResidencyResponse) -> ServiceStatus:
    load = message.load
    tenants = tuple(TenantLoad(each.tenant, each.requests, each.tokens) for each in load.tenants)
    return ServiceStatus(decode_workers(message), Load(load.requests, load.tokens, tenants))


def decode_workers(message: pb.GetResidencyResponse) -> tuple[WorkerResidency, ...]:
    return tuple(map(decode_worker, message.workers))


# --- errors ---------------------------------------------------------------------------------------------------------

DOMAIN = "expert-pager"  # of google.rpc.ErrorInfo
_FACTS = ("needed", "slots")  # what PoolTooLarge carries beside its message


def error_facts(error: PagerError) -> dict[str, int]:
    """The numbers that an error carries beside its message."""
    facts = {name: getattr(error, name) for name in _FACTS if hasattr(error, name)}
    key = getattr(error, "key", None)
    if isinstance(key, ExpertKey):
        facts |= {"layer": key.layer, "expert": key.expert}
    return facts


def encode_error(error: PagerError) -> worker_pb2.Error:
    """An error on its way from a worker to a router."""
    return worker_pb2.Error(
        reason=error.reason,
        message=error.message,
        field=error.field,
        retry_after_s=error.retry_after_s,
        facts=error_facts(error),
    )


def decode_error(message: worker_pb2.Error) -> PagerError:
    """An error of the same class with the same facts; a plain PagerError (internal) for an unknown reason."""
    field, retry_after_s = optional(message, "field"), optional(message, "retry_after_s")
    return _error(message.reason, message.message, field, retry_after_s, message.facts)


def decode_status(message: Status) -> PagerError | None:
    """The error in the details that a router answers with; None for a status that is no router's."""
    info, retry, bad = ErrorInfo(), RetryInfo(), BadRequest()
    for packed in message.details:
        for detail in (info, retry, bad):
            packed.Unpack(detail)  # leaves it alone where it is of another type
    if info.domain != DOMAIN:
        return None
    names = (*_FACTS, "layer", "expert")
    facts = {name: int(value) for name, value in info.metadata.items() if name in names and value.isdecimal()}
    delay_ms = retry.retry_delay.ToMilliseconds()
    field = bad.field_violations[0].field if bad.field_violations else None
    return _error(info.reason, message.message, field, delay_ms / 1000 if delay_ms else None, facts)


def _error(
    reason: str, message: str, field: str | None, retry_after_s: float | None, facts: Mapping[str, int]
) -> PagerError:
    kind = _error_kinds().get(reason, PagerError)
    error = kind.__new__(kind)
    PagerError.__init__(error, message, field=field, retry_after_s=retry_after_s)
    facts = dict(facts)
    if "expert" in facts:
        error.__dict__["key"] = ExpertKey(facts.pop("layer"), facts.pop("expert"))
    error.__dict__.update(facts)
    return error


def _error_kinds() -> dict[str, type[PagerError]]:
    return {kind.reason: kind for kind in _subclasses(PagerError) if "reason" in kind.__dict__}


def _subclasses(kind: type[PagerError]) -> Iterator[type[PagerError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


# --- bitmaps of loaded experts --------------------------------------------------------------------------------------


def encode_bitmap(experts: Sequence[int]) -> bytes:
    """Little-endian bitmap in which bit e % 8 of byte e / 8 is set for each expert e."""
    bitmap = sum(1 << expert for expert in set(experts))
    return bitmap.to_bytes((bitmap.bit_length() + 7) // 8, "little")


def decode_bitmap(data: bytes) -> int:
    return int.from_bytes(data, "little")


# --- helpers --------------------------------------------------------------------------------------------------------


def optional(message: Any, field: str) -> Any:
    """A field's value; None where the field has presence and is absent."""
    descriptor = message.DESCRIPTOR.fields_by_name[field]
    if descriptor.has_presence and not message.HasField(field):
        return None
    return getattr(message, field)


def _key(table: Mapping[Key, Any], number: int, field: str) -> Key:
    for key, known in table.items():
        if known == number:
            return key
    raise InvalidRequest(f"{field} {number} is unknown to this version; update the client", field=field)
