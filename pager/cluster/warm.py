"""What a worker held, in a small file of its own, so that its next life pages that in before it is ready.

Best effort: a file that can not be used costs a line in the log, and the worker starts cold. Knows no torch.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pager.types import RoutingFacts

log = logging.getLogger(__name__)

VERSION = 1
MAX_BYTES = 16 * 2**20

Experts = Sequence[Sequence[int]]  # per layer, the routed ones


class WarmFile:
    """The file of one worker. Written by it alone, by several of its threads."""

    def __init__(self, folder: Path, worker: str, fingerprint: str, facts: RoutingFacts) -> None:
        self._path = folder / f"{worker}.json"
        self._fingerprint = fingerprint
        self._routed_per_layer = facts.routed_per_layer
        self._saved: Any = None

    def read(self) -> list[list[int]] | None:
        """What to page in; None where there is no file, or none that is this model's, which is logged."""
        try:
            if self._path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            return self._checked(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is ignored, and this worker starts cold: %s", self._path, error)
            return None

    def save(self, experts: Experts) -> None:
        """Replaces the file in one step, when something changed. Nothing held is nothing to remember."""
        content = [list(layer) for layer in experts]
        if content == self._saved or not any(content):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"version": VERSION, "fingerprint": self._fingerprint, "experts": content}, file)
            os.replace(temporary, self._path)
        except OSError as error:
            log.warning("what this worker holds could not be saved to %s: %s", self._path, error)
        else:
            self._saved = content

    def _checked(self, document: Any) -> list[list[int]]:
        """Raises ValueError that says what is wrong."""
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise ValueError(f"it is not a file of version {VERSION}")
        if document.get("fingerprint") != self._fingerprint:
            raise ValueError("it is of another model")
        experts = document.get("experts")
        if not isinstance(experts, list) or len(experts) != len(self._routed_per_layer):
            raise ValueError(f"it does not have {len(self._routed_per_layer)} layers")
        for number, (layer, routed) in enumerate(zip(experts, self._routed_per_layer, strict=True)):
            if not isinstance(layer, list) or not all(type(each) is int and 0 <= each < routed for each in layer):
                raise ValueError(f"layer {number} has {routed} routed experts, and the file names others")
        return experts
