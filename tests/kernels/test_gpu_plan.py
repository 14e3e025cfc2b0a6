"""Tiles of the Triton kernels: every kernel has a row on every architecture, and rows that are wrong are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from check import TRITON

from mint_engine.kernels import gpu_plan

if TRITON:
    from mint_engine.kernels.triton_common import planned_for

pytestmark = pytest.mark.skipif(not TRITON, reason="triton is not installed")


@pytest.mark.parametrize("arch", gpu_plan.SHARED)
def test_every_kernel_and_case_has_a_row_that_may_be_tried(arch: int) -> None:
    known = gpu_plan.tunables()
    rows = gpu_plan.read(gpu_plan.PLANS / f"sm_{arch}.json")
    assert set(rows) == {(t.name, case) for t in known.values() if t.oldest <= arch for case in t.cases}
    for (name, case), row in rows.items():
        candidates = known[name].candidates(arch, case)
        assert row in candidates, f"{name} {case}: {row} does not fit"
        assert 1 <= len(candidates) <= 1000


def test_a_newer_gpu_uses_the_nearest_older_plan() -> None:
    tile = gpu_plan.tunables()["target_logprob.tile"]
    assert tile.row(103) == tile.row(100)
    assert tile.row(89) == tile.row(80)
    assert [planned_for(c) for c in (80, 90, 103, 120)] == [80, 90, 103, 80]
    with pytest.raises(ValueError, match=r"arch: expected compute capability 8.0 or newer, got 7.5"):
        tile.row(75)


def test_a_width_takes_the_next_case() -> None:
    forward = gpu_plan.tunables()["attention.forward"]
    assert [forward.case(width) for width in (16, 64, 65, 128, 256, 500)] == [64, 64, 128, 128, 256, 256]


def test_a_trial_holds_inside_only() -> None:
    merge = gpu_plan.tunables()["target_logprob.merge"]
    before, other = merge.row(90), {"ROWS": 8, "TILES": 32, "warps": 2, "stages": 1}
    with gpu_plan.trial(merge.name, 0, other):
        assert merge.meta(90) == {"ROWS": 8, "TILES": 32, "num_warps": 2, "num_stages": 1, **gpu_plan.FUSED}
    assert merge.row(90) == before != other
    with (
        pytest.raises(ValueError, match=r"ROWS: expected one of \[4, 8, 16, 32\], got 5 \(target_logprob.merge on"),
        gpu_plan.trial(merge.name, 0, {**other, "ROWS": 5}),
    ):
        pass


def test_rows_are_written_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan, "PLANS", tmp_path)
    row = {"ROWS": 8, "TILES": 32, "warps": 2, "stages": 1}
    gpu_plan.write(90, {("target_logprob.merge", 0): row})
    gpu_plan.write(90, {("adamw.places", 0): {"warps": 8, "stages": 1}})
    assert gpu_plan.read(tmp_path / "sm_90.json") == {
        ("adamw.places", 0): {"warps": 8, "stages": 1}, ("target_logprob.merge", 0): row,
    }  # fmt: skip
    assert gpu_plan.tunables()["target_logprob.merge"].row(90) == row
    gpu_plan._rows.cache_clear()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"case": 0}, "row: expected a field 'kernel'"),
        ({"kernel": "adamw.places", "case": 0, "warps": 4}, r"row: expected the parameters \['warps', 'stages'\]"),
        ({"kernel": "adamw.places", "case": 0, "warps": 3, "stages": 1}, r"warps: expected one of \[4, 8\], got 3"),
        ({"kernel": "adamw.places", "case": 1, "warps": 4, "stages": 1}, r"case: expected one of \[0\], got 1"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, fields: dict, message: str) -> None:
    gpu_plan.tunables()
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps([fields]))
    with pytest.raises(ValueError, match=message + ".*row 0 of sm_90.json"):
        gpu_plan.read(path)


def test_two_rows_for_one_kernel_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps([{"kernel": "adamw.places", "case": 0, "warps": 4, "stages": 1}] * 2))
    with pytest.raises(ValueError, match=r"row: expected one for each kernel and case, got .* \(row 1"):
        gpu_plan.read(path)
