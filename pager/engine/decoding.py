"""The model's calls for requests: a part of one prompt, or one token for each of a group, by a single forward."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from pager.engine.interface import failure_of
from pager.engine.paged_model import PagedModel
from pager.engine.request import Request
from pager.engine.runner import DecodeBatch, GroupGraph, ModelRunner, Recorder, Step, capture_on
from pager.engine.sampler import NOT_FINITE, NOTHING_ALLOWED, Sampler
from pager.errors import ENDS_THE_PROCESS, Cancelled, InvalidRequest, NotReady, PagerError, SlotsExhausted
from pager.pools.step import RequestRouting, StepRouting
from pager.types import TokenLogprobs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Token:
    """A request's next token; with its log-probability where the request wants that."""

    id: int
    logprobs: TokenLogprobs | None = None


Outcome = Token | PagerError
"""A request's next token, or the error that ends the request."""


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """The device state of requests that decode together; kept from step to step while the group stays the same."""

    requests: tuple[Request, ...]
    step: StepRouting
    batch: DecodeBatch
    sampler: Sampler
    graph: GroupGraph = field(default_factory=GroupGraph)


class Decoder:
    """Owns the groups and the runner. Every failure is attributed to the requests that it belongs to."""

    def __init__(self, paged: PagedModel, runner: ModelRunner) -> None:
        self._paged = paged
        self._runner = runner
        self._groups: dict[str, _Group] = {}
        self._recorder = Recorder(capture_on(runner.device) if not runner.keeps_states else None)
        self.num_decode_forwards = 0
        self.forward_s = 0.0

    @property
    def num_layers_run(self) -> int:
        """Returns the layers that all forwards have run, the present one included; for any thread."""
        return self._runner.num_layers_run

    @property
    def shares_prefills(self) -> bool:
        """Tells whether prompts may run in one forward."""
        return self._runner.shares_prefills

    @property
    def shares_steps(self) -> bool:
        """Tells whether prompts may run in the forward of rows: not where their steps are recorded."""
        return self._runner.shares_prefills and not self._recorder.is_on

    def prefill(self, parts: Sequence[tuple[Request, int]]) -> Sequence[Sequence[Outcome]]:
        """Runs the next tokens of each prompt, as many as its part says, by one forward. Returns the first
        token of each of its answers after the last part of a prompt, else nothing.

        An exception within the forward, as for requests that were cancelled, leaves it. Then each prompt runs by
        itself, and an exception there is its outcome.
        """
        try:
            return self._run_prompts(parts)[0]
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            if len(parts) == 1:
                return [[_told(error, parts[0][0])]]
            if not isinstance(error, Cancelled | NotReady):
                log.warning("a prefill of %d requests failed (%s); each runs alone", len(parts), type(error).__name__)
        return [outcomes for part in parts for outcomes in self.prefill([part])]

    def prefill_and_decode(
        self, parts: Sequence[tuple[Request, int]], name: str, requests: Iterable[Request]
    ) -> tuple[Sequence[Sequence[Outcome]], Sequence[Outcome]]:
        """Does what `prefill` and `decode` do, by one forward. Where that fails, by one for each."""
        requests = tuple(requests)
        try:
            return self._run_prompts(parts, self._group(name, requests))
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            self._groups.pop(name, None)
            # Cancelled requests end a forward, and so do those whose experts the page cache has lost.
            if not isinstance(error, Cancelled | NotReady | SlotsExhausted):
                log.warning(
                    "a step for %d requests and the prompts of %d others failed (%s); they run apart",
                    len(requests), len(parts), type(error).__name__,
                )  # fmt: skip
        decoded = self.decode(name, requests)
        return self.prefill(parts), decoded

    def _run_prompts(
        self, parts: Sequence[tuple[Request, int]], beside: _Group | None = None
    ) -> tuple[Sequence[Sequence[Outcome]], Sequence[Outcome]]:
        """Returns what `prefill` returns, and the next tokens of the group `beside`, whose rows are in the forward."""
        requests = [request for request, _ in parts]
        part_of_T = torch.arange(len(parts)).repeat_interleave(torch.tensor([count for _, count in parts]))
        keeps_hidden = any(request.asked.sampling.prompt_logprobs is not None for request in requests)
        with (
            self._timed(),
            self._paged.step(
                [_routing(request) for request in requests],
                rows=part_of_T.to(self._runner.device) if len(parts) > 1 else None,
                prefill=True,
                beside=None if beside is None else beside.step,
            ),
            self._runner.keeping_hidden() if keeps_hidden else nullcontext() as kept,
        ):
            prompts = [request.prompt_part(count) for request, count in parts]
            logits_NV = self._runner.prefill(prompts, None if beside is None else beside.batch)
            if kept is not None:
                self._take_prompt_logprobs(parts, kept, logits_NV)
        decoded = [] if beside is None else self._advance(beside, logits_NV[len(parts) :])
        for request, count in parts:
            request.num_prefilled += count
        return self._first_tokens(requests, logits_NV), decoded

    def _first_tokens(self, requests: Sequence[Request], logits_NV: torch.Tensor) -> list[list[Outcome]]:
        """Returns the first token of each answer of those whose prompts have run; nothing for the others."""
        forked = [_forked(request) if request.is_prefilled else () for request in requests]
        rows = [(n, row) for n, found in enumerate(forked) if not isinstance(found, PagerError) for row in found]
        tokens = self._sample([row for _, row in rows], logits_NV[[n for n, _ in rows]])
        found: list[list[Outcome]] = [[each] if isinstance(each, PagerError) else [] for each in forked]
        for (n, _), token in zip(rows, tokens, strict=True):
            found[n].append(token)
        return found

    def _sample(self, requests: Sequence[Request], logits_NV: torch.Tensor) -> list[Outcome]:
        """Samples the first tokens of answers. Where that fails for one, each is sampled by itself."""
        if not requests:
            return []
        try:
            for request in requests:
                request.draw.rewind(len(request.output_ids))
            sampler = Sampler([request.draw for request in requests], self._runner.device)
            return _outcomes(sampler, sampler.sample(logits_NV).tolist(), logits_NV)
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            if len(requests) == 1:
                return [_told(error, requests[0])]
        return [self._sample([request], logits_NV[n : n + 1])[0] for n, request in enumerate(requests)]

    def _take_prompt_logprobs(
        self, parts: Sequence[tuple[Request, int]], kept: list[torch.Tensor], logits_NV: torch.Tensor
    ) -> None:
        assert len(parts) == 1, "the logits of every token need the memory of a forward"
        ((request, count),) = parts
        start, num_top = request.num_prefilled, request.asked.sampling.prompt_logprobs
        assert num_top is not None
        next_ids = request.asked.prompt_token_ids[start + 1 : start + count + 1]
        request.prompt_logprobs += self._runner.prompt_logprobs(kept, logits_NV, next_ids, num_top)

    def decode(self, name: str, requests: Iterable[Request]) -> list[Outcome]:
        """Decodes the next token of each request by one forward. `name` identifies the group of the last step that
        continues.

        Where the forward fails for an expert or anything else that one request needs, each request runs by itself, so
        that only those fail that cannot run.
        """
        requests = tuple(requests)
        try:
            return self._run(self._group(name, requests))
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            self._groups.pop(name, None)
            if len(requests) == 1:
                return [_told(error, requests[0])]
            if isinstance(error, SlotsExhausted) and any(request.is_in_place for request in requests):
                return self._decode_leased(name, requests, error)
            if not isinstance(error, Cancelled | NotReady):  # this is how a step ends whose requests were all cancelled
                log.warning(
                    "a step for %d requests failed (%s); each runs by itself", len(requests), type(error).__name__
                )
        return [self._decode_alone(request) for request in requests]

    def _decode_leased(self, name: str, requests: Sequence[Request], error: SlotsExhausted) -> list[Outcome]:
        """Decodes for those of `requests` that have slots; `error` is the outcome of the others."""
        leased = [request for request in requests if not request.is_in_place]
        outcomes = iter(self.decode(name, leased) if leased else ())
        return [error if request.is_in_place else next(outcomes) for request in requests]

    def _decode_alone(self, request: Request) -> Outcome:
        try:
            return self._run(self._new_group((request,)))[0]
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            return _told(error, request)

    def _run(self, group: _Group) -> list[Outcome]:
        batch, sampler, step = group.batch, group.sampler, group.step
        with self._paged.running(step):
            with self._timed():
                padded = replay = None
                if self._recorder.is_on and step.is_steady and sampler.is_recordable:
                    padded = self._runner.padded_context(batch)
                    replay = self._replay(group, padded)
                if replay is None:
                    logits_BV = self._runner.decode(batch, padded)
                else:
                    sampler.draw()
                    token_B = replay()
                    step.replayed()
                    batch.count_step()
            if replay is None:
                return self._advance(group, logits_BV)
        self.num_decode_forwards += 1
        return _outcomes(sampler, token_B.tolist(), None)

    def _advance(self, group: _Group, logits_BV: torch.Tensor) -> list[Outcome]:
        """Samples the group's next tokens, which are its next step's input."""
        token_B = group.sampler.sample(logits_BV)
        group.batch.advance(token_B)
        self.num_decode_forwards += 1
        return _outcomes(group.sampler, token_B.tolist(), logits_BV)

    def _replay(self, group: _Group, padded_context: int) -> Step | None:
        """Returns the step as a graph, where the group has one by now."""

        def record() -> Step | None:
            with step.recording():
                return self._recorder.record(partial(device_step, self._runner, batch, sampler, padded_context))

        batch, sampler, step = group.batch, group.sampler, group.step
        return group.graph.replay(padded_context, record=record)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Adds a forward's time to `forward_s`; the time of forwards within it is counted once."""
        before_s, started_s = self.forward_s, time.perf_counter()
        try:
            yield
        finally:
            self.forward_s = before_s + time.perf_counter() - started_s

    def keep_groups(self, names: Collection[str]) -> None:
        """Drops the groups of other names, which hold prompts and tensors of requests that may have ended."""
        if not self._groups.keys() <= set(names):
            self._groups = {name: group for name, group in self._groups.items() if name in names}

    def _group(self, name: str, requests: tuple[Request, ...]) -> _Group:
        group = self._groups.get(name)
        if group is None or group.requests != requests:
            group = self._new_group(requests)
            # A request whose pool was suspended for a while returns to a group that was paused meanwhile.
            self._groups = {
                other: kept for other, kept in self._groups.items() if set(requests).isdisjoint(kept.requests)
            }
            self._groups[name] = group
        return group

    def _new_group(self, requests: tuple[Request, ...]) -> _Group:
        step = StepRouting([_routing(request) for request in requests])
        for request in requests:
            request.draw.rewind(len(request.output_ids))
            request.join(step)
        return _Group(
            requests=requests,
            step=step,
            batch=DecodeBatch([request.row_start() for request in requests], self._runner.device),
            sampler=Sampler([request.draw for request in requests], self._runner.device),
        )


@torch.inference_mode()
def device_step(runner: ModelRunner, batch: DecodeBatch, sampler: Sampler, padded_context: int) -> torch.Tensor:
    """Returns [B] next tokens, which are the next step's input. This is the whole step except what the host draws and
    counts.
    """
    token_B = sampler.pick(runner.decode(batch, padded_context))
    batch.feed(token_B)
    return token_B


def _outcomes(sampler: Sampler, token_ids: list[int], logits_BV: torch.Tensor | None) -> list[Outcome]:
    """Makes outcomes of sampled ids. `logits_BV` is None for a step whose sampler reports nothing."""
    logprobs = {} if logits_BV is None else sampler.logprobs(logits_BV, token_ids)
    return [
        Token(token_id, logprobs.get(row)) if token_id >= 0 else _no_token(token_id)
        for row, token_id in enumerate(token_ids)
    ]


def _no_token(why: int) -> PagerError:
    if why == NOT_FINITE:
        return PagerError("the model produced a logit that is not a finite number; the checkpoint may be damaged")
    assert why == NOTHING_ALLOWED
    return InvalidRequest(
        "no token is allowed next: what the grammar allows is forbidden by min_tokens, or missing in the vocabulary; "
        "change one of them",
        field="sampling",
    )


def _routing(request: Request) -> RequestRouting:
    assert request.routing is not None, "the request was not admitted"
    return request.routing


def _forked(request: Request) -> Sequence[Request] | PagerError:
    """Returns the rows of the request's answers, or the error that keeps it from having them."""
    try:
        return request.fork()
    except ENDS_THE_PROCESS:
        raise
    except BaseException as error:
        return _told(error, request)


def _told(error: BaseException, request: Request) -> PagerError:
    """Returns `error`, which ended the request's forward, in the form that its client may see."""
    kind = "ran out of device memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
    return failure_of(error, request.asked.id, f"the model's forward {kind}")
