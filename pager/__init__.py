"""Serve mixture-of-experts models with only the experts in memory that a request needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pager.client import AsyncClient, Client
    from pager.engine.library import load_model
    from pager.types import (
        Bytes,
        Count,
        Counts,
        DriftAction,
        DriftPolicy,
        ExpertPool,
        Full,
        Mass,
        PoolAsk,
        SamplingParams,
        Share,
    )

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "Bytes",
    "Client",
    "Count",
    "Counts",
    "DriftAction",
    "DriftPolicy",
    "ExpertPool",
    "Full",
    "Mass",
    "PoolAsk",
    "SamplingParams",
    "Share",
    "__version__",
    "load_model",
]

# torch and transformers take seconds to import, and grpc a part of one: what needs them comes when it is used.
_MODULES = {"load_model": "pager.engine.library", "Client": "pager.client", "AsyncClient": "pager.client"}
_HAS_ENGINE = find_spec("pager.engine") is not None  # not where only the client is installed


def __getattr__(name: str) -> Any:
    if name == "load_model" and not _HAS_ENGINE:
        raise ImportError("load_model is part of expert-pager, and only expert-pager-client is installed")
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, "pager.types")), name)
    raise AttributeError(f"module 'pager' has no attribute {name!r}")


_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_EMO = "transformers.models.emo"


class _EmoInTransformers(MetaPathFinder, Loader):
    """An import hook that lets transformers find EMO among its own models, so that `AutoConfig`, `AutoTokenizer` and
    `pipeline` know it from `import pager` on, in whatever order the two are imported.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == _EMO:
            return ModuleSpec(name, self)
        if name == _AUTO_CONFIG:
            return _then_add_emo(PathFinder.find_spec(name, path, target))
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fills the module `_EMO`: importing `pager.models` registers EMO with all that it needs."""
        sys.modules[_EMO] = import_module("pager.models")


def _then_add_emo(spec: ModuleSpec | None) -> ModuleSpec | None:
    if spec is not None and spec.loader is not None:
        run = spec.loader.exec_module

        def run_and_add(module: ModuleType) -> None:
            run(module)
            _add_emo(module)

        spec.loader.exec_module = run_and_add  # type: ignore[method-assign]
    return spec


def _add_emo(configuration_auto: Any) -> None:
    configuration_auto.CONFIG_MAPPING_NAMES.setdefault("emo", "EmoConfig")


if _HAS_ENGINE:
    sys.meta_path.insert(0, _EmoInTransformers())
    if _AUTO_CONFIG in sys.modules:
        _add_emo(sys.modules[_AUTO_CONFIG])
