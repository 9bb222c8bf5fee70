"""`/ui` of the real service in headless Chromium: what is drawn is what the service says of itself."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from expert_pager.v1 import expert_pager_pb2 as pb
from playwright.sync_api import Browser, Page

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1360, "height": 900}
SECRET = "walrus protocol seventeen"
# Of each cell of a map, whether its middle has the colour of an expert in a slot; anything else must be the other one.
READ_MAP = """(canvas) => {
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const pen = copy.getContext("2d", { willReadFrequently: true });
  const read = (x, y) => String(pen.getImageData(x, y, 1, 1).data);
  const colour = (name) => {
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
    pen.fillRect(0, 0, 1, 1);
    return read(0, 0);
  };
  const held = colour("--held"), absent = colour("--absent");
  pen.drawImage(canvas, 0, 0);
  const routed = state.model.routed_per_layer, columns = Math.max(...routed);
  return routed.map((experts, layer) => Array.from({ length: experts }, (_, expert) => {
    const x = Math.floor(((expert + 0.4) * canvas.width) / columns);
    const found = read(x, Math.floor(((layer + 0.4) * canvas.height) / routed.length));
    if (found !== held && found !== absent) throw new Error(`layer ${layer}, expert ${expert} is ${found}`);
    return found === held;
  }));
}"""
# The cells of the pool that is in use, as of one moment.
LIVE_ROW = """() => {
  const row = document.querySelector("#pools tbody tr.live");
  return row && Array.from(row.querySelectorAll("td"), (cell) => cell.textContent);
}"""
COUNTS = ("experts_hit", "experts_missed", "bytes_from_disk", "bytes_from_host")


@dataclass
class Shown:
    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: set[str] = field(default_factory=set)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()


@pytest.fixture
def address(idle_service: Any) -> str:
    return f"http://{idle_service.targets()['router']}"


@pytest.fixture
def show(browser: Browser, address: str) -> Iterator[Callable[..., Shown]]:
    shown: list[Shown] = []

    def show(viewport: dict[str, int], scheme: str = "light") -> Shown:
        page = browser.new_page(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
        page.set_default_timeout(120_000)
        here = Shown(page)
        page.on("console", lambda message: here.complaints.append(message.text))
        page.on("pageerror", lambda error: here.complaints.append(str(error)))
        page.on("request", lambda request: here.requests.add(request.url.removeprefix(address)))
        page.goto(f"{address}/ui")
        page.locator("#main").wait_for()
        shown.append(here)
        return here

    yield show
    for here in shown:
        assert here.complaints == []
        assert here.requests <= {"/ui", "/ui/state.json", "/favicon.ico"}
        here.page.close()


def state_at(address: str) -> Any:
    with urllib.request.urlopen(f"{address}/ui/state.json", timeout=30) as reply:
        return json.load(reply)


def worker_counts(service: Any) -> dict[str, float]:
    """From the workers' own metrics, by the names that the page's state has for them."""
    metrics = service.worker_metrics()

    def lookups(result: str) -> float:
        return float(metrics.total("expert_pager_lookups_total", tier="device", result=result))

    return {
        "experts_hit": lookups("hit") + lookups("hit_in_flight"),
        "experts_missed": lookups("miss"),
        "bytes_from_disk": metrics.total("expert_pager_transfer_bytes_total", source="disk"),
        "bytes_from_host": metrics.total("expert_pager_transfer_bytes_total", source="host"),
    }


class Reader:
    """A client that asks again and again until it is stopped: one answer may end before the page has heard of it."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask
        self._is_over = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._num_answers = self._thread.submit(self._read)

    def _read(self) -> int:
        num_answers = 0
        while not self._is_over.is_set():
            with contextlib.suppress(grpc.RpcError):
                for _ in self._ask():
                    pass
                num_answers += 1
        return num_answers

    def stop(self) -> None:
        """After the present answer."""
        self._is_over.set()

    def num_answers(self) -> int:
        """That came to their own end."""
        with self._thread:
            return self._num_answers.result(120)


def bits(worker: pb.WorkerResidency, routed: list[int]) -> list[list[bool]]:
    masks = [int.from_bytes(layer, "little") for layer in worker.resident]
    return [[bool(mask >> expert & 1) for expert in range(count)] for mask, count in zip(masks, routed, strict=True)]


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_the_map_is_what_the_service_holds(
    idle_service: Any, show: Callable[..., Shown], until: Callable[..., None], viewport: dict[str, int]
) -> None:
    service = idle_service
    for seed in range(2):  # a quarter of the experts fits: something is held, and something is not
        service.generate([1, 2, 3], pool=service.random_pool(seed, 12), max_tokens=2)
    service.wait_until_idle()
    shown = show(viewport, "light" if viewport is DESK else "dark")

    (name,) = service.residency()

    def says_the_same() -> bool:
        """Both hear of the worker every few seconds, so what they say is compared as of one moment."""
        worker = service.residency()[name]
        drawn = shown.page.locator("#maps canvas").evaluate(READ_MAP)
        number = sum(map(sum, drawn))
        slots = f"{number} of {worker.slots} slots"
        return (
            0 < number == worker.resident_experts < sum(service.routed_per_layer)
            and drawn == bits(worker, service.routed_per_layer)
            and f"ready, {slots}, 0 running, 0 waiting" in shown.text("#maps .head .soft")
            and shown.text("#resident") == slots
        )

    until(says_the_same, 60)
    assert shown.text("#maps h3") == name
    assert shown.text("#status-text") == "1 of 1 worker ready"
    assert shown.text("h1") == service.stub.GetModel(pb.GetModelRequest(), timeout=30).name
    assert shown.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# Of a map's cells, how many have each of these colours at their middle.
COUNT_CELLS = """(canvas, names) => {
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const pen = copy.getContext("2d", { willReadFrequently: true });
  const read = (x, y) => String(pen.getImageData(x, y, 1, 1).data);
  const colours = names.map((name) => {
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
    pen.fillRect(0, 0, 1, 1);
    return read(0, 0);
  });
  pen.drawImage(canvas, 0, 0);
  const routed = facts.routed_per_layer, columns = Math.max(...routed), counts = names.map(() => 0);
  for (const [layer, experts] of routed.entries()) {
    for (let expert = 0; expert < experts; expert++) {
      const x = Math.floor(((expert + 0.4) * canvas.width) / columns);
      const found = colours.indexOf(read(x, Math.floor(((layer + 0.4) * canvas.height) / routed.length)));
      if (found >= 0) counts[found]++;
    }
  }
  return counts;
}"""


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_the_playground_shows_an_answer_as_it_is_made(
    idle_service: Any, browser: Browser, until: Callable[..., None], viewport: dict[str, int]
) -> None:
    service, prompt = idle_service, "SELECT name FROM users WHERE"
    for seed in range(3):  # whatever the slots held for others
        service.generate([1, 2, 3], pool=service.random_pool(seed, 20), max_tokens=2)
    complaints: list[str] = []
    with browser.new_page(viewport=viewport) as page:  # type: ignore[arg-type]
        page.set_default_timeout(120_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{service.ready['http_url']}/ui")
        page.locator("#playground").wait_for()
        for name, value in (("#pool", "12.5%"), ("#other", "full"), ("#tokens", "24"), ("#prompt", prompt)):
            page.fill(name, value)
        page.press("#prompt", "Control+Enter")
        page.locator("#differences", has_text="token").wait_for()
        pooled, exact = page.locator(".answer").all()
        # Which of the pool's experts were read is what the map says once all its cells are filled.
        pool = service.generate(prompt, pool=pb.PoolPolicy(share=0.125), max_tokens=24, ignore_eos=False)
        num_experts = pool.usage.pool.num_experts
        canvas = pooled.locator("canvas")

        def is_filled() -> bool:
            held, disk, host = canvas.evaluate(COUNT_CELLS, ["held", "disk", "host"])
            bill = pooled.locator(".bill").inner_text()
            return bool(
                disk > 0
                and held + disk >= num_experts
                and host == 0
                and bill.startswith(f"{num_experts} experts, {held} there already, ")
            )

        until(is_filled, 60)
        assert pooled.locator(".output").inner_text() == prompt + pool.text
        whole = service.generate(prompt, max_tokens=24, pool=pb.PoolPolicy(full=pb.Full()), ignore_eos=False)
        assert exact.locator(".output").inner_text() == prompt + whole.text
        assert "outside of the pool" not in exact.locator("p.soft").last.inner_text()
        tints = pooled.locator(".output span[title]").evaluate_all("spans => spans.map((span) => span.title)")
        assert len(tints) == len(pool.tokens) - 1  # the first token's forward chose the pool
        mean = sum(float(tint.split()[0]) for tint in tints) / len(tints)
        assert mean == pytest.approx(100 * pool.usage.out_of_pool_mass, abs=0.2)
        assert page.locator("#heat canvas").get_attribute("aria-label") == (
            f"Scores of {len(service.routed_per_layer)} layers, a strip each"
        )
        page.locator("#known-pools button", has_text=pool.usage.pool.digest[:12]).click()
        assert page.locator("#cells canvas").evaluate(COUNT_CELLS, ["held", "disk"]) == [num_experts, 0]
        row = page.locator("#pools tbody button", has_not_text=pool.usage.pool.digest[:12]).first
        other = row.inner_text()
        row.press("Enter")
        page.locator("#cells-note", has_text=other).wait_for()
        first, _, both = page.locator("#cells canvas").evaluate(COUNT_CELLS, ["held", "disk", "both"])
        assert first + both == num_experts
        assert page.locator("#cells-note").inner_text().startswith(f"{both} experts in both: ")
        assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
        until(lambda: re.match(r"\d+ of [1-9]", page.locator("#errors").inner_text()) is not None, 30)
        assert page.locator("#waits svg .rate").count() >= 1
    assert complaints == []


def sampled_since(address: str, before: dict[str, float]) -> dict[str, float]:
    """What was added to the samples since `before` was the last of them."""
    mine = [sample for sample in state_at(address)["samples"] if sample["end_unix_s"] >= before["end_unix_s"] - 0.2]
    return {name: sum(sample[name] for sample in mine) - before[name] for name in COUNTS}


def is_quiet(address: str, seconds: float = 4.0) -> bool:
    """Nothing was added to the samples for so long."""
    before = state_at(address)["samples"][-1]
    time.sleep(seconds)
    return not any(sampled_since(address, before).values())


def test_live_pools_and_paging(
    idle_service: Any, show: Callable[..., Shown], until: Callable[..., None], address: str
) -> None:
    service = idle_service
    until(lambda: is_quiet(address))  # the page hears of what workers did a little later
    before, paged = state_at(address)["samples"][-1], worker_counts(service)
    pool = service.random_pool(77, 10)
    shown = show(DESK)
    reader = Reader(lambda: service.open(SECRET, pool=pool, tenant="acme", max_tokens=900, request_id="shown"))
    try:
        live = shown.page.wait_for_function(LIVE_ROW).json_value()
    finally:
        reader.stop()
    service.stub.Abort(pb.AbortRequest(request_id="shown"), metadata=(("x-tenant-id", "acme"),))
    num_answers = reader.num_answers() + 1
    assert live[1:4] == ["1", "fixed", "1"]
    assert int(live[4]) < num_answers
    assert live[7].endswith(f" of {10 * len(service.routed_per_layer)}")
    answer = service.generate(SECRET, pool=pool, tenant="acme", max_tokens=3)
    service.wait_until_idle()

    def moved() -> dict[str, float]:
        return {name: count - paged[name] for name, count in worker_counts(service).items()}

    until(lambda: sampled_since(address, before) == moved(), 60)
    assert moved()["experts_missed"] > 0
    assert moved()["bytes_from_disk"] > 0

    def hit_rate() -> str:
        hits, misses = (
            sum(sample[name] for sample in state_at(address)["samples"]) for name in ("experts_hit", "experts_missed")
        )
        return f"{round(100 * hits / (hits + misses), 1):g} %"

    until(lambda: shown.text("#hit-rate") == hit_rate(), 30)
    assert shown.page.locator("#hits svg .rate").count() == 1
    bars = shown.page.locator("#bandwidth svg rect.disk")
    until(lambda: bars.count() == len(state_at(address)["samples"]), 30)
    assert any(float(bar.get_attribute("height") or 0) > 0 for bar in bars.all())
    row = shown.page.locator("#pools tbody tr", has_text=answer.usage.pool.digest[:12])
    until(lambda: row.locator("td").all_text_contents()[3:5] == ["0", str(num_answers)], 30)
    assert not [each for each in (SECRET, "acme") if each in json.dumps(state_at(address))]
