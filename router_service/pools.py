"""Stores of named pools: the protocol, and the stores in this process and in a folder."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from pager.errors import ConfigError, DamagedPool, PoolNameInUse, PoolStoreUnavailable, TooManyPools
from pager.pools.pick import MAX_ENCODED_BYTES, decode_named, encode_named
from pager.reading import read_bounded
from pager.store.appearing import create_owned, remove_abandoned
from pager.types import NamedPool, PoolListing

log = logging.getLogger("expert_pager.router")

MAX_POOLS_OF_TENANT = 256
MAX_POOLS = 16_384  # of all tenants together
_SUFFIX = ".json"
_PART = ".part-"


class PoolStore(Protocol):
    """A store of pools by tenant and name.

    Every method raises PoolStoreUnavailable when the store cannot be reached.
    """

    async def find(self, tenant: str, name: str) -> NamedPool | None:
        """Returns the pool of that name. Raises DamagedPool."""

    async def add(self, tenant: str, named: NamedPool) -> None:
        """Adds a pool; of two concurrent ones with one name, one is refused. Raises PoolNameInUse or TooManyPools."""

    async def replace(self, tenant: str, named: NamedPool) -> None:
        """Adds a pool or replaces the one of that name. Raises TooManyPools."""

    async def delete(self, tenant: str, name: str) -> bool:
        """Deletes a pool; returns False when there was none."""

    async def all_of(self, tenant: str) -> PoolListing: ...

    async def close(self) -> None: ...


class MemoryPools:
    """A store that lasts as long as this process."""

    def __init__(self) -> None:
        self._pools: dict[str, dict[str, NamedPool]] = {}

    async def find(self, tenant: str, name: str) -> NamedPool | None:
        return self._pools.get(tenant, {}).get(name)

    async def add(self, tenant: str, named: NamedPool) -> None:
        if await self.find(tenant, named.name) is not None:
            raise name_in_use(named.name)
        await self.replace(tenant, named)

    async def replace(self, tenant: str, named: NamedPool) -> None:
        mine = self._pools.get(tenant, {})
        if named.name not in mine:
            check_room(len(mine), sum(map(len, self._pools.values())))
        self._pools.setdefault(tenant, mine)[named.name] = named

    async def delete(self, tenant: str, name: str) -> bool:
        mine = self._pools.get(tenant, {})
        is_there = mine.pop(name, None) is not None
        if is_there and not mine:
            del self._pools[tenant]
        return is_there

    async def all_of(self, tenant: str) -> PoolListing:
        return PoolListing(tuple(named for _, named in sorted(self._pools.get(tenant, {}).items())))

    async def close(self) -> None:
        self._pools.clear()


async def listing_of(stored: Iterable[tuple[str, bytes]]) -> PoolListing:
    """Decodes pools one by one, since hundreds of large ones take a while."""
    pools, damaged = [], []
    for name, data in stored:
        try:
            pools.append(decode_named(data, name))
        except DamagedPool:
            damaged.append(name)
        await asyncio.sleep(0)
    return PoolListing(tuple(pools), tuple(damaged))


def name_in_use(name: str) -> PoolNameInUse:
    return PoolNameInUse(f"a pool {name!r} exists already; choose another name, or set `replace`", field="name")


def check_room(num_of_tenant: int, num_of_all: int) -> None:
    """Checks whether one more pool may be added. Raises TooManyPools."""
    if num_of_tenant >= MAX_POOLS_OF_TENANT:
        raise TooManyPools(
            f"this tenant has {MAX_POOLS_OF_TENANT} named pools, which is its limit; delete one that is not needed"
        )
    if num_of_tenant >= MAX_POOLS - num_of_all:
        raise TooManyPools(
            f"the store of named pools is nearly full, and a tenant may have no more of them than it leaves free for "
            f"others; this one has {num_of_tenant}: delete one that is not needed"
        )


class FolderPools:
    """A store of files `TENANT@NAME.json`: neither part can hold an @, so no name leaves the folder.

    Several processes may share it. A file appears whole or not at all: it is written under another name, which is
    removed when a store is opened and its process is gone.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the folder and makes it if it is missing. Raises ConfigError."""
        self._folder = folder
        self._writing = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            remove_abandoned(folder.glob(f"{_PART}*"), Path.unlink)
        except OSError as error:
            raise ConfigError(
                f"pools.path {folder} cannot be written: {error.strerror or error}; name a folder that can be written"
            ) from None

    async def find(self, tenant: str, name: str) -> NamedPool | None:
        with _translated("read"):
            data = await asyncio.to_thread(_read, self._path(tenant, name))
        return None if data is None else decode_named(data, name)

    async def add(self, tenant: str, named: NamedPool) -> None:
        with _translated("written"):
            await asyncio.to_thread(self._write, tenant, named, is_new=True)

    async def replace(self, tenant: str, named: NamedPool) -> None:
        with _translated("written"):
            await asyncio.to_thread(self._write, tenant, named, is_new=False)

    async def delete(self, tenant: str, name: str) -> bool:
        with _translated("deleted"):
            try:
                await asyncio.to_thread(self._path(tenant, name).unlink)
            except FileNotFoundError:
                return False
        return True

    async def all_of(self, tenant: str) -> PoolListing:
        with _translated("read"):
            stored = await asyncio.to_thread(self._read_all, tenant)
        return await listing_of(stored)

    async def close(self) -> None:
        """Does nothing: no file stays open."""

    def _path(self, tenant: str, name: str) -> Path:
        return self._folder / f"{tenant}@{name}{_SUFFIX}"

    def _write(self, tenant: str, named: NamedPool, *, is_new: bool) -> None:
        with self._writing:  # so that two calls at once do not both find the last free place
            self._write_one(tenant, named, is_new=is_new)

    def _write_one(self, tenant: str, named: NamedPool, *, is_new: bool) -> None:
        path = self._path(tenant, named.name)
        if not path.exists():
            names = [each.name for each in self._folder.glob(f"*{_SUFFIX}")]
            check_room(sum(name.startswith(f"{tenant}@") for name in names), len(names))
        part = self._folder / f"{_PART}{secrets.token_hex(8)}"
        handle = create_owned(part)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(encode_named(named))
                file.flush()
                os.fsync(file.fileno())
                if is_new:
                    os.link(part, path)  # unlike a rename, a link fails where a file exists
                else:
                    os.replace(part, path)
        except FileExistsError:
            raise name_in_use(named.name) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)

    def _read_all(self, tenant: str) -> list[tuple[str, bytes]]:
        prefix = f"{tenant}@"
        found = []
        for path in self._folder.glob(f"{prefix}*{_SUFFIX}"):
            data = _read(path)
            if data is not None:
                found.append((path.name.removeprefix(prefix).removesuffix(_SUFFIX), data))
        return sorted(found)


def _read(path: Path) -> bytes | None:
    try:
        return read_bounded(path, MAX_ENCODED_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        # too large, or not a regular file: this pool is damaged, and the others are not
        if error.errno in (errno.EFBIG, errno.EINVAL):
            return b""
        raise


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turns errors of files into errors without paths, which are for the log and not for clients."""
    try:
        yield
    except OSError as error:
        log.error("a named pool cannot be %s: %s", what, error)
        raise PoolStoreUnavailable(
            f"the named pool cannot be {what}: {error.strerror or type(error).__name__}; the service's log has the "
            "details"
        ) from None
