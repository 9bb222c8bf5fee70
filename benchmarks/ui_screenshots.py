"""Pictures of `/ui` for the docs, on a desk and on a phone: the playground, and two workers under a light load.

python -m benchmarks.ui_screenshots MODEL FOLDER
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from playwright.sync_api import Page, ViewportSize, sync_playwright

from demo.__main__ import service
from demo.prompts import PROMPTS
from pager import Client, Count, SamplingParams, Share

DESK, PHONE = ViewportSize(width=1360, height=1400), ViewportSize(width=390, height=1500)
TENANTS = ("acme", "globex", "initech")
NUM_CLIENTS = 3
TIMEOUT_MS = 300_000
LAW = dict(PROMPTS)["law"]


def take(model: Path, folder: Path, seconds: float) -> list[Path]:
    """Writes the pictures, those of the page after `seconds` of load. Raises SystemExit without a browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, names)), None)
    if browser_path is None:
        raise SystemExit(f"install one of {', '.join(names)}")
    os.environ |= {"EXPERT_PAGER_WORKERS_COUNT": "2", "EXPERT_PAGER_WORKERS_HOST_MEMORY": "12MiB"}
    with service(model, "25%") as ready, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        pages = {
            "": browser.new_page(viewport=DESK, color_scheme="light"),
            "-phone": browser.new_page(viewport=PHONE, color_scheme="dark", device_scale_factor=2),
        }
        _warm(ready["address"])
        taken = [_play(page, ready["http_url"], folder / f"playground{kind}.png") for kind, page in pages.items()]
        with load(ready["address"]):
            time.sleep(seconds)
            address = ready["metrics_url"].removesuffix("/metrics")
            taken += [_shoot(page, address, folder / f"ui{kind}.png") for kind, page in pages.items()]
        browser.close()
    return taken


def _warm(address: str) -> None:
    """Leaves experts of other prompts in slots and in host memory."""
    with Client(address, timeout_s=300) as client:
        for _, prompt in PROMPTS:
            client.generate(prompt, SamplingParams(max_tokens=8), Share(0.125)).text()


def _play(page: Page, address: str, path: Path) -> Path:
    """Asks a prompt with a pool, and with all experts beside it."""
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(f"{address}/ui")
    page.locator("#playground").wait_for()
    for field, value in (("#pool", "25%"), ("#other", "full"), ("#tokens", "48"), ("#prompt", LAW)):
        page.fill(field, value)
    page.press("#prompt", "Control+Enter")
    page.locator("#differences", has_text="token").wait_for()
    page.wait_for_function("() => runs.every((run) => run.bill && !run.queue.length && !run.drawing)")
    page.locator("#known-pools button").first.click()
    page.evaluate("() => window.scrollTo(0, 0)")
    page.screenshot(path=path)
    return path


@contextmanager
def load(address: str) -> Iterator[None]:
    """Clients that ask one prompt after the other, each with a pool of its own size."""
    done = Event()
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        asking = [clients.submit(_ask, address, number, done) for number in range(NUM_CLIENTS)]
        try:
            yield
        finally:
            done.set()
    for each in asking:
        each.result()


def _ask(address: str, number: int, done: Event) -> None:
    prompts = itertools.islice(itertools.cycle(PROMPTS), number, None)
    sampling = SamplingParams(max_tokens=120, ignore_eos=True, seed=number)
    with Client(address, tenant=TENANTS[number % len(TENANTS)], timeout_s=300) as client:
        while not done.is_set():
            client.generate(next(prompts)[1], sampling, Count(12 + 4 * number)).text()


def _shoot(page: Page, address: str, path: Path) -> Path:
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(f"{address}/ui")
    page.locator("#pools tbody tr.live").first.wait_for()
    page.screenshot(path=path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=150)
    arguments = parser.parse_args()
    for file in take(arguments.model, arguments.folder, arguments.seconds):
        print(file)
