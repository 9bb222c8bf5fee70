"""The folder of a run. Files in it appear whole or not at all, so that a run can be ended at any time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from safetensors import safe_open

CHECKPOINT = "checkpoint.safetensors"
WEIGHTS_PREFIX = "model."
"""Of the model's tensors in the checkpoint; the optimizer's begin with `optimizer.`."""


@dataclass(slots=True)
class Progress:
    """The progress of a run, over all its resumptions."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0

    @classmethod
    def of(cls, run: Path) -> Self:
        """Reads the progress from the run's checkpoint."""
        with safe_open(run / CHECKPOINT, "numpy") as file:
            return cls(**json.loads(file.metadata()["progress"]))

    def metadata(self) -> dict[str, str]:
        """Returns metadata for the checkpoint: in the same file as the weights, so that both are of one step."""
        return {"progress": json.dumps(asdict(self))}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` when the block ends without an error."""
    partial = path.with_name(f"partial-{path.name}")
    yield partial
    partial.replace(path)
