"""How a program's launches are repeated: as a CUDA graph, or one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Capture(Protocol):
    """Made once per program from a function that only launches work on buffers which stay where they are."""

    def __call__(self) -> None:
        """Do the function's work once more, on what is in the buffers now. Nobody waits for it."""


class NoGraph:
    """Calls the function each time: on a CPU, and the first time a shape is seen."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch

    def __call__(self) -> None:
        self._launch()


class CudaGraph:
    """Records the function's launches once and replays them with one.

    The function must have run before, on this thread: kernels are compiled and tables made at their first use, which
    a capture must not see. Memory that it takes belongs to ``pool``, which programs share: only one runs at a time.
    """

    def __init__(self, launch: Callable[[], None], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            launch()

    def __call__(self) -> None:
        self._graph.replay()
