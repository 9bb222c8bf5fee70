"""A decode step as a CUDA graph: recorded once, then replayed by one call instead of a launch for every kernel.

What can be recorded works on tensors that stay where they are, in shapes that stay as they are, and asks the device for
nothing. The experts' slots are looked up on the device, so others may come and go between two replays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

STEPS_BEFORE_CAPTURE = 4
"""Of a group: one that changes sooner than that is never recorded. A new shape runs once before it is."""

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]
"""Records what a step does on the device without doing it. What it returns does that, and returns what the step did."""


class CudaCapture:
    """Graphs on the current device that share their memory: one of them is used at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._latest: torch.cuda.CUDAGraph | None = None  # memory that no graph shares any more is gone for good

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # The outer block goes back to this stream even if the capture can not be ended. What other threads ask of the
        # device, as those that read experts do, is no part of it.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = step()
        self._latest = graph

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def capture_on(device: torch.device) -> Capture | None:
    """How steps are recorded on this device; None where they are not."""
    return CudaCapture() if device.type == "cuda" else None


class Recorder:
    """Records steps until one can not be recorded; from then on it is off. Mutable."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture

    @property
    def is_on(self) -> bool:
        return self._capture is not None

    def record(self, step: Step) -> Step | None:
        """The step's replay; None, and a warning, where it can not be recorded."""
        assert self._capture is not None, "it is off"
        try:
            return self._capture(step)
        except Exception as error:
            self._capture = None
            log.warning("decode steps run without a CUDA graph from now on, as one could not be recorded: %s", error)
            return None


class GroupGraph:
    """The graph of one group, if it has one now. Mutable."""

    def __init__(self) -> None:
        self._num_to_run = STEPS_BEFORE_CAPTURE
        self._made_for: tuple[object, ...] = ()
        self._replay: Step | None = None

    def replay(self, *made_for: object, record: Callable[[], Step | None]) -> Step | None:
        """The replay of the next step; None when that is to be run. `made_for` is kept: a graph serves nothing else."""
        if self._made_for != made_for:
            self._made_for, self._replay = made_for, None
            self._num_to_run = max(1, self._num_to_run)
        if self._num_to_run:
            self._num_to_run -= 1
        elif self._replay is None:
            self._replay = record()
        return self._replay
