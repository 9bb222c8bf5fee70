"""What the options say of a pool, in one place for all commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from pager.types import DriftPolicy, PoolSize, PoolSource

SourceOption = Annotated[
    PoolSource | None,
    typer.Option(help="prefill: the worker's prefill chooses the pool; prediction: the routing-only pass does."),
]
DigestOption = Annotated[
    str | None, typer.Option(help="Use a pool this tenant was given before (with --server).", metavar="HEX")
]
NameOption = Annotated[str | None, typer.Option(help="Use a pool made by `expert-pager calibrate`.", metavar="NAME")]
DriftOption = Annotated[
    str | None,
    typer.Option(
        help="What to do when the answer leaves its pool: past a mean router mass outside of it ('0.3') widen the "
        "pool, or use all experts from there on ('0.3:exact'). Averaged over 16 tokens, or N ('0.3:widen:N').",
        metavar="MASS[:widen|exact[:N]]",
    ),
]


@dataclass(frozen=True, slots=True)
class PoolAsk:
    """Which pool to ask for; nothing set means the service's default, and all experts in this process."""

    size: PoolSize | None = None
    source: PoolSource | None = None
    digest: str | None = None
    name: str | None = None
    drift: DriftPolicy | None = None

    @classmethod
    def of(
        cls,
        size: str | None,
        source: PoolSource | None = None,
        digest: str | None = None,
        name: str | None = None,
        drift: str | None = None,
    ) -> PoolAsk:
        """Raises typer.BadParameter for options that exclude each other, InvalidRequest for values."""
        from pager.routing.drift import parse_drift
        from pager.routing.pool import parse_pool_size

        given = {"--pool": size, "--pool-digest": digest, "--pool-name": name}
        named = [option for option, value in given.items() if value is not None]
        if len(named) > 1:
            raise typer.BadParameter(f"{' and '.join(named)} name different pools; give one of them")
        if source is PoolSource.FIXED:
            raise typer.BadParameter("a fixed pool is given with --pool-name or --pool-digest")
        if source is not None and (digest is not None or name is not None):
            raise typer.BadParameter(f"--pool-source says who chooses a pool, and {named[0]} names one")
        return cls(None if size is None else parse_pool_size(size), source, digest, name, parse_drift(drift))
