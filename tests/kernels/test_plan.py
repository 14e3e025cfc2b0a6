"""The table that says which library multiplies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from check import normal

from mint_engine.kernels import bordered_linear, bordered_linear_backward, op, plan
from mint_engine.kernels.gemm import mm

ROW = {"isa": "avx2", "vendor": "AuthenticAMD", "amx": False, "dtype": "float32", "use": "ours"}


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "x86.json"
    path.write_text(json.dumps(rows))
    return path


def test_the_plans_that_ship_are_valid() -> None:
    paths = [path for path in plan.PLANS.glob("*.json") if not path.stem.startswith("sm_")]  # those are gpu_plan's
    assert paths
    assert all(plan.read(path) for path in paths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use": "cublas"}, r"use: expected one of \['ours', 'torch'\], got 'cublas' \(row 1 of x86.json\)"),
        ({"dtype": "float16"}, r"dtype: expected one of .*, got 'float16'"),
        ({"amx": "no"}, r"amx: expected a bool, got 'no'"),
        ({"rows": 8}, r"row: expected the fields .*, got"),
        ({"vendor": "AuthenticAMD"}, r"row: expected one for each machine and dtype"),
    ],
)
def test_a_row_that_says_something_else_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.read(write(tmp_path, ROW, {**ROW, **change}))


def test_a_row_decides_for_its_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ROW)
    monkeypatch.setattr(plan, "PLANS", tmp_path)
    monkeypatch.setattr(plan.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(plan, "_cpu", lambda: ("AuthenticAMD", False))
    choose = plan._ours.__wrapped__  # without the cache
    assert choose("avx2", torch.float32)
    assert not choose("avx2", torch.bfloat16)
    assert not choose("scalar", torch.float32)
    monkeypatch.setattr(plan, "_cpu", lambda: ("GenuineIntel", True))
    assert not choose("avx2", torch.float32)


@pytest.mark.parametrize("choice", [True, False])
def test_the_cpu_face_follows_the_plan(choice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ours", lambda dtype: choice)
    x, weight, dy = normal(30, 700, seed=1), normal(90, 700, seed=2), normal(30, 90, seed=3)
    product = mm if choice else torch.mm
    assert torch.equal(bordered_linear(x, weight, face="cpu"), product(x, weight.T))
    assert torch.equal(bordered_linear_backward(dy, weight, face="cpu"), product(dy, weight))
    if op.native.isa() != "scalar":  # the two differ, or the test would show nothing
        assert not torch.equal(mm(x, weight.T), torch.mm(x, weight.T))
