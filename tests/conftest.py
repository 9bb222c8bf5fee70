"""What holds for every test."""

from hypothesis import HealthCheck, settings

# How fast an example runs, and which examples are tried, would otherwise differ from one run to the next.
settings.register_profile(
    "same-everywhere", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same-everywhere")
