"""The layout of `experts.pack`: a checksummed header, then one contiguous 4096-aligned extent for each expert.

    magic, version, header length, xxh3_128 of the header | header JSON | zeros up to 4096 | extent | zeros | ...

An extent is the parameters of an expert one after the other, in one dtype: gate_up [2F, D] (gate rows first) and then
down [D, F] in version 1; in version 2 the header names them; in version 3 they are bytes, and the header names what
they are quantised to as well. Offsets in the header count from the end of the padded header, so that its length does
not depend on them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from pager.errors import CheckpointError
from pager.reading import parse_json
from pager.store.quantised import RecordFormat
from pager.store.reads import DataFile
from pager.store.safetensors import DTYPE_NAMES, DTYPES, MAX_HEADER_BYTES
from pager.types import ExpertKey, ExpertShape

PACK_NAME = "experts.pack"
TRUNK_NAME = "trunk.safetensors"
ALIGNMENT = 4096

_MAGIC = b"EXPRPACK"
_VERSIONS = (1, 2, 3)
_PREFIX = struct.Struct("<8sIQ16s")
_NO_CHECKSUM = "0" * 32


@dataclass(frozen=True, slots=True)
class Extent:
    """The place of one expert's bytes, counted from the end of the padded header, and their xxh3_128 in hex."""

    offset: int
    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class PackHeader:
    """The content of a pack. `trunk_checksums` covers every tensor of the trunk file beside it."""

    source_fingerprint: str
    experts_per_layer: tuple[int, ...]
    shape: ExpertShape
    dtype: torch.dtype
    extents: Mapping[ExpertKey, Extent]
    trunk_checksums: Mapping[str, str]
    record: RecordFormat | None = None
    """What quantised experts are in; `shape` is then that of their bytes, and `dtype` uint8."""

    @classmethod
    def plan(
        cls,
        source_fingerprint: str,
        experts_per_layer: tuple[int, ...],
        shape: ExpertShape,
        form: torch.dtype | RecordFormat,
        trunk_names: Iterable[str],
    ) -> PackHeader:
        """Makes the header of a pack yet to be written: everything but the checksums, and as long as the final one.

        `shape` is the model's. Raises UnsupportedModel for experts that cannot be quantised to `form`.
        """
        record = form if isinstance(form, RecordFormat) else None
        dtype = torch.uint8 if isinstance(form, RecordFormat) else form
        shape = record.record(shape) if record else shape
        places = _places(experts_per_layer, shape.num_elements * dtype.itemsize)
        extents = {key: Extent(offset, nbytes, _NO_CHECKSUM) for key, (offset, nbytes) in places.items()}
        trunk = dict.fromkeys(trunk_names, _NO_CHECKSUM)
        return cls(source_fingerprint, experts_per_layer, shape, dtype, extents, trunk, record)

    def with_checksums(self, extents: Mapping[ExpertKey, str], trunk: Mapping[str, str]) -> PackHeader:
        filled = {key: dataclasses.replace(extent, checksum=extents[key]) for key, extent in self.extents.items()}
        return dataclasses.replace(
            self, extents=filled, trunk_checksums={name: trunk[name] for name in self.trunk_checksums}
        )

    @property
    def fingerprint(self) -> str:
        """The packed model's id, made of its source's id and what its experts are held as."""
        held = DTYPE_NAMES[self.dtype] if self.record is None else str(self.record)
        return hashlib.sha256(f"{self.source_fingerprint}/{held}".encode()).hexdigest()[:32]

    @property
    def extents_nbytes(self) -> int:
        return sum(align(extent.nbytes) for extent in self.extents.values())

    def encode(self) -> bytes:
        """Encodes the header as it is stored, padded."""
        body = {
            "source_fingerprint": self.source_fingerprint,
            "experts_per_layer": self.experts_per_layer,
            "hidden": self.shape.hidden,
            "intermediate": self.shape.intermediate,
            "dtype": DTYPE_NAMES[self.dtype],
            **({"parameters": self.shape.parameters} if self.shape.parameters else {}),
            **({"record": self.record.encoded()} if self.record else {}),
            "extents": [[*key, extent.offset, extent.nbytes, extent.checksum] for key, extent in self.extents.items()],
            "trunk": dict(self.trunk_checksums),
        }
        encoded = json.dumps(body, separators=(",", ":")).encode()
        version = 3 if self.record else 2 if self.shape.parameters else 1
        prefix = _PREFIX.pack(_MAGIC, version, len(encoded), xxhash.xxh3_128_digest(encoded))
        return (prefix + encoded).ljust(align(_PREFIX.size + len(encoded)), b"\0")


def align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def all_keys(experts_per_layer: Iterable[int]) -> Iterator[ExpertKey]:
    """Lists every expert in layer order."""
    return (ExpertKey(layer, expert) for layer, count in enumerate(experts_per_layer) for expert in range(count))


def _places(experts_per_layer: Iterable[int], nbytes: int) -> dict[ExpertKey, tuple[int, int]]:
    """The offset and length of each expert's extent."""
    return {key: (index * align(nbytes), nbytes) for index, key in enumerate(all_keys(experts_per_layer))}


def read_pack_header(file: DataFile) -> tuple[PackHeader, int]:
    """Reads the header and finds the byte at which the extents begin. Raises CheckpointError if the file is damaged or
    truncated.
    """
    try:
        magic, version, length, digest = _PREFIX.unpack(file.read(_PREFIX.size, 0))
        if magic != _MAGIC:
            raise _damaged(file.path, "it does not begin as a pack does")
        if version not in _VERSIONS:
            known = ", ".join(map(str, _VERSIONS))
            raise CheckpointError(f"{file.path} is a pack of version {version}; this release reads version {known}")
        if length > MAX_HEADER_BYTES or _PREFIX.size + length > file.size:
            raise _damaged(file.path, f"its {file.size} bytes cannot hold its header of {length}")
        encoded = file.read(length, _PREFIX.size)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read the header of {file.path}: {error}") from error
    if xxhash.xxh3_128_digest(encoded) != digest:
        raise _damaged(file.path, "its header does not match its checksum")
    try:
        header = _decode(encoded)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file.path, f"its header can't be understood ({error!r})") from error
    data_start = align(_PREFIX.size + length)
    _check_extents(file, header, data_start)
    return header, data_start


def _decode(encoded: bytes) -> PackHeader:
    """Decodes a header. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
    body = parse_json(encoded)
    experts_per_layer, extents = tuple(body["experts_per_layer"]), body["extents"]
    parameters = tuple((str(name), tuple(part)) for name, part in body.get("parameters", ()))
    sizes = (size for _, part in parameters for size in part)
    numbers = (
        *sizes,
        *experts_per_layer,
        body["hidden"],
        body["intermediate"],
        *(part for row in extents for part in row[:4]),
    )
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("a size or an offset is not a whole number")
    if len(extents) != sum(experts_per_layer):
        raise ValueError(f"{len(extents)} extents for {sum(experts_per_layer)} experts")
    return PackHeader(
        source_fingerprint=str(body["source_fingerprint"]),
        experts_per_layer=experts_per_layer,
        shape=ExpertShape(body["hidden"], body["intermediate"], parameters),
        dtype=DTYPES[body["dtype"]],
        extents={ExpertKey(layer, expert): Extent(*rest) for layer, expert, *rest in extents},
        trunk_checksums={str(name): str(checksum) for name, checksum in body["trunk"].items()},
        record=RecordFormat.decoded(body["record"]) if "record" in body else None,
    )


def _check_extents(file: DataFile, header: PackHeader, data_start: int) -> None:
    where = {key: (extent.offset, extent.nbytes) for key, extent in header.extents.items()}
    if where != _places(header.experts_per_layer, header.shape.num_elements * header.dtype.itemsize):
        raise _damaged(file.path, "its extents are not those of its experts")
    expected = data_start + header.extents_nbytes
    if file.size < expected:
        raise CheckpointError(
            f"{file.path} is truncated: it should have {expected} bytes and has {file.size}; pack it again"
        )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound expert pack: {why}; pack the model again")
