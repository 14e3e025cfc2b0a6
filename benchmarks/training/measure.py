"""One workload: the gate, then the contenders' steps interleaved, then memory and profile."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.training.contenders import FINEST, KINDS, ORACLE
from benchmarks.training.gate import GateClosedError, Result, budget, check, check_rounding
from benchmarks.training.processes import ContenderError, Process, processes

ROUNDED = "PEFT all bf16"
PROFILED = ("ours bf16", "ours float32")
PATIENCE, HOPELESS = 20.0, 10.0  # seconds a step; times the fastest

Rows = dict[str, dict[str, Any]]


def measure(
    workload: str, contenders: list[str], rounds: int, threads: int, say: Callable[[str], None],
    known: dict[str, Result],
) -> tuple[Rows, dict[str, str]]:  # fmt: skip
    """(by contender: seconds of each round, memory, profile; who was left out, and why).

    ``known``: what the gate has found in other groups of the workload; this group's results are added.

    Raises:
        GateClosedError: a contender of ours is wrong, or PEFT's float32 is not there to compare with.
    """
    with processes(workload, contenders, threads) as made:
        out = {name: reason for name, reason in made.items() if isinstance(reason, str)}
        running = {name: process for name, process in made.items() if isinstance(process, Process)}
        _gate(running, out, lambda: _finest(workload, threads), known)
        say(f"{workload}: {len(running)} contenders agree; timing")
        rows = _time(running, rounds, say)
        for name, process in running.items():
            rows[name].update(process.ask("memory"))
        for name in PROFILED:
            if name in running:
                rows[name].update(running[name].ask("profile", 1))
    return rows, out


def _time(running: dict[str, Process], rounds: int, say: Callable[[str], None]) -> Rows:
    """Seconds of each round. Who takes tens of seconds and ten times the fastest has one round: more would change no
    ratio that anybody looks at, and PEFT in bf16 on a CPU without bf16 instructions takes most of the time of all."""
    rows: Rows = {name: {"seconds": [], "cpu_seconds": []} for name in running}
    for turn in range(rounds):
        fastest = min((row["seconds"][0] for row in rows.values() if row["seconds"]), default=0.0)
        for name, process in running.items():
            if turn and rows[name]["seconds"][0] > max(PATIENCE, HOPELESS * fastest):
                if turn == 1:
                    say(f"{name}: {rows[name]['seconds'][0]:.0f} s a step; timed once")
                continue
            took = process.ask("step")
            rows[name]["seconds"].append(took["s"])
            rows[name]["cpu_seconds"].append(took["cpu_s"])
    return rows


def _gate(
    running: dict[str, Process], out: dict[str, str], finest: Callable[[], Result], known: dict[str, Result]
) -> None:
    """The first step of everybody, compared. A peer that fails or differs is left out; one of ours closes the gate.

    ``finest``: PEFT's result in float64, which takes a while; asked for where float32 differs from float32.
    """
    results: dict[str, Result] = {}
    for name, process in list(running.items()):
        try:
            results[name] = _result(process)
        except ContenderError as failed:
            _leave_out(name, str(failed), running, out)
    if ORACLE not in results:
        raise GateClosedError(f"{ORACLE} did not run: {out.get(ORACLE, 'it was not asked for')}")
    known |= results
    exact, rounded = results[ORACLE], known.get(ROUNDED)
    for name, got in results.items():
        if name not in (ORACLE, ROUNDED):
            try:
                check(name, got, exact, budget(KINDS[name].dtype, rounded, exact))
            except GateClosedError as closed:
                if KINDS[name].ours and KINDS[name].dtype == "float32":
                    check_rounding(name, got, exact, finest())
                    continue
                if KINDS[name].ours:
                    raise
                _leave_out(name, str(closed), running, out)


def _result(process: Process) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gradients.safetensors"
        loss = process.ask("gradients", path)["loss"]
        return Result(loss, load_file(path))


def _finest(workload: str, threads: int) -> Result:
    with processes(workload, [FINEST], threads) as made:
        process = made[FINEST]
        if isinstance(process, str):
            raise GateClosedError(process)
        return _result(process)


def _leave_out(name: str, reason: str, running: dict[str, Process], out: dict[str, str]) -> None:
    if KINDS[name].ours:
        raise GateClosedError(reason)
    out[name] = reason
    running.pop(name).end()


def merge(measured: Rows, rows: Rows) -> None:
    """Add another group's rounds; the higher peak of memory counts."""
    for name, row in rows.items():
        if name not in measured:
            measured[name] = row
            continue
        known = measured[name]
        known["seconds"] += row["seconds"]
        known["cpu_seconds"] += row["cpu_seconds"]
        known["above"] = max(known["above"], row["above"])


def median(row: dict[str, Any]) -> float:
    return statistics.median(row["seconds"])


def quartiles(row: dict[str, Any]) -> tuple[float, float]:
    values = row["seconds"]
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
