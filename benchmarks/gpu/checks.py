"""Is it right? Each op in the working dtype against float64, within three times plain torch's own error."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.case import Case, widened
from benchmarks.gpu.cases import cases
from benchmarks.gpu.store import ROOT

FACTOR = 3.0  # DESIGN.md section 5


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def check(bench: Bench, case: Case) -> dict[str, Any]:
    """The op's largest error relative to float64, and plain torch's in the same dtype."""
    exact = case.run(widened(case.inputs), "reference")
    plain = case.run(case.inputs, "reference")
    found = case.run(case.inputs, bench.face)
    pairs = [(error(f, e), error(p, e)) for f, p, e in zip(found, plain, exact, strict=True)]
    # An ulp where plain torch happens to be exact.
    floor = 2.0**-9 if found[0].dtype.itemsize == 2 else 1e-6
    right = all(ours <= FACTOR * max(theirs, floor) for ours, theirs in pairs)  # NaN is wrong
    return {"right": bool(right), "error": max(p[0] for p in pairs), "plain_torch_error": max(p[1] for p in pairs)}


def correctness(bench: Bench, model: str) -> dict[str, Any]:
    return {case.name: check(bench, case) for case in cases(bench, model)}


def suite(bench: Bench) -> dict[str, Any]:
    """The kernels' own tests, on this device. A dry run runs one of them."""
    which = ["tests/kernels/test_swiglu.py"] if bench.dry else ["tests/kernels"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *which]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False, timeout=240
    )
    tail = done.stdout.strip().splitlines()[-12:]
    return {"right": done.returncode == 0, "last_lines": tail}
