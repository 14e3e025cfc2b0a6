"""Recording CUDA graphs, against a stand-in for torch.cuda that keeps torch's rules about their memory pools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mint_engine.gpu.capture import CudaGraphs


class Cuda:
    """Pools end with their last graph, and a capture into one that has ended fails, as in torch's allocator."""

    def __init__(self) -> None:
        self.graphs_of: dict[int, int] = {}  # pool -> graphs that are alive
        self.streams: list[torch.device] = []
        self.captures: list[tuple[int, int, str]] = []  # pool, stream, mode

    def graph_pool_handle(self) -> int:
        return len(self.graphs_of) + 100

    def stream(self, device: torch.device) -> int:
        self.streams.append(device)
        return len(self.streams)

    @contextmanager
    def graph(self, graph: Graph, pool: int, stream: int, capture_error_mode: str) -> Iterator[None]:
        if self.graphs_of.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.graphs_of[pool] = self.graphs_of.get(pool, 0) + 1
        graph.pool = pool
        self.captures.append((pool, stream, capture_error_mode))
        yield


class Graph:
    cuda: Cuda
    pool: int

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1

    def __del__(self) -> None:
        self.cuda.graphs_of[self.pool] -= 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()
    monkeypatch.setattr(Graph, "cuda", found, raising=False)
    fakes: dict[str, Any] = {"CUDAGraph": Graph, "graph": found.graph, "graph_pool_handle": found.graph_pool_handle}
    for name, fake in {**fakes, "Stream": found.stream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return found


def test_graphs_share_a_pool_until_the_last_is_gone(cuda: Cuda) -> None:
    """All of them go at once when the borders grow."""
    graphs, launched = CudaGraphs(torch.device("cuda", 1)), []
    one = graphs.record(lambda: launched.append(1))
    two = graphs.record(lambda: launched.append(2))
    assert launched == [1, 2]
    del one
    three = graphs.record(lambda: launched.append(3))
    del two, three
    four = graphs.record(lambda: launched.append(4))
    assert [pool for pool, _, _ in cuda.captures] == [100, 100, 100, 101]
    four()
    assert launched == [1, 2, 3, 4]  # replayed, not launched


def test_graphs_of_a_device_are_captured_on_one_stream_of_it(cuda: Cuda) -> None:
    """torch's own default is a stream of the device that came first, whichever it was."""
    for index in range(2):
        graphs = CudaGraphs(torch.device("cuda", index))
        kept = [graphs.record(lambda: None) for _ in range(2)]
        assert len(kept) == 2
    assert cuda.streams == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert [stream for _, stream, _ in cuda.captures] == [1, 1, 2, 2]
    assert {mode for _, _, mode in cuda.captures} == {"thread_local"}  # other threads go on allocating
