"""What has to be installed to serve, or to call a service: said in words when it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pager.errors import ConfigError

_SERVE = ("ray", "grpc", "grpc_health", "grpc_reflection", "grpc_status", "google", "redis", "expert_pager")


@contextmanager
def serve_extra(purpose: str) -> Iterator[None]:
    """Around imports. Raises ConfigError, saying what to install, when a package of the `serve` extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in _SERVE:
            raise
        raise ConfigError(
            f"{purpose} needs the package {missing!r}, which is not installed; run: pip install 'expert-pager[serve]'"
        ) from None
