"""Models named as on the Hugging Face hub: ORGANISATION/NAME, or with a revision ORGANISATION/NAME@REVISION.

huggingface_hub keeps what it downloads in its own cache, where other programs find it, too.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pager.errors import CheckpointError

FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model")
"""Weights and words of a model; never code or pickles."""

PREFIX = "hf:"
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_OFFLINE = "HF_HUB_OFFLINE"
_is_kept_offline = False


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub, at a branch, tag or commit; None is the default branch."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, source: str | Path) -> Self | None:
        """Parses a name; None for a folder of this machine: one that is there, or whose first part is. `hf:` is always
        the hub.

        Raises CheckpointError for what follows `hf:` and is no name.
        """
        text = str(source)
        found = _NAME.fullmatch(text.removeprefix(PREFIX))
        if text.startswith(PREFIX):
            if found is None:
                raise CheckpointError(f"{text[:200]!r} names no model; write hf:ORGANISATION/NAME or add @REVISION")
        elif found is None or Path(text).exists() or Path(text).parent.exists():
            return None
        return cls(found["name"], found["revision"])

    @property
    def short_name(self) -> str:
        return self.name.partition("/")[2]

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def fetch(self) -> Path:
        """Downloads what is not in the cache yet; the folder there. Raises CheckpointError."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        with _online():
            try:
                folder = snapshot_download(
                    self.name, revision=self.revision, allow_patterns=list(FILES), ignore_patterns=["*/*"]
                )
            except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
                raise CheckpointError(_why(self, error)) from None
        if not (Path(folder) / "config.json").is_file():
            raise CheckpointError(f"{self} on the hub is no checkpoint of a model: it has no config.json")
        return Path(folder)


def local_folder(source: str | Path) -> Path:
    """The folder of a checkpoint, downloaded where it is named as on the hub. Raises CheckpointError."""
    model = HubModel.parse(source)
    return Path(source) if model is None else model.fetch()


def keep_offline() -> None:
    """Has huggingface_hub look at local files only, but for `fetch`; what the environment says comes first."""
    global _is_kept_offline
    if _OFFLINE not in os.environ:
        os.environ[_OFFLINE] = "1"
        _is_kept_offline = True


@contextmanager
def _online() -> Iterator[None]:
    """Undoes `keep_offline` for the block. Nothing else of this process uses the hub."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if _is_kept_offline:
        constants.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _why(model: HubModel, error: BaseException) -> str:
    """Returns what to tell the user of a download that failed."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    for each in chain:
        if isinstance(each, GatedRepoError):
            return f"{model} is not open to everybody: accept its terms on the hub and set HF_TOKEN"
        if isinstance(each, RevisionNotFoundError):
            return f"{model.name} has no revision {model.revision!r} on the hub; name a branch, a tag or a commit"
        if isinstance(each, RepositoryNotFoundError):
            return (
                f"there is no folder {model.name!r} here and no such model on the hub, or it is private; check the "
                "name, or set HF_TOKEN"
            )
        if isinstance(each, HFValidationError):
            return f"{str(model)[:200]!r} is no name of a model on the hub; write ORGANISATION/NAME"
    if os.environ.get(_OFFLINE, "") not in ("", "0") and not _is_kept_offline:
        return f"{model} is not in the cache {constants.HF_HUB_CACHE}, and {_OFFLINE} forbids to fetch it; unset it"
    status = next((each.response.status_code for each in chain if isinstance(each, HfHubHTTPError)), None)
    reason = type(chain[-1]).__name__ if status is None else f"it answers with status {status}"
    return (
        f"there is no folder {model.name!r} here, {model} is not in the cache {constants.HF_HUB_CACHE}, and it cannot "
        f"be fetched from {constants.ENDPOINT} ({reason}); check the connection, or give a folder"
    )
