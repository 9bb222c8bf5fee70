"""Programs that measure, each by itself: `python -m benchmarks.NAME --help`. See README.md."""
