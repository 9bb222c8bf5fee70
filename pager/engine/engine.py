"""Continuous batching: every request has its own pool, and all of them share the step.

A request waits, is admitted when KV and slots for its whole life can be had at once, has its prompt run in one forward
(in parts where its pool is known before), and then decodes with the others, one forward for all. `step` follows this
order; prompts whose experts are loaded run in the forward of those that decode. A forward that has to wait for reads
does not delay requests whose experts are loaded: they decode meanwhile.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Tokenizer

from pager import threads
from pager.cache.shares import COMMON
from pager.engine.decoding import Decoder, Outcome
from pager.engine.grammar import Grammars
from pager.engine.interface import EngineLimits, EngineObserver, EngineStatus, Failure, StreamEvent, failure_of
from pager.engine.kv import BLOCK_TOKENS, BlockPool, KvCache, Prefix
from pager.engine.paged_model import PagedModel
from pager.engine.request import Request, effective_policy, record_spans
from pager.engine.runner import ModelRunner
from pager.engine.scheduler import Inbox, LineClock, RequestBounds, check_answers
from pager.engine.turns import Experts, TenantCounters, WaitingLine, as_bits, by_overlap
from pager.errors import ENDS_THE_PROCESS, Cancelled, DeadlineExceeded, NotReady, PagerError, SlotsExhausted
from pager.memory import PREFILL_CHUNK_TOKENS
from pager.pools.pick import check_pool
from pager.tokenizing import TokenTexts, panics_as_errors
from pager.types import Account, FinishReason, GenerateRequest, TokenChunk, Usage

log = logging.getLogger(__name__)

ADMISSION_RETRY_S = 0.01  # reads that end free slots without a signal
ADMISSION_TRIES = 32  # tries per step, so that a long line costs a step little
IDLE_POLL_S = 0.002
# An engine that was idle begins when nobody else has come in such a pause, of which there are so many at most: requests
# that are sent at once arrive one by one, and the others would wait for a forward of the first one alone.
COMPANY_PAUSE_S, COMPANY_MOST_PAUSES = 0.001, 5
# Where a tenant is guaranteed slots: of prompts that run between two layers of a forward, whose memory is not free, and
# of others' prompts in one forward, for whose next layer the tenant waits.
WITHIN_FORWARD_TOKENS, BESIDE_GUARANTEED_TOKENS = 128, 256
CHECK_S = 0.05  # how often a forward that waits for reads checks for cancelled and overdue requests


class Engine:
    """One model on one device. `submit`, `cancel` and `status` may be called from any thread; `step` from one at a
    time.
    """

    def __init__(
        self,
        paged: PagedModel,
        tokenizer: Tokenizer,
        limits: EngineLimits,
        *,
        sink: Callable[[list[StreamEvent]], None],
        observer: EngineObserver | None = None,
    ) -> None:
        """Makes the engine. `sink` is called by the stepping thread: after each step, and during a long one with what
        happened so far.

        Raises UnsupportedModel where the model cannot run over KV blocks, or requests cannot share a batch.
        """
        config = paged.model.config
        self._paged = paged
        self._texts = TokenTexts(getattr(tokenizer, "backend_tokenizer", tokenizer))
        # Beyond these bounds the plan has no working memory.
        self._max_running = min(limits.max_running, paged.plan.max_running)
        self._limits = limits
        self._prefill_chunk_tokens = min(
            limits.prefill_chunk_tokens, PREFILL_CHUNK_TOKENS, config.max_position_embeddings
        )
        lone_chunk_tokens = min(limits.lone_chunk_tokens, paged.plan.chunk_tokens)
        self._lone_chunk_tokens = max(self._prefill_chunk_tokens, lone_chunk_tokens)
        self._sink = sink
        self._observer = observer or EngineObserver()
        plan = paged.plan
        self._blocks = BlockPool(plan.num_kv_blocks, self._max_running)
        cache = KvCache(
            paged.layers, plan.num_kv_blocks, paged.dtype, paged.device,
            gather_tokens=plan.gather_tokens, num_places=self._max_running,
        )  # fmt: skip
        self._cache = cache
        self._runner = ModelRunner(paged.model, cache, paged.device, on_layer=self._on_layer)
        self._decoder = Decoder(paged, self._runner)
        paged.pager.call_while_waiting(self._meanwhile)
        self._bounds = RequestBounds(
            config.max_position_embeddings, self._blocks.num_blocks * BLOCK_TOKENS, config.vocab_size
        )
        self._eos_ids = _eos_ids(paged.model.generation_config.eos_token_id)
        self._grammars = Grammars(self._texts, config.vocab_size, self._eos_ids)
        self._inbox = Inbox(limits.max_running + limits.max_waiting)
        self._line: WaitingLine[Request] = WaitingLine(limits.max_overtakes)
        self._clock = LineClock()
        self._tenants = TenantCounters()
        self._expert_width = max(paged.facts.experts_per_layer)
        self._num_ended = 0
        self._read_ahead_for: tuple[Request | None, int] = (None, 0)  # and how many had ended by then
        self._joining: list[Request] = []  # in order of arrival; some wait for their grammars to be compiled
        self._prefilling: list[Request] = []
        self._running: list[Request] = []
        self._events: list[StreamEvent] = []
        self._watched: list[Request] = []  # those in flight that tell what is read for them while it is read
        self._soonest_deadline_s = math.inf
        self._next_admission_s = 0.0
        self._room_at_refusal: tuple[int, int, int, int] | None = None  # None where something else has changed since
        self._in_forward: Sequence[Request] = ()  # in a long forward: nothing that they hold is given back
        self._may_interrupt = False  # the current forward is that one, and not a short one that runs while it waits
        self._is_stepping = False
        self._guaranteed_came = False  # a request of a tenant that is guaranteed slots, which has not been looked at
        self._serves_within = paged.device.type == "cpu"  # elsewhere a graph may be being recorded
        self._may_serve_within = False  # such requests, between layers of the present forward; once in each
        self._num_steps_begun = 0
        self._next_decode_s = 0.0
        self._num_tokens = 0
        self._num_steps = 0
        self._stepping = threading.Lock()  # held while `run` runs

    # Methods for any thread.

    def submit(self, request: GenerateRequest) -> None:
        """Queues the request; its chunks, or one Failure, go to the sink. Raises whatever can be known at once.

        That is InvalidRequest, PromptTooLong, PoolTooSmall, PoolTooLarge, UnsupportedModel, DeadlineExceeded,
        DuplicateRequest, Overloaded, NotReady.
        """
        self._bounds.check(request)
        now_s, deadline_s = time.monotonic(), math.inf
        if request.deadline_s is not None:
            left_s = request.deadline_s - now_s
            if not left_s > 0:
                raise DeadlineExceeded(
                    f"the deadline passed {-left_s:.3f} s before the request arrived", field="deadline"
                )
            if len(self._line):
                self._clock.check(self.status().waiting, left_s)
            deadline_s = request.deadline_s
        policy = effective_policy(request)
        check_answers(request, policy, self._max_running)
        if policy.fixed is not None:
            check_pool(policy.fixed, self._paged.facts)
        self._paged.pager.guarantee(request.tenant, request.guaranteed_share)
        num_slots, width = self._paged.slots_needed(policy, request.tenant), self._expert_width
        with panics_as_errors():
            queued = Request(request, self._texts, now_s, deadline_s, self._eos_ids, num_slots=num_slots, width=width)
        queued.prefix = self._prefix_of(queued)
        if request.sampling.grammar is not None:
            queued.compiling = self._grammars.compile(request.sampling.grammar)
        try:
            self._inbox.put(queued)
        except PagerError:
            queued.leave_grammar()
            raise

    def _prefix_of(self, request: Request) -> Prefix | None:
        if not self._limits.prefix_cache or self._paged.keeps_states:
            return None
        asked = request.asked
        # A prompt whose parts would each page anew runs whole.
        in_parts = request.policy.fixed is not None or self._paged.fully_resident
        return Prefix(
            asked,
            request.policy,
            None if self._limits.share_prefixes else asked.tenant,
            is_long=self._runner.is_long(len(asked.prompt_token_ids)),
            max_tokens=len(asked.prompt_token_ids) if in_parts else self._prefill_chunk_tokens,
        )

    def cancel(self, request_id: str, tenant: str) -> bool:
        """Ends the request with Failure(Cancelled): before the next step or, where a long forward runs for it alone,
        before the next layer. Returns False when that tenant has no such request.
        """
        return self._inbox.cancel(request_id, tenant)

    def status(self) -> EngineStatus:
        running = len(self._prefilling) + len({id(request.first) for request in tuple(self._running)})
        return EngineStatus(
            waiting=max(0, len(self._inbox) - running),
            running=running,
            kv_blocks_used=self._blocks.num_used,
            kv_blocks_cached=self._blocks.num_published,
            kv_blocks_total=self._blocks.num_blocks,
            is_stepping=self._is_stepping,
            progress=self._num_steps_begun + self._decoder.num_layers_run + self._paged.pager.progress,
            num_steps=self._num_steps,
            num_decode_forwards=self._decoder.num_decode_forwards,
            place_s=self._clock.place_s if len(self._line) else None,
        )

    def start(self) -> None:
        """Starts a thread that calls `run`."""
        threading.Thread(target=self.run, name="engine", daemon=True).start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Refuses new requests, lets the present ones end for `drain_s`, fails the rest with NotReady. Idempotent.

        Returns when `run` has ended. Must not be called on the thread that it runs on.
        """
        self._inbox.close()
        self._inbox.wait_until_empty(drain_s)
        self._inbox.halt()
        with self._stepping:
            self._fail_all(_shutting_down())
        self._grammars.close()

    def _leave(self) -> None:
        """Stops as the process exits: like `stop`, but without waiting for a step that hangs."""
        self._inbox.close()
        self._inbox.halt()
        if self._stepping.acquire(timeout=threads.TIMEOUT_S):
            self._stepping.release()

    # Methods for the stepping thread.

    def run(self) -> None:
        """Steps until `stop`; called once, on the thread that loaded the model. torch computes with a team of threads
        for each thread that calls it; where these outnumber the processors, all of them sleep between two operations
        instead of spinning, which halves the speed of a small model.
        """
        with self._stepping:
            threads.call(self, Engine._leave)
            while not self._inbox.is_halted:
                try:
                    worked = self.step()
                except BaseException:  # the thread must not end while there are requests
                    log.exception("a step failed; every request in flight fails with it")
                    self._fail_all(PagerError("the engine failed; the worker's log has the details"))
                    continue
                if not worked:
                    self._await_requests()

    def _await_requests(self) -> None:
        """Waits until there may be something to run; from idleness on, for those that come together."""
        was_idle = not len(self._inbox)
        self._inbox.wait_for_news(None if was_idle else IDLE_POLL_S)
        if was_idle and self._decoder.shares_prefills:
            self._inbox.wait_for_company(COMPANY_PAUSE_S, COMPANY_MOST_PAUSES, self._prefill_chunk_tokens)

    def step(self) -> bool:
        """Decodes a token of each request, admits, runs prompts by one forward; or all by one. Returns False when there
        is nothing to run.
        """
        started_s = time.monotonic()
        self._num_steps_begun += 1
        self._is_stepping = True
        forward_before_s, tokens_before = self._decoder.forward_s, self._num_tokens
        try:
            self._take_in(started_s)
            self._end_overdue(started_s)
            self._may_serve_within = self._serves_within
            self._admit(started_s)
            if not self._prefill_and_decode():
                self._decode()
                now_s = time.monotonic()
                self._take_in(now_s)  # who has come meanwhile would wait for one more forward
                self._admit(now_s)
                self._guaranteed_came, self._may_serve_within = False, self._serves_within
                self._prefill(self._prefilling)  # last, so that a first token waits for no other forward
            if self._num_tokens == tokens_before:
                self._decode_waiting()
        finally:
            self._deliver()
            self._is_stepping = False
        num_tokens = self._num_tokens - tokens_before
        if num_tokens:
            self._num_steps += 1
            with _errors_logged("the observer of a step failed"):
                forward_s = self._decoder.forward_s - forward_before_s
                self._observer.stepped(time.monotonic() - started_s, forward_s, num_tokens)
        return num_tokens > 0

    def _take_in(self, now_s: float) -> None:
        arrived, cancelled = self._inbox.take()
        for request in arrived:
            if request.has_ended:
                continue
            self._soonest_deadline_s = min(self._soonest_deadline_s, request.deadline_s)
            self._joining.append(request)
        for request in self._joining[:]:
            if request.has_ended or not request.awaits_grammar:
                self._joining.remove(request)
                self._join(request, now_s)
        for request in cancelled:
            if not request.has_ended:
                self._end_early(request, Cancelled("the request was cancelled"))

    def _join(self, request: Request, now_s: float) -> None:
        """Puts the request into the line, unless it has ended or its grammar cannot be used."""
        if request.has_ended:
            return
        with self._on_behalf_of(request, "its grammar failed"):
            request.take_grammar()
            if not len(self._line):
                self._clock.forget()
            self._line.add(request)
            if request.asked.is_watched:
                self._watched.append(request)
            self._tenants.arrived(request.asked.tenant, request.asked.weight)
            request.place = len(self._line)
            self._guaranteed_came |= self._has_guarantee(request)
            self._admit_soon()

    def _end_overdue(self, now_s: float) -> None:
        if now_s < self._soonest_deadline_s:
            return
        self._soonest_deadline_s = math.inf
        for request in self._inbox.live():
            if request.deadline_s <= now_s:
                given = f"{len(request.output_ids)} of at most {request.asked.sampling.max_tokens} tokens"
                self._end_early(request, DeadlineExceeded(f"the deadline passed after {given}", field="deadline"))
            else:
                self._soonest_deadline_s = min(self._soonest_deadline_s, request.deadline_s)

    def _end_early(self, request: Request, error: PagerError) -> None:
        if any(row in self._in_forward for row in request.rows):
            request.fate = request.fate or error
        else:
            self._fail(request, error)

    @contextmanager
    def _long_forward(self, requests: Sequence[Request]) -> Iterator[None]:
        """Surrounds a forward that may take long: between its layers, and while it waits, other requests are served."""
        around = self._in_forward, self._may_interrupt
        self._in_forward, self._may_interrupt = (*self._in_forward, *requests), True
        try:
            yield
        finally:
            self._in_forward, self._may_interrupt = around

    def _on_layer(self) -> None:
        """Called before every layer of every forward: serves tenants that are guaranteed slots, and ends cancelled and
        overdue requests, if the forward is long.

        Requests that are not in the forward end at once. Raises, and so leaves the forward, when none in it continues.
        """
        if self._may_serve_within and self._paged.pager.is_any_guaranteed:
            self._serve_within()
        if not self._may_interrupt:
            return
        now_s = time.monotonic()
        self._take_in(now_s)
        self._end_overdue(now_s)
        self._deliver()
        if self._inbox.is_halted:
            raise _shutting_down()
        if all(request.fate is not None for request in self._in_forward):
            raise Cancelled("no request waits for this forward any more")

    def _serve_within(self) -> None:
        """Runs prompts of tenants that are guaranteed slots within a forward of others, between two of its layers."""
        now_s = time.monotonic()
        self._take_in(now_s)
        if not self._guaranteed_came:
            return
        self._guaranteed_came = self._may_serve_within = False
        self._admit(now_s)
        own = [request for request in self._prefilling if self._has_guarantee(request)]
        known = [request for request in own if request.group is not None and request not in self._in_forward]
        self._prefill([request for request in known if request.is_paged_in(self._paged)], WITHIN_FORWARD_TOKENS)
        self._deliver()

    def _able(self) -> list[Request]:
        """Returns the running requests whose next forward waits for nothing, or pages as it goes."""
        found = []
        for request in tuple(self._running):
            if request.awaits_slots or request in self._in_forward:
                continue
            with self._on_behalf_of(request, "its lease failed"):
                if not request.awaits_experts:
                    found.append(request)
        return found

    def _decode(self) -> None:
        """Runs a forward for all requests that hold their experts, and one for the exact ones of each account."""
        able = self._able()
        exact: dict[str, list[Request]] = {}
        for request in able:
            if request.is_exact:  # whose forwards evict, each from the slots of its own account
                exact.setdefault(self._account_of(request), []).append(request)
        self._decode_pooled([request for request in able if not request.is_exact])
        for account, requests in exact.items():
            self._decode_long(_exact_group(account), requests)
        self._decoder.keep_groups({"pooled", *map(_exact_group, exact)})

    def _decode_waiting(self) -> None:
        """Runs one forward for requests whose experts are still being read, where there is nothing else to do."""
        waiting = [request for request in self._running if not (request.is_exact or request.awaits_slots)]
        self._decode_long("pooled", waiting)

    def _decode_long(self, name: str, requests: Sequence[Request]) -> None:
        if not requests:
            return
        with self._long_forward(requests):
            outcomes = self._decoder.decode(name, requests)
        self._take_all(requests, outcomes)

    def _decode_pooled(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        started_s = time.monotonic()
        around = self._in_forward, self._may_interrupt
        self._in_forward, self._may_interrupt = (*self._in_forward, *requests), False
        try:
            outcomes = self._decoder.decode("pooled", requests)
        finally:
            self._in_forward, self._may_interrupt = around
        self._take_all(requests, outcomes)
        now_s = time.monotonic()
        self._next_decode_s = now_s + (now_s - started_s)

    def _take_all(self, requests: Sequence[Request], outcomes: Sequence[Outcome]) -> None:
        now_s = time.monotonic()
        num_before = sum(len(request.output_ids) for request in requests)
        for request, outcome in zip(requests, outcomes, strict=True):
            if request.has_ended:
                continue  # with another of its answers
            with self._on_behalf_of(request, "taking a token failed"):
                self._take(request, outcome, now_s)
                if not request.has_ended:
                    request.answer_drift()
        self._num_tokens += sum(len(request.output_ids) for request in requests) - num_before

    def _meanwhile(self) -> float | None:
        """Called while a forward waits for reads: does what `_on_layer` does, and decodes a token for requests that
        hold their experts. Returns the seconds until the next call; None in a forward that is not long.
        """
        if not self._may_interrupt:
            return None
        self._on_layer()
        due_s = self._decode_meanwhile()
        return CHECK_S if due_s is None else min(CHECK_S, due_s)

    def _decode_meanwhile(self) -> float | None:
        """Decodes for requests that hold their experts, with pauses as long as such a step takes. Returns the seconds
        until the next one.
        """
        able = [request for request in self._able() if not request.is_exact]
        if not able:
            return None
        if self._next_decode_s <= time.monotonic():
            self._decode_pooled(able)
            self._deliver()
        return max(0.0, self._next_decode_s - time.monotonic())

    def _admit(self, now_s: float) -> None:
        suspended = [request for request in (*self._prefilling, *self._running) if request.awaits_slots]
        if not (suspended or len(self._line)) or now_s < self._next_admission_s:
            return
        self._next_admission_s = now_s + ADMISSION_RETRY_S
        held_up = self._resume(suspended)  # answers that have begun come before those that have not
        if self._room_at_refusal == self._room() or all(self._account_of(each) in held_up for each in self._line):
            return
        self._charge(now_s)
        refused, is_complete = self._admit_some(now_s, held_up)
        self._room_at_refusal = self._room() if refused else None
        if not is_complete:
            self._admit_soon()
        if refused and self._read_ahead_for != (refused[0], self._num_ended):
            self._read_ahead_for = (refused[0], self._num_ended)
            with self._on_behalf_of(refused[0], "reading its experts ahead failed"):
                refused[0].read_ahead(self._paged)

    def _admit_some(self, now_s: float, held_up: Collection[str]) -> tuple[list[Request], bool]:
        """Admits waiting requests that fit, but none of the accounts `held_up`. Returns those that were refused, in the
        order in which they were tried, and whether it came to the end.

        It does not where a tenant is guaranteed slots and its prompt can run, or may just have come.
        """
        refused: list[Request] = []
        refused_pools: set[tuple[str, Experts]] = set()  # and whose slots they would have been in
        for number, request in enumerate(self._candidates()):
            account, pool = self._account_of(request), request.group
            if account in held_up or (pool is not None and (account, pool) in refused_pools):
                continue
            with self._on_behalf_of(request, "its admission failed"):
                if number == 0:
                    request.prefetch(self._paged)  # before it is reserved: a prefetch takes no promised slot
                is_full = self._num_rows + request.num_rows > self._max_running
                may_fit = not is_full and self._may_fit(request)
                if not is_full and request.acquire(self._paged, self._blocks, may_fit=may_fit):
                    self._let_in(request, now_s)
                    if self._has_guarantee(request) and request.is_paged_in(self._paged):
                        return refused, False
                else:
                    refused.append(request)
                    if pool is not None:
                        refused_pools.add((account, pool))
                if is_full or len(refused) == ADMISSION_TRIES:
                    break
            if self._paged.pager.is_any_guaranteed and self._inbox.has_news:
                return refused, False
        return refused, True

    def _may_fit(self, request: Request) -> bool:
        """Returns False where there are certainly too few slots, which is cheaper to tell than to try."""
        holding = [other for other in (*self._prefilling, *self._running) if not other.is_in_place]
        experts = request.group
        if experts is None or any(other.group is None or other.has_drifted for other in holding):
            return True  # some are held of which nothing is known here
        held = 0
        for other in holding:
            held |= other.group or 0
        return (experts | held).bit_count() <= self._paged.pager.num_slots

    def _admit_soon(self) -> None:
        """Has the next step look at the line: somebody has come, or given back what others may wait for."""
        self._next_admission_s, self._room_at_refusal = 0.0, None

    def _room(self) -> tuple[int, int, int, int]:
        """Returns what admission depends on, beside who has come and who has ended: slots and blocks that can be had,
        rows, and how often guarantees have changed.
        """
        pager = self._paged.pager
        return pager.num_unreserved, self._blocks.num_free, self._num_rows, pager.num_guarantees

    def _account_of(self, request: Request) -> str:
        return self._paged.pager.account(request.asked.tenant)

    @property
    def _num_rows(self) -> int:
        """The rows of a decode step once all prompts have run."""
        return len(self._running) + sum(request.num_rows for request in self._prefilling)

    def _let_in(self, request: Request, now_s: float) -> None:
        self._line.admit(request, request.group)
        self._tenants.admitted(request.asked.tenant)
        self._prefilling.append(request)
        request.admitted_s = max(now_s, request.submitted_s)  # it may have come just after `now_s`
        waited_s = request.admitted_s - request.submitted_s
        self._clock.admitted(request.place, waited_s)
        self._observer.queued(waited_s)
        request.prefetch(self._paged)

    def _candidates(self) -> Iterator[Request]:
        """Yields waiting requests in the order to try: by class, by what their tenants were given, then by overlap."""
        if len(self._line) == 1:
            return self._line.candidates()
        of_tenant = self._tenants.claims()
        held = 0
        for request in (*self._prefilling, *self._running):
            held |= 0 if request.is_in_place else request.want.experts or 0
        loaded: Experts | None = None

        def ordered(requests: Sequence[Request]) -> Iterator[Request]:
            nonlocal loaded
            if loaded is None:
                loaded = held | as_bits(self._paged.pager.resident_experts(), self._expert_width)
            return (requests[index] for index in by_overlap([each.want for each in requests], loaded, held))

        def claim(request: Request) -> tuple[int, float, int]:
            return -request.asked.priority, *of_tenant(request.asked.tenant)

        return self._line.candidates(
            claim=claim, ordered=ordered, group=lambda request: request.group, lane=self._account_of
        )

    def _charge(self, now_s: float, ended: Sequence[Request] = ()) -> None:
        """Charges tenants for what their requests have used since the last call; or only for those that end."""
        holding = tuple(dict.fromkeys(request.first for request in (*self._prefilling, *self._running)))
        num_alike = Counter(request.group for request in holding if not request.is_in_place)
        costs: dict[str, float] = {}
        for request in ended or holding:
            held = request.lease.num_bound + request.lease.num_reserved if request.lease is not None else 0
            share = held / max(1, self._paged.pager.num_slots)
            if request.group is not None:
                share /= max(1, num_alike[request.group])
            tenant = request.asked.tenant
            costs[tenant] = costs.get(tenant, 0.0) + request.spend(now_s, share, self._paged)
        for tenant, (given, entitled) in self._tenants.charge(costs).items():
            self._observer.shared_out(tenant, given, entitled)

    def _resume(self, suspended: list[Request]) -> set[str]:
        """Gives drifting requests their slots, in the order of arrival within each account. Returns the accounts of
        those that have to keep waiting.
        """
        held_up: set[str] = set()
        for request in sorted(suspended, key=lambda each: each.submitted_s):
            if (account := self._account_of(request)) in held_up:
                continue
            with self._on_behalf_of(request, "resuming it failed"):
                if not request.acquire_change(self._paged):
                    held_up.add(account)
        return held_up

    def _prefill_and_decode(self) -> bool:
        """Runs prompts, and a token of each request that decodes, by one forward. Returns False, with nothing done,
        where they cannot share one.
        """
        most_tokens = min(self._prefill_chunk_tokens, self._paged.plan.beside_tokens)
        if not (self._prefilling and self._running and most_tokens and self._decoder.shares_steps):
            return False
        rows = self._able()
        if self._paged.pager.is_any_guaranteed or not rows or not self._run_beside_each_other(rows):
            return False
        parts = self._parts(self._prefilling, most_tokens)
        if not parts or not self._run_beside_each_other([rows[0], *(request for request, _ in parts)]):
            return False
        name = _exact_group(self._account_of(rows[0])) if rows[0].is_exact else "pooled"
        with self._long_forward(rows):
            self._run_prompts(parts, name, rows)
        self._decoder.keep_groups({name})
        return True

    def _run_beside_each_other(self, requests: Sequence[Request]) -> bool:
        is_exact = requests[0].is_exact
        return all(each.is_exact is is_exact and each.runs_beside_others(self._paged) for each in requests)

    def _prefill(self, requests: Sequence[Request], most_tokens: int | None = None) -> None:
        """Runs prompts whose experts are loaded, as many as one forward takes; the very first, if nothing decodes."""
        room = self._lone_chunk_tokens if self._is_alone else self._prefill_chunk_tokens
        if parts := self._parts(requests, min(room, most_tokens or room)):
            self._run_prompts(parts)

    def _parts(self, requests: Sequence[Request], room: int) -> list[tuple[Request, int]]:
        """Returns which prompts run next, with how many tokens each. Those of tenants that are guaranteed slots come
        first.
        """
        decoding = bool(self._able()) if requests else False
        parts: list[tuple[Request, int]] = []
        able = [request for request in requests if not request.awaits_slots]
        for request in sorted(able, key=self._has_guarantee, reverse=True):
            if not (parts or self._has_guarantee(request)) and self._paged.pager.is_any_guaranteed:
                room = min(room, BESIDE_GUARANTEED_TOKENS)
            with self._on_behalf_of(request, "its prefill failed"):
                waits_alike = bool(parts) and request.shares_pool(parts[0][0])
                if not (decoding or parts) or waits_alike or request.is_paged_in(self._paged):
                    num_tokens = self._tokens_to_run(request, room)
                    if not parts or self._may_join(request, parts[0][0], num_tokens, room):
                        parts.append((request, num_tokens))
                        room -= num_tokens
            if parts and room <= 0:
                break
        return parts

    def _has_guarantee(self, request: Request) -> bool:
        """Tells whether the request's tenant is guaranteed slots."""
        return self._account_of(request) != COMMON

    @property
    def _is_alone(self) -> bool:
        """Tells whether a single prompt is all that there is to run."""
        return len(self._prefilling) == 1 and not (self._running or self._joining or len(self._line))

    def _tokens_to_run(self, request: Request, room: int) -> int:
        """Returns how many tokens of its prompt run next: all that are left, or as many as there is `room` for in a
        part.
        """
        num_left = len(request.asked.prompt_token_ids) - request.num_prefilled
        return min(num_left, room) if request.may_be_chunked(self._paged) else num_left

    def _may_join(self, request: Request, first: Request, num_tokens: int, room: int) -> bool:
        """Tells whether the prompt may run in the forward of another: both hold their experts, or both page as they go.
        Those of another account would hold up what a tenant is guaranteed, or page into slots that are not theirs.
        """
        return (
            0 < num_tokens <= room
            and self._decoder.shares_prefills
            and request.is_exact == first.is_exact
            and self._account_of(request) == self._account_of(first)
            and request.asked.sampling.prompt_logprobs is None
            and first.asked.sampling.prompt_logprobs is None
        )

    def _run_prompts(self, parts: Sequence[tuple[Request, int]], name: str = "", rows: Sequence[Request] = ()) -> None:
        """Runs parts of prompts, and with them a token of each of `rows`, which are the group `name`."""
        requests = [request for request, _ in parts]
        started_s, num_before = time.monotonic(), sum(request.num_prefilled for request in requests)
        for request in requests:
            if math.isnan(request.prefill_started_s):
                request.prefill_started_s = started_s
        with self._long_forward(requests):
            if rows:
                outcomes, decoded = self._decoder.prefill_and_decode(parts, name, rows)
            else:
                outcomes, decoded = self._decoder.prefill(parts), ()
        # None where the forward was left, or failed.
        self._num_tokens += sum(request.num_prefilled for request in requests) - num_before
        now_s = time.monotonic()
        for request, first_tokens in zip(requests, outcomes, strict=True):
            with self._on_behalf_of(request, "taking its first token failed"):
                self._take_first(request, first_tokens, now_s)
        self._take_all(rows, decoded)

    def _take_first(self, request: Request, outcomes: Sequence[Outcome], now_s: float) -> None:
        """Continues a request after a part of its prompt has run: it waits on, or its answers decode from now on."""
        for part in request.take_prompt_logprobs():
            tenant = request.asked.tenant
            self._events.append(TokenChunk(request.asked.id, (), "", None, tenant, prompt_logprobs=part))
        error = request.fate or next((each for each in outcomes if isinstance(each, PagerError)), None)
        if request.is_in_place and isinstance(error, SlotsExhausted):
            request.lose_place()
            return
        if error is not None:
            self._fail(request, error)
        if error is not None or not outcomes:
            return
        request.share_prompt(self._blocks, self._cache)
        self._prefilling.remove(request)
        self._running += request.rows
        if request.lease is not None and not request.is_exact:  # an exact one pages within its reservation
            request.lease.shrink()
            self._admit_soon()
        for row, outcome in zip(request.rows, outcomes, strict=True):
            if not request.has_ended:
                self._take(row, outcome, now_s)

    def _take(self, request: Request, outcome: Outcome, now_s: float) -> None:
        outcome = request.fate or outcome
        if request.is_in_place and isinstance(outcome, SlotsExhausted):
            request.lose_place()
            return
        if isinstance(outcome, PagerError):
            self._fail(request.first, outcome)
            return
        if not request.output_ids:
            self._observer.first_token(now_s - request.submitted_s)
        text, reason = request.accept(outcome.id, now_s)
        request.publish(self._blocks)
        num_going_on = request.num_going_on
        usage = None if reason is None else self._account(request, reason, is_last=not num_going_on)
        chunk = TokenChunk(
            request.asked.id,
            (outcome.id,),
            text,
            usage,
            request.asked.tenant,
            () if outcome.logprobs is None else (outcome.logprobs,),
            page_ins=request.take_page_ins(),
            outside_mass=request.take_outside(),
            index=request.index,
            num_going_on=num_going_on,
        )
        if reason is not None and num_going_on:
            self._running.remove(request)
            request.leave(self._blocks)
        elif reason is not None:
            self._end(request.first, reason.value, usage)
        self._events.append(chunk)

    def _account(self, request: Request, reason: FinishReason, *, is_last: bool) -> Usage:
        """Returns the usage of an answer that is about to end well; with a request's last one its account is closed."""
        if is_last:
            request.account(self._paged)
        usage = request.usage(reason, self._paged.fingerprint)
        if is_last:
            record_spans(request.first, reason.value)
        return usage

    @contextmanager
    def _on_behalf_of(self, request: Request, what: str) -> Iterator[None]:
        """Makes any exception in the block fail that request alone; the log says `what` failed."""
        try:
            yield
        except ENDS_THE_PROCESS:
            raise
        except BaseException as error:
            failure = failure_of(error, request.asked.id, what)
            if not request.has_ended:
                self._fail(request.first, failure)

    def _fail(self, request: Request, error: PagerError) -> None:
        with _errors_logged(f"the spans of request {request.asked.id} failed"):
            record_spans(request, error.reason.lower())
        account = self._end(request, error.reason.lower())
        self._events.append(Failure(request.asked.id, error, request.asked.tenant, account))

    def _end(self, request: Request, outcome: str, usage: Usage | None = None) -> Account:
        """Gives back at once what the request holds, whatever its state. Raises nothing: the end of a request cannot
        fail.
        """
        account, rows = request.account(self._paged), request.rows
        self._settle_with_tenant(request)
        with _errors_logged(f"request {request.asked.id} could not give back all that it held"):
            request.release(self._blocks)
        self._running = [row for row in self._running if row not in rows]
        if request in self._prefilling:
            self._prefilling.remove(request)
        if request in self._line:
            self._line.remove(request)
        if request in self._watched:
            self._watched.remove(request)
        self._num_ended += 1
        self._admit_soon()
        with _errors_logged(f"the observer failed at the end of request {request.asked.id}"):
            self._observer.ended(outcome, account, usage, request.token_s)
        self._inbox.remove(request)
        return account

    def _settle_with_tenant(self, request: Request) -> None:
        """Charges the tenant of a request that ends; a request that has not joined the line yet is unknown there."""
        was_admitted = not math.isnan(request.admitted_s)
        if not was_admitted and request not in self._line:
            return
        with _errors_logged(f"charging the tenant of request {request.asked.id} failed"):
            if was_admitted:
                self._charge(time.monotonic(), [request])
            self._tenants.ended(request.asked.tenant, was_admitted=was_admitted)

    def _deliver(self) -> None:
        for request in self._watched:
            if page_ins := request.take_page_ins():
                asked = request.asked
                self._events.append(TokenChunk(asked.id, (), "", None, asked.tenant, page_ins=page_ins))
        events, self._events = self._events, []
        if not events:
            return
        try:
            self._sink(events)
        except Exception:
            log.exception("the sink of the engine's events failed; %d events were lost", len(events))

    def _fail_all(self, error: PagerError) -> None:
        self._inbox.take()
        for request in self._inbox.live():
            self._fail(request, error)
        self._deliver()


def _exact_group(account: str) -> str:
    """Returns the name of the group in which the exact requests of an account decode."""
    return f"exact {account}"


def _shutting_down() -> NotReady:
    return NotReady("this worker is shutting down; send the request to another", retry_after_s=1.0)


@contextmanager
def _errors_logged(what: str) -> Iterator[None]:
    """Logs exceptions in the block, on which no answer depends."""
    try:
        yield
    except ENDS_THE_PROCESS:
        raise
    except BaseException:
        log.exception(what)


def _eos_ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)
