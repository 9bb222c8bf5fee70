"""The playground: what its endpoints tell, to whom, and the page in front of them, in a real browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from pager.threads import LoopThread
from pager.types import Full
from router_service.admission import Role
from router_service.keys import Gate
from router_service.prediction import Passes
from tests.router_service.conftest import FACTS, MODEL, Running, scores_for
from tests.router_service.test_router_keys import KeyRing, bearer, call, guarded, http, within
from tests.support.waiting import until

PROMPT = "hello"
NUM_EXPERTS = 2 * 2  # of a pool of two a layer: the first layer is dense
HOSTILE = "<img src=x onerror='window.broken=1'>"
HOSTILE_PROMPT = f"g{HOSTILE[:20]}"  # of whose pool are the experts that a watched request reads


async def events(client: httpx.AsyncClient, body: dict[str, Any], headers: Any = ()) -> list[dict[str, Any]]:
    async with client.stream("POST", "/ui/answers", json=body, headers=dict(headers)) as answer:
        assert answer.status_code == 200, await answer.aread()
        return [json.loads(line.removeprefix("data: ")) async for line in answer.aiter_lines() if line]


async def test_scores_and_an_answer_with_its_bill(service: Running) -> None:
    async with http(service, Gate()) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        facts = (await client.get("/ui/playground.json")).json()
        assert (facts["model"], facts["routed_per_layer"]) == (MODEL.name, list(FACTS.routed_per_layer))
        assert (facts["default_pool"], facts["pools"]) == ("full", [])
        scored = (await client.post("/ui/scores", json={"prompt": PROMPT, "pool": "2"})).json()
        expected = scores_for(ord("h"), "trunk")
        assert scored["scores"] == [pytest.approx(list(layer), abs=1e-4) for layer in expected.mean_LR]
        assert (scored["num_tokens"], scored["source"], scored["worker"]) == (len(PROMPT), "trunk", "w0")
        assert scored["expected"]["num_experts"] == NUM_EXPERTS
        first, *others, last = await events(client, {"prompt": PROMPT, "pool": "2", "max_tokens": 4})
    assert service.cluster.received[-1][1].is_watched
    assert first == {
        "text": "h",
        "ids": [ord("h")],
        "page_ins": [[1, 7, "disk", 2.0], [2, 7, "host", 4.0]],
    }
    assert others == [{"text": text, "ids": [ord(text)], "outside": 0.25} for text in "el"]
    bill = last.pop("bill")
    assert last == {"text": "l", "ids": [ord("l")], "outside": 0.25}
    assert (bill["mode"], bill["pool"]["num_experts"], bill["completion_tokens"]) == ("pool", NUM_EXPERTS, 4)
    assert [len(layer) for layer in bill["pool"]["experts"]] == [0, 2, 2]
    assert (bill["experts_hit"], bill["bytes_from_disk"], bill["first_token_ms"]) == (11, 5, 750.0)


async def test_a_service_without_a_predictor_has_no_scores(serve: Any) -> None:
    async with (
        serve(passes=Passes()) as service,
        http(service, Gate()) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        scored = (await client.post("/ui/scores", json={"prompt": PROMPT, "pool": "2"})).json()
        assert (scored["source"], scored["scores"], scored["expected"]) == ("prefill", [], None)
        *_, last = await events(client, {"prompt": PROMPT, "pool": "2", "max_tokens": 2})
        assert last["bill"]["pool"]["num_experts"] == NUM_EXPERTS
        again = (await client.post("/ui/scores", json={"prompt": PROMPT, "pool": "2"})).json()
        assert again["expected"] == last["bill"]["pool"]  # what its prefill chose


async def test_an_exact_answer_has_no_pool(service: Running) -> None:
    async with http(service, Gate()) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        *_, last = await events(client, {"prompt": PROMPT, "pool": "full", "max_tokens": 2})
    assert service.cluster.received[-1][1].pool.size == Full()
    assert (last["bill"]["mode"], last["bill"]["pool"]) == ("exact", None)


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/ui/answers", {"max_tokens": 0}, 400, "max_tokens"),
        ("/ui/answers", {"max_tokens": 10**6}, 400, "max_tokens"),
        ("/ui/answers", {"pool": "lots"}, 400, "pool"),
        ("/ui/answers", {"name": "law"}, 404, "pool.name"),
        ("/ui/answers", {"name": "law", "pool": "2"}, 400, "pool"),
        ("/ui/scores", {"pool": "200"}, 400, "pool"),
        ("/ui/scores", {"prompt": ""}, 400, "prompt"),
        ("/ui/scores", {"prompt": "x" * 100}, 400, "prompt"),
        ("/ui/scores", {"tenant": "acme"}, 400, "tenant"),
        ("/ui/scores", {"drift": "much"}, 400, "drift"),
    ],
)
async def test_what_is_wrong_is_refused_by_its_name(
    service: Running, path: str, fields: dict[str, Any], status: int, param: str
) -> None:
    async with http(service, Gate()) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        answer = await client.post(path, json={"prompt": PROMPT} | fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
        *_, last = await events(client, {"prompt": PROMPT, "max_tokens": 1})
        assert "bill" in last


async def test_a_client_that_leaves_ends_its_answer(service: Running) -> None:
    service.cluster.hold[1] = asyncio.Event()
    async with http(service, Gate()) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        async with client.stream("POST", "/ui/answers", json={"prompt": PROMPT, "max_tokens": 4}) as answer:
            assert await anext(answer.aiter_lines())

        async def is_cancelled() -> bool:
            return bool(service.cluster.cancelled)

        await within(60, is_cancelled)
    assert service.pipeline.admission.num_requests == 0


async def test_a_tenant_sees_its_own_pools_alone(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    acme, rival, operator = await ring.add("acme"), await ring.add("rival"), await ring.add("house", Role.OPERATOR)
    gate = ring.gate()
    async with (
        guarded(gate) as service,
        http(service, gate) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        made = (await call(service, "Calibrate", bearer(acme))).pool
        (named,) = (await client.get("/ui/playground.json", headers=dict(bearer(acme)))).json()["pools"]
        assert (named["name"], named["digest"]) == (made.name, made.pool.digest)
        mine = (await client.get("/ui/pools/law", headers=dict(bearer(acme)))).json()
        assert sum(map(len, mine["experts"])) == mine["num_experts"] == made.pool.num_experts
        assert (await client.get("/ui/playground.json", headers=dict(bearer(rival)))).json()["pools"] == []
        assert (await client.get("/ui/pools/law", headers=dict(bearer(rival)))).status_code == 404
        by_name = {"prompt": PROMPT, "name": "law", "max_tokens": 1}
        *_, last = await events(client, by_name, bearer(acme))
        assert last["bill"]["pool"]["digest"] == made.pool.digest
        assert (await client.post("/ui/answers", json=by_name, headers=dict(bearer(rival)))).status_code == 404
        shown = f"/ui/pool.json?digest={made.pool.digest}"  # of all tenants' requests
        assert (await client.get(shown, headers=dict(bearer(rival)))).status_code == 403
        assert (await client.get(shown, headers=dict(bearer(operator)))).json()["experts"] == mine["experts"]
        assert (await client.get(f"{shown}0", headers=dict(bearer(operator)))).status_code == 404
        for path in ("/ui/playground.json", "/ui/pools/law"):
            assert (await client.get(path, headers=dict(bearer(operator)))).status_code == 403


# --- the page, in a browser -------------------------------------------------------------------------------------------


@contextmanager
def served(ring: KeyRing | None = None) -> Iterator[tuple[str, Running]]:
    """A service in a thread of its own, with both of its fronts: its address, and the service."""
    thread, stack = LoopThread("service"), AsyncExitStack()

    async def start() -> tuple[str, Running]:
        gate = Gate() if ring is None else ring.gate()
        service = await stack.enter_async_context(guarded(gate))
        return await stack.enter_async_context(http(service, gate)), service

    try:
        yield thread.run(start(), 60)
    finally:
        thread.run(stack.aclose(), 60)
        thread.stop()


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page of the playground, which must not complain but of what is refused."""
    complaints: list[str] = []
    with browser.new_page(**options) as page:
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"{url}/ui")
        yield page
    assert [each for each in complaints if "the server responded with a status of 40" not in each] == []


def ask(page: Page, prompt: str, **fields: str) -> None:
    """With the keyboard alone."""
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")


def test_the_page_asks_for_a_key_and_shows_what_its_role_allows(tmp_path: Path, browser: Browser) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    thread = LoopThread("keys")  # the browser's driver has a loop of its own on this one
    tenant, operator = thread.run(ring.add("acme")), thread.run(ring.add("house", Role.OPERATOR))
    thread.stop()
    with served(ring) as (url, _), visiting(browser, url) as page:
        page.locator("#key-form").wait_for()
        assert not page.locator("#playground").is_visible()
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.locator("#key-note", has_text="Bearer KEY").wait_for()
        page.fill("#key", tenant)
        page.press("#key", "Enter")
        page.locator("#playground").wait_for()
        assert not page.locator("#main").is_visible()
        assert page.locator("h1").inner_text() == MODEL.name
        ask(page, PROMPT, pool="2", tokens="3")
        page.locator(".bill", has_text="to the first token").wait_for()
        assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert tenant not in page.content()
        page.reload()  # and forgets the key
        page.locator("#key-form").wait_for()
        page.fill("#key", operator)
        page.press("#key", "Enter")
        page.locator("#main").wait_for()
        assert not page.locator("#playground").is_visible()
        row = page.locator("#pools tbody button")
        row.click()
        page.locator("#cells canvas").wait_for()
        assert page.locator("#cells-note").inner_text() == f"{NUM_EXPERTS} experts, count:2"


def test_the_map_the_bill_and_the_difference(browser: Browser) -> None:
    with served() as (url, _), visiting(browser, url, viewport={"width": 390, "height": 844}) as page:
        ask(page, HOSTILE_PROMPT, pool="2", other="full", tokens="3")
        page.locator("#differences", has_text="Both have the same 3 tokens.").wait_for()
        assert page.locator(".output").first.inner_text() == HOSTILE_PROMPT + HOSTILE_PROMPT[:3]
        assert page.locator("img").count() == 0
        page.locator(".answer canvas[aria-label*='2 experts there already, 2 read']").wait_for()
        bills = page.locator(".bill").all_inner_texts()
        assert bills[0] == "4 experts, 2 there already, 12 B paged, 750 ms to the first token"
        assert bills[1].startswith("24 experts asked for, 11 there already")
        titles = page.locator(".output span[title]").evaluate_all("spans => spans.map((span) => span.title)")
        assert titles == ["25 % outside of the pool"] * 4
        page.locator("#known-pools button").click()
        page.locator("#cells canvas").wait_for()
        assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
        with page.expect_download() as saved:
            page.click("#save")
        assert json.loads(saved.value.path().read_text()) == page.evaluate("() => looked[0].experts")
        assert saved.value.suggested_filename in page.locator("#slice-line").inner_text()


def test_tokens_are_shown_as_they_come_until_somebody_stops_them(browser: Browser) -> None:
    with served() as (url, service), visiting(browser, url) as page:
        service.cluster.hold[2] = asyncio.Event()
        ask(page, PROMPT, pool="2", tokens="5")
        page.locator(".output", has_text=f"{PROMPT}he").wait_for()
        page.locator(".answer canvas[aria-label*='2 read']").wait_for()
        assert page.locator(".bill").inner_text() == ""
        page.click("#stop")
        page.locator("#ask-error", has_text="Stopped.").wait_for()
        until(lambda: service.cluster.cancelled, 60)
        assert page.locator("#stop").is_disabled()


def test_an_error_is_said_where_the_answer_would_be(browser: Browser) -> None:
    with served() as (url, service), visiting(browser, url) as page:
        ask(page, PROMPT, pool=HOSTILE)
        page.locator("#ask-error", has_text=HOSTILE[:10]).wait_for()
        assert page.locator("img").count() == 0
        service.cluster.fail["w0"] = [(1, RuntimeError("broken"))]
        ask(page, PROMPT, pool="2")
        page.locator("#ask-error", has_text="internal error").wait_for()
        ask(page, PROMPT, pool="2")
        page.locator(".bill", has_text="to the first token").wait_for()
        assert not page.locator("#ask-error").is_visible()
