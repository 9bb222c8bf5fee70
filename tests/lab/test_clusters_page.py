"""The page in headless Chromium, at the widths of a phone and of a desk, with documents that try to break out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page

import pager.lab.clusters as cluster_page
from pager.errors import InvalidRequest
from pager.lab.clusters import ModelReport, TracedDocument, build_page, embed_json, make_report
from pager.types import RoutingFacts
from tests.support.values import some

FACTS = RoutingFacts(experts_per_layer=(17, 0, 17), shared_per_layer=(1, 0, 1), top_k_per_layer=(3, 0, 3))
PHONE, DESK = (390, 844), (1360, 900)
CLUSTERS, DOCUMENTS, TOKENS = 5, 3, 40
HOSTILE = (
    "</script>",
    "<script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "<!--<script>",
    "${window.broken = 1}",
    "\u2028",
    "\ud800",
)
DOMAINS = ("<b>bold</b>", "code", "law")


def documents(seed: int) -> list[TracedDocument]:
    """Each domain keeps to experts of its own; the first one's text is hostile."""
    random = np.random.default_rng(seed)
    made = []
    for number, domain in enumerate(DOMAINS):
        words = HOSTILE if number == 0 else tuple(f" {domain}{word}" for word in range(6))
        for document in range(DOCUMENTS):
            logits = random.normal(size=(TOKENS, 2, 16))
            logits[:, :, 5 * number : 5 * number + 5] += 3
            probs_TC = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).reshape(TOKENS, 32)
            pieces = tuple(words[token % len(words)] for token in range(TOKENS))
            made.append(TracedDocument(domain, f'"{domain}" #{document}', pieces, probs_TC.astype(np.float32)))
    return made


def report(name: str = "emo", seed: int = 0) -> ModelReport:
    return make_report(name, FACTS, documents(seed), CLUSTERS, seed)


@dataclass(frozen=True, slots=True)
class Shown:
    """A page as a browser shows it, and what it did that it should not."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def panel(self, view: str, model: int = 0) -> Locator:
        return self.page.locator(f"#{view} .panel[data-model='{model}']")

    def check(self) -> None:
        assert self.complaints == []
        assert len(self.requests) == 1, "only the file itself"
        assert self.page.evaluate("window.broken") is None


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Shown]]:
    """`show(html, (width, height), **of the page)`; at the end, whatever the page did must have been right."""
    shown: list[Shown] = []

    def show(html: str, size: tuple[int, int] = DESK, **options: Any) -> Shown:
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        page = browser.new_page(viewport={"width": size[0], "height": size[1]}, **options)
        page.set_default_timeout(120_000)
        here = Shown(page)
        page.on("request", lambda request: here.requests.append(request.url))
        page.on("console", lambda message: here.complaints.append(message.text))
        page.on("pageerror", lambda error: here.complaints.append(str(error)))
        page.goto(file.as_uri())
        shown.append(here)
        return here

    yield show
    for here in shown:
        here.check()
        here.page.close()


@pytest.fixture(scope="module")
def one() -> str:
    return build_page([report()], seed=0, max_tokens=TOKENS)


@pytest.fixture(scope="module")
def two() -> str:
    return build_page([report(), report("<i>standard</i>", seed=1)], seed=0, max_tokens=TOKENS)


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_selecting_a_cluster_shows_its_tokens(show: Callable[..., Shown], one: str, size: tuple[int, int]) -> None:
    shown = show(one, size)
    panel = shown.panel("clusters")
    rows = panel.locator(".list button")
    assert rows.count() == CLUSTERS
    assert panel.locator(".detail h3").inner_text() == "1\nCluster 1"
    rows.nth(2).click()
    assert panel.locator(".detail h3").inner_text() == "3\nCluster 3"
    assert rows.nth(2).get_attribute("aria-pressed") == "true"
    assert panel.locator(".chip").count() > 0
    # The marked token of every quotation is of the cluster, in a document that says so too.
    marks = panel.locator(".quotes mark").all_inner_texts()
    panel.locator(".quotes .link").first.click()
    here = shown.panel("documents").locator(".reader .here")
    assert (here.get_attribute("data-cluster"), here.inner_text().strip()) == ("2", marks[0].strip())
    assert shown.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_every_domain_has_a_row_of_all_experts(show: Callable[..., Shown], one: str, size: tuple[int, int]) -> None:
    shown = show(one, size)
    shown.page.click("#tab-experts")
    panel = shown.panel("experts")
    assert panel.locator("tbody th").all_inner_texts() == list(DOMAINS)
    assert panel.locator("td").count() == len(DOMAINS) * 16
    assert panel.locator(".layers button").all_inner_texts() == ["0", "2"]
    assert "Layer 2, pools of 3 experts" in panel.locator(".note").inner_text()
    panel.locator(".layers button").first.click()
    assert "Layer 0, pools of 3 experts" in panel.locator(".note").inner_text()
    # Ordered by main domain, the first columns belong to the first domain; by number, expert 0 comes first.
    cell = panel.locator("tr").nth(1).locator("td").first
    assert float(cell.evaluate("cell => cell.style.getPropertyValue('--v')")) < 50
    shown.page.click("[data-key=index]")
    assert "expert 0\n" in str(panel.locator("td").first.get_attribute("aria-label"))
    shown.page.click("[data-key=mass]")
    assert panel.locator("table").get_attribute("aria-label") == "Share of probability, layer 0 of emo"
    values = panel.locator("td").evaluate_all(
        "cells => cells.map((cell) => Number(cell.style.getPropertyValue('--v')))"
    )
    assert max(values) == 100
    assert 0 < min(values) < 50
    assert shown.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_documents_are_coloured_and_hostile_text_is_text(show: Callable[..., Shown], one: str) -> None:
    shown = show(one)
    shown.page.click("#tab-documents")
    panel = shown.panel("documents")
    assert panel.locator(".strips canvas").count() == len(DOMAINS) * DOCUMENTS
    text = panel.locator(".reader").evaluate("node => node.textContent")
    assert all(piece in text for piece in HOSTILE[:-1])
    assert panel.locator(".reader span").count() == TOKENS
    panel.locator(".legend button").first.click()
    lit = panel.locator(".reader span.on")
    assert len({token.get_attribute("data-cluster") for token in lit.all()}) == 1
    assert shown.page.locator("img, b:text-is('bold')").count() == 0
    assert shown.page.locator("script").count() == 2


def test_two_models_are_side_by_side_on_a_desk_and_one_by_one_on_a_phone(show: Callable[..., Shown], two: str) -> None:
    desk, phone = show(two), show(two, PHONE)
    first, second = (desk.panel("clusters", model).bounding_box() for model in range(2))
    assert first is not None
    assert second is not None
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]
    assert desk.panel("clusters", 1).locator("h2").inner_text() == "<i>standard</i>"
    assert [phone.panel("clusters", model).is_visible() for model in range(2)] == [True, False]
    phone.page.locator("#models button").nth(1).click()
    assert [phone.panel("clusters", model).is_visible() for model in range(2)] == [False, True]
    assert phone.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_keyboard_is_enough(show: Callable[..., Shown], one: str) -> None:
    shown = show(one)
    keys = shown.page.keyboard
    shown.page.locator("#tab-clusters").focus()
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    assert shown.page.locator("#experts").is_visible()
    shown.page.locator("#experts td").first.focus()
    keys.press("ArrowDown")
    keys.press("ArrowRight")
    assert (
        shown.page.locator("#experts tr")
        .nth(1)
        .locator("td")
        .nth(1)
        .evaluate("cell => cell === document.activeElement")
    )
    assert DOMAINS[1] in shown.page.locator("#tip").inner_text()
    keys.press("Escape")
    assert shown.page.locator("#tip").is_hidden()
    shown.page.click("#tab-clusters")
    keys.press("Tab")
    keys.press("Tab")  # over the order of the list, into it: one stop, whatever its length
    keys.press("End")
    keys.press("Enter")
    assert shown.panel("clusters").locator(".detail h3").inner_text() == f"{CLUSTERS}\nCluster {CLUSTERS}"
    keys.press("Tab")
    assert shown.page.evaluate("document.activeElement.closest('.list')") is None


def test_dark_where_the_reader_wants_it(show: Callable[..., Shown], one: str) -> None:
    grounds = [
        show(one, color_scheme=scheme).page.evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    light, dark = (sum(map(int, ground[4:-1].split(","))) for ground in grounds)
    assert dark < 200 < 600 < light


def test_the_sampling_is_said(show: Callable[..., Shown], one: str) -> None:
    shown = show(one)
    shown.page.click("summary")
    method = shown.page.locator("#method").inner_text()
    assert "3 documents of each domain, drawn at random (seed 0), each cut at its first 40 tokens" in method
    assert "the text of all of them" in method
    assert f"{len(DOMAINS) * DOCUMENTS * TOKENS} tokens" in shown.page.locator("#lede").inner_text()


def test_a_page_that_would_be_too_large_shows_fewer_documents(
    show: Callable[..., Shown], one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_page, "MAX_PAGE_BYTES", len(one.encode()) - 1)
    smaller = build_page([report()], seed=0, max_tokens=TOKENS)
    assert len(smaller.encode()) < len(one.encode())
    shown = show(smaller)
    assert shown.panel("documents").locator("canvas").count() == len(DOMAINS)
    assert "the text of 3 of them, the first of each domain" in some(shown.page.locator("#method").text_content())
    monkeypatch.setattr(cluster_page, "MAX_PAGE_BYTES", 10_000)
    with pytest.raises(InvalidRequest, match="give fewer files, or fewer tokens a document"):
        build_page([report()], seed=0, max_tokens=TOKENS)


def test_nothing_in_the_data_can_end_its_element() -> None:
    text = embed_json(["</script><!--", "&amp;", "\ud800"])
    assert not set("<>&") & set(text)
    assert text.encode()
