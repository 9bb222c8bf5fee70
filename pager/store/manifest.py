"""`checksums.json`: what the bytes of a plain checkpoint were when someone recorded them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pager.errors import CheckpointError
from pager.reading import read_json_file, reason_of

MANIFEST_NAME = "checksums.json"
ALGORITHM = "xxh3_128"


@dataclass(frozen=True, slots=True)
class Manifest:
    """File name → bytes, and tensor name → xxh3_128 of its stored bytes, in hex."""

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
    """The manifest of a checkpoint directory, None where there is none. Raises CheckpointError if it is malformed."""
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
