"""How a client command speaks TLS with a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pager.errors import ConfigError
from pager.reading import MAX_PEM_BYTES, read_bounded, reason_of

TlsCa = Annotated[
    Path | None,
    typer.Option(help="With --server: use TLS, and trust whom this certificate has signed.", metavar="PEM"),
]
TlsIdentity = Annotated[
    Path | None,
    typer.Option(help="With --tls-ca, for a service that asks: own certificate and key in a file.", metavar="PEM"),
]


@dataclass(frozen=True, slots=True)
class ClientTls:
    """`identity` has a certificate and its key."""

    ca: Path
    identity: Path | None = None

    @classmethod
    def of(cls, server: str | None, ca: Path | None, identity: Path | None) -> ClientTls | None:
        """None for plain text. Raises typer.BadParameter for options that can take no effect."""
        if ca is not None and server is None:
            raise typer.BadParameter("--tls-ca can take no effect here; it goes with --server")
        if ca is None and identity is not None:
            raise typer.BadParameter("--tls-identity can take no effect here; it goes with --tls-ca")
        return None if ca is None else cls(ca, identity)

    def read(self) -> tuple[bytes, bytes | None]:
        """The certificate to trust, and the identity. Raises ConfigError."""
        return _pem(self.ca, "--tls-ca"), _pem(self.identity, "--tls-identity") if self.identity else None


def _pem(path: Path, option: str) -> bytes:
    try:
        text = read_bounded(path, MAX_PEM_BYTES)
    except OSError as error:
        raise ConfigError(f"{option} {str(path)!r} can not be read: {reason_of(error)}") from None
    if b"-----BEGIN " not in text:
        raise ConfigError(f"{option} {str(path)!r} is not a PEM file")
    return text
