"""Keys as they are kept, in a file or in Redis: of each its SHA-256, its tenant, its roles and its bounds.

`router_service.gate` checks callers by them, and `expert-pager keys` changes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pager.errors import ConfigError
from pager.reading import parse_json, read_bounded, reason_of
from router_service.redis import RedisClient, RedisUnavailableError
from router_service.tenants import Caller, CallerLimits, Role

log = logging.getLogger("expert_pager.router")

MAX_FILE_BYTES = 8 << 20
IN_REDIS = "redis"  # what router.keys says instead of a file
PREFIX = 16  # characters of a hash by which its entry is found; the whole is compared in constant time
_TENANT = r"^[A-Za-z0-9._-]{1,64}$"
_LIMIT = Field(default=None, ge=1, le=2**53)

Headers = Iterable[tuple[str, str | bytes]] | None
Value = TypeVar("Value")

# --- what is kept ---------------------------------------------------------------------------------------------------


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
    """One caller that is known: by a key's SHA-256, by a name in a client's certificate, or by a token's tenant."""

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    tenant: str = Field(pattern=_TENANT)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    certificate: str | None = Field(default=None, min_length=1, max_length=256)
    jwt: bool = False
    roles: tuple[Role, ...] = (Role.INFERENCE,)
    limits: EntryLimits = EntryLimits()
    priority: int = Field(default=0, ge=-100, le=100)
    weight: float = Field(default=1.0, ge=0.01, le=100.0)
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
    """All callers that are known, by what shows who they are."""

    by_sha256: Mapping[str, tuple[str, Caller]] = field(
        default_factory=dict
    )  # by a prefix, for the whole to be compared
    by_certificate: Mapping[str, Caller] = field(default_factory=dict)
    by_jwt_tenant: Mapping[str, Caller] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> KeySet:
        """Raises ConfigError for two entries of one id or one identity."""
        seen: set[tuple[str, str | None]] = set()
        for each in entries:
            for mark in (("id", each.id), ("sha256", each.sha256), ("certificate", each.certificate),
                         ("jwt", each.tenant if each.jwt else None)):  # fmt: skip
                if mark[1] is not None and mark in seen:
                    raise ConfigError(f"two keys have the same {mark[0]} as key {each.id!r}; revoke one")
                seen.add(mark)
        return cls(
            {each.sha256[:PREFIX]: (each.sha256, each.caller) for each in entries if each.sha256 is not None},
            {each.certificate: each.caller for each in entries if each.certificate is not None},
            {each.tenant: each.caller for each in entries if each.jwt},
        )


def parse_entries(data: bytes, where: str) -> tuple[Entry, ...]:
    """Raises ConfigError, which quotes no value: one may be a key that was put in the place of its hash."""
    try:
        return _Document.model_validate(parse_json(data)).keys
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where} is no file of keys: {at or 'it'}: {first['msg'][:200]}") from None
    except ValueError:
        raise ConfigError(f'{where} is no file of keys: it is not JSON of the form {{"keys": [...]}}') from None


def new_key() -> tuple[str, str]:
    """A key that nobody has, and its SHA-256."""
    key = f"epk_{secrets.token_urlsafe(32)}"
    return key, sha256_of(key)


def new_entry(tenant: str, roles: Sequence[Role], limits: EntryLimits, **further: Any) -> Entry:
    """An entry with an id of its own; `further` has what shows who it is. Raises ConfigError."""
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


# --- where it is kept -----------------------------------------------------------------------------------------------

Edit = Callable[[tuple[Entry, ...]], tuple[Entry, ...]]


class KeyStore(Protocol):
    """Where entries are kept, as the command line sees it."""

    async def entries(self) -> tuple[Entry, ...]:
        """Raises ConfigError."""

    async def change(self, edit: Edit) -> None:
        """Changes all of it at once; of two at a time, one waits for the other. Raises ConfigError."""


class KeyFile:
    """A JSON file of entries, which only its owner can read. It appears whole or not at all."""

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
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # which only its owner can read
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                os.chmod(part, path.stat().st_mode & 0o777)
            os.replace(part, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(part)
            raise


@contextmanager
def _locked(folder: Path) -> Any:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


ENTRIES, _VERSION = "expert-pager:1:keys", "expert-pager:1:keys-version"
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
        raise ConfigError("the keys in Redis are changed by others all the time; try again")

    async def close(self) -> None:
        with suppress(RedisUnavailableError):
            await self._client.close()


def read_file(path: Path, what: str) -> bytes:
    try:
        return read_bounded(path, MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {reason_of(error)}") from None
