"""A checkpoint directory, from the hub or packed: its files, the recorded checksums, and its tensors one by one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from pager.errors import CheckpointError
from pager.gguf import PLAIN, SUFFIX, GgufFile, config_of, is_gguf, read_gguf
from pager.reading import read_json_file, reason_of
from pager.store.pack_format import PACK_NAME, TRUNK_NAME, PackHeader, read_pack_header
from pager.store.reads import LARGE_PAGE_BYTES, DataFile, in_large_pages, read_pieces, read_tensor_at
from pager.store.safetensors import DTYPES, TensorSpec, read_header

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
    """The open files by name, the tensors in them, the header of the pack beside them, if packed, and of GGUF files."""

    files: Mapping[str, DataFile]
    specs: Mapping[str, TensorSpec]
    pack: PackHeader | None
    gguf: GgufFile | None = None

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
    # As transformers, which opens the files that an index names and takes what is in them.
    specs = {name: spec for shard in shards.values() for name, spec in shard.items()}
    specs |= {name: shards[shard][name] for name, shard in weight_map.items() if name in shards[shard]}
    return specs


def _read_weight_map(directory: Path) -> dict[str, str]:
    path = directory / INDEX_NAME
    if not path.exists():
        _refuse_other_containers(directory)
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


# --- tensors ----------------------------------------------------------------------------------------------------------


_SAMPLED_TENSORS = 1024
_SAMPLE_BYTES = 64


class Checkpoint:
    """An open checkpoint. Knows names, shapes and bytes; knows neither model families nor what an expert is.

    `specs` holds every tensor of a plain checkpoint, and of a packed one the trunk's; `pack` is a packed one's
    header, else None. `path` is a folder, or a GGUF file, whose header `gguf` is. A tensor whose checksum is known is
    checked whenever it is read. Thread-safe but for `close`.
    """

    def __init__(self, path: Path, config: dict[str, Any], weights: WeightFiles) -> None:
        """Takes over the open files of `weights`; callers use `open`."""
        self.path = path
        self.config = config
        self.specs: Mapping[str, TensorSpec] = MappingProxyType(dict(weights.specs))
        self.pack = weights.pack
        self.gguf = weights.gguf
        self._weights = weights

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Opens the directory or GGUF file and checks all that can be checked without reading weights.

        Raises CheckpointError for a directory, config, index, shard or header that is missing, malformed or
        truncated, a tensor stored in an unsupported dtype, and files that a recorded manifest contradicts;
        UnsupportedModel for what is not read from GGUF files.
        """
        directory, config, weights = _open(path)
        try:
            manifest = load_manifest(directory) if weights.pack is None and weights.gguf is None else None
            if manifest is not None:
                weights = weights.with_manifest(directory, manifest)
        except BaseException:
            weights.close()
            raise
        return cls(directory, config, weights)

    @classmethod
    def open_unverified(cls, path: str | Path) -> Checkpoint:
        """Opens as `open` does, but ignores a recorded manifest, so that a new one can be recorded."""
        return cls(*_open(path))

    @property
    def is_packed(self) -> bool:
        return self.pack is not None

    @property
    def config_path(self) -> Path:
        """The file that says what the model is."""
        return self.path / "config.json" if self.gguf is None else self.path

    def require_folder(self, to: str) -> None:
        """Refuses a GGUF file `to` something that is done with folders only, by a CheckpointError."""
        if self.gguf is not None:
            raise CheckpointError(
                f"{self.path} is a GGUF file, which is served as it is; to {to}, fetch the checkpoint that it was made "
                "from"
            )

    @property
    def file_nbytes(self) -> dict[str, int]:
        """The safetensors files of the checkpoint and their sizes."""
        return {name: file.size for name, file in self._weights.files.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Returns a stable hex id of the model: config, names, shapes, dtypes, file sizes and a sample of the contents.

        The sample is a few bytes from each of the smallest tensors: norms and gates come first, and every
        expert of a small model. Cheap, and no substitute for checksums. A packed model's derives from its
        source's. Raises CheckpointError.
        """
        if self.pack is not None:
            return self.pack.fingerprint
        specs = [self.specs[name] for name in sorted(self.specs)]
        facts = [
            self.config,
            [[spec.name, spec.shape, str(spec.dtype)] for spec in specs],
            sorted(self.file_nbytes.items()),
        ]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for spec in sorted(specs, key=lambda spec: spec.nbytes)[:_SAMPLED_TENSORS]:
            count = min(_SAMPLE_BYTES, spec.nbytes)
            try:
                digest.update(self._weights.files[spec.file].read(count, spec.offset + (spec.nbytes - count) // 2))
            except OSError as error:
                raise _unreadable(spec, error) from error
        return digest.hexdigest()[:32]

    def require(self, name: str, shape: Iterable[int]) -> TensorSpec:
        """Returns the spec of a tensor that the model needs.

        Raises CheckpointError if it is missing or of another shape.
        """
        spec = self.specs.get(name)
        expected = tuple(shape)
        if spec is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}, which its config calls for (shape {expected})")
        if spec.shape != expected:
            raise CheckpointError(
                f"tensor {name!r} in {self.path / spec.file} has shape {spec.shape}; its config calls for {expected}"
            )
        return spec

    def read_tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Reads a tensor into new CPU memory, cast to `dtype` if given. Raises CheckpointError."""
        spec = self._spec(name)
        dtype = dtype or spec.dtype
        is_large = math.prod(spec.shape) * dtype.itemsize >= LARGE_PAGE_BYTES
        out = in_large_pages(spec.shape, dtype) if is_large else torch.empty(spec.shape, dtype=dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> int:
        """Fills `out` (CPU, contiguous, of the stored shape, any dtype); returns the bytes read.

        Raises CheckpointError, also if the bytes don't match their checksum; what `out` holds then is undefined.
        """
        spec = self.require(name, out.shape)
        hasher = None if spec.checksum is None else xxhash.xxh3_128()
        try:
            count = read_tensor_at(self._weights.files[spec.file], spec.offset, spec.dtype, out, hasher)
        except OSError as error:
            raise _unreadable(spec, error) from error
        _check(spec, hasher)
        return count

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yields the tensor's elements in order, as short 1-D tensors that share a bounded buffer: each is valid until
        the next.

        Raises CheckpointError, at the end if the bytes don't match their checksum.
        """
        spec = self._spec(name)
        hasher = None if spec.checksum is None else xxhash.xxh3_128()
        try:
            yield from read_pieces(self._weights.files[spec.file], spec.offset, spec.nbytes, spec.dtype, hasher)
        except OSError as error:
            raise _unreadable(spec, error) from error
        _check(spec, hasher)

    def duplicate_file(self, name: str) -> DataFile:
        """Opens a descriptor of the caller's own for one of the safetensors files."""
        return self._weights.files[name].duplicate()

    def close(self) -> None:
        self._weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spec(self, name: str) -> TensorSpec:
        spec = self.specs.get(name)
        if spec is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return spec


_CONTAINERS = {".bin": "pickled weights", ".pth": "pickled weights", ".pt": "pickled weights"}


def _refuse_other_containers(path: Path) -> None:
    """Refuses weights in a file of another kind, `path` itself or one in it, by a CheckpointError."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        what = _CONTAINERS.get(file.suffix)
        if what is not None and file.is_file():
            raise CheckpointError(
                f"{file} holds {what}, which are not read here; fetch the model's safetensors, or load it with "
                "transformers and save that (save_pretrained)"
            )
        if path.is_dir() and file.suffix == SUFFIX:
            raise CheckpointError(f"{path} holds no safetensors; of a GGUF file give its own path: {file}")


def _open_gguf(path: Path) -> tuple[Path, dict[str, Any], WeightFiles]:
    gguf = read_gguf(path)
    config = config_of(gguf)
    specs = {
        name: TensorSpec(name, each.file.name, each.offset, each.nbytes, each.shape, DTYPES[each.kind])
        if each.kind in PLAIN
        else TensorSpec(
            name, each.file.name, each.offset, each.nbytes, each.stored_shape, torch.uint8, blocks=each.kind
        )
        for name, each in gguf.tensors.items()
    }
    files: dict[str, DataFile] = {}
    try:
        for each in gguf.files:
            files[each.name] = _open_file(each)
    except BaseException:
        for file in files.values():
            file.close()
        raise
    return gguf.path, config, WeightFiles(files, specs, None, gguf)


def _open(path: str | Path) -> tuple[Path, dict[str, Any], WeightFiles]:
    directory = Path(path)
    if is_gguf(directory):
        return _open_gguf(directory)
    if not directory.is_dir():
        _refuse_other_containers(directory)
        raise CheckpointError(
            f"{directory} is not a directory; give the folder of a downloaded or packed checkpoint, or a GGUF file"
        )
    if (directory / "adapter_config.json").exists():
        put = "put the adapter on what pager.load_model returns (model.load_adapter)"
        if not (directory / "config.json").exists():
            raise CheckpointError(
                f"{directory} holds an adapter and no model; give the folder of its base model, and {put}"
            )
        raise CheckpointError(
            f"{directory} holds an adapter beside a model (adapter_config.json), and transformers would load both; "
            f"move the adapter to a folder of its own, and {put}, or merge it into the model with PEFT"
        )
    if not (directory / "config.json").exists():
        _refuse_other_containers(directory)
    return directory, read_json_object(directory / "config.json"), open_weights(directory)


def _unreadable(spec: TensorSpec, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read tensor {spec.name!r} at byte {spec.offset} of {spec.file}: {error}")


def _check(spec: TensorSpec, hasher: xxhash.xxh3_128 | None) -> None:
    if hasher is not None and hasher.hexdigest() != spec.checksum:
        raise CheckpointError(
            f"tensor {spec.name!r} at byte {spec.offset} of {spec.file} does not match its checksum; "
            "see what else is damaged with `expert-pager verify`, and fetch the file again"
        )
