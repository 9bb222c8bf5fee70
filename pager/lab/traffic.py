"""Traffic to simulate, from a service's log or drawn, and what a service's work costs, by a short run against it.

Legend: L layers, R routed experts of a layer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import statistics
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from pager.client import AsyncClient
from pager.errors import ConfigError, InvalidRequest
from pager.lab.simulate import Arrival, Costs, Simulation
from pager.models.open_model import OpenModel
from pager.predict.fitted import PREDICTOR_NAME, Codebook, PredictorFile
from pager.reading import parse_json, read_bounded, read_lines, reason_of
from pager.types import ExpertPool, PoolAsk, PoolSize, RoutingFacts, SamplingParams

METHODS = frozenset({"Generate", "Complete", "Completions", "ChatCompletions", "Responses", "Messages"})
MAX_REQUESTS = 10_000_000


# --- pools ----------------------------------------------------------------------------------------------------------


def drawn_pool(name: str, sizes: Sequence[int], facts: RoutingFacts) -> ExpertPool:
    """A pool of so many experts in each layer, the same for a name whenever it is drawn."""
    random = np.random.default_rng(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))
    layers = (
        tuple(sorted(map(int, random.permutation(routed)[:size])))
        for routed, size in zip(facts.routed_per_layer, sizes, strict=True)
    )
    return ExpertPool(tuple(layers))


@dataclass(frozen=True, eq=False)
class Pools:
    """The pools of one model at one size: its codewords', and drawn ones for names whose experts are not known."""

    facts: RoutingFacts
    sizes: tuple[int, ...]  # experts in each layer
    codewords: Mapping[str, ExpertPool]

    @classmethod
    def of(cls, model: Path, size: PoolSize) -> Pools:
        """Raises ConfigError for a model without a codebook, CheckpointError for one that cannot be read."""
        opened = OpenModel.open(model)
        try:
            facts = opened.facts
            path = Path(opened.checkpoint.path) / PREDICTOR_NAME
            file = PredictorFile.load(path, opened.checkpoint.fingerprint) if path.exists() else None
        finally:
            opened.checkpoint.close()
        codebook = None if file is None else Codebook.of(file, facts)
        if codebook is None:
            raise ConfigError(f"{model} has no codebook, whose pools requests share; make one with `fit-router`")
        found = {name: codebook.pool(name, size) for name in codebook.names}
        first = next(iter(found.values()))
        return cls(facts, tuple(map(len, first.experts)), found)

    def known_and_drawn(self, names: Iterable[str]) -> dict[str, ExpertPool]:
        """The pool of each name."""
        known = dict(self.codewords)
        return {name: known.get(name) or drawn_pool(name, self.sizes, self.facts) for name in names}


# --- traces ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrivals; `num_left_out` had no pool that others share."""

    arrivals: Sequence[Arrival]
    num_left_out: int = 0


def read_log(path: Path) -> Trace:
    """The requests in the log of a service (`log.format = "json"`), .gz or not, by when they came.

    Lines of anything else are passed over. Raises ConfigError for a file without a request.
    """
    found: list[Arrival] = []
    num_left_out = 0
    try:
        for _, line in read_lines(path):
            value = _request_line(line)
            if value is None:
                continue
            pool = _pool_of(value)
            if not pool:
                num_left_out += 1
                continue
            ended_s = datetime.fromisoformat(value["time"]).timestamp()
            arrival = Arrival(
                ended_s - float(value["took_ms"]) / 1000,
                str(value["tenant"]),
                pool,
                max(1, int(value["prompt_tokens"])),
                max(1, int(value["completion_tokens"])),
            )
            found.append(arrival)
            if len(found) > MAX_REQUESTS:
                raise ValueError(f"it has more than {MAX_REQUESTS:,} requests; cut it")
    except (KeyError, TypeError, ValueError, OSError, EOFError) as error:
        raise ConfigError(f"the log {path} cannot be read: {reason_of(error)}") from None
    if not found:
        raise ConfigError(
            f'{path} has no request that shared a pool; give the JSON log of a router (`log.format = "json"`), or '
            "leave it out and let traffic be drawn"
        )
    found.sort(key=lambda arrival: arrival.at_s)
    return Trace(found, num_left_out)


def _request_line(line: str) -> dict[str, Any] | None:
    try:
        value = parse_json(line.strip())
    except ValueError:
        return None
    is_request = isinstance(value, dict) and value.get("method") in METHODS and "completion_tokens" in value
    return value if is_request and isinstance(value, dict) else None


def _pool_of(value: Mapping[str, Any]) -> str:
    """The name under which requests share the pool: a codeword's, a tenant's own, or a digest; empty for no such."""
    codeword, pool = value.get("codeword"), str(value.get("pool", ""))
    if codeword and codeword != "none":
        return str(codeword)
    if pool.startswith("named:"):
        return f"{value['tenant']}/{pool}"
    return pool if pool.startswith("fixed:") else ""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Traffic that is drawn: Poisson arrivals, tenants and pools by Zipf's law, and bursts of one pool."""

    num_requests: int = 100_000
    num_tenants: int = 100
    per_s: float = 10.0
    prompt_tokens: int = 64  # of the mean; lengths are drawn between half and one and a half of it
    output_tokens: int = 64
    burst_share: float = 0.1  # of the requests, which come in bursts
    burst_requests: int = 50  # of one pool and tenant, ten times as fast as all the rest
    seed: int = 0

    def check(self) -> None:
        """Raises InvalidRequest."""
        counts = (self.num_requests, self.num_tenants)
        if not all(1 <= count <= MAX_REQUESTS for count in counts) or not 0 < self.per_s < math.inf:
            raise InvalidRequest(
                f"traffic is drawn of 1 to {MAX_REQUESTS:,} requests and tenants, and more than 0 a second, not of "
                f"{self.num_requests} requests of {self.num_tenants} tenants at {self.per_s:g} a second"
            )

    def arrivals(self, pools: Sequence[str]) -> list[Arrival]:
        """The requests, which are for the given pools."""
        self.check()
        random = np.random.default_rng(self.seed)
        count, num_bursts = self.num_requests, int(self.burst_share * self.num_requests / self.burst_requests)
        num_steady = count - num_bursts * self.burst_requests
        at_N = np.cumsum(random.exponential(count / num_steady / self.per_s, num_steady))
        tenant_N, pool_N = _zipf(random, self.num_tenants, num_steady), _zipf(random, len(pools), num_steady)
        bursts = [
            random.uniform(0, at_N[-1]) + np.cumsum(random.exponential(0.1 / self.per_s, self.burst_requests))
            for _ in range(num_bursts)
        ]
        at_N = np.concatenate([at_N, *bursts])
        one_each = np.repeat(_zipf(random, self.num_tenants, num_bursts), self.burst_requests)
        tenant_N = np.concatenate([tenant_N, one_each])
        pool_N = np.concatenate([pool_N, np.repeat(_zipf(random, len(pools), num_bursts), self.burst_requests)])
        prompt_N, output_N = (
            random.integers(max(1, mean // 2), mean + mean // 2 + 1, count).tolist()
            for mean in (self.prompt_tokens, self.output_tokens)
        )
        order = np.argsort(at_N, kind="stable").tolist()
        at_s, tenants, names = at_N.tolist(), [f"t{number}" for number in range(self.num_tenants)], list(pools)
        return [Arrival(at_s[n], tenants[tenant_N[n]], names[pool_N[n]], prompt_N[n], output_N[n]) for n in order]


def _zipf(random: np.random.Generator, num: int, count: int) -> np.ndarray:
    shares = 1 / np.arange(1, num + 1)
    return random.choice(num, count, p=shares / shares.sum())


def with_another(arrivals: Sequence[Arrival], like: str) -> list[Arrival]:
    """The trace with one tenant more, which sends what `like` sends, a moment later. Raises InvalidRequest."""
    added = [
        Arrival(each.at_s + 0.001, f"another-{like}", each.pool, each.prompt_tokens, each.output_tokens)
        for each in arrivals
        if each.tenant == like
    ]
    if not added:
        raise InvalidRequest(f"no request of the trace is of a tenant {like[:80]!r}")
    return sorted([*arrivals, *added], key=lambda each: each.at_s)


# --- costs ----------------------------------------------------------------------------------------------------------


WHOLE = frozenset({"expert_bytes", "num_slots", "max_running", "max_waiting", "workers_per_machine"})
ABOVE_0 = frozenset(
    {"step_s", "page_bytes_per_s", "expert_bytes", "num_slots", "max_running", "workers_per_machine", "alone"}
)


def read_costs(path: Path) -> Costs:
    """Raises ConfigError."""
    try:
        value = parse_json(read_bounded(path, 1 << 20))
        known = [each.name for each in fields(Costs)]
        if not isinstance(value, dict) or not set(value) <= set(known):
            raise ValueError(f"its fields are {', '.join(known)}")
        for name, each in value.items():
            kind = int if name in WHOLE else int | float
            if name == "in_place":
                if not isinstance(each, bool):
                    raise ValueError(f"its in_place is {each!r}; it must be true or false")
                continue
            if isinstance(each, bool) or not isinstance(each, kind) or not 0 <= each < math.inf:
                raise ValueError(f"its {name} is {each!r}; it must be a {'whole ' * (name in WHOLE)}number, 0 or more")
            if not each and name in ABOVE_0:
                raise ValueError(f"its {name} is 0; it must be above 0")
        return Costs(**value)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the costs in {path} cannot be read: {reason_of(error)}") from None


def write_costs(costs: Costs, path: Path) -> None:
    """Raises ConfigError."""
    try:
        path.write_text(json.dumps(asdict(costs), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"the costs cannot be written to {path}: {reason_of(error)}") from None


@dataclass
class _Answer:
    """The times of an answer's tokens, and its usage."""

    began_s: float
    token_s: list[float] = field(default_factory=list)
    bytes_paged: int = 0
    num_missed: int = 0
    at_worker_s: float = 0.0  # from its arrival there until its first token

    @property
    def first_s(self) -> float:
        return self.token_s[0] - self.began_s

    @property
    def way_s(self) -> float:
        """To the worker and back."""
        return self.first_s - self.at_worker_s

    @property
    def gap_s(self) -> float:
        """Between two tokens, over the later half, when all prompts of its wave have run."""
        later = self.token_s[len(self.token_s) // 2 :]
        return (later[-1] - later[0]) / (len(later) - 1)


class Measuring:
    """A short run against a service that has nothing else to do; all of its workers are loaded alike."""

    SHAPES: Sequence[tuple[int, int]] = ((1, 1), (4, 1), (12, 1), (12, 2), (12, 4), (24, 1), (24, 2), (24, 4))
    """The rows that decode at each worker, and how many pools they are in."""
    POOLS = 4  # at each worker
    ARRIVALS, LOAD = 128, 0.7  # requests that come one by one, and of the tokens/s with everything at once
    REPEATS = 3  # of these requests
    MIXED = 5  # runs with everything at once
    ROUNDS = 3  # in which all shapes take turns, so that what else the machine does falls on each of them alike
    TOKENS = 48
    SHORT, LONG = 16, 256
    MOST = 64  # requests in flight: what services let one tenant have

    def __init__(self, client: AsyncClient, pools: Pools, seed: int = 0) -> None:
        self._client = client
        self._pools = pools
        self._random = np.random.default_rng(seed)
        self._num_drawn = 0
        self._vocabulary = 256

    async def run(self) -> Costs:
        """Raises what the client raises."""
        await self._look_around()
        return await self._agreeing(await self._by_parts())

    async def _look_around(self) -> None:
        """Finds pools that are at home at each worker. Raises ConfigError unless all workers are ready."""
        model = await self._client.model()
        self._vocabulary = model.vocab_size
        known = await self._client.residency()
        workers = [worker for worker in known if worker.state == "ready"]
        self._homes: dict[str, list[ExpertPool]] = {worker.id: [] for worker in workers}
        if not workers:
            raise ConfigError("no worker is ready, so that none is home to a pool; wait until the service is")
        if len(workers) < len(known):
            raise ConfigError(
                f"{len(workers)} of {len(known)} workers are ready, and those that share a machine are slower than one "
                "alone; wait until all are"
            )
        await self._find_homes()
        self._expert_bytes = max(worker.expert_bytes for worker in workers)
        self._num_slots = min(worker.num_slots for worker in workers)

    async def _by_parts(self) -> Costs:
        """Measures each cost by itself."""
        own = [pools[0] for pools in self._homes.values()]
        most = max(1, self.MOST // len(own))
        shapes = [shape for shape in self.SHAPES if shape[0] <= most] or [self.SHAPES[0]]
        busiest = max(rows for rows, num_pools in shapes if num_pools == 1)
        await self._wave(own, 2, self.SHORT)
        short: list[_Answer] = []
        long: list[_Answer] = []
        gaps: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
        in_place: set[tuple[int, int]] = set()  # shapes with more pools than slots, which are computed all the same
        router_s, alone, changes_s = [], [], []
        for _ in range(self.ROUNDS):
            for answers, num_tokens in ((short, self.SHORT), (long, self.LONG)):
                answers += [*await self._wave(own, 4, num_tokens), *await self._wave(own, 4, num_tokens)]
            router_s.append(_apart(await self._wave(own * min(12, most), 1, self.SHORT)))
            for (rows, num_pools), found in gaps.items():
                pools = [pool for pools in self._homes.values() for pool in pools[:num_pools]]
                answers = await self._wave(pools * (rows // num_pools), self.TOKENS, self.SHORT)
                found.append(_gap(answers))
                if _any_in_place(answers):
                    in_place.add((rows, num_pools))
            alone.append(_gap(await self._wave(own[:1] * busiest, self.TOKENS, self.SHORT)) / gaps[busiest, 1][-1])
            rows = min(12, busiest)
            lengths = [self.TOKENS // 2 + 2 * number for number in range(rows) for _ in own]
            waning_s = _waning(await self._wave(own * rows, lengths, self.SHORT), len(own))
            of_one_pool = {shape[0]: found[-1] for shape, found in gaps.items() if shape[1] == 1}
            unchanged_s = _unchanged(of_one_pool, rows)
            changes_s.append((waning_s - unchanged_s) / max(1, rows - 1))
        token_s = max(0.0, (_at_worker(long) - _at_worker(short)) / (self.LONG - self.SHORT))
        gap_s = {(*shape, shape in in_place): statistics.median(found) for shape, found in gaps.items()}
        step_s, row_s, pool_s, place_s = _plane(gap_s)
        return Costs(
            step_s=step_s,
            row_s=row_s,
            pool_s=pool_s,
            place_s=place_s,
            prefill_s=max(1e-6, _at_worker(short) - self.SHORT * token_s),
            prompt_token_s=token_s,
            page_bytes_per_s=await self._page_in_rate(statistics.median(each.first_s for each in short)),
            request_s=max(1e-6, statistics.median(each.way_s for each in short)),
            router_s=max(0.0, statistics.median(router_s)),
            change_s=max(0.0, statistics.median(changes_s)),
            workers_per_machine=len(self._homes),
            alone=min(1.0, statistics.median(alone)),
            expert_bytes=self._expert_bytes,
            num_slots=self._num_slots,
        )

    async def _agreeing(self, costs: Costs) -> Costs:
        """Returns the costs with forwards that take as much longer as mixed runs took longer than was forecast.

        What router, client and workers do for requests that come and go takes cores from the forwards beside it, which
        waves of answers that begin and end together do not show. Nor do they show whether pools for which there are no
        slots are computed in the page cache, nor what makes some first tokens later than most: kernels for a number of
        tokens that did not come lately, and all that runs on the cores meanwhile.
        """
        # The first of them are asked for most: they are of one worker after the other.
        pools = {pool.digest: pool for alike in zip(*self._homes.values(), strict=True) for pool in alike}
        drawn = [
            Drawn(min(self.MOST, 24 * len(self._homes)), 1, 1.0, self.TOKENS, self.TOKENS, burst_share=0.0, seed=seed)
            for seed in range(self.MIXED)
        ]
        traces = [[replace(each, at_s=0.0) for each in one.arrivals(list(pools))] for one in drawn]
        took_s: list[float] = []
        is_in_place = False
        for trace in traces:
            answers = await self._replay(trace, pools)
            took_s.append(max(each.token_s[-1] for each in answers) - min(each.began_s for each in answers))
            is_in_place |= _any_in_place(answers)
        per_s = self.LOAD * len(traces[0]) / min(took_s)
        apart = Drawn(self.ARRIVALS, 1, per_s, self.TOKENS, self.TOKENS, burst_share=0.0, seed=self.MIXED)
        one_by_one = apart.arrivals(list(pools))
        answers = [each for _ in range(self.REPEATS) for each in await self._replay(one_by_one, pools)]
        seen = MixedRuns(traces, took_s, one_by_one, late([each.first_s for each in answers]))
        return agreeing(replace(costs, in_place=is_in_place), pools, list(self._homes), seen)

    async def _replay(self, trace: Sequence[Arrival], pools: Mapping[str, ExpertPool]) -> list[_Answer]:
        async def one(arrival: Arrival) -> _Answer:
            await asyncio.sleep(arrival.at_s)
            return await self._answer(pools[arrival.pool], arrival.output_tokens, arrival.prompt_tokens)

        return list(await asyncio.gather(*map(one, trace)))

    async def _find_homes(self) -> None:
        """Finds pools until every worker is the home of some: codewords, which overlap as those of requests do, or else
        drawn ones.
        """
        codewords = list(self._pools.codewords.values())
        for number in range(64 * len(self._homes)):
            pool = codewords[number] if number < len(codewords) else self._new_pool()
            answer = await self._client.route(self._prompt(1), PoolAsk(fixed=pool))
            found = self._homes.get(answer.worker or "")
            if found is not None and len(found) < self.POOLS:
                found.append(pool)
            if all(len(pools) == self.POOLS for pools in self._homes.values()):
                return
        raise ConfigError("some workers are home to no pool; is the service idle, and are all workers ready?")

    async def _page_in_rate(self, warm_s: float) -> float:
        """Bytes/s of a worker, from pools that are there nowhere, for one worker after the other."""
        num_bytes, seconds = 0, 0.0
        for _ in range(8):
            (answer,) = await self._wave([self._new_pool()], 2, self.SHORT)
            num_bytes, seconds = num_bytes + answer.bytes_paged, seconds + answer.first_s - warm_s
        return num_bytes / max(seconds, 1e-3) or 1e9

    async def _wave(
        self, pools: Collection[ExpertPool], tokens: int | Sequence[int], prompt_tokens: int
    ) -> list[_Answer]:
        lengths = [tokens] * len(pools) if isinstance(tokens, int) else tokens
        answers = (self._answer(*each, prompt_tokens) for each in zip(pools, lengths, strict=True))
        return list(await asyncio.gather(*answers))

    async def _answer(self, pool: ExpertPool, tokens: int, prompt_tokens: int) -> _Answer:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        found = _Answer(time.perf_counter())
        async for chunk in self._client.generate(self._prompt(prompt_tokens), sampling, PoolAsk(fixed=pool)):
            found.token_s += [time.perf_counter()] * len(chunk.token_ids)
            if chunk.usage is not None:
                found.bytes_paged = chunk.usage.paging.bytes_paged
                found.num_missed = chunk.usage.paging.experts_missed
                found.at_worker_s = chunk.usage.time_to_first_token_s
        return found

    def _new_pool(self) -> ExpertPool:
        self._num_drawn += 1
        return drawn_pool(f"measured-{self._num_drawn}", self._pools.sizes, self._pools.facts)

    def _prompt(self, num_tokens: int) -> tuple[int, ...]:
        """Never one that was sent before: what is cached of it would not run."""
        return tuple(map(int, self._random.integers(0, self._vocabulary - 4, num_tokens)))


def measure(
    address: str, pools: Pools, api_key: str | None = None, credentials: grpc.ChannelCredentials | None = None
) -> Costs:
    """Returns what work costs at an idle service. Raises what the client raises, and ConfigError where it is not
    idle.
    """

    async def run() -> Costs:
        async with AsyncClient(address, timeout_s=120, api_key=api_key, credentials=credentials) as client:
            return await Measuring(client, pools).run()

    return asyncio.run(run())


def _any_in_place(answers: Iterable[_Answer]) -> bool:
    """Tells whether experts were computed where the page cache has them: then they are missed, and none are paged."""
    return any(each.num_missed and not each.bytes_paged for each in answers)


def _at_worker(answers: Iterable[_Answer]) -> float:
    return statistics.median(answer.at_worker_s for answer in answers)


def _gap(answers: Iterable[_Answer]) -> float:
    return statistics.median(answer.gap_s for answer in answers)


def _apart(answers: Iterable[_Answer]) -> float:
    """Returns the mean time between the arrivals, at their workers, of requests that are sent at once."""
    ways_s = [answer.way_s for answer in answers]
    return float(np.subtract(*np.percentile(ways_s, (90, 10)))) / (0.8 * len(ways_s))


def _waning(answers: Sequence[_Answer], num_workers: int) -> float:
    """Returns the time from the first end to the last one at a worker whose answers end one after the other."""
    ends_s = [answer.token_s[-1] for answer in answers]
    return statistics.median(max(own) - min(own) for own in (ends_s[n::num_workers] for n in range(num_workers)))


@dataclass(frozen=True, slots=True)
class MixedRuns:
    """Mixed runs at a service: some with everything at once, which took `took_s` each, and one in which requests came
    one by one, whose `late` first tokens came after `late_s`.
    """

    at_once: Sequence[Sequence[Arrival]]
    took_s: Sequence[float]
    one_by_one: Sequence[Arrival]
    late_s: float


def late(first_token_s: Sequence[float]) -> float:
    """Returns the mean of the times within which 90, 95 and 99 of a hundred came; each by itself says little of a few
    hundred.
    """
    return float(np.mean(np.percentile(first_token_s, (90, 95, 99))))


FORWARDS = ("step_s", "row_s", "pool_s", "place_s", "change_s", "prefill_s", "prompt_token_s")


def agreeing(costs: Costs, pools: Mapping[str, ExpertPool], workers: Sequence[str], seen: MixedRuns) -> Costs:
    """Returns the costs with forwards that take so much longer, or less long, and first tokens that are so much later,
    that what was `seen` is forecast. Of several runs the median counts, for their forecasts.
    """
    for _ in range(4):  # as not all of the time is that of forwards
        runs = [Simulation(pools, costs, workers).run(trace) for trace in seen.at_once]
        forecast_s = [run.ended_s - run.began_s for run in runs]
        times = float(np.median(np.divide(seen.took_s, forecast_s)))
        costs = replace(costs, **{name: getattr(costs, name) * times for name in FORWARDS})
    least_s, most_s = 0.0, seen.late_s
    for _ in range(12):  # what is drawn is the same each time, so a longer mean makes all later
        busy_s = (least_s + most_s) / 2
        forecast = Simulation(pools, replace(costs, busy_s=busy_s), workers).run(seen.one_by_one)
        if late(forecast.first_token_s) < seen.late_s:
            least_s = busy_s
        else:
            most_s = busy_s
    return replace(costs, busy_s=least_s)


def _unchanged(gap_s: Mapping[int, float], rows: int) -> float:
    """Returns the time of two steps each of `rows` - 1 rows down to one, from the times of steps of some numbers of
    rows.
    """
    return 2 * float(np.interp(range(1, rows), sorted(gap_s), [gap_s[each] for each in sorted(gap_s)]).sum())


def _plane(gaps: Mapping[tuple[int, int, bool], float]) -> tuple[float, float, float, float]:
    """Returns the time of a step of one row, of each further row, of each further pool, and of computing any in place,
    from gaps by rows, pools, and whether some had no slots.
    """
    shape_N4 = np.array([(1, rows - 1, num_pools - 1, in_place) for rows, num_pools, in_place in gaps], float)
    gap_N = np.array(list(gaps.values()))
    # What took long may be off by as much more.
    found_4 = np.linalg.lstsq(shape_N4 / gap_N[:, None], np.ones_like(gap_N), rcond=None)[0]
    step_s, *more_s = map(float, found_4)
    row_s, pool_s, place_s = (max(each, 0.0) for each in more_s)
    return max(step_s, 1e-6), row_s, pool_s, place_s
