"""Which routing-only passes a router runs: from its settings and what lies beside the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from pager.config import RouterConfig
from pager.errors import ConfigError
from pager.memory.machine import resolve_device
from pager.models.open_model import OpenModel
from pager.predict.fitted import PREDICTOR_NAME, LexicalPredictor, PredictorFile
from pager.predict.trunk import FittedPredictor, TrunkPredictor
from router_service.ports import Scorer
from router_service.prediction import Passes

MIN_RECALL = 0.5


def build_passes(opened: OpenModel, config: RouterConfig) -> Passes:
    """Loads the small file and leaves the trunk to be loaded when it is wanted; `opened` must stay open till then.

    Raises ConfigError for a choice that can take no effect, CheckpointError for a file that is another model's.
    """
    path = Path(opened.checkpoint.path) / PREDICTOR_NAME
    name = config.router if config.router != "auto" else ("fitted" if path.exists() else "trunk")
    if name in ("lexical", "fitted") and not path.exists():
        raise ConfigError(
            f"router.router is {name!r}, which needs {path}, which is not there; make it with `expert-pager fit-router "
            f"{opened.checkpoint.path} --documents FILE`, or serve with --predictor trunk"
        )
    if config.min_recall is not None and (name == "prefill" or not path.exists()):
        what = (
            "router.router is 'prefill', which predicts nothing"
            if name == "prefill"
            else f"there is no {path} to estimate it with"
        )
        raise ConfigError(f"router.min_recall can take no effect: {what}; leave it out")
    if name == "prefill":
        return Passes()

    file = PredictorFile.load(path, opened.checkpoint.fingerprint) if path.exists() else None

    @cache
    def trunk() -> TrunkPredictor:
        # The workers want the cores; a routing-only pass is short and runs one at a time.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
        return TrunkPredictor(opened, resolve_device(config.device), file.stand_ins if file else None)

    if file is None:
        return Passes({"trunk": trunk}, ("trunk",))
    lexical = cache(lambda: LexicalPredictor(file))
    available: dict[str, Callable[[], Scorer]] = {"lexical": lexical}
    chain = {"lexical": ("lexical", "fitted"), "trunk": ("trunk",), "fitted": ("fitted",)}[name]
    min_recall = MIN_RECALL if config.min_recall is None else config.min_recall
    if name == "lexical" and min_recall == 0:
        chain = ("lexical",)  # nothing is ever too little, so the trunk is never wanted
    else:
        available |= {"trunk": trunk, "fitted": cache(lambda: FittedPredictor(file, trunk()))}
    return Passes(available, chain, file.expected_recall, min_recall)


def load_first(passes: Passes) -> None:
    """So that the first prompt need not wait for it. Raises CheckpointError."""
    for name in passes.chain[:1]:
        passes.available[name]()
