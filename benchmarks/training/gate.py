"""Nothing is timed that is wrong: losses and gradients of our step against PEFT's in float32, before any number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1e-4  # float32, relative, as in "parity with PEFT to 1e-4"
FACTOR = 2.0  # bf16: our error at most so many times that of PEFT in bf16 (tests/test_bf16.py)
# float32, where PEFT's own roundings are as large as EXACT: so many times its error from float64. As in tests/kernels/
# check.py: two that round at the same places differ by the error of one, another order of summation by some more.
ROUNDING = 3.0


class GateClosedError(RuntimeError):
    """A contender computes something else: no speed-up is printed."""


@dataclass(frozen=True)
class Result:
    loss: float
    grads: Mapping[str, Tensor]


def error(got: Result, exact: Result) -> tuple[float, float]:
    """(of the loss, of all gradients together), relative, L2. Infinite for gradients of other names or shapes."""
    shapes = [{name: t.shape for name, t in r.grads.items()} for r in (got, exact)]
    if shapes[0] != shapes[1]:
        return float("inf"), float("inf")
    squares = [(torch.sum((got.grads[n].double() - t.double()) ** 2), torch.sum(t.double() ** 2))
               for n, t in exact.grads.items()]  # fmt: skip
    of_grads = float(sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5
    return abs(got.loss - exact.loss) / abs(exact.loss), of_grads


def check(name: str, got: Result, exact: Result, budget: tuple[float, float]) -> None:
    """Raises GateClosedError where an error (loss, gradients) is above the budget, or not a number."""
    for what, found, most in zip(("loss", "gradients"), error(got, exact), budget, strict=True):
        if not found <= most:
            raise GateClosedError(f"{name}: {what} differ from PEFT's in float32 by {found:.2e}, allowed {most:.2e}")


def check_rounding(name: str, got: Result, rounded: Result, finest: Result) -> None:
    """What :func:`check` does, against PEFT in float64, for a batch on which float32 cannot be EXACT.

    On some sequences (of random tokens, mostly) roundings grow a thousandfold, PEFT's as ours. ``rounded``: PEFT's
    result in float32.
    """
    for what, found, theirs in zip(("loss", "gradients"), error(got, finest), error(rounded, finest), strict=True):
        if not found <= max(EXACT, ROUNDING * theirs):
            raise GateClosedError(
                f"{name}: {what} differ from PEFT's in float64 by {found:.2e}, allowed {EXACT:.0e} or {ROUNDING:.0f} "
                f"times the {theirs:.2e} of PEFT in float32"
            )


def budget(dtype: str, rounded: Result | None, exact: Result) -> tuple[float, float]:
    """What a contender may be off. ``rounded``: PEFT's result with everything in bf16."""
    if dtype == "float32":
        return EXACT, EXACT
    if rounded is None:
        raise GateClosedError("bf16: there is no result of PEFT in bf16 to measure the error by")
    of_loss, of_grads = error(rounded, exact)
    # A batch's loss is one number, and PEFT's may be right by luck: on the demo's batch the mean of 95
    # log-probabilities is off by 0.3 to 0.45 % in bf16, ours as theirs. So it is allowed the dtype's eps, 0.8 %,.
    return max(FACTOR * of_loss, torch.finfo(torch.bfloat16).eps), FACTOR * of_grads
