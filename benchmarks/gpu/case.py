"""An op called as a training step calls it: what is checked, tuned and measured is the same call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Results = tuple[Tensor, ...]
Call = Callable[[dict[str, Tensor], str | None], Results]


@dataclass(frozen=True)
class Case:
    """``run(inputs, face)`` gives the op's results. ``moved`` bytes and ``flop`` are the least any version needs."""

    name: str
    inputs: dict[str, Tensor]
    run: Call
    moved: float = 0.0
    flop: float = 0.0


def widened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in float64."""
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
