"""A flag by which somebody who wants the device ends a call that takes several steps there."""

from __future__ import annotations

import torch


class Interruption:
    """Raised and lowered by Python's threads, read by C++ between two steps (``kernels.decode_steps``)."""

    def __init__(self) -> None:
        self.flag = torch.zeros(1, dtype=torch.int32)
        self._value = self.flag.numpy()

    @property
    def wanted(self) -> bool:
        return bool(self._value[0])

    @wanted.setter
    def wanted(self, value: bool) -> None:
        self._value[0] = value
