"""Files that tests read, and small ways to make and damage files."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
DOCUMENTS = DATA / "documents"
"""A few documents of two domains, as `fit-router` and `clusters` read them."""

GOLDEN = DATA / "golden"
CHECKPOINT = GOLDEN / "ckpt_emo_tiny"
"""A small random EMO checkpoint: 4 layers of 16 experts, one of them shared; a token takes 4."""

EMO_TINY = ROOT / "models" / "emo-tiny"
"""The trained model that the repository ships."""


@dataclass(frozen=True, slots=True)
class Golden:
    """Outputs that the authors' own code computed for the small random checkpoint."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    checkpoint: Path = CHECKPOINT


def golden(name: str) -> Golden:
    """`emo_tiny` without pools, `pool_emo_tiny` with document pools."""
    return Golden(json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors"))


def written(path: Path, content: str | bytes) -> Path:
    """The path of a new file with this content; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def flip(path: Path, offset: int) -> None:
    """Inverts one byte of a file in place."""
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0xFF]))


def open_files(path: Path) -> list[str]:
    """The open files of this process that lie at or below `path`."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [file for file in found if Path(file).is_relative_to(path)]
