"""Which files of the repository the distribution expert-pager-client has. None of them is copied into this folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).resolve().parent
MODULES = ("__init__.py", "client.py", "errors.py", "py.typed", "types.py", "wire.py")


def files() -> dict[str, str]:
    """Each file to be packed, and its place. Next to this file where a source distribution was unpacked."""
    is_unpacked = (HERE / "pager").is_dir()
    pager = (HERE if is_unpacked else HERE.parent) / "pager"
    stubs = (HERE if is_unpacked else HERE.parent / "protos") / "expert_pager"
    packed = {str(pager / name): f"pager/{name}" for name in MODULES}
    for path in sorted(stubs.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".pyi", ".proto", ".typed"):
            packed[str(path)] = f"expert_pager/{path.relative_to(stubs)}"
    return packed


def version() -> str:
    """The one that `pager/__init__.py` has."""
    [path] = [path for path, place in files().items() if place == "pager/__init__.py"]
    found = re.search(r'^__version__ = "([^"]+)"$', Path(path).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, path
    return found[1]


class ClientFiles(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"].update(files())
