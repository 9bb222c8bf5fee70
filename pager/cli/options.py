"""Options that several commands share: prompts, pools, TLS."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pager.errors import ConfigError, InvalidRequest
from pager.reading import MAX_PEM_BYTES, check_text, read_bounded, reason_of
from pager.types import PoolAsk, PoolSource

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
        raise ConfigError(f"{option} {str(path)!r} cannot be read: {reason_of(error)}") from None
    if b"-----BEGIN " not in text:
        raise ConfigError(f"{option} {str(path)!r} is not a PEM file")
    return text


Prompt = str | tuple[int, ...]
MAX_BYTES = 1 << 26  # a prompt in a file

PromptText = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt.")]
PromptFile = Annotated[
    str | None, typer.Option(help="Read the prompt from a UTF-8 file, or from stdin with '-'.", metavar="FILE")
]
TokenIds = Annotated[str | None, typer.Option(help="A prompt of token ids: '1,2,3'.", metavar="IDS")]


def read_prompt(text: str | None, file: str | None, token_ids: str | None) -> Prompt:
    """The one prompt given. Raises typer.BadParameter unless it is exactly one, InvalidRequest for bad text or ids."""
    if sum(given is not None for given in (text, file, token_ids)) != 1:
        raise typer.BadParameter("give the prompt once: as an argument, with --prompt-file or with --token-ids")
    if token_ids is not None:
        return _ids(token_ids)
    if file is not None:
        return _file(file)
    assert text is not None
    return check_text(text, "the prompt")


def _ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise InvalidRequest(f"--token-ids takes whole numbers such as '1,2,3', not {text[:60]!r}") from None
    if any(not 0 <= token_id < 2**32 for token_id in ids):
        raise InvalidRequest(f"token id {min(ids) if min(ids) < 0 else max(ids)} is not in any vocabulary")
    return ids


def _file(name: str) -> str:
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if name == "-" else read_bounded(name, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InvalidRequest(f"prompt file {name} cannot be read: {reason_of(error)}") from None
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"the prompt has more than the {MAX_BYTES} bytes that one may have")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the prompt is not UTF-8: byte {error.start} ({error.reason})") from None


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
        help="What to do when the answer leaves its pool: past a mean gate mass outside of it ('0.3') widen the "
        "pool, or use all experts from there on ('0.3:exact'). Averaged over 16 tokens, or N ('0.3:widen:N').",
        metavar="MASS[:widen|exact[:N]]",
    ),
]


def pool_ask(
    size: str | None,
    source: PoolSource | None = None,
    digest: str | None = None,
    name: str | None = None,
    drift: str | None = None,
) -> PoolAsk:
    """Which pool to ask for; nothing set means the service's default, and all experts in this process.

    Raises typer.BadParameter for options that exclude each other, InvalidRequest for values.
    """
    from pager.pools.drift import parse_drift
    from pager.pools.pick import parse_pool_size

    given = {"--pool": size, "--pool-digest": digest, "--pool-name": name}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise typer.BadParameter(f"{' and '.join(named)} name different pools; give one of them")
    if source is PoolSource.FIXED:
        raise typer.BadParameter("a fixed pool is given with --pool-name or --pool-digest")
    if source is not None and (digest is not None or name is not None):
        raise typer.BadParameter(f"--pool-source says who chooses a pool, and {named[0]} names one")
    size_ = None if size is None else parse_pool_size(size)
    return PoolAsk(size_, source, digest=digest, name=name, drift=parse_drift(drift))


ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint folder, as downloaded or packed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for routed experts: '64MiB', bytes, or a share of all of them ('25%'). "
        "Default: what the machine has.",
        metavar="SIZE",
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(help="Host tier behind the slots: a size, or a share of all experts; 0 for none.", metavar="SIZE"),
]
KvMemory = Annotated[str | None, typer.Option(help="Memory for keys and values.", metavar="SIZE")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU where there is one.", metavar="NAME")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Serve in bfloat16 (default), float16, float32, or auto: as the checkpoint says.", metavar="NAME"
    ),
]
Pool = Annotated[
    str | None,
    typer.Option(
        help="How many experts the request may use: a number a layer (32), a share of all ('12.5%'), the gate mass "
        "to cover ('mass:0.9', or 'mass:0.9:48' with a cap), or 'full'.",
        metavar="SIZE",
    ),
]
