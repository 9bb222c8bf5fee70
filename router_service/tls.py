"""TLS of the fronts: the operator's PEM files, checked together, and read again when they are renewed."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grpc

from pager.errors import ConfigError
from pager.reading import MAX_PEM_BYTES, read_bounded, reason_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of a service. With `client_ca`, clients must present a certificate that it has signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Returns gRPC's credentials. Raises ConfigError for files that cannot be read, are not PEM or do not match."""
        pems = self.read()
        return grpc.dynamic_ssl_server_credentials(
            pems.configuration(),
            _Renewal(self, pems),  # type: ignore[arg-type]  # grpc-stubs does not know that it may return None
            require_client_authentication=self.client_ca is not None,
        )

    def context(self) -> ssl.SSLContext:
        """Returns a context for HTTP. Raises ConfigError as `credentials` does."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        self.load_into(context, self.read())
        return context

    def load_into(self, context: ssl.SSLContext, pems: _Pems) -> None:
        """Loads the files into a context; handshakes that begin from now on use them."""
        with _as_file(pems.cert) as cert, _as_file(pems.key) as key:
            context.load_cert_chain(cert, key, password="")
        if pems.roots is not None:
            with _as_file(pems.roots) as roots:
                context.load_verify_locations(roots)
            context.verify_mode = ssl.CERT_REQUIRED

    def read(self) -> _Pems:
        """Reads the files and checks that they fit together. Raises ConfigError."""
        roots = _pem(self.client_ca, "router.tls_client_ca") if self.client_ca else None
        pems = _Pems(_pem(self.key, "router.tls_key"), _pem(self.cert, "router.tls_cert"), roots)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_ciphers("ALL:@SECLEVEL=0")  # the operator chooses how strong a key has to be
        try:
            with _as_file(pems.cert) as cert, _as_file(pems.key) as key:
                # otherwise the password of an encrypted key is asked for at the terminal
                context.load_cert_chain(cert, key, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"router.tls_cert {str(self.cert)!r} and router.tls_key {str(self.key)!r} are not a certificate and "
                f"its key: {_reason(error)}"
            ) from None
        if roots is not None:
            try:
                with _as_file(roots) as path:
                    context.load_verify_locations(path)
            except OSError as error:
                raise ConfigError(
                    f"router.tls_client_ca {str(self.client_ca)!r} holds no certificate: {_reason(error)}"
                ) from None
        return pems


class _Pems(NamedTuple):
    """The contents of the files."""

    key: bytes
    cert: bytes
    roots: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.cert)], self.roots)


class _Renewal:
    """The callback of gRPC at every handshake. Owns the files in use and the last report of unusable ones."""

    def __init__(self, files: TlsFiles, used: _Pems) -> None:
        self._files = files
        self._used = used
        self._complaint = ""

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns the files' new content, or None to keep what is in use."""
        try:
            found = self._files.read()
        except ConfigError as error:  # perhaps it is halfway through its renewal
            if error.message != self._complaint:
                log.warning("%s; continuing with the previous certificate", error)
            self._complaint = error.message
            return None
        self._complaint = ""
        if found == self._used:
            return None
        self._used = found
        log.info("the certificate in router.tls_cert %s was renewed", self._files.cert)
        return found.configuration()


def _pem(path: Path, key: str) -> bytes:
    try:
        text = read_bounded(path, MAX_PEM_BYTES)
    except OSError as error:
        raise ConfigError(f"{key} {str(path)!r} cannot be read: {reason_of(error)}") from None
    if b"-----BEGIN " not in text:
        raise ConfigError(f"{key} {str(path)!r} is not a PEM file")
    return text


@contextmanager
def _as_file(text: bytes) -> Iterator[str]:
    """Yields the path of a file in memory with this content, since the file on disk may have changed by now."""
    file = os.memfd_create("pem")
    try:
        os.write(file, text)
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return reason.replace("_", " ").lower() if isinstance(reason, str) else "its content is cut off or damaged"
