"""What there is to measure, the most important first: that is the order in which a budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import agreement, checks, decoding, ops, steps, tuning
from benchmarks.gpu import bench as ceilings
from benchmarks.gpu.bench import Bench


@dataclass(frozen=True)
class Part:
    """``seconds``: about how long it takes on a Hopper, a guess; ``run(bench, deadline)`` gives its results."""

    name: str
    seconds: float
    run: Callable[[Bench, float], dict[str, Any]]


def parts(*, dry: bool, arch: int) -> list[Part]:
    """All of them. A dry run does the same on a toy model."""
    middle = "tiny" if dry else "4b"
    models = ["tiny"] if dry else ["0.6b", "4b", "8b"]
    found = [
        Part("peaks", 5, lambda b, _: ceilings.peaks(b)),
        Part("correctness", 30, lambda b, _: checks.correctness(b, middle)),
        Part("agreement", 30, lambda b, _: agreement.agreement(b)),
    ]

    def step(model: str, peer: str) -> Part:
        """Ours and one peer in turns: Liger's kernels are patched into transformers for the rest of the process."""
        kind = {"liger": peer == "liger", "compiled": peer == "compiled"}
        seconds = 80 if peer == "compiled" else 45
        return Part(f"step-{model}-{peer}", seconds, lambda b, _: steps.versus(b, model, **kind))

    found += [step(model, "peft") for model in models]
    small = models[0]
    found += [
        Part("step-256", 15, lambda b, _: steps.small(b, small)),
        Part("ahead", 15, lambda b, _: steps.ahead(b, small)),
        Part("products", 10, lambda b, _: ops.products(b, middle)),
        Part("loss", 15, lambda b, _: ops.loss(b, middle)),
        Part("ops", 60, lambda b, _: ops.floors(b, middle)),
        Part("adapters", 40, lambda b, _: steps.sharing(b, small)),
        *(Part(f"decode-{model}", 20, lambda b, _, model=model: decoding.decode(b, model)) for model in models),  # type: ignore[misc]
        *(step(model, "compiled") for model in models[:1]),
        # After plain PEFT's.
        *(step(model, "liger") for model in models),
        Part("tuning", 120, lambda b, deadline: tuning.tune(b, middle, arch, min(deadline, time.monotonic() + 180))),
        Part("suite", 150, lambda b, _: checks.suite(b)),
    ]
    return found
