"""How a program's launches are repeated: as a CUDA graph, or one by one."""

from __future__ import annotations

import weakref
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


class CudaGraphs:
    """Records functions' launches as CUDA graphs of one device, whose temporary memory is one pool: one runs at a time.

    A pool ends with its last graph, and torch fails where its handle is used again: then the next graph begins another.
    They are all captured on one stream of this device, as torch asks of graphs with a common pool; its own default is
    one stream for the process, of whichever device came first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool: Any = None
        self._alive: weakref.WeakSet[CudaGraph] = weakref.WeakSet()

    def record(self, launch: Callable[[], None]) -> Capture:
        """The launches of ``launch``, which has run before on this thread: kernels are compiled and tables made at
        their first use, which a capture must not see. What it does is recorded, not done."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        if not self._alive:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        made = CudaGraph(graph)
        self._alive.add(made)
        return made


class CudaGraph:
    """Replays recorded launches with one."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def __call__(self) -> None:
        self._graph.replay()
