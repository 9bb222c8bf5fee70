"""Keys of callers, kept in a file or in Redis, and the one checker of callers in front of every method.

`Gate` checks callers by them, and `expert-pager keys` changes them.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pager.cache.shares import MOST_GUARANTEED
from pager.errors import ConfigError, InvalidRequest, PermissionDenied, Unauthenticated
from pager.reading import parse_json, read_bounded, reason_of, replace_file
from router_service.admission import TENANT_KEY, Caller, CallerLimits, Role, check_tenant, present, tenant_in, tenant_of
from router_service.redis import RedisClient, RedisUnavailableError

log = logging.getLogger("expert_pager.router")

MAX_FILE_BYTES = 8 << 20
IN_REDIS = "redis"  # the value of router.keys that stands for Redis instead of a file
PREFIX = 16  # characters of a hash by which its entry is found; the whole hash is compared in constant time
_TENANT = r"^[A-Za-z0-9._-]{1,64}$"
_LIMIT = Field(default=None, ge=1, le=2**53)

Headers = Iterable[tuple[str, str | bytes]] | None
Value = TypeVar("Value")

ENTRIES, _VERSION = "expert-pager:1:keys", "expert-pager:1:keys-version"
REFRESH_S = 0.25  # a revoked key is refused within a second
MAX_CREDENTIAL_BYTES = 8192
MIN_SECRET_BYTES, MIN_RSA_BITS = 32, 2048  # of what signs JSON web tokens
_LEEWAY_S = 30  # by which clocks may differ

# --- entries --------------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EntryLimits(_Strict):
    """The bounds of an entry, as `CallerLimits`."""

    requests_in_flight: int | None = _LIMIT
    tokens_in_flight: int | None = _LIMIT
    requests_per_minute: int | None = _LIMIT
    requests_per_day: int | None = _LIMIT
    tokens_per_minute: int | None = _LIMIT
    tokens_per_day: int | None = _LIMIT


class Entry(_Strict):
    """One known caller: by a key's SHA-256, by a name in a client's certificate, or by a token's tenant."""

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    tenant: str = Field(pattern=_TENANT)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    certificate: str | None = Field(default=None, min_length=1, max_length=256)
    jwt: bool = False
    roles: tuple[Role, ...] = (Role.INFERENCE,)
    limits: EntryLimits = EntryLimits()
    priority: int = Field(default=0, ge=-100, le=100)
    weight: float = Field(default=1.0, ge=0.01, le=100.0)
    guaranteed_share: float = Field(default=0.0, ge=0.0, le=MOST_GUARANTEED)
    created: str = Field(default="", max_length=40)

    @model_validator(mode="after")
    def _has_one_identity(self) -> Entry:
        if (self.sha256 is not None) + (self.certificate is not None) + self.jwt != 1:
            raise ValueError("an entry has one of `sha256`, `certificate` and `jwt`")
        return self

    @property
    def caller(self) -> Caller:
        limits = CallerLimits(**self.limits.model_dump())
        return Caller(self.tenant, self.id, frozenset(self.roles), limits, self.priority, self.weight)


class _Document(_Strict):
    keys: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class KeySet:
    """All known callers, by the credential that identifies them."""

    # By a prefix; the whole is compared afterwards.
    by_sha256: Mapping[str, tuple[str, Caller]] = field(default_factory=dict)
    by_certificate: Mapping[str, Caller] = field(default_factory=dict)
    by_jwt_tenant: Mapping[str, Caller] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)  # that tenants are guaranteed of each worker's slots
    of_tenants: Mapping[str, Caller] = field(default_factory=dict)  # by the highest priority, then by the latest key

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> KeySet:
        """Builds the set. Raises ConfigError for two entries with one id or one identity, or too much guaranteed."""
        seen: set[tuple[str, str | None]] = set()
        for each in entries:
            for mark in (("id", each.id), ("sha256", each.sha256), ("certificate", each.certificate),
                         ("jwt", each.tenant if each.jwt else None)):  # fmt: skip
                if mark[1] is not None and mark in seen:
                    raise ConfigError(f"two keys have the same {mark[0]} as key {each.id!r}; revoke one")
                seen.add(mark)
        shares: dict[str, float] = {}
        for each in entries:
            if each.guaranteed_share:
                shares[each.tenant] = max(each.guaranteed_share, shares.get(each.tenant, 0.0))
        if (total := sum(shares.values())) > MOST_GUARANTEED + 1e-9:
            raise ConfigError(
                f"{len(shares)} tenants are guaranteed {total:.0%} of the slots together, and {MOST_GUARANTEED:.0%} "
                "can be, as others have to run too; guarantee less (`guaranteed_share`)"
            )
        return cls(
            {each.sha256[:PREFIX]: (each.sha256, each.caller) for each in entries if each.sha256 is not None},
            {each.certificate: each.caller for each in entries if each.certificate is not None},
            {each.tenant: each.caller for each in entries if each.jwt},
            shares,
            {each.tenant: each.caller for each in sorted(entries, key=lambda each: each.caller.priority)},
        )


def parse_entries(data: bytes, where: str) -> tuple[Entry, ...]:
    """Parses entries. Raises ConfigError, which quotes no value: one may be a key put in the place of its hash."""
    try:
        return _Document.model_validate(parse_json(data)).keys
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where} is not a file of keys: {at or 'it'}: {first['msg'][:200]}") from None
    except ValueError:
        raise ConfigError(f'{where} is not a file of keys: it is not JSON of the form {{"keys": [...]}}') from None


def new_key() -> tuple[str, str]:
    """Returns a new random key, and its SHA-256."""
    key = f"epk_{secrets.token_urlsafe(32)}"
    return key, sha256_of(key)


def new_entry(tenant: str, roles: Sequence[Role], limits: EntryLimits, **further: Any) -> Entry:
    """Returns an entry with an id of its own; `further` has its credential. Raises ConfigError."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return Entry(
            id=f"k{secrets.token_hex(6)}", tenant=tenant, roles=tuple(roles) or (Role.INFERENCE,), limits=limits,
            created=created, **further,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg'][:200]}") from None


def sha256_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


# --- stores of entries ----------------------------------------------------------------------------------------------

Edit = Callable[[tuple[Entry, ...]], tuple[Entry, ...]]


class KeyStore(Protocol):
    """The place where entries are kept, as the command line sees it."""

    async def entries(self) -> tuple[Entry, ...]:
        """Returns the entries. Raises ConfigError."""

    async def change(self, edit: Edit) -> None:
        """Changes all entries at once; of two concurrent changes, one waits for the other. Raises ConfigError."""


class KeyFile:
    """A JSON file of entries, readable by its owner only. It is always replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def entries(self) -> tuple[Entry, ...]:
        if not self._path.exists():
            return ()
        return parse_entries(read_file(self._path, "the file"), f"{str(self._path)!r}")

    async def change(self, edit: Edit) -> None:
        try:
            with _locked(self._path.resolve().parent):
                changed = edit(await self.entries())
                KeySet.of(changed)
                self._write(changed)
        except OSError as error:
            raise ConfigError(f"{str(self._path)!r} cannot be written: {reason_of(error)}") from None

    def _write(self, entries: tuple[Entry, ...]) -> None:
        path = self._path.resolve()
        text = json.dumps({"keys": [each.model_dump(mode="json", exclude_defaults=True) for each in entries]}, indent=1)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        replace_file(path, f"{text}\n".encode(), mode, is_durable=True)


@contextmanager
def _locked(folder: Path) -> Any:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


_CHANGE = """
if (redis.call('get', KEYS[2]) or '') ~= ARGV[1] then return 0 end
redis.call('set', KEYS[1], ARGV[2])
redis.call('set', KEYS[2], ARGV[3])
return 1
"""


class KeysInRedis:
    """The same JSON under a key of Redis, with a version that changes with it."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client

    async def version(self) -> bytes:
        async with self._client.commands() as redis:
            return bytes(await redis.get(_VERSION) or b"")

    async def read(self) -> bytes:
        async with self._client.commands() as redis:
            return bytes(await redis.get(ENTRIES) or b'{"keys": []}')

    async def entries(self) -> tuple[Entry, ...]:
        try:
            return parse_entries(await self.read(), f"the value of {ENTRIES} in Redis")
        except RedisUnavailableError as error:
            raise ConfigError(f"the keys in Redis cannot be read: {error}") from None

    async def change(self, edit: Edit) -> None:
        try:
            for _ in range(20):
                version = await self.version()
                changed = edit(await self.entries())
                KeySet.of(changed)
                text = json.dumps({"keys": [each.model_dump(mode="json", exclude_defaults=True) for each in changed]})
                if await self._client.script(_CHANGE, (ENTRIES, _VERSION), version, text, secrets.token_hex(8)):
                    return
        except RedisUnavailableError as error:
            raise ConfigError(f"the keys in Redis cannot be changed: {error}") from None
        raise ConfigError("the keys in Redis kept changing meanwhile; try again")

    async def close(self) -> None:
        with suppress(RedisUnavailableError):
            await self._client.close()


def read_file(path: Path, what: str) -> bytes:
    try:
        return read_bounded(path, MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {reason_of(error)}") from None


# --- keys as last read ------------------------------------------------------------------------------------------------


class WatchedFile(Generic[Value]):
    """Owns the last valid contents of a file. Raises ConfigError only when it is made."""

    def __init__(self, path: Path, key: str, parse: Callable[[bytes, str], Value]) -> None:
        self._path = path
        self._key = key
        self._parse = parse
        self._data = read_file(path, key)
        self.value = parse(self._data, f"{key} {str(path)!r}")
        self._complaint = ""

    def refresh(self) -> None:
        """Reads the file again. Invalid contents are logged once, and the previous ones stay in force."""
        try:
            data = read_file(self._path, self._key)
            if data != self._data:
                value = self._parse(data, f"{self._key} {str(self._path)!r}")
                self._data, self.value = data, value
                log.info("%s %s was read again", self._key, self._path)
        except ConfigError as error:
            if error.message != self._complaint:
                log.warning("%s; continuing with its previous contents", error)
            self._complaint = error.message
            return
        self._complaint = ""


class WatchedRedis:
    """Owns the keys as last read from Redis. Until Redis has answered once, no key is known."""

    def __init__(self, store: KeysInRedis) -> None:
        self._store = store
        self._version: bytes | None = None
        self._complaint = ""
        self.value = KeySet()

    async def refresh(self, thread: Executor | None = None) -> None:
        """Reads the keys again when their version has changed. While Redis is unreachable, the last ones stay in force.

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
                log.warning("the keys in Redis cannot be read: %s; continuing with those read before", error)
            self._complaint = str(error)
            return
        self._complaint = ""

    async def close(self) -> None:
        await self._store.close()


def parse_key_set(data: bytes, where: str) -> KeySet:
    """Parses the callers of a file of keys. Raises ConfigError."""
    return KeySet.of(parse_entries(data, where))


# --- tokens ---------------------------------------------------------------------------------------------------------


def parse_secret(data: bytes, where: str) -> bytes:
    """Returns the secret of HS256. Raises ConfigError for one that can be guessed."""
    secret = data.strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"{where} has {len(secret)} bytes and a secret needs {MIN_SECRET_BYTES}; make a longer one")
    return secret


def parse_jwks(data: bytes, where: str) -> Mapping[str, Any]:
    """Returns the public keys of RS256 by their ids. Raises ConfigError."""
    import jwt  # with cryptography 9 MiB, which only a router that takes tokens needs

    try:
        keys = [key for key in jwt.PyJWKSet.from_dict(parse_json(data)).keys if key.key_type == "RSA"]
    except (ValueError, AttributeError, jwt.PyJWTError):
        keys = []
    if not keys:
        raise ConfigError(f"{where} is not a JSON web key set with an RSA key")
    if any(key.key.key_size < MIN_RSA_BITS for key in keys):
        raise ConfigError(f"{where} has an RSA key of fewer than {MIN_RSA_BITS} bits; make a longer one")
    return {key.key_id or "": key.key for key in keys}


@dataclass(frozen=True, slots=True)
class Tokens:
    """The check of JSON web tokens: by a secret (HS256), by public keys (RS256), or by either."""

    audience: str
    issuer: str | None = None
    tenant_claim: str = "tenant"
    secret: WatchedFile[bytes] | None = None
    jwks: WatchedFile[Mapping[str, Any]] | None = None

    def caller_of(self, token: str, known: Mapping[str, Caller]) -> Caller | None:
        """Returns the token's caller; None for an invalid token. `known` are the tenants' entries, with bounds and
        allowed roles.
        """
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
        import jwt

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


# --- the checker of callers -------------------------------------------------------------------------------------------
#
# One checker in front of every front, of API keys, client certificates and JSON web tokens. It holds the keys, secrets
# and public keys as last read, and reads them again several times a second. It tells no caller what was wrong.

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
    "Drain": frozenset({Role.OPERATOR}),
    "/ui/state.json": frozenset({Role.OPERATOR, Role.METRICS}),
    "/ui/pool.json": frozenset({Role.OPERATOR, Role.METRICS}),
    "/metrics": frozenset({Role.OPERATOR, Role.METRICS}),
}
"""Who may call a method or see a page: whoever has one of these roles. All others are for inference."""
KEYS_ALONE = frozenset({"Drain"})
"""The methods that nobody may call where no keys are set."""

OPEN_PAGES = ("/ui", "/ui/")
"""What everybody may see: a page without a fact in it, which asks for a key."""


class Gate:
    """The one checker of callers. It owns no key, only what was last read of them. Without keys every caller is
    admitted.

    It is called from the event loop and from the threads of the metrics server.
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
        self._thread = ThreadPoolExecutor(1, "keys")  # a thread of its own, because others can be busy for seconds

    async def start(self) -> None:
        """Starts to read again at intervals; Redis is read for the first time."""
        if isinstance(self._keys, WatchedRedis):
            await self._keys.refresh(self._thread)
        if self.is_on:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stops reading."""
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
            except Exception as error:  # an error must not end the refresh: a revoked key would stay valid forever
                log.error("the keys could not be read again: %s; trying again", type(error).__name__)

    def _sources(self) -> Iterable[object]:
        return (self._keys, self._tokens and self._tokens.secret, self._tokens and self._tokens.jwks)

    def check(self, method: str, headers: Headers, tls_names: Iterable[str] = ()) -> Caller:
        """Returns the caller, if it may call the method. Raises Unauthenticated, PermissionDenied or InvalidRequest."""
        caller = self.caller_of(headers, tls_names)
        if not self.is_on and method in KEYS_ALONE:
            raise PermissionDenied(
                "this takes a key with the role operator, and the service has no keys (router.keys); to drain it or a "
                "worker, send the process SIGTERM"
            )
        if self.is_on and not caller.roles & ROLES_OF.get(method, _INFERENCE):
            raise PermissionDenied("the key does not permit this")
        return caller

    def caller_of(self, headers: Headers, tls_names: Iterable[str] = ()) -> Caller:
        """Returns the caller, by a call's metadata or headers (names in lower case) and the names in a client's
        certificate.

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
            raise Unauthenticated("the service requires a key: send a valid one as `authorization: Bearer KEY`")
        known = self._with_share(known)
        present.set(known)
        if not any(name == TENANT_KEY for name, _ in pairs):
            return known
        named = tenant_of(pairs)
        if named != known.tenant and not self.trusts_tenant_header and Role.OPERATOR not in known.roles:
            raise PermissionDenied("the key does not permit this")
        caller = self._with_share(self._acting_for(known, named))
        present.set(caller)
        return caller

    def _acting_for(self, known: Caller, tenant: str) -> Caller:
        """Returns the caller as one that acts for `tenant`, with the priority and weight of a key of that tenant's."""
        if tenant == known.tenant:
            return replace(known, acts_for_another=False)
        of_tenants = {} if self._keys is None else self._keys.value.of_tenants
        own = of_tenants.get(tenant, known)
        return replace(known, tenant=tenant, acts_for_another=True, priority=own.priority, weight=own.weight)

    def _with_share(self, caller: Caller) -> Caller:
        """Returns the caller with its tenant's guarantee, whichever key is shown and whoever acts for the tenant."""
        share = 0.0 if self._keys is None else self._keys.value.shares.get(caller.tenant, 0.0)
        return caller if share == caller.guaranteed_share else replace(caller, guaranteed_share=share)

    def claimed_tenant(self, headers: Headers) -> str:
        """Returns the tenant of a call that is not checked yet, for metrics and logs."""
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
    """Returns every credential that is sent. Malformed ones become an empty text, which is refused."""
    for name, value in pairs:
        if name == "x-api-key":  # the header that clients of Anthropic's methods use
            yield value if isinstance(value, str) else ""
        if name != "authorization":
            continue
        scheme, _, rest = (value if isinstance(value, str) else "").partition(" ")
        if scheme.lower() == "bearer":
            yield rest.strip()
        elif scheme.lower() == "basic":  # browsers send this for /ui: the password is the key
            yield _password(rest.strip())
        else:
            yield ""


def _password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""
