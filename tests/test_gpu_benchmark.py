"""benchmarks.gpu without a GPU: resuming, the budget, what a dry run may write; and a dry run of all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts as all_parts
from benchmarks.gpu import steps
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import Part
from benchmarks.gpu.store import RESULTS, Store
from benchmarks.gpu.verdicts import verdicts

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: measure"),
]
Use = Callable[[list[Part]], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Have the command do these parts instead of its own."""
    return lambda found: monkeypatch.setattr(all_parts, "parts", lambda **_: found)


def part(name: str, done: list[str], seconds: float = 0.0, **result: Any) -> Part:
    def run(bench: Any, deadline: float) -> dict[str, Any]:
        done.append(name)
        if "error" in result:
            raise RuntimeError(result["error"])
        return result

    return Part(name, seconds, run)


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The last line printed."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return found


def test_a_second_call_does_what_is_missing(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    use([part("a", done, rows=3), part("b", done, error="boom"), part("c", done, rows=4)])
    assert command.main(["--out", str(tmp_path), "--dry-run"]) == 1
    assert done == ["a", "b", "c"]
    first = document(capsys)
    assert first["parts"]["b"]["failed"] == "RuntimeError: boom"
    use([part("a", done, rows=3), part("b", done, rows=5), part("c", done, rows=4)])
    assert command.main(["--out", str(tmp_path), "--dry-run"]) == 0
    assert done == ["a", "b", "c", "b"]
    second = document(capsys)
    assert {name: rows["rows"] for name, rows in second["parts"].items()} == {"a": 3, "b": 5, "c": 4}
    assert json.loads((tmp_path / "gpu.json").read_text()) == second


def test_other_sources_or_another_device_are_measured_anew(tmp_path: Path) -> None:
    mine = {"sources": "1", "device": "one", "dry_run": False}
    Store(tmp_path, mine).write("a", {"ms": 1.5})
    assert Store(tmp_path, mine).read("a") == {"ms": 1.5}
    assert Store(tmp_path, {**mine, "sources": "2"}).read("a") is None
    (tmp_path / "part-a.json").write_text("{cut off")
    assert Store(tmp_path, mine).read("a") is None


def test_no_part_is_begun_after_the_budget(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    use([part("a", done), part("b", done)])
    assert command.main(["--out", str(tmp_path), "--dry-run", "--budget", "0"]) == 0
    assert done == []
    assert "call again" in document(capsys)["parts"]["b"]["not_measured"]


def test_only_some_parts(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    use([part("peaks", done), part("a", done), part("b", done)])
    assert command.main(["--out", str(tmp_path), "--dry-run", "--only", "b"]) == 0
    assert done == ["peaks", "b"]
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "--dry-run", "--only", "nothing"])
    assert "no part nothing; there are peaks, a, b" in capsys.readouterr().err


def test_a_dry_run_leaves_no_number_and_nothing_among_the_results(
    use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use([part("a", [], ms=1.5, rows=[{"gbs": 2.0, "n": 3}], right=True)])
    assert command.main(["--out", str(tmp_path), "--dry-run"]) == 0
    found = document(capsys)
    assert found["note"].startswith("dry run")
    assert found["parts"]["a"] == {"ms": None, "rows": [{"gbs": None, "n": 3}], "right": True}
    assert "1.5" not in (tmp_path / "part-a.json").read_text()
    assert (tmp_path / "gpu.txt").read_text().startswith("*** dry run")
    with pytest.raises(SystemExit):
        command.main(["--out", str(RESULTS / "h200"), "--dry-run"])
    assert not (RESULTS / "h200").exists()


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path)])
    assert "no GPU that torch can use; --dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--dry-run"]) == 0, capsys.readouterr().out
    found = document(capsys)
    measured = {name: rows for name, rows in found["parts"].items() if "not_measured" not in rows}
    assert set(measured) == {p.name for p in all_parts.parts(dry=True, arch=90)}
    assert all(op["right"] for part in ("correctness", "agreement") for op in measured[part].values())
    assert set(measured["decode-tiny"]["batch 64"]) >= {"base", "adapter", "eight adapters"}
    assert measured["suite"]["right"], measured["suite"]["last_lines"]
    tuned = {name.split()[0] for name, row in measured["tuning"].items() if isinstance(row, dict) and "best" in row}
    wanted = {"target_logprob.tile", "target_logprob.rebuild", "embedding.gather", "adamw.places"}
    assert wanted | {"bordered_linear.wide"} <= tuned  # by tile, as float32 is multiplied
    assert found["targets"]
    assert all(row["met"] is None for row in found["targets"].values()), "nothing was measured"


def test_targets_are_met_missed_or_not_measured() -> None:
    def step(ms: float | None, gib: float) -> dict[str, Any]:
        return {"ms": ms, "tokens_per_s": None if ms is None else 8e6 / ms, "peak_gib": gib}

    parts = {
        "step-4b-peft": {"tokens": 8000, "ours": step(280.0, 30.0), "peft": step(900.0, 40.0)},
        "step-4b-liger": {"tokens": 8000, "ours": step(280.0, 30.0), "liger": {"absent": "not installed"}},
        "step-8b-peft": {"not_measured": "the budget was spent"},
        "step-256": {"ours": step(None, 1.0)},
        "ops": {
            "SwiGLU": {"bound": "memory", "of_floor": 0.79},
            "attention": {"bound": "arithmetic", "of_floor": 0.1},
        },
        "loss": {"ms": 3.0, "over_floor": 1.35, "peers_ms": {"Liger": 2.0}},
        "products": {"qkv": {"ratio": 1.05, "backward_ratio": 1.07}},
        "adapters": {"failed": "RuntimeError: boom"},
        "decode-8b": {"batch 1": {"of_floor": 0.5, "adapter_speed": 0.94}},
    }
    found = verdicts(parts)
    assert {what: row["met"] for what, row in found.items()} == {
        "4b: tokens/s, at first": True, "4b: tokens/s, then": False, "4b: speed over peft": True,
        "4b: memory of peft's": False, "4b: speed over liger": None, "4b: memory of liger's": None,
        "256 tokens: ms": None, "SwiGLU: of copy bandwidth": False, "loss: over the floor of two products": True,
        "loss: time of Liger's": False, "qkv: bordered over bare": True, "qkv: bordered over bare, backward": False,
        "8b: decode, batch 1, of the floor, at first": True, "8b: decode, batch 1, of the floor, then": False,
        "8b: decode, batch 1, with an adapter": False,
    }  # fmt: skip
    assert found["4b: speed over peft"] == {"value": 900.0 / 280.0, "target": "at least 3", "met": True}


def test_steps_that_do_not_fit_together_are_measured_with_half_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(bench: Bench, model: str, tokens: int, contenders: dict[str, Any]) -> dict[str, Any]:
        asked.append((tokens, sorted(contenders), [make.args[2] for make in contenders.values()]))
        if tokens > 32:
            raise torch.OutOfMemoryError("too much")
        return {name: {} for name in contenders}

    monkeypatch.setattr(steps, "measured", measured)
    bench = Bench(torch.device("cpu"), torch.float32, True, rows=32, rounds=1)
    steps.versus(bench, "tiny")
    assert asked == [(n, ["ours", "peft"], [n, n]) for n in (64, 32)]
