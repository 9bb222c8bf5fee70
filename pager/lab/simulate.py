"""A service in simulated time: the router's and the engine's own pure code on traffic, against measured costs.

Placement (`pager.cluster.placement`), admission and fairness (`pager.engine.turns`), slots and eviction
(`pager.cache.index`) are what a service runs; only forwards, reads and the way between them are replaced by what they
take (`Costs`). Steps in which nothing is admitted and nobody ends are taken together, so that a request costs a few
events, however long its answer.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random

import numpy as np

from pager.cache.index import DEFAULT_POLICY, CacheIndex, make_policy
from pager.cluster.placement import place
from pager.engine.scheduler import LineClock
from pager.engine.turns import Experts, Spent, TenantCounters, WaitingLine, Want, as_bits, by_overlap
from pager.types import ExpertKey, ExpertPool

CHUNK_TOKENS = 512  # of prompts in one forward
MAX_OVERTAKES = 8
ADMISSION_TRIES = 32
READ_AHEAD = 16  # pools read ahead that do not evict each other, as `pager.cache.ledger.PrefetchList` has it
CHARGE_EVERY_S = 0.05
REPORT_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of a worker's work on the machine in question, and its room."""

    step_s: float  # a decode forward with one row
    row_s: float  # and each further row of it
    pool_s: float  # and each further pool whose rows are in it
    prefill_s: float  # a forward over prompts alone
    prompt_token_s: float  # each token of them, in a forward of their own or in that of rows
    page_bytes_per_s: float
    request_s: float  # the way to the worker and back, up to the first token, where the router has nothing else to do
    expert_bytes: int
    num_slots: int
    max_running: int = 32
    max_waiting: int = 256
    restart_s: float = 30.0  # from the loss of a worker until another is ready, with nothing loaded
    router_s: float = 0.0  # of `request_s`, what the router does for one request after the other
    change_s: float = 0.0  # of the first decode forward after rows have come or gone
    workers_per_machine: int = 1  # which share its cores
    in_place: bool = False  # pools for which there are no slots are computed where the page cache has them
    place_s: float = 0.0  # what a forward takes more in which any pool is computed so
    busy_s: float = 0.0  # how much later first tokens are, in the mean, as cores are busy; drawn for each request
    alone: float = 1.0  # a forward's time where no other worker of the machine computes, over that where all do


@dataclass(frozen=True)
class NamedExperts(ExpertPool):
    """A pool under the name by which requests share it, with what the simulation asks of it made once."""

    name: str = ""
    bits: Experts = 0
    listed: tuple[ExpertKey, ...] = ()

    def __hash__(self) -> int:
        return hash(self.name)

    @classmethod
    def of(cls, name: str, pool: ExpertPool, width: int) -> NamedExperts:
        """`width` is more than the number of any expert."""
        return cls(pool.experts, None, name, as_bits(pool.experts, width), pool.keys())


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    tenant: str
    pool: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules by which requests are placed and admitted: as the service does, or by a rule to compare with."""

    name: str
    placement: str = "homes"  # or "least loaded", "round robin"
    admission: str = "overlap"  # or "first come"


SERVICE = Rules("as the service does")
OTHERS = (
    Rules("first come, first served", admission="first come"),
    Rules("placed in turn", placement="round robin"),
    Rules("placed where least is running", placement="least loaded"),
)


class _Request:
    """One request on its way. Compared and hashed by identity."""

    __slots__ = (
        "admitted_s",
        "arrival",
        "decoded_before",
        "first_s",
        "is_in_place",
        "num_left",
        "number",
        "place",
        "pool",
        "sent_s",
        "spent",
        "spent_s",
        "want",
        "was_lost",
    )

    def __init__(self, number: int, arrival: Arrival, pool: NamedExperts) -> None:
        self.number = number
        self.arrival = arrival
        self.pool = pool
        self.want = Want(len(pool.listed), arrival.prompt_tokens + arrival.output_tokens, pool.bits)
        self.admitted_s = self.first_s = self.sent_s = self.spent_s = math.nan
        self.place = 0  # in its worker's line when it joined, the first being 1
        self.decoded_before = 0  # steps of its worker before its first decode step
        self.spent = Spent()
        self.is_in_place = False  # it holds no slots
        self.num_left = arrival.prompt_tokens  # of its prompt, not run yet
        self.was_lost = False


@dataclass(slots=True)
class Outcome:
    """The outcome of a trace."""

    rules: Rules
    num_workers: int
    first_token_s: list[float] = field(default_factory=list)
    by_tenant: dict[str, list[float]] = field(default_factory=dict)
    num_tokens: int = 0
    bytes_paged: int = 0
    num_placed: int = 0
    num_resident: int = 0  # placed where all of their pool was
    num_refused: int = 0
    num_failed: int = 0
    began_s: float = math.inf
    ended_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / max(self.ended_s - self.began_s, 1e-9)

    def first_token_at(self, percent: float) -> float:
        """The time within which that part of the requests had its first token."""
        return float(np.percentile(self.first_token_s, percent)) if self.first_token_s else math.nan

    def worst_tenant_at(self, percent: float) -> float:
        """The largest of the tenants' own such times; of those with ten requests at least, where there are any."""
        often = [times for times in self.by_tenant.values() if len(times) >= 10] or list(self.by_tenant.values())
        return max((float(np.percentile(times, percent)) for times in often), default=math.nan)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Alike steps, one after the other; with parts of prompts one forward, with rows in it or without."""

    start_s: float
    step_s: float
    num_steps: int  # in which rows decode
    parts: Sequence[tuple[_Request, int]] = ()  # and how many tokens of each

    @property
    def end_s(self) -> float:
        return self.start_s + max(1, self.num_steps) * self.step_s


class _Worker:
    """One worker: its line, its slots, and the stretch of steps that it is in. A `Candidate` of placement."""

    peak_page_in_bytes_per_s = None

    def __init__(self, id_: str, costs: Costs, rules: Rules, width: int) -> None:
        """`width` is more than the number of any expert."""
        self.id = id_
        self.costs = costs
        self.width = width
        self.is_fair = rules.admission == "overlap"
        self.state = "ready"
        self.num_slots = costs.num_slots
        self.page_in_bytes_per_s = costs.page_bytes_per_s
        self.waiting = self.running = 0  # these four as last reported
        self.place_s: float | None = None
        self.reported: Experts = 0
        self.bytes_paged = 0
        self.neighbours: Sequence[_Worker] = ()  # on the same machine
        self.begin()

    def begin(self) -> None:
        """Begins with nothing loaded and nobody in line."""
        self.line: WaitingLine[_Request] = WaitingLine(MAX_OVERTAKES)
        self.clock = LineClock()
        self.tenants = TenantCounters()
        self.index = CacheIndex(self.costs.num_slots, make_policy(DEFAULT_POLICY))
        self.resident: Experts = 0
        self.holders: Counter[NamedExperts] = Counter()
        self.held: Experts = 0
        self.ahead: deque[NamedExperts] = deque(maxlen=READ_AHEAD)  # what is read ahead evicts none of these
        self.coming: deque[tuple[float, ExpertKey]] = deque()  # reads in order, by their ends
        self.prefilling: list[_Request] = []
        self.decoding: list[tuple[int, int, _Request]] = []  # a heap by the step at which they end
        self.num_decoded = 0  # steps
        self.has_changed = False  # since the last of them: who decodes
        self.charged_s = 0.0
        self.num_ended = 0
        self.read_ahead_for: tuple[_Request | None, int] = (None, 0)  # and how many had ended then
        self.stretch: _Stretch | None = None
        self.has_decoded = False  # in this step, of which prompts are the end
        self.due_s = math.inf
        self.version = 0

    @property
    def num_live(self) -> int:
        return len(self.line) + len(self.prefilling) + len(self.decoding)

    def missing_bytes(self, pool: ExpertPool) -> int:
        assert isinstance(pool, NamedExperts)
        return (pool.bits & ~self.reported).bit_count() * self.costs.expert_bytes

    def report(self) -> None:
        """Reports to the router, which knows no more of the worker until the next report."""
        self.waiting, self.running = len(self.line), len(self.prefilling) + len(self.decoding)
        self.place_s = self.clock.place_s if len(self.line) else None
        self.reported = self.resident

    # Slots.

    def install(self, now_s: float) -> None:
        while self.coming and self.coming[0][0] <= now_s:
            self.index.installed(self.coming.popleft()[1])

    def load(self, keys: Sequence[ExpertKey], now_s: float, spare: Collection[ExpertKey] = ()) -> bool:
        """Pins `keys` and queues the reads they need; False where they do not fit now."""
        plan = self.index.plan(keys, spare=spare)
        if plan is None:
            return False
        self.index.commit(plan)
        if plan.victims:
            self.resident &= ~_bits(plan.victims, self.width)
        if plan.loads:
            self.resident |= _bits([load.key for load in plan.loads], self.width)
            ends_s = max(now_s, self.coming[-1][0] if self.coming else 0.0)
            each_s = self.costs.expert_bytes / self.costs.page_bytes_per_s
            for number, load in enumerate(plan.loads, 1):
                self.coming.append((ends_s + number * each_s, load.key))
            self.bytes_paged += len(plan.loads) * self.costs.expert_bytes
        return True

    def acquire(self, request: _Request, now_s: float) -> bool:
        """Takes slots for the request or, where it needs none, admits it without; False where it has to wait."""
        has_free = (request.pool.bits & ~self.resident).bit_count() <= self.index.num_free
        has_slots = (has_free or not self.costs.in_place) and self.hold(request.pool, now_s)
        request.is_in_place = self.costs.in_place and not has_slots
        return has_slots or request.is_in_place

    def hold(self, pool: NamedExperts, now_s: float) -> bool:
        """Takes slots for one request more of the pool; False where they are not to be had now."""
        if pool not in self.holders:
            # What comes may be nobody's, and cost nothing.
            new = (pool.bits & ~self.held).bit_count() - len(self.coming)
            if new > self.index.num_unreserved or not self.load(pool.listed, now_s):
                return False
            self.held |= pool.bits
            if pool in self.ahead:
                self.ahead.remove(pool)
        self.holders[pool] += 1
        return True

    def release(self, pool: NamedExperts) -> None:
        self.holders[pool] -= 1
        if not self.holders[pool]:
            del self.holders[pool]
            for key in pool.listed:
                self.index.unpin(key)
            self.held = 0
            for other in self.holders:
                self.held |= other.bits

    def ready_s(self, pool: NamedExperts) -> float:
        """When all of the pool will be there."""
        if not self.coming:
            return 0.0
        bits, width = pool.bits, self.width
        ends = (end_s for end_s, key in self.coming if bits >> (key.layer * width + key.expert) & 1)
        return max(ends, default=0.0)

    # Turns.

    def candidates(self) -> Iterator[_Request]:
        if len(self.line) == 1 or not self.is_fair:
            return self.line.candidates()
        of_tenant = self.tenants.claims()
        loaded, held = self.resident, self.held

        def ordered(requests: Sequence[_Request]) -> Iterator[_Request]:
            return (requests[index] for index in by_overlap([each.want for each in requests], loaded, held))

        return self.line.candidates(
            claim=lambda request: of_tenant(request.arrival.tenant),
            ordered=ordered,
            group=lambda request: request.pool.bits,
        )

    def admit(self, now_s: float) -> None:
        if not len(self.line):
            return
        if len(self.line) > 1 and now_s - self.charged_s > CHARGE_EVERY_S:
            self.charge(now_s, [*self.prefilling, *(request for _, _, request in self.decoding)])
            self.charged_s = now_s
        refused: list[_Request] = []
        for request in self.candidates():
            if any(request.pool is other.pool for other in refused):
                continue
            is_full = len(self.prefilling) + len(self.decoding) >= self.costs.max_running
            if is_full or not self.acquire(request, now_s):
                refused.append(request)
            else:
                self.line.admit(request, request.pool.bits)
                self.tenants.admitted(request.arrival.tenant)
                self.prefilling.append(request)
                self.clock.admitted(request.place, now_s - request.sent_s)
                request.admitted_s = request.spent_s = now_s
            if is_full or len(refused) == (ADMISSION_TRIES if self.is_fair else 1):
                break
        if refused and self.is_fair and self.read_ahead_for != (refused[0], self.num_ended):
            self.read_ahead_for = (refused[0], self.num_ended)
            self.read_ahead(refused[0].pool, now_s)

    def read_ahead(self, pool: NamedExperts, now_s: float) -> None:
        """Reads what fits of the pool that is next into slots that nobody holds."""
        missing, width = pool.bits & ~self.resident, self.width
        room = self.index.num_unreserved - (pool.bits & self.resident & ~self.held).bit_count()
        if not missing or room <= 0:
            return
        keys = [key for key in pool.listed if missing >> (key.layer * width + key.expert) & 1][:room]
        self.ahead.append(pool)
        if self.load(keys, now_s, spare={key for other in self.ahead for key in other.listed}):
            for key in keys:
                self.index.unpin(key)

    def charge(self, now_s: float, requests: Iterable[_Request]) -> None:
        costs: dict[str, float] = {}
        for request in requests:
            held = 0 if request.is_in_place else len(request.pool.listed)
            share = held / self.num_slots / max(1, self.holders[request.pool])
            output = 0 if math.isnan(request.first_s) else self.num_decoded - request.decoded_before + 1
            spent = Spent(
                0 if math.isnan(request.first_s) else request.arrival.prompt_tokens,
                min(output, request.arrival.output_tokens),
                0.0,
                request.spent.slot_s + share * (now_s - request.spent_s),
            )
            tenant = request.arrival.tenant
            costs[tenant] = costs.get(tenant, 0.0) + spent.cost(request.spent)
            request.spent, request.spent_s = spent, now_s
        self.tenants.charge(costs)

    # Steps.

    @property
    def is_computing(self) -> bool:
        return self.stretch is not None

    @property
    def pace(self) -> float:
        """The time that a forward takes now, over that where all workers of the machine compute."""
        if not self.neighbours:
            return 1.0
        busy = sum(other.is_computing for other in self.neighbours) / len(self.neighbours)
        return self.costs.alone + (1 - self.costs.alone) * busy

    def arrive(self, request: _Request, now_s: float) -> None:
        if not len(self.line):
            self.clock.forget()
        self.line.add(request)
        request.place, request.sent_s = len(self.line), now_s
        self.tenants.arrived(request.arrival.tenant)
        if self.stretch is None:
            self.due_s = min(self.due_s, now_s)
            self.version += 1
        else:
            self.look_up(now_s)

    def look_up(self, now_s: float) -> None:
        """Ends the stretch with the step that it is in: what it was begun for has changed."""
        if self.stretch is None:
            return
        start_s, step_s, num_steps = self.stretch.start_s, self.stretch.step_s, self.stretch.num_steps
        num_begun = max(1, math.ceil((now_s - start_s) / step_s)) if step_s else num_steps
        if num_begun < num_steps:
            self.stretch = replace(self.stretch, num_steps=num_begun)
            self.due_s = self.stretch.end_s
            self.version += 1

    def step(self, now_s: float) -> Iterator[_Request]:
        """Ends the stretch that is due, and begins the next. Yields who has had its last token."""
        self.install(now_s)
        if self.stretch is not None:
            num_steps, parts = self.stretch.num_steps, self.stretch.parts
            self.num_decoded += num_steps
            self.has_decoded = not parts
            self.has_changed &= not num_steps
            while self.decoding and self.decoding[0][0] <= self.num_decoded:
                self.has_changed = True
                yield self.end(heapq.heappop(self.decoding)[2], now_s)
            for request, num_tokens in parts:
                request.num_left -= num_tokens
                if request.num_left:
                    continue
                self.prefilling.remove(request)
                request.first_s = now_s
                request.decoded_before = self.num_decoded
                if request.arrival.output_tokens == 1:
                    yield self.end(request, now_s)
                    continue
                self.has_changed = True
                last = self.num_decoded + request.arrival.output_tokens - 1
                heapq.heappush(self.decoding, (last, request.number, request))
        self.admit(now_s)
        self.begin_stretch(now_s)

    def end(self, request: _Request, now_s: float) -> _Request:
        self.num_ended += 1
        self.charge(now_s, [request])
        self.tenants.ended(request.arrival.tenant, was_admitted=True)
        if not request.is_in_place:
            self.release(request.pool)
        return request

    def begin_stretch(self, now_s: float) -> None:
        """Begins what the engine would do next: a forward of prompts, with the rows unless these have just decoded; or
        steps of the rows until somebody ends, or prompts can run.
        """
        rows = [request for _, _, request in self.decoding]
        parts, ready_s = self.parts(now_s)
        decoding = [] if parts and self.has_decoded else rows
        step_s = self.forward_s(decoding, parts)
        start_s = now_s + self.pace * self.costs.change_s * (self.has_changed and bool(decoding))
        self.version += 1
        if parts:
            if not parts[0][0].is_in_place:  # it may wait for reads
                step_s = max(step_s, self.ready_s(parts[0][0].pool) - start_s)
            self.stretch = _Stretch(start_s, step_s, int(bool(decoding)), parts)
        elif rows:
            num_steps = self.decoding[0][0] - self.num_decoded
            if ready_s < math.inf:
                num_steps = min(num_steps, max(1, math.ceil((ready_s - now_s) / step_s)))
            self.stretch = _Stretch(start_s, step_s, num_steps)
        else:
            self.stretch = None
        self.due_s = math.inf if self.stretch is None else self.stretch.end_s

    def parts(self, now_s: float) -> tuple[list[tuple[_Request, int]], float]:
        """Returns which prompts run next, with how many tokens each, and when the next of the others can."""
        parts: list[tuple[_Request, int]] = []
        ready_s, room = math.inf, CHUNK_TOKENS
        for request in self.prefilling:
            there_s = 0.0 if request.is_in_place else self.ready_s(request.pool)
            waits_alike = bool(parts) and request.pool is parts[0][0].pool
            if there_s > now_s and (self.decoding or parts) and not waits_alike:
                ready_s = min(ready_s, there_s)
            elif room:
                parts.append((request, min(room, request.num_left)))
                room -= parts[-1][1]
        return parts, ready_s

    def forward_s(self, rows: Sequence[_Request], parts: Sequence[tuple[_Request, int]]) -> float:
        """Returns how long a forward of these takes now."""
        costs, requests = self.costs, [*rows, *(request for request, _ in parts)]
        # Where all have slots and one pool holds them, there is no need to look.
        is_one = len(self.holders) < 2 and not costs.in_place
        num_pools = 1 if is_one else len({request.pool.name for request in requests})
        seconds = costs.step_s + (len(rows) - 1) * costs.row_s if rows else costs.prefill_s
        seconds += max(0, num_pools - 1) * costs.pool_s
        seconds += sum(num_tokens for _, num_tokens in parts) * costs.prompt_token_s
        return self.pace * (seconds + costs.place_s * any(request.is_in_place for request in requests))

    def lose(self) -> list[_Request]:
        """Ends its process. Returns who was there."""
        requests = [*self.line, *self.prefilling, *(request for _, _, request in self.decoding)]
        version = self.version
        self.begin()
        self.state, self.version = "dead", version + 1
        return requests


def _bits(keys: Iterable[ExpertKey], width: int) -> Experts:
    bits = 0
    for key in keys:
        bits |= 1 << (key.layer * width + key.expert)
    return bits


class Simulation:
    """A router and its workers. `run` takes a trace from its first request to its last token; one that is later in time
    may follow, for which workers hold what they held.
    """

    def __init__(
        self,
        pools: Mapping[str, ExpertPool],
        costs: Costs,
        workers: int | Sequence[str],
        rules: Rules = SERVICE,
        lose_at_s: float | None = None,
    ) -> None:
        """`workers`: how many, or their ids, by which pools have their homes.

        `lose_at_s`: when the first worker is lost, counted from the first request.
        """
        width = 1 + max((expert for pool in pools.values() for layer in pool.experts for expert in layer), default=0)
        self.pools = {name: NamedExperts.of(name, pool, width) for name, pool in pools.items()}
        self.costs = costs
        names = [f"w{number}" for number in range(workers)] if isinstance(workers, int) else workers
        self.workers = [_Worker(name, costs, rules, width) for name in names]
        for number, worker in enumerate(self.workers):
            first = number - number % costs.workers_per_machine
            machine = self.workers[first : first + costs.workers_per_machine]
            worker.neighbours = [other for other in machine if other is not worker]
        self.by_id = {worker.id: worker for worker in self.workers}
        self.rules = rules
        self.in_flight: Counter[str] = Counter()
        self.outcome = Outcome(rules, len(self.workers))
        self._lose_at_s = lose_at_s
        self._events: list[tuple[float, int, _Worker, int]] = []
        self._numbers = count()
        self._next_report_s = 0.0
        self._half_way_s = max(0.0, costs.request_s - costs.router_s) / 2
        self._random = Random(0)

    def run(self, arrivals: Iterable[Arrival]) -> Outcome:
        """Arrivals come in the order of their times."""
        self.outcome = Outcome(self.rules, len(self.workers))
        paged_before = sum(worker.bytes_paged for worker in self.workers)
        trace = iter(arrivals)
        following = next(trace, None)
        if following is not None:
            self.outcome.began_s = following.at_s
            if self._lose_at_s is not None:
                heapq.heappush(self._events, (following.at_s + self._lose_at_s, -1, self.workers[0], -1))
        router_s, router_free_s = self.costs.router_s, -math.inf
        while following is not None or self._events:
            if following is not None:
                sent_s = max(following.at_s, router_free_s) + router_s
                if not self._events or sent_s + self._half_way_s <= self._events[0][0]:
                    request = _Request(next(self._numbers), following, self.pools[following.pool])
                    self.send(request, sent_s + self._half_way_s)
                    following, router_free_s = next(trace, None), sent_s
                    continue
            now_s, _, worker, version = heapq.heappop(self._events)
            if version == -1:
                self.lose(worker, now_s)
            elif version == worker.version:
                was_computing = worker.is_computing
                for request in worker.step(now_s):
                    self.ended(worker, request, now_s)
                self.expect(worker)
                if worker.is_computing != was_computing:
                    self.look_up(worker.neighbours, now_s)
        self.outcome.bytes_paged = sum(worker.bytes_paged for worker in self.workers) - paged_before
        return self.outcome

    def send(self, request: _Request, now_s: float) -> None:
        while now_s >= self._next_report_s:
            self.report()
            self._next_report_s += REPORT_EVERY_S
            if self._next_report_s < now_s - REPORT_EVERY_S:
                self._next_report_s = now_s
        worker = self.chosen(request)
        is_too_large = len(request.pool.listed) > self.costs.num_slots
        if worker is None or is_too_large or worker.num_live >= self.costs.max_running + self.costs.max_waiting:
            self.outcome.num_refused += 1
            return
        self.outcome.num_placed += 1
        self.outcome.num_resident += request.pool.bits & ~worker.resident == 0
        self.in_flight[worker.id] += 1
        worker.arrive(request, now_s)
        self.expect(worker)

    def chosen(self, request: _Request) -> _Worker | None:
        ready = [worker for worker in self.workers if worker.state == "ready"]
        if not ready:
            return None
        if self.rules.placement == "round robin":
            return ready[self.outcome.num_placed % len(ready)]
        if self.rules.placement == "least loaded":
            return min(ready, key=lambda worker: (self.in_flight[worker.id], worker.id))
        pool = request.pool
        return self.by_id[place(pool, ready, in_flight=self.in_flight, home_key=pool.name).worker_id]

    def report(self) -> None:
        for worker in self.workers:
            worker.report()

    def expect(self, worker: _Worker) -> None:
        if worker.due_s < math.inf:
            heapq.heappush(self._events, (worker.due_s, next(self._numbers), worker, worker.version))

    def look_up(self, workers: Iterable[_Worker], now_s: float) -> None:
        """Has workers go on at another pace from their next steps on."""
        for worker in workers:
            version = worker.version
            worker.look_up(now_s)
            if worker.version != version:
                self.expect(worker)

    def ended(self, worker: _Worker, request: _Request, now_s: float) -> None:
        self.in_flight[worker.id] -= 1
        outcome, arrival = self.outcome, request.arrival
        busy_s = self.costs.busy_s and self._random.expovariate(1 / self.costs.busy_s)
        took_s = request.first_s - arrival.at_s + self._half_way_s + busy_s
        outcome.first_token_s.append(took_s)
        outcome.by_tenant.setdefault(arrival.tenant, []).append(took_s)
        outcome.num_tokens += arrival.output_tokens
        outcome.ended_s = max(outcome.ended_s, now_s)

    def lose(self, worker: _Worker, now_s: float) -> None:
        """The worker is lost, or another one is ready in its place."""
        if worker.state == "dead":
            worker.state = "ready"
            return
        for request in worker.lose():
            self.in_flight[worker.id] -= 1
            if math.isnan(request.first_s) and not request.was_lost:
                request.was_lost = True
                self.send(request, now_s)
            else:
                self.outcome.num_failed += 1
        heapq.heappush(self._events, (now_s + self.costs.restart_s, -1, worker, -1))
