"""Fixtures for what a machine may lack. Whatever depends on one of them carries its marker, so that nobody forgets it.

A test names the program that it runs as a fixture and gets its path; a program that is missing is a failure that says
how to get it. `make test-fast` leaves out all tests that carry one of these markers.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MARKERS = {
    "ray_runtime": "ray",
    "new_process": "slow",
    "redis_server": "redis",
    "chromium": "browser",
    "kubectl": "tools",
    "helm": "tools",
    "promtool": "tools",
    "prometheus_server": "tools",
    "guidellm": "tools",
    "node": "tools",
}
"""The marker of every test that depends on a fixture."""


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each test the markers of the fixtures that it uses, directly or through others."""
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in MARKERS:
                item.add_marker(MARKERS[fixture])


def program(*names: str) -> Path:
    """The path of the first of these programs that is there."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail(f"this test runs {names[0]}, which is not here; `make test` installs it or says how")
    return Path(found)


@pytest.fixture(scope="session")
def ray_runtime() -> None:
    """Marks what starts Ray, or a service, which starts it. Ray comes with the package: what counts is its time."""


@pytest.fixture(scope="session")
def new_process() -> None:
    """Marks what starts a Python process that imports torch, which takes seconds."""


@pytest.fixture(scope="session")
def redis_server() -> Path:
    return program("redis-server")


@pytest.fixture(scope="session")
def kubectl() -> Path:
    return program("kubectl")


@pytest.fixture(scope="session")
def helm() -> Any:
    """Helm's own engine, as a library; it is one of the development dependencies."""
    try:
        import helm_python
    except ImportError:
        pytest.fail("this test needs helm-python-sdk, which is not here; `make install` installs it")
    return helm_python


@pytest.fixture(scope="session")
def promtool() -> Path:
    return program("promtool")


@pytest.fixture(scope="session")
def prometheus_server() -> Path:
    return program("prometheus")


@pytest.fixture(scope="session")
def guidellm() -> Path:
    return in_environment("guidellm", "bin", "guidellm")


@pytest.fixture(scope="session")
def node() -> tuple[Path, Path]:
    """The program, and the folder of the packages that tests use."""
    return program("node"), in_environment("node", "node_modules")


def in_environment(*parts: str) -> Path:
    """What `make` puts into the environment that the tests run in."""
    found = Path(sys.prefix).joinpath(*parts)
    if not found.exists():
        pytest.fail(f"this test needs {found}, which is not here; `make test` installs it")
    return found


@pytest.fixture(scope="session")
def chromium() -> Path:
    return program("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Browser]:
    """A headless browser; a page of it is a stranger's first visit."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=120_000)
        yield launched
        launched.close()
