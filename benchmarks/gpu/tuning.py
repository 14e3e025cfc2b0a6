"""Tile rows of the Triton kernels (kernels/gpu_plan.py): every candidate timed, the fastest right one kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.case import Case
from benchmarks.gpu.cases import cases
from benchmarks.gpu.checks import Oracle
from mint_engine.kernels import gpu_plan

MOST = 24  # candidates of a kernel, evenly taken from all


def tune(bench: Bench, model: str, arch: int, deadline: float) -> dict[str, Any]:
    """For each kernel and case that the ops of ``model`` use: its row now, the best row found, and both times."""
    found: dict[str, Any] = {}
    for case in cases(bench, model):
        oracle: Oracle | None = None
        for kernel, width in _used(lambda case=case: case.run(case.inputs, bench.face)):  # type: ignore[misc]
            name = f"{kernel} {width}"
            if name in found:
                continue
            if time.monotonic() > deadline:
                return {**found, "stopped": "the budget was spent before all kernels were tuned"}
            oracle = oracle or Oracle(case)
            found[name] = _best(bench, case, oracle, kernel, width, arch)
    return found


def _used(run: Callable[[], Any]) -> list[tuple[str, int]]:
    """The (kernel, case) whose rows are asked for while ``run`` runs."""
    asked: dict[tuple[str, int], None] = {}
    original = gpu_plan.Tunable.row

    def row(self: gpu_plan.Tunable, arch: int, width: int = 0) -> gpu_plan.Row:
        asked[self.name, self.case(width)] = None
        return original(self, arch, width)

    gpu_plan.Tunable.row = row  # type: ignore[method-assign]
    try:
        run()
    finally:
        gpu_plan.Tunable.row = original  # type: ignore[method-assign]
    return list(asked)


def _best(bench: Bench, case: Case, oracle: Oracle, kernel: str, width: int, arch: int) -> dict[str, Any]:
    tunable = gpu_plan.tunables()[kernel]
    now = tunable.row(arch, width)
    rows = tunable.candidates(arch, width)
    rows = rows[:: max(1, -(-len(rows) // (2 if bench.dry else MOST)))]
    best, fastest, failed = now, bench.interleaved({"now": lambda: case.run(case.inputs, bench.face)}, 3)["now"], 0
    before = fastest
    for row in rows:
        if tunable.lacking(row, arch) is not None:
            failed += 1
            continue
        with gpu_plan.trial(kernel, width, row):
            try:
                right = oracle.check(bench.face)["right"]
                took = bench.interleaved({"row": lambda: case.run(case.inputs, bench.face)}, 3)["row"]
            except Exception:  # too many registers or too much shared memory for this chip: no candidate
                failed += 1
                continue
        if right and took < 0.98 * fastest:  # less is noise
            best, fastest = row, took
    if bench.write_plans and best != now:
        gpu_plan.write(arch, {(kernel, width): best})
    return {"op": case.name, "now": now, "best": best, "now_ms": before, "best_ms": fastest, "tried": len(rows),
            "failed": failed}  # fmt: skip
