"""Compiles every Triton kernel for GPUs that are not here, and says what each costs.

    python tests/kernels/offline.py [--arch 80 90 100] [--only WORD] [--reuse] [--write] [--record FILE]

Runs the public ops on ``meta`` tensors of real models' shapes, with a driver that knows an architecture but has no
device: what is compiled is exactly what would be launched, with the same specialisations. Registers, stack (where
spills go) and tensor-core instructions are read from the machine code by the tools that come with Triton.
``--write`` records them in resources.json, under the version of Triton; ``test_resources.py`` is the gate. ``--reuse``
takes from there what the same version has compiled of the same source with the same arguments.

It must be a process of its own: in one where the interpreter is on (the tests'), nothing compiles.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from offline_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mint_engine.kernels import triton_common

Resources = dict[str, int | str]

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


def fingerprint(arch: int, function: JITFunction, key: str) -> str:
    """Of all that a kernel is compiled from. ``key``: Triton's own, of the arguments' types, constants and options."""
    parts = triton.__version__, str(arch), function.cache_key, key  # cache_key: the source, with that of what it calls
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


_fingerprints: dict[str, str] = {}  # of compiled kernels, by Triton's hash: it keeps them, and compiles none twice


@contextmanager
def compiling_for(arch: int, known: Container[str] = ()) -> Iterator[list[tuple[JITFunction, str, Any]]]:
    """Inside, launches only compile, for ``arch``, and only what has none of the ``known`` fingerprints.

    Yields the growing list of (function, fingerprint, compiled kernel or None).
    """
    compiled: list[tuple[JITFunction, str, Any]] = []
    asked: list[str] = []
    run, hook = JITFunction.run, triton.knobs.runtime.jit_cache_hook

    def skip_known(*, key: str, fn: Any, **_: Any) -> bool:
        asked.append(fingerprint(arch, fn.jit_function, key))
        return asked[-1] in known

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        asked.clear()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel is not None and asked:
            _fingerprints[kernel.hash] = asked[-1]
        compiled.append((self, asked[-1] if asked else _fingerprints[kernel.hash], kernel))

    driver.set_active(NoDevice(arch))
    JITFunction.run = compile_only
    triton.knobs.runtime.jit_cache_hook = skip_known
    triton_common.DEVICES.add("meta")
    try:
        yield compiled
    finally:
        JITFunction.run = run
        triton.knobs.runtime.jit_cache_hook = hook
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


def measure(arch: int, only: str = "", known: Mapping[str, Resources] | None = None) -> dict[str, Resources]:
    """Case and kernel -> resources, for every case whose name contains ``only``; ``known`` ones are not compiled."""
    known, out = known or {}, {}
    for name, run in CASES.items():
        if only not in name:
            continue
        with compiling_for(arch, known) as compiled:
            run()
        assert compiled, f"{name} launches no kernel"
        seen: dict[str, list[str]] = {}
        for function, source, kernel in compiled:
            label = f"{name}: {function.__name__.lstrip('_')}"
            variants = seen.setdefault(label, [])
            if source not in variants:
                variants.append(source)
                found = known[source] if kernel is None else {**resources(kernel, arch), "source": source}
                out[label if len(variants) == 1 else f"{label} {len(variants)}"] = found
    return out


def read(record: Path) -> dict[str, dict[str, dict[str, Resources]]]:
    """What is recorded: version of Triton -> architecture -> case and kernel -> resources."""
    return json.loads(record.read_text()) if record.exists() else {}


def write(record: Path, result: dict[str, dict[str, Resources]], partial: bool) -> None:
    """Record ``result`` under this version of Triton, a line for each kernel."""
    recorded = read(record)
    mine = recorded.setdefault(triton.__version__, {})
    for arch, kernels in result.items():
        mine[arch] = {**mine.get(arch, {}), **kernels} if partial else kernels
    text = json.dumps(recorded, indent=1, sort_keys=True)
    record.write_text(re.sub(r"\{\s+([^{}]+?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHES)
    parser.add_argument("--only", default="")
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--record", type=Path, default=RESOURCES, help="instead of resources.json")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    recorded, result = read(options.record).get(triton.__version__, {}) if options.reuse else {}, {}
    for arch in options.arch:
        known = {str(found.get("source")): found for found in recorded.get(f"sm_{arch}", {}).values()}
        result[f"sm_{arch}"] = measure(arch, options.only, known)
    if options.write:
        write(options.record, result, partial=bool(options.only))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
