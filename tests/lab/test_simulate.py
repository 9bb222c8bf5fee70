"""The simulator runs the service's own rules, and forecasts from a log, from drawn traffic, and from measured costs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pager.cli import app
from pager.errors import ConfigError, InvalidRequest
from pager.lab import simulate
from pager.lab.simulate import OTHERS, SERVICE, Arrival, Costs, Rules, Simulation
from pager.lab.traffic import (
    FORWARDS,
    Drawn,
    MixedRuns,
    agreeing,
    drawn_pool,
    late,
    read_costs,
    read_log,
    with_another,
    write_costs,
)
from pager.types import ExpertPool, RoutingFacts

FACTS = RoutingFacts(experts_per_layer=(64, 64), shared_per_layer=(0, 0), top_k_per_layer=(2, 2))
POOLS = {f"c{number:02d}": drawn_pool(f"c{number:02d}", (8, 8), FACTS) for number in range(12)}
COSTS = Costs(
    step_s=0.004,
    row_s=0.0005,
    pool_s=0.001,
    prefill_s=0.006,
    prompt_token_s=0.0001,
    page_bytes_per_s=1e8,
    request_s=0.002,
    expert_bytes=100_000,
    num_slots=40,
    restart_s=5.0,
)
PAGING_S = 16 * COSTS.expert_bytes / COSTS.page_bytes_per_s


def one(at_s: float = 0.0, pool: str = "c00", tenant: str = "t", prompt: int = 10, output: int = 5) -> Arrival:
    return Arrival(at_s, tenant, pool, prompt, output)


def test_a_request_alone_takes_what_its_parts_take() -> None:
    outcome = Simulation(POOLS, COSTS, 1).run([one()])
    first_s = COSTS.request_s + max(COSTS.prefill_s + 10 * COSTS.prompt_token_s, PAGING_S)
    assert outcome.first_token_s == [pytest.approx(first_s)]
    assert outcome.ended_s == pytest.approx(first_s - COSTS.request_s / 2 + 4 * COSTS.step_s)
    assert (outcome.num_tokens, outcome.bytes_paged) == (5, 16 * COSTS.expert_bytes)
    warm = Simulation(POOLS, COSTS, 1).run([one(), one(1.0)])
    assert warm.first_token_s[1] == pytest.approx(COSTS.request_s + COSTS.prefill_s + 10 * COSTS.prompt_token_s)
    assert warm.bytes_paged == outcome.bytes_paged


def test_requests_of_one_pool_share_steps_and_others_cost_their_pool() -> None:
    def seconds(pools: list[str]) -> float:
        costs = replace(COSTS, page_bytes_per_s=math.inf)
        return Simulation(POOLS, costs, 1).run([one(pool=pool, output=101) for pool in pools]).ended_s

    alone, together, apart = seconds(["c00"]), seconds(["c00"] * 2), seconds(["c00", "c01"])
    assert together - alone == pytest.approx(100 * COSTS.row_s + 10 * COSTS.prompt_token_s)
    assert apart - together == pytest.approx(101 * COSTS.pool_s), "in the forward of the prompts, too"


def test_an_arrival_ends_a_stretch_of_steps_at_the_next_one() -> None:
    outcome = Simulation(POOLS, replace(COSTS, request_s=0.0), 1).run([one(output=1000), one(1.0)])
    waited_s = outcome.first_token_s[0] - (COSTS.prefill_s + 10 * COSTS.prompt_token_s)
    assert -1e-9 <= waited_s <= COSTS.step_s, "it waits for the step that runs, and its own forward is next"


def test_prompts_share_the_forward_of_rows_unless_these_have_just_decoded() -> None:
    """Two come during a step of the first one. One has room in the forward right after it, the other in the next."""
    costs = replace(COSTS, request_s=0.0, page_bytes_per_s=math.inf)
    arrivals = [one(output=100), one(0.1, prompt=simulate.CHUNK_TOKENS), one(0.1, prompt=100)]
    outcome = Simulation(POOLS, costs, 1).run(arrivals)
    first_s = COSTS.prefill_s + 10 * COSTS.prompt_token_s
    step_ends_s = first_s + math.ceil((0.1 - first_s) / COSTS.step_s) * COSTS.step_s
    alone_s = step_ends_s + COSTS.prefill_s + simulate.CHUNK_TOKENS * COSTS.prompt_token_s
    beside_s = alone_s + COSTS.step_s + COSTS.row_s + 100 * COSTS.prompt_token_s
    assert sorted(outcome.first_token_s) == pytest.approx([first_s, alone_s - 0.1, beside_s - 0.1])


def test_the_router_takes_one_request_after_the_other() -> None:
    costs = replace(COSTS, request_s=0.5, router_s=0.3, page_bytes_per_s=math.inf)
    outcome = Simulation(POOLS, costs, 1).run([one(tenant=f"t{number}") for number in range(3)])
    own_s = 0.5 + COSTS.prefill_s + 10 * COSTS.prompt_token_s
    assert outcome.first_token_s == [pytest.approx(own_s + 0.3 * number) for number in range(3)]


def test_the_first_step_after_rows_have_come_or_gone_takes_longer() -> None:
    def ended_s(change_s: float, *arrivals: Arrival) -> float:
        costs = replace(COSTS, change_s=change_s, page_bytes_per_s=math.inf)
        return Simulation(POOLS, costs, 1).run(arrivals).ended_s

    for arrivals, changes in (([one(output=50)], 1), ([one(output=50), one(output=20)], 2), ([one(output=1)], 0)):
        assert ended_s(0.1, *arrivals) == pytest.approx(ended_s(0.0, *arrivals) + 0.1 * changes)


def test_pools_without_slots_are_computed_in_place() -> None:
    costs = replace(COSTS, num_slots=20, page_bytes_per_s=math.inf)
    arrivals = [one(output=1001), one(pool="c01", output=11), one(pool="c01", output=11)]
    waiting, beside = (Simulation(POOLS, replace(costs, in_place=each), 1) for each in (False, True))
    waited, ran = waiting.run(arrivals), beside.run(arrivals)
    assert min(waited.first_token_s[1:]) > 1000 * costs.step_s
    assert max(ran.first_token_s) < 10 * costs.step_s
    assert waited.bytes_paged > ran.bytes_paged == 16 * costs.expert_bytes, "the second pool is not paged"
    assert ran.ended_s > 1000 * costs.step_s + 10 * costs.pool_s, "their rows are in the forwards of the other"
    assert beside.workers[0].index.num_held == 0


def test_a_long_prompt_runs_in_parts_and_the_rows_decode_in_each() -> None:
    costs = replace(COSTS, request_s=0.0, page_bytes_per_s=math.inf)
    outcome = Simulation(POOLS, costs, 1).run([one(output=20), one(0.03, prompt=2 * simulate.CHUNK_TOKENS + 1)])
    alone_s = COSTS.prefill_s + 10 * COSTS.prompt_token_s
    assert outcome.ended_s == pytest.approx(
        alone_s + 19 * COSTS.step_s  # of the first one, of which two share a forward with parts of the other
        + COSTS.prefill_s + (2 * simulate.CHUNK_TOKENS + 1) * COSTS.prompt_token_s + 4 * COSTS.row_s
    )  # fmt: skip


def test_forwards_in_place_take_longer() -> None:
    costs = replace(COSTS, num_slots=20, in_place=True, page_bytes_per_s=math.inf)
    arrivals = [one(output=101), one(pool="c01", output=11)]
    with_, without = (Simulation(POOLS, replace(costs, place_s=each), 1).run(arrivals).ended_s for each in (0.1, 0.0))
    assert with_ - without == pytest.approx(0.1 * 11), "those of the second one, which has no slots"


def test_a_router_knows_of_a_worker_what_it_last_reported() -> None:
    simulation = Simulation(POOLS, replace(COSTS, max_running=1), 1)
    (worker,), pool = simulation.workers, simulation.pools["c00"]
    simulation.run([one()])
    assert worker.resident == pool.bits
    assert worker.missing_bytes(pool) == 16 * COSTS.expert_bytes, "it reported before it loaded any"
    simulation.report()
    assert (worker.missing_bytes(pool), worker.place_s) == (0, None), "nobody is in line"
    simulation.run([one(10.0 + at_s, output=1000) for at_s in (0, 0, 0, 6)])
    assert (worker.waiting, worker.running) == (1, 1), "of three that take four seconds each, after six"
    assert worker.place_s == pytest.approx(1.0, abs=0.05), "the second in line waited four, the first not at all"


def test_workers_of_one_machine_slow_each_other_down() -> None:
    """One works alone for as long as the other, whose answer is shorter, has nothing to do."""

    def ended_s(per_machine: int, *arrivals: Arrival) -> float:
        costs = replace(COSTS, alone=0.5, workers_per_machine=per_machine, page_bytes_per_s=math.inf, router_s=0.002)
        return Simulation(POOLS, costs, 2, Rules("", placement="round robin")).run(arrivals).ended_s

    long, short = one(output=1001), one(output=101, pool="c01")
    apart, beside = ended_s(1, long, short), ended_s(2, long, short)
    prefill_s = COSTS.prefill_s + 10 * COSTS.prompt_token_s
    assert apart == pytest.approx(COSTS.request_s + prefill_s + 1000 * COSTS.step_s, abs=0.01)
    assert ended_s(2, long) == pytest.approx(COSTS.request_s + (prefill_s + 1000 * COSTS.step_s) / 2, abs=0.01)
    assert beside == pytest.approx(ended_s(2, long) + (prefill_s + 100 * COSTS.step_s) / 2, abs=0.02)


requests = st.lists(
    st.builds(
        one,
        at_s=st.floats(0, 3),
        pool=st.sampled_from(sorted(POOLS)),
        tenant=st.sampled_from(["a", "b", "c"]),
        prompt=st.integers(1, 600),
        output=st.integers(1, 40),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(
    arrivals=requests,
    num_workers=st.integers(1, 3),
    rules=st.sampled_from([SERVICE, *OTHERS]),
    loses=st.booleans(),
    in_place=st.booleans(),
)
def test_every_request_ends_once_under_any_rules(
    arrivals: list[Arrival], num_workers: int, rules: object, loses: bool, in_place: bool
) -> None:
    arrivals = sorted(arrivals, key=lambda arrival: arrival.at_s)
    costs = replace(COSTS, max_running=4, max_waiting=6, in_place=in_place)
    simulation = Simulation(POOLS, costs, num_workers, rules, 1.0 if loses else None)  # type: ignore[arg-type]
    outcome = simulation.run(arrivals)
    assert len(outcome.first_token_s) + outcome.num_refused + outcome.num_failed == len(arrivals)
    assert not any(math.isnan(first_s) or first_s < costs.request_s for first_s in outcome.first_token_s)
    assert all(count == 0 for count in simulation.in_flight.values())
    for worker in simulation.workers:
        worker.install(math.inf)
        worker.index.check_integrity()
        assert (worker.num_live, worker.held, worker.index.num_held) == (0, 0, 0)
        loaded = sum(1 << (key.layer * worker.width + key.expert) for key in worker.index.loaded())
        assert worker.resident == loaded
    again = Simulation(POOLS, costs, num_workers, rules, 1.0 if loses else None)  # type: ignore[arg-type]
    assert again.run(arrivals).first_token_s == outcome.first_token_s, "the same trace gives the same forecast"


def mixed(per_s: float = 60.0, count: int = 1500) -> list[Arrival]:
    return Drawn(count, 20, per_s, prompt_tokens=40, output_tokens=30).arrivals(sorted(POOLS))


def test_homes_page_less_and_answer_sooner_than_placement_that_knows_no_pools() -> None:
    service, *others = (Simulation(POOLS, COSTS, 4, rules).run(mixed()) for rules in (SERVICE, *OTHERS))
    for other in others[1:]:
        assert service.bytes_paged < 0.6 * other.bytes_paged
        assert service.first_token_at(99) < other.first_token_at(99)
        assert service.num_resident > other.num_resident
    assert service.bytes_paged < others[0].bytes_paged, "first come, first served pages pools again"


def test_a_worker_more_helps_and_a_worker_lost_costs() -> None:
    trace = mixed(80.0)
    few, more = (Simulation(POOLS, COSTS, count).run(trace) for count in (2, 3))
    assert more.first_token_at(99) < few.first_token_at(99)
    lost = Simulation(POOLS, COSTS, 3, SERVICE, 5.1).run(trace)
    assert lost.first_token_at(99) > more.first_token_at(99)
    assert lost.num_failed > 0
    assert len(lost.first_token_s) + lost.num_failed == len(trace)


def test_drawn_traffic_is_what_was_asked_for_and_the_same_again() -> None:
    drawn = Drawn(20_000, 50, 25.0, seed=3)
    arrivals = drawn.arrivals(sorted(POOLS))
    assert arrivals == drawn.arrivals(sorted(POOLS))
    times = [arrival.at_s for arrival in arrivals]
    assert times == sorted(times)
    assert len(arrivals) / times[-1] == pytest.approx(25.0, rel=0.1)
    assert np.mean([arrival.output_tokens for arrival in arrivals]) == pytest.approx(64, rel=0.05)
    assert len({arrival.tenant for arrival in arrivals}) == 50
    for wrong in (Drawn(0), Drawn(num_tenants=0), Drawn(per_s=0.0), Drawn(per_s=math.nan), Drawn(10**9)):
        with pytest.raises(InvalidRequest, match="traffic is drawn of"):
            wrong.arrivals(["c00"])


def test_a_pool_that_no_worker_can_hold_is_refused_and_the_others_are_answered() -> None:
    large = {**POOLS, "large": drawn_pool("large", (21, 21), FACTS)}
    outcome = Simulation(large, COSTS, 2).run([one(), one(0.1, "large"), one(0.2, "c01"), one(0.3, "large")])
    assert (outcome.num_refused, len(outcome.first_token_s), outcome.num_failed) == (2, 2, 0)


def test_another_tenant_sends_what_one_sends() -> None:
    more = with_another([one(0.0, tenant="a"), one(1.0, tenant="b")], "a")
    assert [arrival.tenant for arrival in more] == ["a", "another-a", "b"]
    with pytest.raises(InvalidRequest, match="no request of the trace is of a tenant 'z'"):
        with_another(more, "z")


def log_line(**facts: object) -> str:
    line = {
        "time": "2026-11-30T12:00:10.000+00:00", "level": "INFO", "method": "Generate", "tenant": "acme", "code": "OK",
        "pool": "12.5%", "codeword": "c01", "prompt_tokens": 7, "completion_tokens": 9, "took_ms": 4000.0,
    }  # fmt: skip
    return json.dumps(line | facts) + "\n"


def test_a_routers_log_is_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    others = ["not json\n", json.dumps({"message": "started"}) + "\n", log_line(method="GetModel")]
    lines = [
        log_line(),
        *others,
        log_line(time="2026-11-30T12:00:09.000+00:00", took_ms=500.0, codeword="none", pool="named:law"),
        log_line(codeword="none"),
        log_line(code="DEADLINE_EXCEEDED", took_ms=5000.0, completion_tokens=0),
    ]
    path.write_text("".join(lines))
    trace = read_log(path)
    assert trace.num_left_out == 1
    found = [(each.pool, each.tenant, each.prompt_tokens, each.output_tokens) for each in trace.arrivals]
    assert found == [("c01", "acme", 7, 1), ("c01", "acme", 7, 9), ("acme/named:law", "acme", 7, 9)]
    times = [each.at_s - trace.arrivals[0].at_s for each in trace.arrivals]
    assert times == pytest.approx([0.0, 1.0, 3.5])
    path.write_text("".join(others))
    with pytest.raises(ConfigError, match=r"has no request that shared a pool.*log\.format"):
        read_log(path)
    path.write_text(log_line(time="yesterday"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_log(path)


def test_costs_are_read_as_they_were_written_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    for costs in (COSTS, replace(COSTS, in_place=True)):
        write_costs(costs, path)
        assert read_costs(path) == costs
    as_number = path.read_text().replace("true", "1")
    for wrong in ("{}", "[]", as_number, '{"step_s": "x"}', path.read_text().replace("step_s", "stop_s"), "{"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="the costs in"):
            read_costs(path)


def test_the_command_forecasts_a_log_and_what_if(tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "models" / "emo-tiny"
    write_costs(replace(COSTS, num_slots=190), tmp_path / "costs.json")
    (tmp_path / "log").write_text("".join(log_line(took_ms=1000.0 * number) for number in range(1, 30)))
    command = ["simulate", str(tmp_path / "log"), "--model", str(model), "--costs", str(tmp_path / "costs.json")]
    result = CliRunner().invoke(app, [*command, "--another-like", "acme", "--compare", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["requests"] == 29
    names = ("as it is", "with one worker more", "with another acme", *(rules.name for rules in OTHERS))
    assert tuple(found["results"]) == names
    assert [found["results"][name]["workers"] for name in names[:3]] == [2, 3, 2]
    drawn = ["simulate", *command[2:], "--requests", "50", "--tenants", "3", "--per-second", "5", "--workers", "1"]
    result = CliRunner().invoke(app, drawn)
    assert result.exit_code == 0, result.output
    assert "50 requests, 1 worker" in result.stdout
    result = CliRunner().invoke(app, [*drawn, "--tls-ca", "ca.pem"])
    assert result.exit_code == 2
    assert "--tls-ca would have no effect here" in result.output


def test_a_pool_is_drawn_by_its_name() -> None:
    pool = drawn_pool("named:law", (3, 5), FACTS)
    assert pool == drawn_pool("named:law", (3, 5), FACTS) != drawn_pool("named:tax", (3, 5), FACTS)
    assert isinstance(pool, ExpertPool)
    assert [len(layer) for layer in pool.experts] == [3, 5]


def test_costs_are_made_to_agree_with_what_mixed_runs_took() -> None:
    traces = [[replace(each, at_s=0.0) for each in mixed(count=48)] for _ in range(3)]
    slower = replace(COSTS, **{name: 1.4 * getattr(COSTS, name) for name in FORWARDS}, busy_s=0.02)
    took_s = [Simulation(POOLS, slower, 2).run(trace).ended_s for trace in traces]
    took_s[1] *= 1.5  # as another program ran
    one_by_one = mixed(20.0, count=64)
    seen = MixedRuns(traces, took_s, one_by_one, late(Simulation(POOLS, slower, 2).run(one_by_one).first_token_s))
    found = agreeing(COSTS, POOLS, ["w0", "w1"], seen)
    assert found.step_s == pytest.approx(slower.step_s, rel=0.03)
    assert found.busy_s == pytest.approx(slower.busy_s, rel=0.1)
    assert found.prefill_s / found.step_s == pytest.approx(COSTS.prefill_s / COSTS.step_s)
    assert (found.request_s, found.page_bytes_per_s) == (COSTS.request_s, COSTS.page_bytes_per_s)
