"""Device buffers that the host writes ahead: two pinned copies of each, so that one is written while one moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

SLOTS = 2


class Staged:
    """One device buffer and its pinned copies on the host."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fill: float = 0) -> None:
        pin = device.type == "cuda"
        self.device = torch.full(shape, fill, dtype=dtype, device=device)
        self._host = [torch.full(shape, fill, dtype=dtype, pin_memory=pin) for _ in range(SLOTS)]

    def host(self, slot: int) -> np.ndarray:
        """The host's copy, to write into."""
        array: np.ndarray = self._host[slot].numpy()
        return array

    def upload(self, slot: int, target: Tensor | None = None) -> None:
        """Queue the copy to the device (or to ``target``). The host's copy must stay as it is until it is done."""
        (self.device if target is None else target).copy_(self._host[slot], non_blocking=True)


class Turns:
    """Which of the host's copies is free: ``with turns.next() as slot`` waits for its last upload, rarely for long."""

    def __init__(self, device: torch.device) -> None:
        self._done: list[torch.cuda.Event | None] = [None] * SLOTS
        self._cuda, self._turn = device.type == "cuda", 0

    @contextmanager
    def next(self) -> Iterator[int]:
        slot = self._turn = (self._turn + 1) % SLOTS
        before = self._done[slot]
        if before is not None:
            before.synchronize()
        yield slot
        if self._cuda:
            event = self._done[slot] = torch.cuda.Event()
            event.record()


def mark(device: torch.device) -> Callable[[], None]:
    """A function that waits, on any thread, until ``device`` has done what has been queued so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event(blocking=True)  # who waits sleeps
    event.record()

    def wait() -> None:
        with torch.cuda.device(device):  # a thread's own; else the first GPU would get a context
            event.synchronize()

    return wait


def download(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` on the host that will be there when the device has come so far; on the CPU it is at once."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
