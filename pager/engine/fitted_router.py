"""The fitted pass: trunk and lexical scores together, mapped to what the whole document will want.

No routed expert is loaded or run.
"""

from __future__ import annotations

from collections.abc import Sequence

from pager.engine.trunk_router import TrunkRouter
from pager.errors import CheckpointError
from pager.routing.fitted import CombinedMap, LexicalRouter, RouterFile
from pager.types import RoutingScores


class FittedRouter:
    """Scores prompts with a model's trunk and its `router.safetensors`. Not thread-safe: one pass at a time."""

    def __init__(self, file: RouterFile, trunk: TrunkRouter) -> None:
        """Raises CheckpointError where the two are not of the same model."""
        if file.fingerprint != trunk.fingerprint:
            raise CheckpointError(
                f"the router was fitted to the model {file.fingerprint} and the trunk is of {trunk.fingerprint}; "
                "fit it again with `expert-pager fit-router`"
            )
        if bool(file.stand_ins) != trunk.has_stand_ins:
            raise CheckpointError("the trunk must be loaded with the stand-ins of its router file, and only with those")
        self.file = file
        self.trunk = trunk
        self._lexical = LexicalRouter(file)
        self._map = CombinedMap(file)

    def scores(self, token_ids: Sequence[int]) -> RoutingScores:
        """Raises InvalidRequest for an empty prompt and for token ids that the vocabulary does not have."""
        return self._map.scores(self._lexical.features(token_ids), self.trunk.scores(token_ids))
