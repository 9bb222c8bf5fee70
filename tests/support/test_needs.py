"""Markers come from fixtures, and no test goes past them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.files import ROOT

# bash is on every machine that the tests run on.
PAST_THE_FIXTURES = re.compile(
    r'which\((?!"bash")|(?<![\w\]])\[\s*"(?:redis-server|chromium|promtool|prometheus|kubectl)"'
)


@pytest.fixture
def started(ray_runtime: None) -> None:
    """Stands for a fixture that starts a service."""


def test_a_test_has_the_marker_of_what_its_fixtures_need(
    started: None, new_process: None, request: pytest.FixtureRequest
) -> None:
    assert {marker.name for marker in request.node.iter_markers()} >= {"ray", "slow"}


def test_every_program_is_taken_from_its_fixture() -> None:
    own = Path(__file__).parent
    files = [file for file in sorted((ROOT / "tests").rglob("*.py")) if own not in file.parents]
    assert len(files) > 100
    assert [str(file) for file in files if PAST_THE_FIXTURES.search(file.read_text())] == []
