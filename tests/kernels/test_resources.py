"""What the Triton kernels cost on GPUs that are not here: recorded, and some compiled anew by the slow tests."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from check import TRITON

HERE = Path(__file__).parent
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # bytes a program may have
OLD = "3.6.0"
# Too few rows a tile for the instructions of a whole warp group: those of a warp (HMMA) do.
FEW_ROWS = {
    "bordered_by_tile of few rows: matmul",
    "bordered_by_tile of few rows: two_loops",
    "logits 16 rows: matmul",
    *(f"paged_attention {d}: split" for d in (64, 128, 256)),
    "sample_head: sums",
    "sample_head: pick",
    *(f"norm, swiglu with S of {r}: {op}_shrink" for r in (16, 48, 256) for op in ("norm", "swiglu")),
}
BY_TMA = (
    "bordered_by_tile: persistent",
    "bordered_by_tile of few rows: two_loops",
    "bordered_by_tile of 16: two_loops",
    "target_logprob: tile",
    "target_logprob with gradient: tile",
)
Resources = dict[str, dict[str, Any]]  # case and kernel -> resources


def gate(arch: str, kernels: Resources) -> list[str]:
    """What is wrong: registers spilled to the stack, products off the tensor cores, too much shared memory."""
    faults = []
    for name, r in kernels.items():
        if r["stack"]:
            faults.append(f"{arch} {name}: spills {r['stack']} bytes a thread")
        if r["dots"] and not (r["matrix"] or (name in FEW_ROWS and r["hmma"])):
            faults.append(f"{arch} {name}: {r['dots']} products without the tensor-core instruction of {arch}")
        if arch != "sm_80" and name in BY_TMA and not r["tma"]:
            faults.append(f"{arch} {name}: loads no tile by TMA")
        if r["shared"] > SHARED[arch]:
            faults.append(f"{arch} {name}: {r['shared']} bytes of shared memory, {SHARED[arch]} are there")
    return faults


def recorded() -> dict[str, dict[str, Resources]]:
    """Version of Triton -> architecture -> kernels."""
    return json.loads((HERE / "resources.json").read_text())


def costs(kernels: Resources) -> Resources:
    """Without what says of which source they are: a comment changes that, too."""
    return {name: {key: value for key, value in r.items() if key != "source"} for name, r in kernels.items()}


def test_nothing_recorded_spills_or_leaves_the_tensor_cores() -> None:
    for arches in recorded().values():
        assert set(arches) == set(SHARED)
        for arch, kernels in arches.items():
            assert gate(arch, kernels) == []


def test_the_gate_sees_each_fault() -> None:
    good = {"registers": 64, "stack": 0, "shared": 1024, "warps": 4, "dots": 1, "matrix": 4, "hmma": 4, "tma": 0}
    for fault in ({"stack": 8}, {"matrix": 0}, {"shared": 200 << 10}):
        assert len(gate("sm_80", {"k": {**good, **fault}})) == 1
    assert gate("sm_80", {BY_TMA[0]: good}) == []
    assert len(gate("sm_90", {BY_TMA[0]: good})) == 1


def compiled(arch: str, tmp_path: Path, *options: str, **environment: str) -> Resources:
    """What offline.py measures for ``arch``, in a process without the interpreter and with an empty cache."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "offline.py"), "--arch", arch.removeprefix("sm_"), *options]
    environment = {**inherited, "TRITON_CACHE_DIR": str(tmp_path / "cache"), **environment}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[arch]


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="triton is not installed")
@pytest.mark.parametrize("arch", SHARED)
def test_every_kernel_compiles_to_what_is_recorded(arch: str, tmp_path: Path) -> None:
    """Those that something has changed for; of Hopper's others one in four, which depends on their source.

    After a change that is meant: python tests/kernels/offline.py --write, and look at the diff.
    """
    version = importlib.metadata.version("triton")
    mine = recorded()[version][arch]
    known = {name: r for name, r in mine.items() if arch != "sm_90" or int(r["source"], 16) % 4}
    (tmp_path / "record.json").write_text(json.dumps({version: {arch: known}}))
    kernels = compiled(arch, tmp_path, "--reuse", "--record", str(tmp_path / "record.json"))
    assert gate(arch, kernels) == []
    assert costs(kernels) == costs(mine)


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_what_has_changed_is_compiled_though_the_rest_is_taken_from_the_record(tmp_path: Path) -> None:
    """The record of one kernel is wrong, of the other it is of another source."""
    arch, names = "sm_90", ("adamw: step", "embedding: gather")
    mine = recorded()[importlib.metadata.version("triton")][arch]
    kept, changed = ({**mine[name], "registers": 7} for name in names)
    record = {
        importlib.metadata.version("triton"): {arch: dict(zip(names, (kept, {**changed, "source": "?"}), strict=True))}
    }
    (tmp_path / "record.json").write_text(json.dumps(record))
    for name, registers in zip(names, (7, mine[names[1]]["registers"]), strict=True):
        options = "--reuse", "--only", name.split(":")[0], "--record", str(tmp_path / "record.json")
        assert compiled(arch, tmp_path, *options)[name]["registers"] == registers


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_the_triton_beside_torch_2_11_compiles_every_kernel_too(tmp_path: Path) -> None:
    """Some kernels crash that version's compiler only. It is installed into a folder of this test's own."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "old")]
    subprocess.run([*install, f"triton=={OLD}"], check=True)
    kernels = compiled("sm_90", tmp_path, "--reuse", PYTHONPATH=str(tmp_path / "old"))
    assert gate("sm_90", kernels) == []
    assert costs(kernels) == costs(recorded()[OLD]["sm_90"])
