"""What a worker and a router tell each other survives the wire, field by field."""

import dataclasses
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from expert_pager.v1 import expert_pager_pb2 as public
from expert_pager.v1 import worker_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from pager import wire
from pager.errors import (
    ChecksumMismatch,
    InvalidRequest,
    PagerError,
    PoolTooLarge,
    TenantOverloaded,
    WorkerLost,
)
from pager.types import (
    Account,
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
    Mass,
    PageIn,
    PagingCounts,
    PoolAsk,
    PoolPolicy,
    PoolSource,
    SamplingParams,
    Share,
    TokenChunk,
    TokenLogprobs,
    Usage,
)

layers = st.sets(st.integers(0, 300), max_size=5).map(lambda ids: tuple(sorted(ids)))
pools = st.builds(
    ExpertPool,
    experts=st.lists(layers, max_size=4).map(tuple),
    covered_mass=st.none() | st.floats(0, 1),
)
sizes = (
    st.just(Full())
    | st.builds(Count, st.integers(1, 512))
    | st.builds(Share, st.floats(0.01, 1))
    | st.builds(Mass, st.floats(0.01, 1), st.none() | st.integers(0, 64))
    | st.builds(Counts, st.lists(st.integers(0, 512), max_size=6).map(tuple))
)
finite = st.floats(0, 1e12)
counts = st.integers(0, 2**31 - 1)
drifts = st.builds(DriftPolicy, finite, st.sampled_from(DriftAction), counts)
reports = st.builds(DriftReport, finite, counts, counts, st.none() | counts, counts)
requests = st.builds(
    GenerateRequest,
    id=st.text(max_size=8),
    tenant=st.text(max_size=8),
    prompt_token_ids=st.lists(st.integers(0, 2**31), max_size=6).map(tuple),
    sampling=st.builds(
        SamplingParams,
        max_tokens=counts,
        temperature=finite,
        top_p=finite,
        top_k=counts,
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        stop=st.lists(st.text(max_size=4), max_size=3).map(tuple),
        ignore_eos=st.booleans(),
        min_p=finite,
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        repetition_penalty=finite,
        logit_bias=st.dictionaries(counts, st.floats(-100, 100), max_size=3).map(lambda d: tuple(sorted(d.items()))),
        min_tokens=counts,
        stop_token_ids=st.lists(counts, max_size=3).map(tuple),
        logprobs=st.none() | counts,
        prompt_logprobs=st.none() | counts,
        grammar=st.none()
        | st.just(Grammar(GrammarKind.JSON_OBJECT))
        | st.builds(Grammar, st.sampled_from(sorted({*GrammarKind} - {GrammarKind.JSON_OBJECT})), st.text(max_size=4)),
    ),
    pool=st.builds(
        PoolPolicy, size=sizes, source=st.sampled_from(PoolSource), fixed=st.none() | pools, drift=st.none() | drifts
    ),
    predicted=st.none() | pools,
    traceparent=st.none() | st.text(min_size=1, max_size=8),
    tracestate=st.none() | st.text(min_size=1, max_size=8),
    priority=st.integers(-100, 100),
    weight=st.floats(0.01, 100.0),
    guaranteed_share=st.floats(0.0, 0.9),
    is_watched=st.booleans(),
)
paging_counts = st.builds(PagingCounts, counts, counts, counts, counts, finite)
usages = st.builds(
    Usage,
    mode=st.sampled_from(["exact", "pool", "degraded"]),
    finish_reason=st.sampled_from(FinishReason),
    prompt_tokens=counts,
    completion_tokens=counts,
    pool=st.none() | pools,
    paging=paging_counts,
    out_of_pool_mass=finite,
    predicted_recall=st.none() | finite,
    queue_s=finite,
    time_to_first_token_s=finite,
    model_fingerprint=st.text(max_size=8),
    drift=st.none() | reports,
)
single = st.floats(-100, 0, width=32)
logprobs = st.lists(
    st.builds(
        TokenLogprobs,
        counts,
        single,
        st.lists(counts, max_size=3).map(tuple),
        st.lists(single, max_size=3).map(tuple),
    ),
    max_size=3,
).map(tuple)
chunks = st.builds(
    TokenChunk,
    st.text(),
    st.lists(counts).map(tuple),
    st.text(),
    st.none() | usages,
    logprobs=logprobs,
    prompt_logprobs=logprobs,
)


@given(requests)
def test_a_request_survives(request: GenerateRequest) -> None:
    data = wire.encode_request(request, 7).SerializeToString()
    assert wire.decode_request(pb.Submit.FromString(data)) == request


@pytest.mark.parametrize("ahead_s", [-3e6, 0.0, 3e6])
def test_what_is_left_of_a_deadline_survives_on_another_clock(monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    clock_s = time.monotonic()
    monkeypatch.setattr(time, "time", lambda: pytest.fail("that clock may be set"))
    monkeypatch.setattr(time, "monotonic", lambda: clock_s)
    sampling = SamplingParams(max_tokens=1)
    request = GenerateRequest("a", "t", (1,), sampling, PoolPolicy(), deadline_s=clock_s + 5)
    data = wire.encode_request(request, 7).SerializeToString()
    clock_s += ahead_s  # of the machine that it comes to
    found = wire.decode_request(pb.Submit.FromString(data))
    assert found.deadline_s == pytest.approx(clock_s + 5)


page_ins = st.builds(PageIn, st.builds(ExpertKey, counts, counts), st.sampled_from(["disk", "host"]), finite)


@given(chunks, requests, st.lists(page_ins, max_size=3).map(tuple), st.none() | finite)
def test_a_chunk_survives(
    chunk: TokenChunk, request: GenerateRequest, page_ins: tuple[PageIn, ...], outside_mass: float | None
) -> None:
    chunk = replace(chunk, request_id=request.id, tenant=request.tenant, page_ins=page_ins, outside_mass=outside_mass)
    step = pb.Step()
    wire.add_chunk(step, chunk, 7)
    (received,) = pb.Step.FromString(step.SerializeToString()).chunks
    assert received.ticket == 7
    assert wire.decode_chunk(received, request) == chunk


@pytest.mark.parametrize("text", ["half \ud800", "whole"])
def test_a_chunk_that_cannot_be_encoded_is_not_added(text: str) -> None:
    """Half of a pair is no text that protobuf takes, and a negative number no id."""
    step = pb.Step()
    wire.add_chunk(step, TokenChunk("a", (1,), "first"), 1)
    with pytest.raises(ValueError, match=r"surrogates|range"):
        wire.add_chunk(step, TokenChunk("b", (-1,), text), 2)
    assert [chunk.ticket for chunk in step.chunks] == [1]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("top_p must lie in (0, 1], not 7", field="top_p"),
        PoolTooLarge(needed=96, slots=64),
        ChecksumMismatch("expert 3 of layer 1 is corrupt", ExpertKey(1, 3)),
        WorkerLost("gone", retry_after_s=0.5),
        TenantOverloaded("too many", retry_after_s=2.0),
        PagerError("internal"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_class_and_facts(error: PagerError) -> None:
    data = wire.encode_error(error).SerializeToString()
    found = wire.decode_error(pb.Error.FromString(data))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert found.__dict__ == error.__dict__


def test_every_reason_names_one_class() -> None:
    """A class without a reason of its own travels as its base."""
    kinds = [kind for kind in wire._subclasses(PagerError) if "reason" in kind.__dict__]
    assert len({kind.reason for kind in kinds}) == len(kinds)
    assert {*wire._error_kinds().values()} == {*kinds}


@given(st.sets(st.integers(0, 200)))
def test_a_bitmap_holds_exactly_its_experts(experts: set[int]) -> None:
    bitmap = wire.decode_bitmap(wire.encode_bitmap(sorted(experts)))
    assert {e for e in range(256) if bitmap >> e & 1} == experts


@given(chunks)
def test_a_client_reads_what_a_router_sends(chunk: TokenChunk) -> None:
    data = wire.encode_response(chunk).SerializeToString()
    assert wire.decode_response(public.GenerateResponse.FromString(data)) == chunk


def test_no_field_of_sampling_parameters_is_left_out() -> None:
    grammars = {field.name for field in public.SamplingParams.DESCRIPTOR.oneofs_by_name["grammar"].fields}
    assert grammars == set(GrammarKind)
    fields = {*public.SamplingParams.DESCRIPTOR.fields_by_name} - grammars
    assert fields == {field.name for field in dataclasses.fields(SamplingParams)} - {"grammar"}


def test_what_a_caller_said_is_told_from_what_it_left_to_the_service() -> None:
    own = SamplingParams(temperature=0.7, top_k=20, repetition_penalty=1.1)
    said = wire.encode_generate("a", SamplingParams(max_tokens=3, temperature=0.0, top_k=0), PoolAsk())
    found = wire.decode_sampling(said.sampling, own)
    assert (found.max_tokens, found.temperature, found.top_k, found.repetition_penalty) == (3, 0.0, 0, 1.0)
    left = wire.encode_generate("a", SamplingParams(top_k=5), PoolAsk(), unset={"max_tokens", "temperature"})
    found = wire.decode_sampling(left.sampling, own)
    assert (found.temperature, found.top_k, found.repetition_penalty) == (0.7, 5, 1.0)
    assert not left.sampling.HasField("max_tokens")


def test_sampling_parameters_that_are_not_used_cost_no_byte() -> None:
    assert wire.encode_sampling(SamplingParams(max_tokens=1)).ByteSize() == 2


@given(st.builds(Account, counts, counts, paging_counts, st.none() | finite))
def test_an_account_survives(account: Account) -> None:
    data = wire.encode_account(account).SerializeToString()
    assert wire.decode_account(pb.Account.FromString(data)) == account


def test_no_field_of_a_usage_is_left_out() -> None:
    translated_apart = {"mode", "finish_reason", "pool", "drift"}
    names = {field.name for field in dataclasses.fields(Usage)}
    assert names == {*wire._USAGE, *translated_apart, "paging"}
    paged = {*wire._PAGING.values()}
    assert {*public.Usage.DESCRIPTOR.fields_by_name} == {*wire._USAGE.values(), *paged, *translated_apart}


def test_every_message_with_paging_counts_carries_all_of_them() -> None:
    assert {*wire._PAGING} == {field.name for field in dataclasses.fields(PagingCounts)}
    for message in (public.Usage, pb.Account, pb.Load):
        assert {*wire._PAGING.values()} <= {*message.DESCRIPTOR.fields_by_name}, message.DESCRIPTOR.name


whole = st.integers(0, 2**60)


@given(st.builds(PagingCounts, whole, whole, whole, whole, st.integers(0, 1000).map(float)), st.integers(1, 9))
def test_parts_of_paging_counts_add_up_to_them(paging: PagingCounts, num_parts: int) -> None:
    parts = paging.split(num_parts)
    total = sum(parts, PagingCounts())
    assert len(parts) == num_parts
    assert total == replace(paging, stall_s=total.stall_s)
    assert total.stall_s == pytest.approx(paging.stall_s)
    for each in parts[1:]:
        assert each == parts[1]
        assert parts[0].experts_hit - each.experts_hit in range(num_parts)
    assert total - parts[0] + parts[0] == replace(total, stall_s=(total - parts[0] + parts[0]).stall_s)


def test_the_documented_field_of_a_usage_is_the_next_one() -> None:
    """The diff in docs/contributing.md shows how a field is added: to the message, the value and the table."""
    text = (Path(__file__).parents[1] / "docs" / "contributing.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"## A new field of `Usage`.*?```diff\n(.*?)```", text, re.DOTALL)
    (field,) = re.findall(r"@@ message Usage\n\+  uint32 (\w+) = (\d+);", diff)
    known = public.Usage.DESCRIPTOR.fields_by_number
    assert field[0] not in public.Usage.DESCRIPTOR.fields_by_name
    assert int(field[1]) == max(known) + 1
    assert f"@@ class Usage\n+    {field[0]}: int = 0" in diff
    assert f'@@ _USAGE\n+    "{field[0]}": "{field[0]}",' in diff
