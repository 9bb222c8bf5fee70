"""Serve mixture-of-experts models with only the experts in memory that a request needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pager.engine.library import load_model

__all__ = ["__version__", "load_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `import pager` alone should not.
    if name == "load_model":
        from pager.engine.library import load_model

        return load_model
    raise AttributeError(f"module 'pager' has no attribute {name!r}")
