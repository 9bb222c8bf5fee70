"""A checkpoint directory, as downloaded from Hugging Face or packed: opened, checked, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from pager.errors import CheckpointError
from pager.store.checkpoint import WeightFiles, load_manifest, open_weights, read_json_object
from pager.store.reads import DataFile, read_pieces, read_tensor_at
from pager.store.safetensors_header import TensorSpec

_SAMPLED_TENSORS = 1024
_SAMPLE_BYTES = 64


class Checkpoint:
    """An open checkpoint. Knows names, shapes and bytes; knows neither model families nor what an expert is.

    `specs` holds every tensor of a plain checkpoint, and of a packed one the trunk's; `pack` is a packed one's
    header, else None. A tensor whose checksum is known is checked whenever it is read. Thread-safe but for
    `close`.
    """

    def __init__(self, path: Path, config: dict[str, Any], weights: WeightFiles) -> None:
        """Takes over the open files of `weights`; callers use `open`."""
        self.path = path
        self.config = config
        self.specs: Mapping[str, TensorSpec] = MappingProxyType(dict(weights.specs))
        self.pack = weights.pack
        self._weights = weights

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Opens the directory and checks all that can be checked without reading weights.

        Raises CheckpointError for a directory, config, index, shard or header that is missing, malformed or
        truncated, a tensor that its shard lacks or that is stored in an unsupported dtype, and files that a
        recorded manifest contradicts.
        """
        directory, config, weights = _open(path)
        try:
            manifest = load_manifest(directory) if weights.pack is None else None
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
        out = torch.empty(spec.shape, dtype=dtype or spec.dtype)
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


def _open(path: str | Path) -> tuple[Path, dict[str, Any], WeightFiles]:
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give the folder of a downloaded or packed checkpoint")
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
    return directory, read_json_object(directory / "config.json"), open_weights(directory)


def _unreadable(spec: TensorSpec, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read tensor {spec.name!r} at byte {spec.offset} of {spec.file}: {error}")


def _check(spec: TensorSpec, hasher: xxhash.xxh3_128 | None) -> None:
    if hasher is not None and hasher.hexdigest() != spec.checksum:
        raise CheckpointError(
            f"tensor {spec.name!r} at byte {spec.offset} of {spec.file} does not match its checksum; "
            "see what else is damaged with `expert-pager verify`, and fetch the file again"
        )
