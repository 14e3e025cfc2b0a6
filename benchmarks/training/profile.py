"""Where the time of our step goes, by op: the functions of mint_engine.kernels that others call."""

from __future__ import annotations

import cProfile
import pstats
from collections import defaultdict
from pathlib import Path
from typing import Any

from mint_engine import kernels

FOLDER = str(Path(kernels.__file__).parent)


def profiled(contender: Any, steps: int) -> dict[str, float]:
    """Share of the device thread's time in each op, the rest under "torch" (its functions) and "Python".

    Layers run op by op, with more Python than in the steps that are timed: `decoder_layer` saves that.
    """
    profiler = cProfile.Profile()
    lane = contender.engine._executor.lane()
    lane.submit(profiler.enable).result()  # the device's thread is the one that computes
    with kernels.op_by_op():  # a layer in one call would hide its ops
        for _ in range(steps):
            contender.step()
    lane.submit(profiler.disable).result()
    return shares(pstats.Stats(profiler))


def shares(stats: Any) -> dict[str, float]:
    """Seconds by op, from the calls that come from outside of the kernels' folder; waiting does not count."""
    seconds: dict[str, float] = defaultdict(float)
    total = 0.0
    for (file, _, name), (_, _, own, _, callers) in stats.stats.items():
        if _waits(name):
            continue
        total += own
        if (op := _op(file)) is not None:
            seconds[op] += sum(c[3] for (caller, _, _), c in callers.items() if _op(caller) is None)
        elif file == "~":
            seconds["torch"] += sum(c[2] for (caller, _, _), c in callers.items() if _op(caller) is None)
    found = {op: s for op, s in seconds.items() if s > 0}
    found["Python"] = max(0.0, total - sum(found.values()))
    return {op: round(s / total, 4) for op, s in sorted(found.items(), key=lambda item: -item[1])}


def _op(file: str) -> str | None:
    """The op whose folder (or module) a file is in."""
    if not file.startswith(FOLDER):
        return None
    first = Path(file).relative_to(FOLDER).parts[0]
    return first.removesuffix(".py")


def _waits(name: str) -> bool:
    return "acquire" in name or "wait" in name
