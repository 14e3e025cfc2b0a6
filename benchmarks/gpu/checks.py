"""Is it right? Each op in the working dtype against float64, within three times plain torch's own error."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.case import Case, results, widened
from benchmarks.gpu.cases import cases
from benchmarks.gpu.store import ROOT

FACTOR = 3.0  # DESIGN.md section 5
SUITE_SECONDS = 240


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


class Oracle:
    """An op's results in float64, and how far plain torch is from them in the working dtype: once for many checks."""

    def __init__(self, case: Case) -> None:
        self._case, self._exact = case, results(case, widened(case.inputs), "reference")
        plain = results(case, case.inputs, "reference")
        self._plain = [error(p, e) for p, e in zip(plain, self._exact, strict=True)]

    def check(self, face: str | None) -> dict[str, Any]:
        """The op's largest error relative to float64, and plain torch's in the same dtype."""
        found = results(self._case, self._case.inputs, face)
        ours = [error(f, e) for f, e in zip(found, self._exact, strict=True)]
        # An ulp where plain torch happens to be exact.
        floor = 2.0**-9 if found[0].dtype.itemsize == 2 else 1e-6
        right = all(own <= FACTOR * max(theirs, floor) for own, theirs in zip(ours, self._plain, strict=True))
        return {"right": bool(right), "error": max(ours), "plain_torch_error": max(self._plain)}  # NaN is wrong


def correctness(bench: Bench, model: str) -> dict[str, Any]:
    return {case.name: Oracle(case).check(bench.face) for case in cases(bench, model)}


def suite(bench: Bench) -> dict[str, Any]:
    """The kernels' own tests, on this device. A dry run runs one of them."""
    which = ["tests/kernels/test_swiglu.py"] if bench.dry else ["tests/kernels"]
    # A warning, of a version that we do not know, is no error here.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-k", "triton", *which]
    if find_spec("xdist") is not None and not bench.dry:
        command += ["-n", "8"]  # most of the time goes into compiling, a kernel for each odd size
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False, timeout=SUITE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"right": None, "last_lines": [f"not through after {SUITE_SECONDS} s"]}
    tail = (done.stdout + done.stderr).strip().splitlines()[-12:]
    return {"right": done.returncode == 0, "last_lines": tail}
