"""Pictures of a page that `expert-pager clusters` wrote, for the docs: each view on a desk, and one on a phone.

python -m benchmarks.screenshots PAGE FOLDER
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, sync_playwright

DESK, PHONE = ViewportSize(width=1360, height=900), ViewportSize(width=390, height=844)
TIMEOUT_MS = 300_000


def take(page_file: Path, folder: Path) -> list[Path]:
    """Writes `clusters-VIEW.png` for each view and `clusters-phone.png`. Raises SystemExit without a browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = next(filter(None, map(shutil.which, names)), None)
    if browser_path is None:
        raise SystemExit(f"install one of {', '.join(names)}")
    address = page_file.resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        desk = browser.new_page(viewport=DESK, color_scheme="light")
        desk.set_default_timeout(TIMEOUT_MS)
        desk.goto(address)
        desk.locator(".list").first.wait_for()
        for box in desk.locator("#clusters .panel").all():
            box.get_by_label("Order of the clusters").select_option("purity")
            box.locator(".list button").first.click()
        taken = [_view(desk, view, folder) for view in ("clusters", "documents", "experts")]
        phone = browser.new_page(viewport=PHONE, color_scheme="dark")
        phone.set_default_timeout(TIMEOUT_MS)
        phone.goto(f"{address}#view=experts")
        phone.screenshot(path=folder / "clusters-phone.png")
        browser.close()
    return [*taken, folder / "clusters-phone.png"]


def _view(page: Page, view: str, folder: Path) -> Path:
    page.click(f"#tab-{view}")
    page.mouse.move(0, 0)
    page.evaluate("window.scrollTo(0, 0)")
    path = folder / f"clusters-{view}.png"
    page.screenshot(path=path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for file in take(arguments.page, arguments.folder):
        print(file)
