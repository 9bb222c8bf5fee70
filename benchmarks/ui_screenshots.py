"""Pictures of `/ui` for the docs: a service of two workers under a light load, on a desk and on a phone.

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
from pager import Client, Count, SamplingParams

DESK, PHONE = ViewportSize(width=1360, height=1400), ViewportSize(width=390, height=1500)
TENANTS = ("acme", "globex", "initech")
NUM_CLIENTS = 3
TIMEOUT_MS = 300_000


def take(model: Path, folder: Path, seconds: float) -> list[Path]:
    """Writes `ui.png` and `ui-phone.png` after `seconds` of load. Raises SystemExit without a browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, names)), None)
    if browser_path is None:
        raise SystemExit(f"install one of {', '.join(names)}")
    os.environ["EXPERT_PAGER_WORKERS_COUNT"] = "2"
    with service(model, "25%") as ready, sync_playwright() as playwright, load(ready["address"]):
        time.sleep(seconds)
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        address = ready["metrics_url"].removesuffix("/metrics")
        desk = browser.new_page(viewport=DESK, color_scheme="light")
        phone = browser.new_page(viewport=PHONE, color_scheme="dark", device_scale_factor=2)
        taken = [_shoot(page, address, folder / name) for page, name in ((desk, "ui.png"), (phone, "ui-phone.png"))]
        browser.close()
    return taken


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
