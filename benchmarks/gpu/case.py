"""An op called as a training step calls it: what is checked, tuned and measured is the same call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Results = tuple[Tensor, ...]
Call = Callable[[dict[str, Tensor], str | None], Results]


@dataclass(frozen=True)
class Case:
    """``run(inputs, face)`` gives the op's results. ``moved`` bytes and ``flop`` are the least any version needs.

    ``writes``: inputs that ``run`` writes to: whoever wants them as they were gives it copies (`results`). What is
    timed is the op alone, again and again on the same memory.
    """

    name: str
    inputs: dict[str, Tensor]
    run: Call
    moved: float = 0.0
    flop: float = 0.0
    writes: tuple[str, ...] = ()


def results(case: Case, inputs: dict[str, Tensor], face: str | None) -> Results:
    """What the op makes of ``inputs``, in memory of its own; ``inputs`` stay as they are."""
    taken = {name: t.clone() if name in case.writes else t for name, t in inputs.items()}
    return tuple(t.clone() for t in case.run(taken, face))


def widened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in float64."""
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
