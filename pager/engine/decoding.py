"""The model's calls for sequences: a part of one prompt, or one token for each of a group, by a single forward."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from pager.cache.ledger import Meanwhile
from pager.engine.interface import failure_of
from pager.engine.paged_model import PagedModel
from pager.engine.request import Request
from pager.engine.runner import Check, DecodeBatch, GroupGraph, ModelRunner, Recorder, Step, capture_on
from pager.engine.sampler import NOT_FINITE, NOTHING_ALLOWED, Sampler
from pager.errors import ENDS_THE_PROCESS, Cancelled, InvalidRequest, NotReady, PagerError
from pager.pools.document import DocumentRouting, StepRouting
from pager.types import TokenLogprobs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Token:
    """A sequence's next token; with its log-probability where the sequence wants that."""

    id: int
    logprobs: TokenLogprobs | None = None


Outcome = Token | PagerError
"""A sequence's next token, or why it can have none."""


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Device state of sequences that decode together; kept from step to step while they stay the same."""

    sequences: tuple[Request, ...]
    documents: tuple[DocumentRouting, ...]
    batch: DecodeBatch
    sampler: Sampler
    graph: GroupGraph = field(default_factory=GroupGraph)


class Decoder:
    """Owns the groups and the runner. Every failure is given to the sequences it belongs to."""

    def __init__(self, paged: PagedModel, runner: ModelRunner) -> None:
        self._paged = paged
        self._runner = runner
        self._groups: dict[str, _Group] = {}
        self._recorder = Recorder(capture_on(runner.device))
        self.num_decode_forwards = 0
        self.forward_s = 0.0

    @property
    def num_layers_run(self) -> int:
        """Of all forwards, the present one included; for any thread."""
        return self._runner.num_layers_run

    def prefill(
        self, sequence: Request, num_tokens: int, *, meanwhile: Meanwhile | None = None, check: Check | None = None
    ) -> Outcome | None:
        """Runs the next `num_tokens` of the prompt. The first token of the answer after the last of them, else None.

        `meanwhile` is called where it waits for reads, and may decode others; `check` between two layers. Where either
        raises, the forward is left and the error is the outcome.
        """
        start, prompt = sequence.num_prefilled, sequence.request.prompt_token_ids
        token_ids = prompt[start : start + num_tokens]
        end, num_top = start + len(token_ids), sequence.request.sampling.prompt_logprobs
        try:
            with (
                self._timed(),
                self._paged.step([_document(sequence)], prefill=True, meanwhile=meanwhile),
                self._runner.keeping_hidden() if num_top is not None else nullcontext() as kept,
            ):
                logits_1V = self._runner.prefill(
                    token_ids, sequence.blocks, start, prompt_tokens=len(prompt), check=check
                )
                if kept is not None and num_top is not None:
                    found = self._runner.prompt_logprobs(kept, logits_1V, prompt[start + 1 : end + 1], num_top)
                    sequence.prompt_logprobs += found
            sequence.num_prefilled = end
            if end < len(prompt):
                return None
            sampler = Sampler([sequence.draw], self._runner.device)
            return _outcomes(sampler, sampler.sample(logits_1V).tolist(), logits_1V)[0]
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            return _told(error, sequence)

    def decode(
        self,
        name: str,
        sequences: Iterable[Request],
        *,
        meanwhile: Meanwhile | None = None,
        check: Check | None = None,
    ) -> list[Outcome]:
        """The next token of each, by one forward. `name` says which group of the last step this continues.

        `meanwhile` and `check` are called as in `prefill`.
        Where it fails, be it for an expert or whatever else one of them needs, each sequence runs by itself, so that
        only those fail that cannot run.
        """
        sequences = tuple(sequences)
        try:
            return self._run(self._group(name, sequences), meanwhile, check)
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            self._groups.pop(name, None)
            if len(sequences) == 1:
                return [_told(error, sequences[0])]
            if not isinstance(error, Cancelled | NotReady):  # a step that nobody waits for ends so
                log.warning(
                    "a step for %d requests failed (%s); each runs by itself", len(sequences), type(error).__name__
                )
        return [self._decode_alone(sequence, meanwhile, check) for sequence in sequences]

    def _decode_alone(self, sequence: Request, meanwhile: Meanwhile | None, check: Check | None) -> Outcome:
        try:
            return self._run(self._new_group((sequence,)), meanwhile, check)[0]
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            return _told(error, sequence)

    def _run(self, group: _Group, meanwhile: Meanwhile | None, check: Check | None) -> list[Outcome]:
        batch, sampler = group.batch, group.sampler
        logits_BV: torch.Tensor | None = None
        with self._paged.step(group.documents, meanwhile=meanwhile) as routing:
            with self._timed():
                padded = replay = None
                if self._recorder.is_on and meanwhile is None and routing.is_steady and sampler.is_recordable:
                    padded = self._runner.padded_context(batch)
                    replay = self._replay(group, routing, padded)
                if replay is None:
                    logits_BV = self._runner.decode(batch, padded, check=check)
                else:
                    sampler.draw()
                    token_B = replay()
                    routing.replayed()
                    batch.count_step()
            if logits_BV is not None:
                token_B = sampler.sample(logits_BV)
                batch.advance(token_B)
        self.num_decode_forwards += 1
        return _outcomes(sampler, token_B.tolist(), logits_BV)

    def _replay(self, group: _Group, routing: StepRouting, padded_context: int) -> Step | None:
        """The step as a graph, where the group has one by now."""

        def record() -> Step | None:
            with routing.recording():
                return self._recorder.record(partial(device_step, self._runner, batch, sampler, padded_context))

        batch, sampler = group.batch, group.sampler
        return group.graph.replay(routing, padded_context, record=record)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Adds a forward's time to `forward_s`, with that of forwards within it once."""
        before_s, started_s = self.forward_s, time.perf_counter()
        try:
            yield
        finally:
            self.forward_s = before_s + time.perf_counter() - started_s

    def _group(self, name: str, sequences: tuple[Request, ...]) -> _Group:
        group = self._groups.get(name)
        if group is None or group.sequences != sequences:
            group = self._new_group(sequences)
            # A sequence whose pool is suspended for a while comes back to a group that stood still meanwhile.
            self._groups = {
                other: kept for other, kept in self._groups.items() if set(sequences).isdisjoint(kept.sequences)
            }
            self._groups[name] = group
        return group

    def _new_group(self, sequences: tuple[Request, ...]) -> _Group:
        for sequence in sequences:
            sequence.draw.rewind(len(sequence.output_ids))
        return _Group(
            sequences=sequences,
            documents=tuple(map(_document, sequences)),
            batch=DecodeBatch([sequence.row_start() for sequence in sequences], self._runner.device),
            sampler=Sampler([sequence.draw for sequence in sequences], self._runner.device),
        )


@torch.inference_mode()
def device_step(runner: ModelRunner, batch: DecodeBatch, sampler: Sampler, padded_context: int) -> torch.Tensor:
    """[B] next tokens, which are the next step's input: all of a step but what the host has to draw and to count."""
    token_B = sampler.pick(runner.decode(batch, padded_context))
    batch.feed(token_B)
    return token_B


def _outcomes(sampler: Sampler, token_ids: list[int], logits_BV: torch.Tensor | None) -> list[Outcome]:
    """`logits_BV` None: of a step whose sampler reports nothing."""
    logprobs = {} if logits_BV is None else sampler.logprobs(logits_BV, token_ids)
    return [
        Token(token_id, logprobs.get(row)) if token_id >= 0 else _no_token(token_id)
        for row, token_id in enumerate(token_ids)
    ]


def _no_token(why: int) -> PagerError:
    if why == NOT_FINITE:
        return PagerError("the model gave a logit that is not a finite number; the checkpoint may be damaged")
    assert why == NOTHING_ALLOWED
    return InvalidRequest(
        "no token may come next: what the grammar allows, min_tokens forbids, or the vocabulary does not have; change "
        "one of them",
        field="sampling",
    )


def _document(sequence: Request) -> DocumentRouting:
    assert sequence.document is not None, "the sequence was not admitted"
    return sequence.document


def _told(error: BaseException, sequence: Request) -> PagerError:
    """`error`, which the sequence's forward ended with, as its client is told of it."""
    kind = "ran out of device memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
    return failure_of(error, sequence.request.id, f"the model's forward {kind}")
