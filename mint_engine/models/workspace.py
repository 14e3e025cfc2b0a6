"""Memory that passes over a base model write into, kept from one pass to the next.

A fresh page costs a fault (and its zeroing) at its first touch, for hundreds of megabytes at every step; and a CUDA
graph needs its tensors where they were. So whoever needs a buffer takes it by name: the same name gives the same
memory, grown if it was too small. Two passes never run at once on one base model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_VIEWS = 1 << 14  # of all shapes seen lately; a pass of 30 layers takes some 400


class Workspace:
    """Named buffers on one device. What a buffer holds is undefined until it is written.

    ``generation`` counts how often one has moved: whoever keeps addresses must look. ``before_move`` is called before
    one is given up for a larger one.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self.generation = 0
        self.before_move: Callable[[], None] | None = None
        self._memory: dict[Hashable, Tensor] = {}  # uint8
        self._views: dict[tuple[Hashable, tuple[int, ...], torch.dtype], Tensor] = {}

    def take(self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in the memory called ``name``: the one that the last ``take`` of that name gave, or
        wrote over, is lost."""
        key = (name, shape, dtype)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._view(name, shape, dtype)
        return view

    def _view(self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if len(self._views) >= _VIEWS:
            self._views.clear()
        elements = 1
        for n in shape:
            elements *= n
        size = elements * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            # An eighth more than asked for: batches of nearly the same size share a bucket.
            room = size if memory is None else size + size // 8
            if memory is not None:
                self.generation += 1
                if self.before_move is not None:
                    self.before_move()
            del memory
            self._memory.pop(name, None)  # free it first
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
            memory = self._memory[name] = torch.empty(room, dtype=torch.uint8, device=self._device)
        return memory[:size].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        return sum(memory.numel() for memory in self._memory.values())

    def release(self) -> None:
        """Give all memory back."""
        self.generation += 1
        self._memory.clear()
        self._views.clear()
