"""One request at its worker, from its arrival to its end, and the spans of its trace."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from pager.cache.lease import Lease
from pager.cache.shares import COMMON
from pager.cache.stats import Tier, TierReads, UsageMeter
from pager.engine.grammar import GrammarMask
from pager.engine.kv import BLOCK_TOKENS, BlockPool, KvCache, Prefix
from pager.engine.paged_model import PagedModel
from pager.engine.runner import PromptPart, RowStart
from pager.engine.sampler import Context, Draw
from pager.engine.turns import Experts, Spent, Want, as_bits
from pager.errors import InvalidRequest, PagerError
from pager.observe import tracing
from pager.pools.drift import Change, answer_drift, make_change
from pager.pools.step import RequestRouting, StepRouting
from pager.tokenizing import Detokenizer, StopMatcher, TokenTexts
from pager.types import (
    Account,
    AnswerMode,
    FinishReason,
    GenerateRequest,
    PageIn,
    PagingCounts,
    PoolPolicy,
    PoolSource,
    TokenLogprobs,
    Usage,
)

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

LOGPROBS_A_CHUNK = 1024  # tokens of the prompt: 300 KB with the most alternatives


def record_spans(request: Request, outcome: str) -> None:
    """Records the spans of a request that has ended, however far it came; nothing where it has no trace."""
    asked = request.asked
    if asked.traceparent is not None:
        tracing.record(asked.traceparent, _parts(request, outcome), asked.tracestate)


def _parts(request: Request, outcome: str) -> Iterator[tracing.Part]:
    """Yields queue, prefill and decode, which follow each other, and what was paged from each tier, which overlaps."""
    now_s = time.monotonic()
    unix_s = time.time() - now_s  # the difference between monotonic and unix seconds

    def part(name: str, start_s: float, end_s: float, **facts: int | str) -> tracing.Part:
        return tracing.Part(name, unix_s + start_s, unix_s + (now_s if math.isnan(end_s) else end_s), facts)

    prefill_s, first_s = request.prefill_started_s, request.first_token_s
    yield part("queue", request.submitted_s, request.admitted_s)
    if not math.isnan(prefill_s):
        yield part("prefill", prefill_s, first_s, num_tokens=request.num_prefilled - request.num_cached)
    if not math.isnan(first_s):
        yield part("decode", first_s, now_s, num_tokens=request.num_output_tokens, outcome=outcome)
    for tier, reads in request.reads.items():
        facts = {"num_experts": reads.num_experts, "num_bytes": reads.num_bytes}
        yield part(f"page {tier.value}", reads.started_s, reads.ended_s, **facts)


class Request:
    """One request's life in the engine. Mutable; owned by the engine's thread. Times are monotonic seconds.

    It waits, then holds KV blocks, a lease and its routing until it ends. A request for several answers becomes as many
    of these after its prefill, which decode like any others: rows with a draw, a text and KV blocks of their
    own, and one lease. `first` is the one that was submitted. It has what belongs to the request and not to an answer.
    """

    def __init__(
        self,
        request: GenerateRequest,
        texts: TokenTexts,
        now_s: float,
        deadline_s: float,
        eos_ids: frozenset[int] = frozenset(),
        *,
        num_slots: int = 0,
        width: int = 1024,
    ) -> None:
        """Makes a waiting request that reserves `num_slots`; `width` is more than the number of any expert."""
        sampling = request.sampling
        self.asked = request
        self.policy = effective_policy(request)
        expected = self.policy.fixed or request.predicted
        num_tokens = len(request.prompt_token_ids) + sampling.n * sampling.max_tokens
        self.index = 0  # the number of its answer
        self.others: Sequence[Request] = ()  # for the first answer: the further ones, once the prompt has run
        self._first: Request | None = None  # for a further answer
        self.want = Want(num_slots, num_tokens, None if expected is None else as_bits(expected.experts, width))
        self.spent = Spent()
        self.submitted_s = now_s
        self.deadline_s = deadline_s
        self.place = 0  # its place in line when it joined, the first being 1
        self.admitted_s = math.nan
        self.prefill_started_s = math.nan
        self.first_token_s = math.nan
        self.last_token_s = math.nan
        self.output_ids: list[int] = []
        self.end_ids = (frozenset() if sampling.ignore_eos else eos_ids) | frozenset(sampling.stop_token_ids)
        self.draw = self._new_draw()
        self.compiling: Future[CompiledGrammar] | None = None
        self._compiled: CompiledGrammar | None = None
        self.prefix: Prefix | None = None  # None where prefixes are not shared
        self.blocks: Sequence[int] = ()
        self.kept_at: int | None = None  # the place of its state
        self.lease: Lease | None = None
        self.routing: RequestRouting | None = None
        self.step: StepRouting | None = None  # the step that its decode forwards run in
        self.change: Change | None = None  # drift's pending change: decoding continues once the slots for it can be had
        self.num_cached = 0  # tokens of the prompt whose keys and values were taken over
        self.num_prefilled = 0  # all tokens that need not run any more
        self.prompt_logprobs: list[TokenLogprobs] = []  # those that were not taken yet
        self.is_answered = False  # its answer is complete
        self._has_ended = False
        self._is_lost = False  # the page cache has lost experts that it had no slots for
        self._fate: PagerError | None = None
        self._spare_blocks: Sequence[int] = ()  # for the further answers
        self._told = PagingCounts()  # what the usages of answers have said
        self._meter = UsageMeter(request.tenant, page_ins=deque() if request.is_watched else None)
        self._is_prefetched = False
        self._spent_until_s = math.nan
        self._awaits_slots_since_s = math.nan
        self._texts = texts
        self._detokenizer = Detokenizer(texts, request.prompt_token_ids)
        self._stops = StopMatcher(sampling.stop)

    def _new_draw(self) -> Draw:
        """Answer i of several has seed + i."""
        sampling, prompt = self.asked.sampling, self.asked.prompt_token_ids
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + self.index)
        return Draw(sampling, Context(sampling, prompt, self.output_ids, self.end_ids))

    @property
    def first(self) -> Request:
        """The first answer, which is what was submitted."""
        return self if self._first is None else self._first

    @property
    def rows(self) -> Sequence[Request]:
        """All answers of the request: one until its prompt has run."""
        return (self.first, *self.first.others)

    @property
    def has_ended(self) -> bool:
        """Tells whether the request has ended, whichever of its answers this is."""
        return self.first._has_ended

    @property
    def fate(self) -> PagerError | None:
        """The error that the request ends with once its current forward has been left."""
        return self.first._fate

    @fate.setter
    def fate(self, error: PagerError) -> None:
        self.first._fate = error

    @property
    def num_output_tokens(self) -> int:
        """The tokens of all answers."""
        return sum(len(answer.output_ids) for answer in self.rows)

    @property
    def num_rows(self) -> int:
        """The rows of a decode step that the request takes once its prompt has run."""
        return self.asked.sampling.n

    @property
    def kv_tokens(self) -> int:
        """The number of tokens whose keys and values are kept: all but the last, which no token follows."""
        return len(self.asked.prompt_token_ids) + self.asked.sampling.max_tokens - 1

    @property
    def reads(self) -> Mapping[Tier, TierReads]:
        """The bytes that were read for it, by tier."""
        return self._meter.reads

    def prefetch(self, paged: PagedModel) -> None:
        """Prefetches the experts that the router predicted, once. A known pool's are read when it is reserved."""
        predicted = self.asked.predicted
        if predicted is not None and self.policy.fixed is None and not self._is_prefetched:
            self._is_prefetched = True
            paged.pager.prefetch(predicted.keys(), self._meter)

    def read_ahead(self, paged: PagedModel) -> None:
        """Prefetches the experts of its known pool when it is next, as far as there are slots without a reservation."""
        if self.policy.fixed is not None:
            paged.pager.prefetch(self.policy.fixed.keys(), self._meter)

    def spend(self, now_s: float, slots_share: float, paged: PagedModel) -> float:
        """Returns what it has used since the last call, in prompt tokens. It has held `slots_share` of all slots."""
        since_s = self.admitted_s if math.isnan(self._spent_until_s) else self._spent_until_s
        held_s = 0.0 if math.isnan(since_s) else max(0.0, now_s - since_s)
        before, self._spent_until_s = self.spent, now_s
        self.spent = Spent(
            self.num_prefilled - self.num_cached,
            self.num_output_tokens,
            self._meter.counts.bytes_paged / max(1, paged.facts.expert_bytes),
            before.slot_s + slots_share * held_s,
        )
        return self.spent.cost(before)

    def acquire(self, paged: PagedModel, blocks: BlockPool, *, may_fit: bool = True) -> bool:
        """Takes KV and slots for its whole life, or nothing. Raises PagerError where that can never succeed.

        Where there are no slots (certainly none without `may_fit`), its experts may be where the page cache has them.
        """
        shared = () if self.prefix is None else self.prefix.find(blocks)
        taken = blocks.allocate(self.kv_tokens, shared)
        if taken is None:
            return False
        self.blocks, self.kept_at = taken, blocks.take_place()
        try:
            num_spare = (self.num_rows - 1) * (len(taken) - self._num_common_blocks)
            spare = blocks.allocate(num_spare * BLOCK_TOKENS)
            if spare is None:
                return False
            self._spare_blocks = spare
            self.lease = self._reserve(paged, may_fit=may_fit)
            if self.lease is not None:
                self.routing = paged.routing(self.policy, lease=self.lease, meter=self._meter)
                self.num_cached = self.num_prefilled = len(shared) * BLOCK_TOKENS
                return True
        finally:
            if self.routing is None:
                self._give_back(blocks)
        return False

    def _reserve(self, paged: PagedModel, *, may_fit: bool) -> Lease | None:
        """Takes slots that are free, or that its tenant is guaranteed; else none, where the page cache has its experts:
        what it evicted others would read again. Where that has them not, it takes any slots.
        """
        pager = paged.pager
        evicts = not pager.may_use_in_place or pager.account(self._meter.tenant) != COMMON
        lease = paged.reserve(self.policy, self._meter, evicts=evicts) if may_fit else None
        lease = lease or paged.reserve_in_place(self.policy, self._meter)
        return lease or (paged.reserve(self.policy, self._meter) if may_fit and not evicts else None)

    @property
    def _num_common_blocks(self) -> int:
        """The blocks that all answers share: those that the prompt fills."""
        return len(self.asked.prompt_token_ids) // BLOCK_TOKENS

    def fork(self) -> Sequence[Request]:
        """Makes the further answers, once, when the prompt has run and before first tokens are drawn. Returns all."""
        if len(self.rows) < self.num_rows:
            self.others = tuple(self._answer(index) for index in range(1, self.num_rows))
        return self.rows

    def share_prompt(self, blocks: BlockPool, cache: KvCache) -> None:
        """Gives the further answers the prompt's keys and values: the blocks that it fills are shared, and the one that
        it ends in is copied.
        """
        common, own = self.blocks[: self._num_common_blocks], self.blocks[self._num_common_blocks :]
        for answer in self.others:
            taken, self._spare_blocks = self._spare_blocks[: len(own)], self._spare_blocks[len(own) :]
            blocks.hold(common)
            answer.blocks, answer.kept_at = (*common, *taken), blocks.take_place()
            assert self.kept_at is not None
            cache.states.copy(self.kept_at, answer.kept_at)
            if len(self.asked.prompt_token_ids) % BLOCK_TOKENS and own:
                cache.copy_block(own[0], taken[0])

    def _answer(self, index: int) -> Request:
        """Returns the request in the state in which its answer of that number begins."""
        answer = copy.copy(self)
        answer.index, answer._first = index, self
        answer.blocks, answer.kept_at = (), None
        answer.output_ids = []
        answer.draw = answer._new_draw()
        answer.draw.context.mask = self._new_mask()
        answer.prefix = None if self.prefix is None else self.prefix.fork()
        answer.routing = None if self.routing is None else self.routing.fork()
        answer._detokenizer = Detokenizer(self._texts, self.asked.prompt_token_ids)
        answer._stops = StopMatcher(self.asked.sampling.stop)
        return answer

    def leave(self, blocks: BlockPool) -> None:
        """Gives back what only this answer holds: it is complete, and others continue."""
        self.is_answered = True
        self._give_own(blocks)

    def _give_own(self, blocks: BlockPool) -> None:
        """Gives back what this answer holds."""
        held, self.blocks = self.blocks, ()
        place, self.kept_at = self.kept_at, None
        blocks.free(held)
        if place is not None:
            blocks.free_place(place)

    @property
    def num_going_on(self) -> int:
        """The number of other answers of the request that are incomplete."""
        return sum(not answer.is_answered and answer is not self for answer in self.rows)

    def release(self, blocks: BlockPool) -> None:
        """Gives back everything; the request has ended."""
        assert not self.has_ended, "a request ends once"
        self.first._has_ended = True
        self.first.leave_grammar()
        self.first._give_back(blocks)

    def _give_back(self, blocks: BlockPool) -> None:
        spare, self._spare_blocks = self._spare_blocks, ()
        lease, self.lease = self.lease, None
        try:
            blocks.free(spare)
            for answer in self.rows:
                answer._give_own(blocks)
        finally:
            if lease is not None:
                lease.release()

    @property
    def is_exact(self) -> bool:
        """Tells whether its forwards page experts as they go, so that it shares none with requests that hold theirs."""
        return self.routing is not None and self.routing.is_exact

    @property
    def group(self) -> Experts | None:
        """Its pool, where that is known before its prefill: requests of one group share their slots."""
        return None if self.policy.fixed is None else self.want.experts

    @property
    def has_drifted(self) -> bool:
        """Tells whether it may hold other experts than those of its group."""
        return self.routing is not None and self.routing.has_changed

    def shares_pool(self, other: Request) -> bool:
        """Tells whether both run in the same experts, by what is known before their prefills."""
        return self.group is not None and self.group == other.group

    def may_be_chunked(self, paged: PagedModel) -> bool:
        """Tells whether its prompt may run in parts: not before its pool is chosen, nor where each part would page
        anew, nor where a part that runs again would begin at another state.
        """
        if self.routing is None or paged.keeps_states:
            return False
        return self.routing.is_frozen and (paged.fully_resident or not self.is_exact)

    def runs_beside_others(self, paged: PagedModel) -> bool:
        """Tells whether prompts and rows may run in one forward with its next one: nothing is chosen or looked at in it
        for this request, and next to nothing read.
        """
        routing, lease = self.routing, self.lease
        if routing is None or lease is None or routing.monitor is not None:
            return False
        if not routing.is_frozen:
            return False
        if routing.is_exact:
            has_experts = paged.pager.is_nearly_full
        else:
            has_experts = self.is_prefilled or (lease.failed is None and lease.ready())
        return has_experts and (self.is_prefilled or self.asked.sampling.prompt_logprobs is None)

    @property
    def awaits_grammar(self) -> bool:
        return self.compiling is not None and not self.compiling.done()

    def take_grammar(self) -> None:
        """Constrains the answer by the grammar that was compiled for it. Raises InvalidRequest where that failed."""
        compiling, self.compiling = self.compiling, None
        if compiling is not None:
            self._compiled = compiling.result()
            self.draw.context.mask = self._new_mask()

    def _new_mask(self) -> GrammarMask | None:
        grammar = self.asked.sampling.grammar
        return None if grammar is None or self._compiled is None else GrammarMask(self._compiled, grammar)

    def leave_grammar(self) -> None:
        """Releases its grammar; one that has not been compiled yet is cancelled."""
        if self.compiling is not None:
            self.compiling.cancel()

    @property
    def awaits_experts(self) -> bool:
        """Tells whether experts of its changed pool are still being read, so that others decode meanwhile."""
        lease = self.lease
        if self.routing is None or not self.routing.awaits_experts or lease is None:
            return False
        return lease.failed is None and not lease.ready()

    @property
    def awaits_slots(self) -> bool:
        """Tells whether it needs more slots than there are now, as drift or the page cache wants it: it holds none
        until it can have all.
        """
        return self.change is not None or self.first._is_lost

    @property
    def is_in_place(self) -> bool:
        """Tells whether it holds no slots, as its experts are computed where the page cache has them."""
        return self.lease is not None and self.lease.is_in_place

    def lose_place(self) -> None:
        """Has it wait for slots: the page cache has not all of its experts any more."""
        if not self.first._is_lost:
            self.first._is_lost = True
            self.first._awaits_slots_since_s = time.monotonic()

    def _take_place(self, paged: PagedModel) -> bool:
        """Takes slots in the place of what the page cache has lost, or finds all of it there again. Returns whether."""
        assert self.lease is not None
        if not paged.take_slots(self.policy, self.lease, self._meter.tenant):
            return False
        self.first._is_lost = False
        for answer in self.rows:
            assert answer.routing is not None
            answer.routing.awaits_experts = True
        self._meter.counts += PagingCounts(stall_s=time.monotonic() - self.first._awaits_slots_since_s)
        return True

    def join(self, step: StepRouting) -> None:
        """Runs its next decode forwards in `step`; the measurements of an earlier step are settled before."""
        if self.step is not None and self.step is not step:
            self.step.settle()
        self.step = step

    def answer_drift(self) -> None:
        """Widens its pool or makes it exact between two decode steps, where its policy says so."""
        routing, step = self.routing, self.step
        if routing is None or step is None or routing.monitor is None:
            return
        if routing.monitor.is_due(step.num_unsettled(routing)):
            step.settle()
            self.change = answer_drift(routing)
            self._awaits_slots_since_s = time.monotonic()

    def acquire_change(self, paged: PagedModel) -> bool:
        """Takes the slots that it waits for, all or nothing. Returns whether it has them."""
        assert self.routing is not None
        if self.change is None:
            return not self.first._is_lost or self._take_place(paged)
        if not make_change(self.routing, self.change):
            return False
        self.change = None
        self._meter.counts += PagingCounts(stall_s=time.monotonic() - self._awaits_slots_since_s)
        return True

    def is_paged_in(self, paged: PagedModel) -> bool:
        """Tells whether everything that was prefetched for it has been read."""
        lease, predicted = self.lease, self.asked.predicted
        if self.policy.fixed is not None:
            return lease is None or lease.failed is not None or lease.ready()
        return predicted is None or not paged.pager.prefetch_pending(predicted.keys())

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled == len(self.asked.prompt_token_ids)

    def prompt_part(self, num_tokens: int) -> PromptPart:
        """Returns the next tokens of its prompt, as a forward runs them."""
        prompt, start = self.asked.prompt_token_ids, self.num_prefilled
        assert self.kept_at is not None
        return PromptPart(prompt[start : start + num_tokens], self.blocks, start, len(prompt), self.kept_at)

    def row_start(self) -> RowStart:
        """Returns where its next decode step starts: the last sampled token has not run yet."""
        position = len(self.asked.prompt_token_ids) + len(self.output_ids) - 1
        assert self.kept_at is not None
        return RowStart(self.blocks, self.output_ids[-1], position, self.kept_at)

    def accept(self, token_id: int, now_s: float) -> tuple[str, FinishReason | None]:
        """Takes the next token. Returns the text that may be shown now, and why the answer ends here, if it does."""
        self.output_ids.append(token_id)
        if len(self.output_ids) == 1:
            self.first_token_s = now_s
        self.last_token_s = now_s
        sampling = self.asked.sampling
        if token_id in self.end_ids:
            return self._rest(), FinishReason.STOP
        text = self._stops.feed(self._detokenizer.feed(token_id))
        if self._stops.is_stopped:
            return text, FinishReason.STOP
        if len(self.output_ids) == sampling.max_tokens:
            text += self._rest()
            return text, FinishReason.STOP if self._stops.is_stopped else FinishReason.LENGTH
        return text, None

    def publish(self, blocks: BlockPool) -> None:
        """Publishes what its forwards have computed so far for requests that begin alike, until drift changes its
        pool.
        """
        routing = self.routing
        if self.prefix is not None and routing is not None and not routing.has_changed:
            self.prefix.publish(blocks, self.blocks, self.output_ids, routing.pool)

    def take_prompt_logprobs(self) -> Iterator[tuple[TokenLogprobs, ...]]:
        """Yields the prompt's log-probabilities that are known and were not taken before, in parts that fit into a
        message.
        """
        taken, self.prompt_logprobs = self.prompt_logprobs, []
        for start in range(0, len(taken), LOGPROBS_A_CHUNK):
            yield tuple(taken[start : start + LOGPROBS_A_CHUNK])

    def take_page_ins(self) -> tuple[PageIn, ...]:
        """Returns the experts that were read for a watched request since the last call; none for another."""
        untaken, taken = self._meter.page_ins, []
        while untaken:  # readers add to it meanwhile
            key, source, now_s = untaken.popleft()
            taken.append(PageIn(key, "host" if source is Tier.HOST else "disk", now_s - self.submitted_s))
        return tuple(taken)

    def take_outside(self) -> float | None:
        """Returns the gate mass of a watched request's last token outside of its pool. Waits for the device."""
        if not self.asked.is_watched or self.step is None or self.routing is None:
            return None
        self.step.settle()
        return self.routing.take_outside()

    @property
    def token_s(self) -> float | None:
        """The mean time per token after the first."""
        num_more = len(self.output_ids) - 1
        return (self.last_token_s - self.first_token_s) / num_more if num_more > 0 else None

    def account(self, paged: PagedModel) -> Account:
        """Closes its account, as it is about to end, and returns it: later reads for it are charged to no request."""
        paged.pager.close_account(self._meter)
        was_admitted = not math.isnan(self.admitted_s)
        return Account(
            prompt_tokens=self.num_prefilled,
            completion_tokens=self.num_output_tokens,
            paging=self._meter.counts,
            queue_s=self.admitted_s - self.submitted_s if was_admitted else None,
            cached_prompt_tokens=self.num_cached,
        )

    def usage(self, reason: FinishReason, fingerprint: str) -> Usage:
        """Returns the usage of an answer that ended with `reason`; called before `release`, and for a request's last
        answer after `account`. Of several answers each says what was paged since the one before it ended.
        """
        assert self.routing is not None
        told, self.first._told = self.first._told, self._meter.counts
        if self.step is not None:
            self.step.settle()
        pool, mode = self.routing.pool, self._mode()
        out_of_pool_mass = self.routing.out_of_pool_mass()
        monitor = self.routing.monitor
        predicted, first = self.asked.predicted, self.routing.first_pool
        recall = predicted.recall_of(first) if predicted and first and self.policy.fixed is None else None
        return Usage(
            mode=mode,
            finish_reason=reason,
            prompt_tokens=len(self.asked.prompt_token_ids),
            completion_tokens=len(self.output_ids),
            pool=pool,
            paging=self._meter.counts - told,
            out_of_pool_mass=out_of_pool_mass,
            predicted_recall=recall,
            queue_s=self.admitted_s - self.submitted_s,
            time_to_first_token_s=self.first_token_s - self.submitted_s,
            model_fingerprint=fingerprint,
            drift=monitor.report() if monitor is not None else None,
            cached_prompt_tokens=self.num_cached,
        )

    def _mode(self) -> AnswerMode:
        assert self.routing is not None
        if self.routing.pool is None:
            return "exact"
        return "degraded" if self.routing.degraded else "pool"

    def _rest(self) -> str:
        return self._stops.feed(self._detokenizer.flush()) + self._stops.flush()


def effective_policy(request: GenerateRequest) -> PoolPolicy:
    """Returns the request's policy, with the prediction filled in where that is to be the pool. Raises
    InvalidRequest.
    """
    policy = request.pool
    if policy.source is not PoolSource.PREDICTION or policy.fixed is not None:
        return policy
    if request.predicted is None:
        raise InvalidRequest("the prediction is to be the pool, but the request has none", field="pool.source")
    return replace(policy, fixed=request.predicted)
