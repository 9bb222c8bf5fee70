"""Who is calling: the one checker before every front, of API keys, client certificates and JSON web tokens.

It holds what was last read of keys, secrets and public keys, and looks again several times a second. Whoever is refused
is not told what was wrong.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import jwt

from pager.errors import ConfigError, InvalidRequest, PermissionDenied, Unauthenticated
from pager.reading import parse_json
from router_service.keys import ENTRIES, PREFIX, KeySet, KeysInRedis, parse_entries, read_file, sha256_of
from router_service.redis import RedisUnavailableError
from router_service.tenants import TENANT_KEY, Caller, Role, check_tenant, present, tenant_in, tenant_of

log = logging.getLogger("expert_pager.router")

REFRESH_S = 0.25  # a key that is revoked is refused within a second
MAX_CREDENTIAL_BYTES = 8192

Headers = Iterable[tuple[str, str | bytes]] | None
Value = TypeVar("Value")


class WatchedFile(Generic[Value]):
    """Owns what a file held when it last made sense. Raises ConfigError only when it is made."""

    def __init__(self, path: Path, key: str, parse: Callable[[bytes, str], Value]) -> None:
        self._path = path
        self._key = key
        self._parse = parse
        self._data = read_file(path, key)
        self.value = parse(self._data, f"{key} {str(path)!r}")
        self._complaint = ""

    def refresh(self) -> None:
        """Reads the file again. What cannot be used is logged once, and what was read before stays in force."""
        try:
            data = read_file(self._path, self._key)
            if data != self._data:
                value = self._parse(data, f"{self._key} {str(self._path)!r}")
                self._data, self.value = data, value
                log.info("%s %s was read again", self._key, self._path)
        except ConfigError as error:
            if error.message != self._complaint:
                log.warning("%s; going on with what it held before", error)
            self._complaint = error.message
            return
        self._complaint = ""


class WatchedRedis:
    """Owns the keys that Redis last held. Until Redis has answered once, none are known."""

    def __init__(self, store: KeysInRedis) -> None:
        self._store = store
        self._version: bytes | None = None
        self._complaint = ""
        self.value = KeySet()

    async def refresh(self, thread: Executor | None = None) -> None:
        """Reads the keys again where their version is another. While Redis is away, the last ones stay in force.

        They are parsed in the thread: ten thousand take half a second.
        """
        try:
            version = await self._store.version()
            if version != self._version:
                data, where = await self._store.read(), f"the value of {ENTRIES} in Redis"
                self.value = await asyncio.get_running_loop().run_in_executor(thread, parse_key_set, data, where)
                self._version = version
                log.info("the keys in Redis were read")
        except (RedisUnavailableError, ConfigError) as error:
            if str(error) != self._complaint:
                log.warning("the keys in Redis cannot be read: %s; going on with those that were read before", error)
            self._complaint = str(error)
            return
        self._complaint = ""

    async def close(self) -> None:
        await self._store.close()


def parse_key_set(data: bytes, where: str) -> KeySet:
    """The callers of a file of keys. Raises ConfigError."""
    return KeySet.of(parse_entries(data, where))


# --- tokens ---------------------------------------------------------------------------------------------------------

MIN_SECRET_BYTES = 32
MIN_RSA_BITS = 2048
_LEEWAY_S = 30


def parse_secret(data: bytes, where: str) -> bytes:
    """The secret of HS256. Raises ConfigError for one that can be guessed."""
    secret = data.strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"{where} has {len(secret)} bytes and a secret needs {MIN_SECRET_BYTES}; make a longer one")
    return secret


def parse_jwks(data: bytes, where: str) -> Mapping[str, Any]:
    """The public keys of RS256 by their ids. Raises ConfigError."""
    try:
        keys = [key for key in jwt.PyJWKSet.from_dict(parse_json(data)).keys if key.key_type == "RSA"]
    except (ValueError, AttributeError, jwt.PyJWTError):
        keys = []
    if not keys:
        raise ConfigError(f"{where} is no JSON web key set with an RSA key")
    if any(key.key.key_size < MIN_RSA_BITS for key in keys):
        raise ConfigError(f"{where} has an RSA key of fewer than {MIN_RSA_BITS} bits; make a longer one")
    return {key.key_id or "": key.key for key in keys}


@dataclass(frozen=True, slots=True)
class Tokens:
    """How JSON web tokens are checked: by a secret (HS256), by public keys (RS256), or by either."""

    audience: str
    issuer: str | None = None
    tenant_claim: str = "tenant"
    secret: WatchedFile[bytes] | None = None
    jwks: WatchedFile[Mapping[str, Any]] | None = None

    def caller_of(self, token: str, known: Mapping[str, Caller]) -> Caller | None:
        """None for a token that is not good. `known` are the entries of tenants, with bounds and the most roles."""
        claims = self._claims(token)
        if claims is None:
            return None
        tenant, roles = claims.get(self.tenant_claim), claims.get("roles", [Role.INFERENCE])
        if not isinstance(tenant, str) or not isinstance(roles, list):
            return None
        try:
            check_tenant(tenant)
        except InvalidRequest:
            return None
        asked = frozenset(role for role in Role if role in roles)
        entry = known.get(tenant)
        return Caller(tenant, f"jwt:{tenant}", asked) if entry is None else replace(entry, roles=entry.roles & asked)

    def _claims(self, token: str) -> dict[str, Any] | None:
        try:
            header = jwt.get_unverified_header(token)
            algorithm, key = header.get("alg"), None
            if algorithm == "HS256" and self.secret is not None:
                key = self.secret.value
            elif algorithm == "RS256" and self.jwks is not None:
                keys = self.jwks.value
                key = keys.get(str(header.get("kid", ""))) or (next(iter(keys.values())) if len(keys) == 1 else None)
            if key is None or not isinstance(algorithm, str):
                return None
            return jwt.decode(
                token, key, algorithms=[algorithm], audience=self.audience, issuer=self.issuer, leeway=_LEEWAY_S,
                options={"require": ["exp", "aud"]},
            )  # fmt: skip
        except (jwt.PyJWTError, ArithmeticError, ValueError, TypeError, RecursionError):
            return None


# --- the checker ----------------------------------------------------------------------------------------------------

_ALL = frozenset(Role)
_TENANTS_WORK = frozenset({Role.INFERENCE, Role.OPERATOR})
_INFERENCE = frozenset({Role.INFERENCE})
ROLES_OF: Mapping[str, frozenset[Role]] = {
    "GetModel": _ALL,
    "ServerMetadata": _ALL,
    "ModelMetadata": _ALL,
    "ModelReady": _ALL,
    "ServerReflectionInfo": _ALL,
    "ListPools": _TENANTS_WORK,
    "DeletePool": _TENANTS_WORK,
    "Abort": _TENANTS_WORK,
    "GetResidency": frozenset({Role.OPERATOR}),
    "/ui": _ALL,
    "/ui/": _ALL,
    "/ui/state.json": frozenset({Role.OPERATOR, Role.METRICS}),
    "/metrics": frozenset({Role.OPERATOR, Role.METRICS}),
}
"""Who may call a method or see a page: whoever has one of these roles. All others are for inference."""


class Gate:
    """The one checker of callers: owns no key, only what was last read of them. Without keys everybody is let in.

    It is asked from the event loop and from the threads of the metrics server.
    """

    def __init__(
        self,
        keys: WatchedFile[KeySet] | WatchedRedis | None = None,
        tokens: Tokens | None = None,
        *,
        trusts_tenant_header: bool | None = None,
    ) -> None:
        self._keys = keys
        self._tokens = tokens
        self.is_on = keys is not None or tokens is not None
        self.trusts_tenant_header = not self.is_on if trusts_tenant_header is None else trusts_tenant_header
        self._watching: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "keys")  # of its own: others are busy for seconds

    async def start(self) -> None:
        """Reads again and again from now on, what is in Redis for the first time."""
        if isinstance(self._keys, WatchedRedis):
            await self._keys.refresh(self._thread)
        if self.is_on:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Reads no more."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if isinstance(self._keys, WatchedRedis):
            await self._keys.close()
        self._thread.shutdown(wait=False)

    async def _watch(self) -> None:
        files: list[WatchedFile[Any]] = [each for each in self._sources() if isinstance(each, WatchedFile)]
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                for each in files:
                    await asyncio.get_running_loop().run_in_executor(self._thread, each.refresh)
                if isinstance(self._keys, WatchedRedis):
                    await self._keys.refresh(self._thread)
            except Exception as error:  # or a key that is revoked would stay good for ever
                log.error("the keys could not be read again: %s; trying on", type(error).__name__)

    def _sources(self) -> Iterable[object]:
        return (self._keys, self._tokens and self._tokens.secret, self._tokens and self._tokens.jwks)

    def check(self, method: str, headers: Headers, tls_names: Iterable[str] = ()) -> Caller:
        """The caller, who may call the method. Raises Unauthenticated, PermissionDenied or InvalidRequest."""
        caller = self.caller_of(headers, tls_names)
        if self.is_on and not caller.roles & ROLES_OF.get(method, _INFERENCE):
            raise PermissionDenied("the key does not permit this")
        return caller

    def caller_of(self, headers: Headers, tls_names: Iterable[str] = ()) -> Caller:
        """Who calls, by a call's metadata or headers (names in lower case) and the names in a client's certificate.

        Raises Unauthenticated, or PermissionDenied and InvalidRequest for the tenant that is named.
        """
        present.set(None)
        pairs = list(headers or ())
        if not self.is_on:
            caller = Caller(tenant_of(pairs) if self.trusts_tenant_header else tenant_of(()))
            present.set(caller)
            return caller
        known = self._known(pairs, tls_names)
        if known is None:
            raise Unauthenticated("the service asks for a key: send a valid one as `authorization: Bearer KEY`")
        present.set(known)
        if not any(name == TENANT_KEY for name, _ in pairs):
            return known
        named = tenant_of(pairs)
        if named != known.tenant and not self.trusts_tenant_header and Role.OPERATOR not in known.roles:
            raise PermissionDenied("the key does not permit this")
        caller = replace(known, tenant=named, acts_for_another=named != known.tenant)
        present.set(caller)
        return caller

    def claimed_tenant(self, headers: Headers) -> str:
        """The tenant of a call that is not checked yet, for metrics and logs."""
        return "-" if self.is_on else tenant_in(headers)

    def _known(self, pairs: Sequence[tuple[str, str | bytes]], tls_names: Iterable[str]) -> Caller | None:
        credentials = set(_credentials(pairs))
        keys = self._keys.value if self._keys is not None else KeySet()
        if not credentials:
            found = {keys.by_certificate[name] for name in tls_names if name in keys.by_certificate}
            return found.pop() if len(found) == 1 else None
        if len(credentials) > 1:
            return None
        credential = credentials.pop()
        if not 0 < len(credential) <= MAX_CREDENTIAL_BYTES:
            return None
        if self._tokens is not None and credential.count(".") == 2:
            return self._tokens.caller_of(credential, keys.by_jwt_tenant)
        digest = sha256_of(credential)
        held, caller = keys.by_sha256.get(digest[:PREFIX], ("", None))
        return caller if hmac.compare_digest(held, digest) else None


def _credentials(pairs: Iterable[tuple[str, str | bytes]]) -> Iterable[str]:
    """Every credential that is sent; what is none becomes an empty text, which is refused."""
    for name, value in pairs:
        if name == "x-api-key":  # as clients of Anthropic's methods send it
            yield value if isinstance(value, str) else ""
        if name != "authorization":
            continue
        scheme, _, rest = (value if isinstance(value, str) else "").partition(" ")
        if scheme.lower() == "bearer":
            yield rest.strip()
        elif scheme.lower() == "basic":  # as browsers send it, for /ui: the password is the key
            yield _password(rest.strip())
        else:
            yield ""


def _password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""
