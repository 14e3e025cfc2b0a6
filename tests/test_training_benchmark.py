"""The benchmark of the training step compares like with like, and prints nothing when its gate is closed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import kernel_cases as small
from benchmarks import report
from benchmarks.training import __main__ as command
from benchmarks.training import measure, render
from benchmarks.training.contenders import ALL, FINEST, KINDS
from benchmarks.training.gate import EXACT, ROUNDING, GateClosedError, Result, budget, check, error
from benchmarks.training.targets import Target, targets
from benchmarks.training.workloads import Workload, tiny

FP32 = {"ours float32", "PEFT float32", "PEFT float32, packed"}
GRADS = {"a": torch.ones(2, 3), "b": torch.full((4,), 2.0)}


@pytest.fixture
def work(tiny_tied: Path) -> Workload:
    return tiny(tiny_tied, 199)


def test_all_contenders_train_the_same(work: Workload) -> None:
    """Padded, packed, autocast or ours: the same loss and the same gradients, under the same names."""
    results = {}
    for name, kind in KINDS.items():
        if not kind.compiled:
            contender = kind.make(work)
            results[name] = Result(*contender.gradients())
            contender.step()
    exact, rounded = results["PEFT float32"], results["PEFT all bf16"]
    assert all(tensor.any() for tensor in exact.grads.values())
    for name, got in results.items():
        if name not in ("PEFT all bf16", "PEFT all bf16, packed", "PEFT bf16 autocast"):
            check(name, got, exact, budget(KINDS[name].dtype, rounded, exact))


@pytest.mark.parametrize(
    "wrong",
    [
        Result(1.0 + 2 * EXACT, GRADS),
        Result(math.nan, GRADS),
        Result(1.0, {**GRADS, "a": torch.zeros(2, 3)}),
        Result(1.0, {**GRADS, "b": torch.tensor([2.0, 2.0, 2.0, math.inf])}),
        Result(1.0, {**GRADS, "b": torch.full((2, 2), 2.0)}),
        Result(1.0, {"a": GRADS["a"]}),
    ],
)
def test_the_gate_closes_on_other_numbers(wrong: Result) -> None:
    exact = Result(1.0, GRADS)
    check("ours", exact, exact, budget("float32", None, exact))
    with pytest.raises(GateClosedError, match="ours: "):
        check("ours", wrong, exact, budget("float32", None, exact))


def test_bf16_is_measured_by_the_peer_in_bf16() -> None:
    exact, rounded = Result(1.0, GRADS), Result(1.01, {name: tensor * 1.01 for name, tensor in GRADS.items()})
    allowed = budget("bfloat16", rounded, exact)
    assert allowed == pytest.approx([2 * e for e in error(rounded, exact)])
    with pytest.raises(GateClosedError, match="no result of PEFT in bf16"):
        budget("bfloat16", None, exact)


def test_in_float64_the_roundings_of_the_peer_can_be_seen(work: Workload) -> None:
    """Sequence by sequence, and with a loss that is not rounded to float32: the same up to what float32 rounds."""
    finest = Result(*ALL[FINEST].make(work).gradients())
    assert {tensor.dtype for tensor in finest.grads.values()} == {torch.float64}
    for name in ("PEFT float32", "ours float32"):
        of_loss, of_grads = error(Result(*KINDS[name].make(work).gradients()), finest)
        assert 0 < of_loss < 1e-6
        assert 1e-8 < of_grads < 1e-5


class FakeProcess:
    """A contender that answers with a loss and two gradients, times ``scale``; or dies."""

    def __init__(self, loss: float | None, scale: float = 1.0) -> None:
        self.loss, self.scale, self.ended = loss, scale, False

    def ask(self, command: str, *arguments: Any) -> dict[str, Any]:
        if self.loss is None:
            raise measure.ContenderError("out of memory")
        assert command == "gradients", "nothing may be timed before the gate"
        save_file({name: tensor * self.scale for name, tensor in GRADS.items()}, arguments[0])
        return {"loss": self.loss}

    def end(self) -> None:
        self.ended = True


def not_needed() -> Result:
    raise AssertionError("float64 takes minutes")


@pytest.mark.parametrize(("theirs", "ours", "passes"), [(2.0, 5.0, True), (2.0, 7.0, False), (0.1, 1.4, False)])
def test_where_float32_is_too_coarse_float64_is_the_measure(theirs: float, ours: float, passes: bool) -> None:
    """Errors in units of EXACT, on opposite sides."""
    running: dict[str, Any] = {
        "ours float32": FakeProcess(1.0, 1 + ours * EXACT), "PEFT float32": FakeProcess(1.0, 1 - theirs * EXACT)
    }  # fmt: skip
    assert (ours <= max(1, ROUNDING * theirs)) == passes
    if passes:
        measure._gate(running, {}, lambda: Result(1.0, GRADS), {})
        return
    with pytest.raises(GateClosedError, match="ours float32: gradients differ from PEFT's in float64"):
        measure._gate(running, {}, lambda: Result(1.0, GRADS), {})


def test_a_peer_that_fails_or_differs_is_left_out() -> None:
    others: dict[str, Any] = {"PEFT float32, packed": FakeProcess(3.0), "PEFT bf16 autocast": FakeProcess(None)}
    running: dict[str, Any] = {"ours float32": FakeProcess(1.0), "PEFT float32": FakeProcess(1.0), **others}
    out: dict[str, str] = {}
    measure._gate(running, out, not_needed, {})
    assert list(running) == ["ours float32", "PEFT float32"]
    assert set(out) == set(others)
    assert all(process.ended for process in others.values())


def test_the_peer_in_bf16_may_be_of_an_earlier_group() -> None:
    known: dict[str, Result] = {}
    both: dict[str, Any] = {"PEFT float32": FakeProcess(1.0), "PEFT all bf16": FakeProcess(1.01)}
    measure._gate(both, {}, not_needed, known)
    running: dict[str, Any] = {"PEFT float32": FakeProcess(1.0), "PEFT bf16 autocast": FakeProcess(1.01)}
    out: dict[str, str] = {}
    measure._gate(running, out, not_needed, known)
    assert out == {}


class Clock:
    """A contender whose steps take as long as it says."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ask(self, command: str) -> dict[str, float]:
        return {"s": self.seconds, "cpu_s": self.seconds}


def test_who_takes_minutes_is_timed_once() -> None:
    running: dict[str, Any] = {"ours bf16": Clock(2.0), "PEFT float32": Clock(19.0), "PEFT all bf16": Clock(43.0)}
    said: list[str] = []
    rows = measure._time(running, 3, said.append)
    assert {name: len(row["seconds"]) for name, row in rows.items()} == {
        "ours bf16": 3, "PEFT float32": 3, "PEFT all bf16": 1,
    }  # fmt: skip
    assert said == ["PEFT all bf16: 43 s a step; timed once"]
    slow: dict[str, Any] = {"ours bf16": Clock(8.0), "PEFT float32": Clock(60.0)}
    assert len(measure._time(slow, 2, said.append)["PEFT float32"]["seconds"]) == 2, "not ten times as long"


@pytest.mark.parametrize("loss", [1.1, None])
def test_the_run_ends_without_a_number_when_ours_is_wrong(
    loss: float | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], work: Workload
) -> None:
    def fake(workload: str, contenders: list[str], rounds: int, threads: int, say: Any, known: Any) -> Any:
        running: Any = {"ours float32": FakeProcess(loss), "PEFT float32": FakeProcess(1.0)}
        measure._gate(running, {}, lambda: Result(1.0, GRADS), {})
        return {}, {}

    monkeypatch.setattr(command, "measure", fake)
    monkeypatch.setattr(command, "fma_peak", lambda dtype: 1e9)
    monkeypatch.setattr(command, "read_bandwidth", lambda: 1e9)
    monkeypatch.setitem(command.WORKLOADS, "demo", lambda: work)
    monkeypatch.setattr("sys.argv", ["training", "--only", "demo"])
    with pytest.raises(SystemExit, match="the gate is closed"):
        command.main()
    assert capsys.readouterr().out == ""


def test_targets_are_missed_and_met() -> None:
    rows = {
        "ours bf16": {"median_ms": 100.0, "peak_share": 0.7, "above_weights_mb": 300},
        "PEFT float32": {"median_ms": 700.0, "above_weights_mb": 1000},
        "PEFT all bf16": {"median_ms": 300.0},
        "PEFT bf16 autocast": {"median_ms": 250.0},
    }
    found = targets(
        {"workloads": {"long": {"contenders": rows}}, "clients": {"8 x 16": {"ratio": 0.4, "at_most": 0.5}}}
    )
    assert [(target.got, target.met) for target in found] == [
        (7.0, True), (2.5, False), (0.7, True), (0.3, False), (0.4, True),
    ]  # fmt: skip
    assert Target(**{k: v for k, v in found[0].document.items() if k != "met"}) == found[0]


def test_an_op_that_is_wrong_is_not_timed() -> None:
    """And one that is right passes, whatever its outputs."""
    for case in (small.norm(4), small.norm_backward(), small.swiglu(4), small.lora_gradients(), small.qk_norm_rope()):
        small.gate("right", case)
    right = small.swiglu_backward()

    def wrong(*inputs: torch.Tensor, face: str | None = None) -> list[torch.Tensor]:
        dgate_up, a = right.ours(*inputs, face=face)
        return [dgate_up if face == "reference" else dgate_up * 1.1, a]

    with pytest.raises(small.GateClosedError, match="wrong: output 0"):
        small.gate("wrong", replace(right, ours=wrong))


def test_who_is_in_two_groups_has_the_rounds_of_both() -> None:
    rows = {"PEFT float32": {"seconds": [1.0], "cpu_seconds": [2.0], "above": 5}}
    measure.merge(rows, {"PEFT float32": {"seconds": [3.0, 4.0], "cpu_seconds": [2.0, 2.0], "above": 7}})
    assert measure.median(rows["PEFT float32"]) == 3.0
    assert rows["PEFT float32"]["above"] == 7
    for group in (group for groups in command.GROUPS.values() for group in groups):
        assert "PEFT float32" in group, "the oracle"
        assert "PEFT all bf16" in group or "ours bf16" not in group, "what bf16 is measured by"


def test_the_report_goes_between_the_marks_and_onto_a_chart(work: Workload, tmp_path: Path) -> None:
    peaks = {"bfloat16": 2e12, "float32": 1e12, "read": 1e10}
    measured = {"seconds": [0.2, 0.1, 0.3], "cpu_seconds": [0.2, 0.2, 0.2], "weights": 1000, "above": 2_500_000}
    rows = {name: command.row(work, name, measured, peaks) for name in ("ours bf16", "PEFT float32")}
    assert rows["ours bf16"]["median_ms"] == 200.0
    assert rows["ours bf16"]["quartiles_ms"] == [150.0, 250.0]
    assert rows["PEFT float32"]["floor_ms"] >= rows["ours bf16"]["floor_ms"]
    workload = {"title": "tiny", "tokens": 50, "weighted": 14, "rounds": 3, "note": "few", "contenders": rows}
    document = {
        "benchmark": "training_short",
        "peaks": {"bfloat16": 2000.0, "float32": 1000.0, "read": 10.0}, "targets": [Target("x", 2.0, 1.0).document],
        "machine": {"cpu": "a CPU", "threads": 2, "torch": "2", "commit": "abc"},
        "workloads": {"demo": {**workload, "left_out": {"PEFT bf16": "it fell over"}}},
    }  # fmt: skip
    told = render.text(document)
    assert "PEFT bf16: not compared: it fell over" in told
    assert "met   x: 2.00, at least 1" in told
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(render.markdown(document), readme)
    assert "| tiny | ours bf16 | 200 | 250 |  | 2 |" in readme.read_text()
    assert "results/training_short.png" in readme.read_text()
    assert readme.read_text().startswith("before\n")
    assert "old" not in readme.read_text()
    report.chart(document, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000
    marks = (report.README.read_text().count(mark) for mark in (report.BEGIN, report.END))
    assert list(marks) == [1, 1]
