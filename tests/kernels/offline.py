"""Compiles every Triton kernel for GPUs that are not here, and says what each costs.

    python tests/kernels/offline.py [--arch 80 90 100] [--only WORD] [--write]

Runs the public ops on ``meta`` tensors of real models' shapes, with a driver that knows an architecture but has no
device: what is compiled is exactly what would be launched, with the same specialisations. Registers, stack (where
spills go) and tensor-core instructions are read from the machine code by the tools that come with Triton.
``--write`` records them in resources.json, under the version of Triton; ``test_resources.py`` is the gate.

It must be a process of its own: in one where the interpreter is on (the tests'), nothing compiles.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from offline_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mint_engine.kernels import triton_common

RESOURCES = Path(__file__).with_name("resources.json")
ARCHES = (80, 90, 100)
# Tensor-core instructions of each architecture in its machine code.
# Tiles of fewer than 64 rows and columns have HMMA everywhere.
MATRIX = {80: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NoDevice:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are cached by device: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Any]]:
    """Inside, launches only compile, for ``arch``. Yields the growing list of (function, compiled kernel)."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append((self, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(NoDevice(arch))
    JITFunction.run = compile_only
    triton_common.DEVICES.add("meta")
    try:
        yield compiled
    finally:
        JITFunction.run = run
        triton_common.DEVICES.discard("meta")


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def resources(kernel: Any, arch: int) -> dict[str, int]:
    """Registers and stack bytes of a thread, shared bytes of a program, its products, its tensor-core instructions.

    Only what has products is disassembled: the tool takes a third of a second to start.
    """
    dots = kernel.asm["ttir"].count("tt.dot ")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code = tool("nvdisasm", "-c", "-ndf", file.name) if dots else ""
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "dots": dots,
        "matrix": len(re.findall(MATRIX[arch], code)),
        "hmma": len(re.findall(MATRIX[80], code)),
        "tma": len(re.findall(r"\bUTMA\w+", code)),
    }


def measure(arch: int, only: str = "") -> dict[str, dict[str, int]]:
    """Case and kernel -> resources, for every case whose name contains ``only``."""
    out: dict[str, dict[str, int]] = {}
    for name, run in CASES.items():
        if only not in name:
            continue
        with compiling_for(arch) as compiled:
            run()
        assert compiled, f"{name} launches no kernel"
        seen: dict[str, list[str]] = {}
        for function, kernel in compiled:
            label = f"{name}: {function.__name__.lstrip('_')}"
            variants = seen.setdefault(label, [])
            if kernel.hash not in variants:
                variants.append(kernel.hash)
                out[label if len(variants) == 1 else f"{label} {len(variants)}"] = resources(kernel, arch)
    return out


def write(result: dict[str, dict[str, dict[str, int]]], partial: bool) -> None:
    """Record ``result`` under this version of Triton, a line for each kernel."""
    recorded = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
    mine = recorded.setdefault(triton.__version__, {})
    for arch, kernels in result.items():
        mine[arch] = {**mine.get(arch, {}), **kernels} if partial else kernels
    text = json.dumps(recorded, indent=1, sort_keys=True)
    RESOURCES.write_text(re.sub(r"\{\s+([^{}]+?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHES)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    result = {f"sm_{arch}": measure(arch, options.only) for arch in options.arch}
    if options.write:
        write(result, partial=bool(options.only))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
