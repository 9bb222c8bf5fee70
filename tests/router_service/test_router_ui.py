"""What `/ui` is told, and that no name in it can break out of the page."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from playwright.sync_api import Browser
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from pager.cluster.placement import WorkerState, WorkerView
from pager.observe.metrics import MetricsServer
from pager.types import (
    Count,
    Counts,
    ExpertPool,
    FinishReason,
    Full,
    ModelInfo,
    PagingCounts,
    PoolPolicy,
    RoutingFacts,
    Usage,
    WorkerResidency,
)
from router_service.hints import InProcessHints
from router_service.ui import (
    KEPT,
    MAX_POOLS,
    MAX_WAITS,
    MAX_WORKERS,
    NUM_SAMPLES,
    SAMPLE_S,
    Page,
    PoolLog,
    Served,
    Watch,
)
from tests.support.calls import rest

HOSTILE = "<img src=x onerror='window.broken=1'>"
FACTS = RoutingFacts(experts_per_layer=(0, 9, 17), shared_per_layer=(0, 1, 1), top_k_per_layer=(0, 2, 2))
MODEL = ModelInfo(
    name=f"{HOSTILE}</script><b>tiny</b>",
    fingerprint="f" * 16,
    context_length=64,
    kv_token_limit=48,
    vocab_size=256,
    facts=FACTS,
    tokenizer_class="",
    tokenizer_sha256="",
    plan="",
)
POOL = ExpertPool(((), (0, 7), (3, 15)))
OTHER = ExpertPool(((), (1, 2), (3, 4)))


def usage(pool: ExpertPool | None) -> Usage:
    return Usage(
        mode="pool",
        finish_reason=FinishReason.LENGTH,
        prompt_tokens=3,
        completion_tokens=2,
        pool=pool,
        paging=PagingCounts(experts_hit=3, experts_missed=1, bytes_from_disk=1000, bytes_from_host=24),
        out_of_pool_mass=0.0,
        predicted_recall=None,
        queue_s=0.0,
        time_to_first_token_s=0.0,
        model_fingerprint="",
    )


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Stage:
    """A watch over the conftest's cluster, whose workers a test changes."""

    def __init__(self, cluster: Any, hints: Any = None) -> None:
        self.cluster, self.clock, self.pools = cluster, Clock(), PoolLog()
        self.hints = hints or InProcessHints()
        self.served = Served()
        self.watch = Watch(MODEL, cluster, self.hints, self.pools, self.served, clock=self.clock)

    def beat(self, seconds: float = 1.0) -> None:
        self.clock.now_s += seconds
        self.watch.beat()

    def state(self) -> dict[str, Any]:
        return asyncio.run(self.watch.state())


@pytest.fixture
def cluster(make_cluster: Any) -> Any:
    return make_cluster()


@pytest.fixture
def stage(cluster: Any) -> Stage:
    cluster.change("w0", resident=(0, 0b1000_0001, 1 << 15 | 1 << 3), paging=PagingCounts(10, 10, 500, 0))
    cluster.change("w1", resident=(0, 0b1, 0), state="starting")
    return Stage(cluster)


# --- samples --------------------------------------------------------------------------------------------------------


def test_what_was_paged_between_beats_is_in_the_sample_of_its_time(stage: Stage) -> None:
    stage.beat()  # w0 has paged before: not in these minutes
    stage.cluster.change("w0", paging=PagingCounts(17, 12, 1500, 64))
    stage.beat(SAMPLE_S)
    stage.cluster.change("w0", paging=PagingCounts(18, 12, 1500, 64))
    stage.beat()
    samples = stage.state()["samples"]
    assert [sample["experts_hit"] for sample in samples] == [7, 1]
    assert [sample["experts_missed"] for sample in samples] == [2, 0]
    assert [sample["bytes_from_disk"] for sample in samples] == [1000, 0]
    assert [sample["bytes_from_host"] for sample in samples] == [64, 0]
    assert [sample["seconds"] for sample in samples] == [1 + SAMPLE_S, 1]


def test_a_worker_that_starts_again_counts_from_its_new_start(stage: Stage) -> None:
    stage.beat()
    stage.cluster.change("w0", paging=PagingCounts(20, 10, 500, 0))
    stage.beat()
    stage.cluster.change("w0", state="dead")
    stage.beat()
    stage.cluster.change("w0", state="ready", paging=PagingCounts(3, 3, 100, 0))
    stage.beat()
    stage.cluster.change("w0", paging=PagingCounts(4, 3, 100, 0))
    stage.beat()
    assert sum(sample["experts_hit"] for sample in stage.state()["samples"]) == 10 + 1


def test_samples_are_of_the_last_minutes_only(stage: Stage) -> None:
    for _ in range(2 * NUM_SAMPLES):
        stage.beat(SAMPLE_S)
    assert len(stage.state()["samples"]) == NUM_SAMPLES


async def test_what_was_sent_and_what_failed_is_in_the_samples(service: Any, lost: Any) -> None:
    asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), sampling=pb.SamplingParams(max_tokens=4))
    await rest(service.stub.Generate(asked))
    service.cluster.fail["w0"] = service.cluster.fail["w1"] = [(2, lost())]
    with pytest.raises(grpc.RpcError):
        await rest(service.stub.Generate(asked))
    service.watch.beat()
    state = await service.watch.state()
    sample = state["samples"][-1]
    assert (sample["tokens"], sample["answers"], sample["errors"]) == (4 + 2, 1, 1)
    assert 0 < state["first_token_s"]["median"] <= state["first_token_s"]["p95"] < 60
    assert sample["first_token_s"] == state["first_token_s"]["median"]


def test_times_of_first_tokens_are_kept_for_as_long_as_the_samples(stage: Stage) -> None:
    assert stage.state()["first_token_s"] == {"median": None, "p95": None}
    stage.served.waits_s.extend(range(1, 101))
    stage.beat(SAMPLE_S)
    stage.beat()
    assert stage.state()["first_token_s"] == {"median": 51, "p95": 96}
    assert [sample["first_token_s"] for sample in stage.state()["samples"]] == [51, None]
    stage.served.waits_s.extend([0.0] * 10 * MAX_WAITS)
    for _ in range(NUM_SAMPLES):
        stage.beat(SAMPLE_S)
    assert stage.state()["first_token_s"] == {"median": 0.0, "p95": 0.0}


# --- workers --------------------------------------------------------------------------------------------------------


async def test_workers_of_other_routers_are_shown_too(cluster: Any) -> None:
    hints = InProcessHints()
    mine = WorkerView("w0", WorkerState.READY, 9, 9, 9, 9, (0, 0, 0))
    far = WorkerResidency("far", WorkerState.READY, 1, 2, 16, 1000, (0, 0b10, 0b100), is_remote=True)
    await hints.report([mine, far])
    cluster.change("w0", resident=())
    workers = {worker["id"]: worker for worker in (await Stage(cluster, hints).watch.state())["workers"]}
    assert list(workers) == ["w0", "w1", "far"]
    assert workers["w0"]["resident"] == ["", "00", "0000"]
    assert (workers["w0"]["waiting"], workers["w0"]["remote"]) == (0, False)
    assert workers["far"]["resident"] == ["", "02", "0400"]
    assert (workers["far"]["waiting"], workers["far"]["running"], workers["far"]["remote"]) == (1, 2, True)


# --- pools ----------------------------------------------------------------------------------------------------------


def test_an_expected_pool_gives_way_to_the_one_that_was_chosen(stage: Stage) -> None:
    with stage.pools.following("acme", "", PoolPolicy(Count(2)), POOL) as live:
        (row,) = stage.state()["pools"]
        assert (row["tenants"], row["digest"], row["size"], row["is_expected"]) == (1, POOL.digest, "count:2", True)
        assert (row["live"], row["answers"]) == (1, 0)
        assert row["resident"] == {"w0": 4, "w1": 1}
        live.answered(usage(OTHER))
    (row,) = stage.state()["pools"]
    assert (row["digest"], row["is_expected"], row["live"], row["answers"]) == (OTHER.digest, False, 0, 1)
    assert (row["experts_hit"], row["experts_missed"], row["bytes_paged"]) == (3, 1, 1024)
    assert row["resident"] == {"w0": 1, "w1": 0}


def test_a_request_without_an_answer_leaves_no_row(stage: Stage) -> None:
    with stage.pools.following("acme", "", PoolPolicy(Full()), None):
        assert stage.state()["pools"][0]["size"] == "full"
    assert stage.state()["pools"] == []


def test_live_pools_come_first_then_the_latest(stage: Stage) -> None:
    for size in (2, 3):
        with stage.pools.following("acme", "", PoolPolicy(Count(size)), POOL) as live:
            live.answered(usage(POOL))
    with (
        stage.pools.following("acme", "", PoolPolicy(Count(4)), POOL),
        stage.pools.following("acme", "", PoolPolicy(Count(4)), POOL),
        stage.pools.following("acme", "", PoolPolicy(Count(5)), POOL),
    ):
        assert [row["size"] for row in stage.state()["pools"]] == ["count:4", "count:5", "count:3", "count:2"]


def test_no_tenant_and_no_named_pool_is_named(stage: Stage) -> None:
    for tenant, name in (("acme-corp", "merger"), ("acme-corp", "law"), ("initech", "merger"), ("initech", "")):
        with stage.pools.following(tenant, name, PoolPolicy(fixed=POOL), POOL) as live:
            live.answered(usage(POOL))
    state = stage.state()
    assert not [secret for secret in ("acme", "initech", "merger", "law") if secret in json.dumps(state)]
    rows = [(row["size"], row["tenants"], row["answers"], row["bytes_paged"]) for row in state["pools"]]
    assert rows == [("fixed", 1, 1, 1024), ("named", 2, 3, 3 * 1024)]


def test_the_state_is_bounded(cluster: Any) -> None:
    some = next(iter(cluster.views.values()))
    facts = RoutingFacts((256,) * 61, (0,) * 61, (8,) * 61)
    stage = Stage(cluster)
    cluster.views.clear()
    for number in range(2 * MAX_WORKERS):
        cluster.views[f"w{number}"] = some
        cluster.change(f"w{number}", id=f"w{number}", resident=(2**256 - 1,) * 61)
    model = replace(MODEL, name="m", facts=facts)
    stage.watch = Watch(model, cluster, stage.hints, stage.pools, clock=stage.clock)
    for number in range(KEPT + 50):
        tenant, size = f"{number:x<64}", Counts(tuple(range(8, 69)))
        pool = ExpertPool(((number % 256,),) * 61)
        with stage.pools.following(tenant, "n" * 64, PoolPolicy(size), pool) as live:
            live.answered(usage(pool))
    for _ in range(NUM_SAMPLES):
        stage.beat(SAMPLE_S)
    state = stage.state()
    assert len(stage.pools.rows) == KEPT
    assert (len(state["workers"]), state["workers_left_out"]) == (MAX_WORKERS, MAX_WORKERS)
    assert (len(state["pools"]), state["pools_left_out"]) == (MAX_POOLS, KEPT - MAX_POOLS)
    assert len(json.dumps(state)) < 256_000


async def test_requests_are_followed(service: Any) -> None:
    """Through the real servicer, while one runs and after."""
    event = service.cluster.hold[1] = asyncio.Event()
    asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), pool=pb.PoolPolicy(count=2))
    call = service.stub.Generate(asked, metadata=(("x-tenant-id", "acme"),))
    await call.read()
    (row,) = (await service.watch.state())["pools"]
    assert (row["tenants"], row["live"], row["answers"], row["is_expected"]) == (1, 1, 0, True)
    event.set()
    *_, last = await rest(call)
    (row,) = (await service.watch.state())["pools"]
    assert (row["tenants"], row["live"], row["answers"]) == (1, 0, 1)
    assert row["digest"] == last.usage.pool.digest


async def test_what_several_answers_paged_is_added_up(service: Any) -> None:
    """Each answer's usage has what was paged since the one before it ended."""
    asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), pool=pb.PoolPolicy(count=2))
    asked.sampling.n, asked.sampling.max_tokens = 3, 2
    usages = [message.usage for message in await rest(service.stub.Generate(asked)) if message.HasField("usage")]
    (row,) = (await service.watch.state())["pools"]
    assert (row["answers"], row["experts_hit"]) == (1, sum(usage.experts_hit for usage in usages))
    assert len(usages) == 3
    assert row["bytes_paged"] == 3 * (5 + 7)


async def test_no_thread_waits_for_the_event_loop(cluster: Any) -> None:
    """The only thread that there is reads the hints, while the page waits for them."""

    class Hints(InProcessHints):
        async def residency(self) -> dict[str, WorkerResidency]:
            await asyncio.to_thread(threading.get_ident)
            return await super().residency()

    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    app = Starlette(routes=Page(Stage(cluster, Hints()).watch, asyncio.get_running_loop()).routes())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        found = await client.get("/ui/state.json")
        assert (found.status_code, found.json()["model"]["name"]) == (200, MODEL.name)
        assert (await client.get("/ui/pool.json?digest=none")).status_code == 404
        assert (await client.get("/ui")).headers["content-type"] == "text/html; charset=utf-8"


# --- over HTTP, in a browser ----------------------------------------------------------------------------------------


@contextmanager
def served(watch: Watch) -> Iterator[str]:
    """The page in front of real metrics; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = MetricsServer(CollectorRegistry(), "127.0.0.1")
    server._server.daemon_threads = False  # to close it waits for the answers that the loop still owes
    server.mount("/ui", Page(watch, loop))
    try:
        yield f"http://{server.address}"
    finally:
        server.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_paths_methods_and_headers(stage: Stage) -> None:
    def get(path: str, method: str = "GET") -> tuple[int, Any, bytes]:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{address}{path}", method=method)) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    with served(stage.watch) as address:
        status, headers, page = get("/ui")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert all(policy[kind].startswith("'sha256-") for kind in ("script-src", "style-src"))
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"expert-pager slice MODEL OUT --pool NAME --server HOST:PORT" in page
        assert b"http" not in page.replace(b"http://www.w3.org/2000/svg", b""), "nothing from elsewhere"
        assert get("/ui/", "HEAD")[2] == b""
        assert json.loads(get("/ui/state.json")[2])["model"]["name"] == MODEL.name
        assert get("/ui/state.json", "POST")[0] == 405
        assert get("/ui/../metrics")[0] == 404
        assert get("/metrics")[1]["Content-Type"].startswith("text/plain")
        assert get("/metrics")[0] == 200
        assert [get(path)[0] for path in ("/", "/metric", "/metricsx", "/favicon.ico", "/ui/x")] == [404] * 5


def test_names_are_text_and_both_workers_have_a_map(stage: Stage, browser: Browser) -> None:
    complaints: list[str] = []
    with (
        served(stage.watch) as address,
        stage.pools.following(HOSTILE, HOSTILE, PoolPolicy(fixed=POOL), POOL),
        browser.new_page(viewport={"width": 390, "height": 844}) as page,
    ):
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"{address}/ui")
        page.locator("#pools tbody tr").wait_for()
        assert page.locator("h1").inner_text() == MODEL.name
        assert page.locator("#pools tbody td").all_text_contents()[:3] == [POOL.digest[:12], "1", "named"]
        assert page.locator("img, b").count() == 0
        assert page.evaluate("window.broken") is None
        assert page.locator("#maps h3").all_inner_texts() == ["All workers", "w0", "w1"]
        labels = page.locator("#maps canvas").evaluate_all("maps => maps.map((map) => map.getAttribute('aria-label'))")
        assert [label.split(": ")[1].split(",")[0] for label in labels] == [
            "5 experts in device slots",
            "4 experts in device slots",
            "1 expert in device slots",
        ]
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert complaints == []
