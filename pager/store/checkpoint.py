"""The files of a checkpoint directory: what lies in it, that nothing is missing, and the recorded checksums."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pager.errors import CheckpointError
from pager.reading import read_json_file, reason_of
from pager.store.pack_format import PACK_NAME, TRUNK_NAME, PackHeader, read_pack_header
from pager.store.reads import DataFile
from pager.store.safetensors_header import TensorSpec, read_header

MANIFEST_NAME = "checksums.json"
ALGORITHM = "xxh3_128"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The recorded checksums: file name → bytes, and tensor name → xxh3_128 of its stored bytes, in hex."""

    file_nbytes: Mapping[str, int]
    tensor_checksums: Mapping[str, str]

    def save(self, directory: Path) -> None:
        """Writes the manifest atomically. Raises CheckpointError where the directory can't be written."""
        body = {
            "version": 1,
            "algorithm": ALGORITHM,
            "files": dict(sorted(self.file_nbytes.items())),
            "tensors": dict(sorted(self.tensor_checksums.items())),
        }
        temporary = directory / f".{MANIFEST_NAME}.partial-{os.getpid()}"
        try:
            with temporary.open("w") as stream:
                json.dump(body, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(directory / MANIFEST_NAME)
        except OSError as error:
            raise CheckpointError(f"cannot write {directory / MANIFEST_NAME}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def load_manifest(directory: Path) -> Manifest | None:
    """Reads the manifest of a checkpoint directory; None without one. Raises CheckpointError if it is malformed."""
    path = directory / MANIFEST_NAME
    if not path.exists():
        return None
    again = "record it again with `expert-pager verify --record`, or remove it"
    try:
        body = read_json_file(path)
        version, algorithm = body["version"], body["algorithm"]
        manifest = Manifest(body["files"], body["tensors"])
        sound = all(type(size) is int for size in manifest.file_nbytes.values()) and all(
            isinstance(digest, str) for digest in manifest.tensor_checksums.values()
        )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}; {again}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checksum manifest ({error!r}); {again}") from error
    if not sound or version != 1 or algorithm != ALGORITHM:
        raise CheckpointError(
            f"{path} is of version {version!r}, algorithm {algorithm!r}, which can't be read here; {again}"
        )
    return manifest


SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The open safetensors files by name, the tensors in them, and the header of the pack beside them, if packed."""

    files: Mapping[str, DataFile]
    specs: Mapping[str, TensorSpec]
    pack: PackHeader | None

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def with_manifest(self, directory: Path, manifest: Manifest) -> WeightFiles:
        """Returns the files with the recorded checksums. Raises CheckpointError for a manifest of other files."""
        stale = "fetch the files again, or record them anew with `expert-pager verify --record`"
        for name, file in self.files.items():
            recorded = manifest.file_nbytes.get(name)
            if recorded != file.size:
                raise CheckpointError(
                    f"{directory / name} has {file.size} bytes and was recorded with {recorded}; {stale}"
                )
        missing = self.specs.keys() - manifest.tensor_checksums.keys()
        if missing:
            raise CheckpointError(f"{directory / MANIFEST_NAME} has no checksum of tensor {min(missing)!r}; {stale}")
        return dataclasses.replace(self, specs=_with_checksums(self.specs, manifest.tensor_checksums))


def open_weights(directory: Path) -> WeightFiles:
    """Opens a plain or packed directory's files. Raises CheckpointError, and then leaves none open."""
    files: dict[str, DataFile] = {}
    try:
        if (directory / PACK_NAME).exists() or (directory / TRUNK_NAME).exists():
            return WeightFiles(files, *_open_packed(directory, files))
        return WeightFiles(files, _open_plain(directory, files), pack=None)
    except BaseException:
        for file in files.values():
            file.close()
        raise


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object. Raises CheckpointError."""
    try:
        value = read_json_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason_of(error)}; fetch it again") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _open_packed(directory: Path, files: dict[str, DataFile]) -> tuple[dict[str, TensorSpec], PackHeader]:
    pack_file = _open_file(directory / PACK_NAME)
    try:
        header, _ = read_pack_header(pack_file)
    finally:
        pack_file.close()
    files[TRUNK_NAME] = _open_file(directory / TRUNK_NAME)
    specs = read_header(files[TRUNK_NAME])
    if specs.keys() != header.trunk_checksums.keys():
        raise CheckpointError(f"{TRUNK_NAME} and {PACK_NAME} in {directory} are not of the same model; pack it again")
    return _with_checksums(specs, header.trunk_checksums), header


def _open_plain(directory: Path, files: dict[str, DataFile]) -> dict[str, TensorSpec]:
    if (directory / SINGLE_NAME).exists():
        files[SINGLE_NAME] = _open_file(directory / SINGLE_NAME)
        return read_header(files[SINGLE_NAME])
    weight_map = _read_weight_map(directory)
    shards: dict[str, dict[str, TensorSpec]] = {}
    for shard in sorted(set(weight_map.values())):
        files[shard] = _open_file(directory / shard)
        shards[shard] = read_header(files[shard])
    specs = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{directory / shard} lacks tensor {name!r}, which {INDEX_NAME} says it holds")
        specs[name] = shards[shard][name]
    return specs


def _read_weight_map(directory: Path) -> dict[str, str]:
    path = directory / INDEX_NAME
    if not path.exists():
        raise CheckpointError(
            f"{directory} holds no {SINGLE_NAME}, {INDEX_NAME} or {PACK_NAME}; other weight formats are not read"
        )
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for shard in weight_map.values():
        # A shard is a file of this directory: an index must not reach elsewhere.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path} names {shard!r} as a shard; a shard is a file in the same directory")
    return weight_map


def _open_file(path: Path) -> DataFile:
    try:
        return DataFile(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"cannot open {path}: {reason_of(error)}; fetch the file again") from error


def _with_checksums(specs: Mapping[str, TensorSpec], checksums: Mapping[str, str]) -> dict[str, TensorSpec]:
    return {name: dataclasses.replace(spec, checksum=checksums[name]) for name, spec in specs.items()}
