"""The router's certificate: read from files at every handshake, so that one that is renewed is used at once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import grpc

from pager.errors import ConfigError
from pager.reading import MAX_PEM_BYTES, read_bounded, reason_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With `client_ca`, clients must show a certificate that it has signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Raises ConfigError when a file can not be read or is not PEM."""
        return grpc.dynamic_ssl_server_credentials(
            self._read(),
            self._renewed,  # type: ignore[arg-type]  # grpc-stubs does not know that it may return None
            require_client_authentication=self.client_ca is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """For gRPC, which calls it at every handshake; None keeps what is in use."""
        try:
            return self._read()
        except ConfigError as error:  # halfway through its renewal, perhaps
            log.warning("%s; going on with the certificate as it was", error)
            return None

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pair = (_pem(self.key, "router.tls_key"), _pem(self.cert, "router.tls_cert"))
        roots = _pem(self.client_ca, "router.tls_client_ca") if self.client_ca else None
        return grpc.ssl_server_certificate_configuration([pair], roots)


def _pem(path: Path, key: str) -> bytes:
    try:
        text = read_bounded(path, MAX_PEM_BYTES)
    except OSError as error:
        raise ConfigError(f"{key} {str(path)!r} can not be read: {reason_of(error)}") from None
    if b"-----BEGIN " not in text:
        raise ConfigError(f"{key} {str(path)!r} is not a PEM file")
    return text
