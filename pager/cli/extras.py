"""What has to be installed beside the core for some commands: said in words when it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pager.errors import ConfigError

_SERVE = ("ray", "grpc", "grpc_health", "grpc_reflection", "grpc_status", "google", "redis", "expert_pager")
_EVAL = ("sklearn", "scipy", "matplotlib")


@contextmanager
def serve_extra(purpose: str) -> Iterator[None]:
    """Around imports. Raises ConfigError, saying what to install, when a package of the `serve` extra is missing."""
    with _extra(purpose, "serve", _SERVE):
        yield


@contextmanager
def eval_extra(purpose: str) -> Iterator[None]:
    """The same for the `eval` extra."""
    with _extra(purpose, "eval", _EVAL):
        yield


@contextmanager
def _extra(purpose: str, extra: str, packages: tuple[str, ...]) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in packages:
            raise
        raise ConfigError(
            f"{purpose} needs the package {missing!r}, which is not installed; run: pip install 'expert-pager[{extra}]'"
        ) from None
