"""What holds for every test: how hypothesis draws, and the fixtures for what a machine may lack."""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support")
pytest_plugins = ("tests.support.needs",)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How fast an example runs, and which examples are tried, would otherwise differ from one run to the next.
settings.register_profile(
    "same-everywhere", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same-everywhere")
